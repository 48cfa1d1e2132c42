"""Groups of pictures in a bank: which rows belong together, through commits, removals and compaction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, InputError
from spade_faiss.bank.facts import facts_of
from tests.support.banks import ABC, DE, batch, files, make_bank

FIRST = batch("a", "b", "a//1", "c", pictures=["a", "b", "a", "c"], groups=["t", "t", "t", ""])
SECOND = batch("d", "e", groups=["u", "t"])


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    made = make_bank(tmp_path / "bank")
    made.append(FIRST)
    made.append(SECOND)
    return made


def test_rows_know_their_siblings(bank: Bank) -> None:
    for state in (bank, Bank.open(bank.path)):
        siblings = state.siblings
        assert siblings.of(np.arange(6)).tolist() == [0, 0, 0, 1, 2, 0]
        assert (len(siblings), siblings.largest) == (3, 4)
        assert state.group_of == {"a": "t", "b": "t", "d": "u", "e": "t"}
        assert state.read(np.array([3, 4])).groups == ["", "u"]
        assert len(state.pictures) == 5
        assert facts_of(state)["groups"] == 3


def test_without_groups_a_bank_is_what_it_was_to_the_byte(tmp_path: Path) -> None:
    plain, alone = make_bank(tmp_path / "plain"), make_bank(tmp_path / "alone")
    plain.append(ABC)
    alone.append(ABC)
    shards = [next(content for name, content in files(made.path).items() if name.endswith(".h5")) for made in (plain, alone)]
    assert shards[0] == shards[1]
    assert b"image/group" not in shards[0]
    assert plain.siblings is plain.pictures
    assert plain.group_of == {}
    assert facts_of(plain)["groups"] is None


def test_a_shard_without_groups_may_stand_beside_one_with_them(bank: Bank) -> None:
    bank.append(batch("x", "y"))
    assert bank.siblings.of(np.arange(8)).tolist() == [0, 0, 0, 1, 2, 0, 3, 4]
    bank.remove(["b"])
    bank.compact()
    assert bank.ids == ["a", "a//1", "c", "d", "e", "x", "y"]
    assert bank.siblings.of(np.arange(7)).tolist() == [0, 0, 1, 2, 0, 3, 4]
    assert Bank.open(bank.path).group_of == {"a": "t", "d": "u", "e": "t"}


def test_a_group_named_as_a_picture_is_another_thing(tmp_path: Path) -> None:
    made = make_bank(tmp_path / "bank")
    made.append(batch("c", "a", groups=["", "c"]))
    assert made.siblings.of(np.arange(2)).tolist() == [0, 1]


def test_a_batch_names_a_group_for_each_entry(tmp_path: Path) -> None:
    made = make_bank(tmp_path / "bank")
    made.append(DE)
    with pytest.raises(InputError, match="2 images has 1 groups"):
        made.append(batch("x", "y", groups=["t"]))
    with pytest.raises(InputError, match="group"):
        made.append(batch("x", "y", groups=["t", "a\0b"]))
    assert made.ids == ["d", "e"]
