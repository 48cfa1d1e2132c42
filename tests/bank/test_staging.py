"""Shards that another process writes beside those of a bank: they are committed by the writer, in its order, or swept."""

from __future__ import annotations

from pathlib import Path

import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import BankError, InputError
from tests.support.banks import ABC, DE, F, assert_holds, events, make_bank


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
