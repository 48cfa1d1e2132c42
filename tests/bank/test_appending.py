"""Appending to a bank: one writer at a time, and a writer that fails or is killed leaves the state before."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss.bank import bank as bank_module
from spade_faiss.bank import shards
from spade_faiss.bank.bank import Bank
from spade_faiss.core import arrays
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout
from tests.support.banks import FINE, PowerCutError, assert_holds, batch, fail_on_call, make_bank


def test_a_second_writer_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_bank(tmp_path / "b")
    second = Bank.open(tmp_path / "b")
    writing, may_go_on = threading.Event(), threading.Event()
    write_shard = shards.write_shard

    def slow(*arguments: Any) -> Any:
        writing.set()
        assert may_go_on.wait(20)
        return write_shard(*arguments)

    monkeypatch.setattr(bank_module, "write_shard", slow)
    thread = threading.Thread(target=first.append, args=[batch("a")])
    thread.start()
    try:
        assert writing.wait(20)
        with pytest.raises(
            BankError,
            match=rf"another process is writing to the bank .*b: process {os.getpid()} on .*; wait until it has finished",
        ):
            second.append(batch("b"))
        assert_holds(Bank.open(tmp_path / "b"))  # reading goes on
    finally:
        may_go_on.set()
        thread.join()
    second.append(batch("b"))
    assert_holds(second, batch("a"), batch("b"))


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (h5py.Group, "create_dataset", 1),
        (h5py.Group, "create_dataset", 3),
        (arrays, "hash_file", 1),
        (os, "fsync", 1),  # the shard's content
        (Path, "replace", 1),  # the shard's name
        (os, "fsync", 2),  # the shard's folder: it has its name, nobody refers to it
        (bank_module, "write_manifest", 1),
        (json, "dumps", 2),
        (os, "fsync", 3),  # the manifest's content
        (Path, "replace", 2),  # the manifest's name
    ],
)
def test_an_append_that_fails_leaves_the_previous_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a"))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_on_call(getattr(owner, name), call))
        with pytest.raises(PowerCutError):
            bank.append(batch("b", "c"))
    assert not list(bank.path.rglob(TEMPORARY_PATTERN))
    for state in (bank, Bank.open(bank.path)):
        assert state.generation == 1
        assert_holds(state, batch("a"))
    # The same append again, with other content in the shard of that number than before.
    bank.append(batch("b", seed=1))
    for state in (bank, Bank.open(bank.path)):
        assert state.generation == 2
        assert state.ids == ["a", "b"]
        np.testing.assert_array_equal(state.level_map(FINE.name, 1), batch("b", seed=1).levels[FINE.name][0])


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    leftovers = [bank.path / ".spade-00.tmp", bank.path / "features" / ".spade-11.tmp"]
    # An index may be built at the same time: its temporary file is not ours to remove.
    others = [bank.path / "indexes" / "hnsw" / ".spade-22.tmp", bank.path / "features" / "notes.txt"]
    for path in (*leftovers, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    assert_holds(Bank.open(bank.path))
    assert all(path.exists() for path in leftovers)  # opening changes nothing
    bank.append(batch("a"))
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank.create(tmp_path / "b", Layout(levels=(Level("a", 2, 4, 3, 3),), embedding_dim=4, input_size=(12, 12)))
    batch = FeatureBatch(["x"], np.zeros((1, 4), np.float32), {"a": np.zeros((1, 3, 3, 2), np.float32)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="1000 bytes free"):
        bank.append(batch)
    assert not any((tmp_path / "b" / "features").iterdir())
    monkeypatch.undo()
    bank.append(batch)
    assert len(Bank.open(tmp_path / "b")) == 1


# ---- SIGKILL


def kill_at_every_step(folder: str) -> list[int]:
    """Kill an append at each of its syncs in turn, and return the bank's generation after each."""
    generations = []
    for step in range(1, 6):
        path = Path(folder, f"step{step}")
        make_bank(path).append(batch("a"))
        child = os.fork()
        if child == 0:
            sync, calls = os.fsync, iter(range(1, 100))

            def sync_or_die(descriptor: int) -> None:
                if next(calls) == step:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)
                sync(descriptor)  # noqa: B023

            try:
                os.fsync = sync_or_die  # type: ignore[assignment]
                Bank.open(path).append(batch("b", "c"))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        bank = Bank.open(path)
        generations.append(bank.generation)
        assert_holds(bank, *[batch("a"), batch("b", "c")][: bank.generation])
        bank.append(batch("d"))
        assert bank.ids[-1] == "d"
        assert not list(path.rglob(TEMPORARY_PATTERN))
    return generations


def kill_at_random(folder: str, seed: int, kills: int) -> list[int]:
    """Kill a process that appends for ever, again and again; return how many images were committed after each kill.

    The writer notes an image in a log after it was committed: whatever the log names must be in the bank.
    """
    rng = random.Random(seed)
    path, log = Path(folder, "bank"), Path(folder, "log")
    make_bank(path)
    log.touch()
    counts = []
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                bank = Bank.open(path)
                with log.open("a", buffering=1) as noted:
                    while True:
                        bank.append(batch(f"image {len(bank)}"))
                        noted.write(bank.ids[-1] + "\n")
            finally:
                os._exit(1)
        before, deadline = log.stat().st_size, time.monotonic() + 10
        # At least one commit, so that the kill hits a writer at work.
        while log.stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        bank = Bank.open(path)
        noted_ids = log.read_text().split("\n")[:-1]
        assert noted_ids == bank.ids[: len(noted_ids)]
        # Killed between the commit and the note: at most that one image.
        assert len(bank) - len(noted_ids) <= 1
        assert_holds(bank, *(batch(f"image {number}") for number in range(len(bank))))
        counts.append(len(bank))
        bank.append(batch(f"image {len(bank)}"))
        assert not list(path.rglob(TEMPORARY_PATTERN))
        log.write_text("".join(f"{name}\n" for name in bank.ids))
    return counts


@pytest.fixture(scope="module")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh process, whose forks inherit no threads of ours."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


@needs_fork
def test_a_kill_at_any_step_leaves_one_generation_or_the_other(tmp_path: Path, other_process: ProcessPoolExecutor) -> None:
    generations = other_process.submit(kill_at_every_step, str(tmp_path)).result(60)
    # Shard content, shard folder, manifest content, manifest folder; without a fifth sync the append is through.
    assert generations == [1, 1, 1, 2, 2]


@needs_fork
def test_killed_again_and_again_no_committed_image_is_lost(tmp_path: Path, other_process: ProcessPoolExecutor) -> None:
    counts = other_process.submit(kill_at_random, str(tmp_path), 11, 8).result(60)
    assert counts == sorted(counts)
    assert counts[-1] > len(counts)
