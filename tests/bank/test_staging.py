"""Shards for several processes: written by one and committed by another, and searched by who owns them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import BankError, InputError
from tests.support.banks import ABC, DE, F, assert_holds, events, make_bank, three_shards


def test_staged_shards_are_committed_in_the_writers_order(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank")
    other = Bank.open(bank.path)  # as a worker has it
    with bank.writing():
        staged = [other.stage(part) for part in (DE, ABC, F)]
        assert len(Bank.open(bank.path)) == 0  # nobody sees them yet
        for shard in (staged[2], staged[0]):
            bank.append_staged(shard)
    assert_holds(Bank.open(bank.path), F, DE)
    assert events(bank) == [(2, "add", 3)]
    assert sorted(path.name for path in (bank.path / "features").iterdir())[:2] == ["000001.h5", "000002.h5"]


def test_the_next_writer_sweeps_what_nobody_committed(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank")
    left = bank.path / "features" / bank.stage(ABC).entry.file
    assert left.exists()
    with Bank.open(bank.path).writing():
        assert not left.exists()


def test_what_is_staged_is_checked(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank")
    with bank.writing():
        twice = bank.stage(ABC), bank.stage(ABC)
        bank.append_staged(twice[0])
        with pytest.raises(InputError, match="already holds 3 of these images"):
            bank.append_staged(twice[1])
        gone, damaged = bank.stage(DE), bank.stage(F)
        (bank.path / "features" / gone.entry.file).unlink()
        with pytest.raises(BankError, match="missing"):
            bank.append_staged(gone)
        path = bank.path / "features" / damaged.entry.file
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(BankError, match="has changed since it was written"):
            bank.append_staged(damaged)
    assert_holds(Bank.open(bank.path), ABC)


def test_some_shards_are_a_bank_of_their_own(tmp_path: Path) -> None:
    bank = three_shards(tmp_path / "bank")
    bank.remove(["d"])
    assert bank.shard_of(np.array([[0, 2], [3, 4]])).tolist() == [[0, 0], [1, 2]]
    some = bank.with_shards([2, 1])
    assert some.ids == ["e", "f"]
    np.testing.assert_array_equal(some.embedding(np.array([0, 1])), bank.embedding(np.array([3, 4])))
    assert len(bank) == 5
