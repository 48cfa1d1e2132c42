"""A folder as a source, step by step and without its thread: files that change while they are on their way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.settings import Run
from spade_faiss.watch.arrivals import Arrival
from spade_faiss.watch.ledger import Ledger
from spade_faiss.watch.settings import WatchSettings
from spade_faiss.watch.sources.folder import FolderSource
from tests.support.pictures import save_png, weave


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger(None, "in")
    yield ledger
    ledger.close()


@pytest.fixture
def source(tmp_path: Path, ledger: Ledger) -> FolderSource:
    save_png(weave(np.random.default_rng(0)), tmp_path / "in" / "a.png")
    return FolderSource(tmp_path / "in", ledger, Run(), WatchSettings(settle_s=0, give_up_s=0))


def look(source: FolderSource) -> list[Arrival]:
    """Look through the folder once; returns what is handed over."""
    source._scan()
    source._take_complete()
    found = []
    while (arrival := source.get(0)) is not None:
        found.append(arrival)
    return found


def test_a_file_that_is_touched_on_its_way_is_sent_once(source: FolderSource, ledger: Ledger, tmp_path: Path) -> None:
    (arrival,) = look(source)
    assert arrival.job is not None
    os.utime(tmp_path / "in" / "a.png", (1e9, 1e9))
    assert look(source) == []
    ledger.add([arrival.id], [], {arrival.job.name: arrival.job.stamp})
    source.settled(arrival)
    assert look(source) == []
    save_png(weave(np.random.default_rng(1)), tmp_path / "in" / "a.png")
    assert len(look(source)) == 1


def test_a_file_that_was_doubtful_and_is_written_anew_is_taken_once(source: FolderSource, tmp_path: Path) -> None:
    """Its turn to be tried for the last time, and its new state, may come in the same moment."""
    (arrival,) = look(source)
    arrival.job.is_last_try = False  # type: ignore[union-attr]
    assert not source.unreadable(arrival, changed=False)
    save_png(weave(np.random.default_rng(1)), tmp_path / "in" / "a.png")
    (again,) = look(source)
    assert again.id != arrival.id
