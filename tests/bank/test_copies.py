"""Pickled and copied banks and snapshots: the same state is opened again, or an error says that it is gone."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import BankError, NotFoundError
from tests.support.banks import ABC, DE, F, assert_holds, batch, three_shards


def again(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copied_by", [again, copy.copy, copy.deepcopy])
def test_a_copy_shows_the_state_of_the_original(tmp_path: Path, copied_by: Any) -> None:
    bank = three_shards(tmp_path / "b")
    for thing in (bank, bank.snapshot()):
        other = copied_by(thing)
        assert type(other) is type(thing)
        assert other.generation == bank.generation
        assert_holds(other, ABC, DE, F)


def test_a_copy_shows_that_state_when_the_bank_has_moved_on(tmp_path: Path) -> None:
    bank = three_shards(tmp_path / "b")
    sent = pickle.dumps(bank.snapshot())
    bank.append(batch("g"))
    bank.remove(["a"])
    assert_holds(pickle.loads(sent), ABC, DE, F)


def test_a_copied_bank_writes_to_the_newest_state(tmp_path: Path) -> None:
    bank = three_shards(tmp_path / "b")
    other = copy.deepcopy(bank)
    bank.append(batch("g"))
    other.append(batch("h"))
    assert Bank.open(bank.path).ids == [*"abcdefgh"]


def test_a_copy_keeps_its_files(tmp_path: Path) -> None:
    """It holds a lease of its own: the original may be closed, and others may compact."""
    bank = three_shards(tmp_path / "b")
    snapshot = again(bank.snapshot())
    bank.remove(["a"])
    bank.compact()
    del bank
    assert_holds(snapshot, ABC, DE, F)


def test_a_state_whose_files_are_gone_is_an_error(tmp_path: Path) -> None:
    bank = three_shards(tmp_path / "b")
    sent = pickle.dumps(bank)
    bank.remove(["a"])
    bank.compact()
    with pytest.raises(BankError, match=r"000001\.h5.* is missing"):
        pickle.loads(sent)
    shutil.rmtree(bank.path)
    with pytest.raises(NotFoundError, match="there is no bank at"):
        pickle.loads(sent)


def test_another_bank_in_its_place_is_an_error(tmp_path: Path) -> None:
    sent = pickle.dumps(three_shards(tmp_path / "b").snapshot())
    shutil.rmtree(tmp_path / "b")
    other = three_shards(tmp_path / "b")
    other.append(batch("g"))
    (tmp_path / "b" / "features" / "000002.h5").write_bytes((tmp_path / "b" / "features" / "000004.h5").read_bytes())
    with pytest.raises(BankError, match="has changed since it was written"):
        pickle.loads(sent)
