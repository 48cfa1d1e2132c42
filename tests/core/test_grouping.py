"""How groups of pictures are written down."""

from __future__ import annotations

import pytest

from spade_faiss import InputError
from spade_faiss.core.grouping import Grouping


@pytest.mark.parametrize("text", ["folder", r"regex=part_(\d+)", "regex=^(a)=(b)"])
def test_what_is_written_is_read(text: str) -> None:
    grouping, table = Grouping.parse(text)
    assert (str(grouping), table) == (text, "")


def test_a_table_is_named_by_its_path_which_is_not_kept() -> None:
    assert Grouping.parse("some/where/Groups.CSV") == (Grouping(by="table"), "some/where/Groups.CSV")
    assert str(Grouping(by="table")) == "table"


@pytest.mark.parametrize("text", ["", "folders", "regex", "regex=", r"regex=part_\d+", "regex=(", "groups.txt"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"group_by=|regex="):
        Grouping.parse(text)


@pytest.mark.parametrize(
    ("by", "pattern"), [("regex", ""), ("folder", "(a)"), ("table", "(a)"), ("parts", ""), ("regex", "(a)" * 1000)]
)
def test_a_manifest_cannot_say_what_no_bank_is_grouped_by(by: str, pattern: str) -> None:
    with pytest.raises(InputError):
        Grouping(by=by, pattern=pattern)
