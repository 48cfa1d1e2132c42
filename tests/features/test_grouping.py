"""Which group each picture belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from spade_faiss import InputError, NotFoundError
from spade_faiss.core.grouping import Grouping
from spade_faiss.features.grouping import find_groups, read_groups

FOLDER, TABLE = Grouping(by="folder"), Grouping(by="table")
NAMES = ["a/1.png", "a/2.png", "b/c/1.png", "3.png"]


def test_no_grouping_finds_no_groups() -> None:
    assert find_groups(NAMES, None, None) == find_groups(NAMES, None, "none") == find_groups(NAMES, FOLDER, "none") == ()


@pytest.mark.parametrize("given", [None, "folder"])
def test_pictures_of_a_folder_belong_together_and_those_of_none_are_by_themselves(given: str | None) -> None:
    assert find_groups(NAMES, FOLDER, given) == ("a", "a", "b/c", "")


def test_a_pattern_finds_what_names_have_in_common() -> None:
    pattern = r"regex=(\w+)_exp\d_(\d+)"
    names = ["x/tile_exp1_07.png", "y/tile_exp2_07.png", "tile_exp1_08.png", "other.png"]
    assert find_groups(names, Grouping.parse(pattern)[0], pattern) == ("tile/07", "tile/07", "tile/08", "")


def test_a_table_names_the_group_of_each(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("﻿note,id,group\n,a/1.png,t\n,b/c/1.png,t\n,3.png,u\n", encoding="utf-8")
    assert find_groups(NAMES, TABLE, str(table)) == ("t", "", "t", "u")


def test_a_pattern_that_a_bank_brings_is_not_run() -> None:
    """It may be somebody else's, made to take forever."""
    with pytest.raises(InputError, match=r"groups its pictures by regex=\(a\+\)\+b; say how .* --group-by 'regex="):
        find_groups(["a" * 100], Grouping(by="regex", pattern="(a+)+b"), None)


@pytest.mark.parametrize(
    ("grouping", "given", "match"),
    [
        (None, "folder", "made without groups"),
        (FOLDER, "regex=(a)", r"by folder, asked for regex=\(a\)"),
        (TABLE, None, "--group-by FILE.csv"),
        (Grouping.parse("regex=(nothing)")[0], "regex=(nothing)", "no group for any of 4 pictures"),
    ],
)
def test_what_does_not_fit_the_bank_is_refused(grouping: Grouping | None, given: str | None, match: str) -> None:
    with pytest.raises(InputError, match=match):
        find_groups(NAMES, grouping, given)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"id,grp\n1,a\n", "no column 'group'"),
        (b"", "no column 'id'"),
        (b"id,group\n1,a\n1,b\n", "puts '1' into two groups, 'a' and 'b'"),
        (b"id,group\n\xff,a\n", "no CSV in UTF-8"),
        (b'id,group\n"1"x,a\n', "no CSV in UTF-8"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    table = tmp_path / "groups.csv"
    table.write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_groups(table)
    with pytest.raises(NotFoundError, match="no table of groups"):
        read_groups(tmp_path / "gone.csv")
