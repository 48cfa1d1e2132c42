"""How normal pictures fall into groups, such as the shots of one part or the pictures of one product, and how it is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_choice, shorten

FOLDER, REGEX, TABLE, NONE = "folder", "regex", "table", "none"
_FORMS = "folder, regex=PATTERN, the path of a CSV, or none"
_LONGEST_PATTERN = 1000


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """What says to which group, or to which product, a picture belongs.

    Args:
        by: `folder`: the folder that it lies in, of products the first one of its id; `regex`: what a pattern finds in its id;
            `table`: a CSV that names the group of each picture, which is not part of a bank.
        pattern: the pattern of `regex`, with at least one group in parentheses: they say what pictures have in common.

    Raises:
        InputError: for anything else.
    """

    by: str
    pattern: str = ""

    def __post_init__(self) -> None:
        check_choice("by", self.by, (FOLDER, REGEX, TABLE))
        if (
            not isinstance(self.pattern, str)
            or len(self.pattern) > _LONGEST_PATTERN
            or bool(self.pattern) != (self.by == REGEX)
        ):
            raise InputError(
                f"pattern={shorten(self.pattern)} must be text of at most {_LONGEST_PATTERN} characters where pictures are "
                f"grouped by a pattern, and empty elsewhere"
            )

    @classmethod
    def parse(cls, text: str, name: str = "group_by") -> tuple[Grouping, str]:
        """Read `folder`, `regex=PATTERN` or the path of a CSV; returns the path as well, which is empty for the others.

        Args:
            text: what is read.
            name: the setting that it is the value of, for the message.

        Raises:
            InputError: for anything else, and for what is no pattern, or a pattern that marks nothing.
        """
        if text == FOLDER:
            return cls(by=FOLDER), ""
        kind, sign, pattern = text.partition("=")
        if sign and kind == REGEX:
            compile_pattern(pattern)
            return cls(by=REGEX, pattern=pattern), ""
        if text.lower().endswith(".csv"):
            return cls(by=TABLE), text
        raise InputError(f"{name}={shorten(text)} is none of {_FORMS}; write for example 'regex=part_(\\d+)'")

    def __str__(self) -> str:
        return f"{REGEX}={self.pattern}" if self.by == REGEX else self.by


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile the pattern of a `Grouping`.

    Raises:
        InputError: for what is no pattern, or a pattern that marks nothing.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"regex={shorten(pattern)} is no regular expression: {error}") from error
    if not compiled.groups:
        raise InputError(
            f"regex={shorten(pattern)} marks nothing; put what the pictures of a group have in common into parentheses, as in "
            f"regex=part_(\\d+)"
        )
    return compiled
