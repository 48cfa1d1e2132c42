"""Declaring settings: the field of one, how its text becomes a value, and checks that several have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar, cast

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import shorten

T = TypeVar("T")

# As a number of nearest normal images: every one of the bank.
ALL = "all"


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    kind: Callable[[str], Any] | None = None,
    formerly: str = "",
) -> Any:
    """Declare a field of a settings dataclass that has an option on the command line.

    Args:
        default: the default of the field and of the option; `dataclasses.MISSING` if the option has to be given.
        help: the help text of the option, without the default. That of a bool which is True says what `--no-NAME` does.
        choices: the values that are allowed, if they are few.
        metavar: the placeholder for the value in the help text.
        kind: what the command line converts the text with; the type of the field unless given.
        formerly: the name under which files hold it that were written before it had this one, see `from_mapping`.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "kind": kind, "formerly": formerly}
    return field(default=default, metadata=metadata)


def int_or_all(text: str) -> int | str:
    """Convert the text of a number of images; `all` stands for every image."""
    return text if text == ALL else int(text)


def one_or_more(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A conversion of text to one value, or to one for each level where commas separate several."""

    def convert(text: str) -> Any:
        values = tuple(map(kind, text.split(",")))
        return values[0] if len(values) == 1 else values

    convert.__name__ = kind.__name__  # argparse shows it
    return convert


def for_each(name: str, value: object, levels: int) -> tuple[Any, ...]:
    """The value of a setting for each of some levels: one value counts for all of them.

    Raises:
        InputError: if it has several values, but not one for each level.
    """
    values = value if isinstance(value, tuple) else (value,) * levels
    if len(values) != levels:
        raise InputError(f"{name}={values!r} has {len(values)} values for {levels} levels; give one for each, or one for all")
    return values


def changed(settings: T, changes: Mapping[str, Any]) -> T:
    """Settings with some of them changed; those whose values follow from others, see `Preprocess.derived`, follow anew."""
    kept = {each.name: getattr(settings, each.name) for each in fields(cast(Any, settings))}
    for name in getattr(settings, "derived", ()):
        del kept[name]
    return type(settings)(**{**kept, **changes})


def level_names(text: str) -> tuple[str, ...]:
    """Convert names of levels that are separated by commas."""
    return tuple(text.split(",")) if text else ()


def pixels(text: str) -> int | tuple[int, int]:
    """Convert the side of a square, or `HEIGHTxWIDTH`."""
    height, by, width = text.partition("x")
    return (int(height), int(width)) if by else int(text)


def several_pixels(text: str) -> tuple[int | tuple[int, int], ...]:
    """Convert what `pixels` converts, several of them separated by commas."""
    return tuple(map(pixels, text.split(","))) if text else ()


def numbers(text: str) -> tuple[int, ...]:
    """Convert numbers that are separated by commas."""
    return tuple(map(int, text.split(","))) if text else ()


def real_numbers(text: str) -> tuple[float, ...]:
    """Convert numbers that are separated by commas, which need not be whole."""
    return tuple(map(float, text.split(","))) if text else ()


def check_blocks(blocks: tuple[int, ...]) -> None:
    """Raise InputError unless a choice of blocks is of numbers from 0, in ascending order."""
    if not isinstance(blocks, tuple) or any(isinstance(block, bool) or not isinstance(block, int) for block in blocks):
        raise InputError(f"blocks={shorten(blocks)} must be a tuple of whole numbers, such as (3, 6, 9, 11)")
    if list(blocks) != sorted(set(blocks)) or min(blocks, default=0) < 0:
        raise InputError(f"blocks={shorten(blocks)} must name each block once, counted from 0 and in ascending order")


def check_indexed_levels(names: tuple[str, ...]) -> None:
    """Raise InputError if a choice of levels to index is empty in places, or names one twice."""
    if "" in [part for name in names for part in name.split("+")] or len(set(names)) < len(names):
        raise InputError(f"levels={names!r} must name each level once, such as ('blocks.2', 'blocks.2+blocks.4')")


def check_level_names(names: tuple[str, ...]) -> None:
    """Raise InputError if a choice of levels is empty in places, or names one twice."""
    parts = [part for name in names for part in name.split("+")]
    if not isinstance(names, tuple) or "" in parts or len(set(parts)) < len(parts):
        raise InputError(f"levels={names!r} must name each level once, such as ('blocks.1', 'blocks.2+blocks.4')")
