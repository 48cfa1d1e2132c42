"""Pieces on workers: results in order, opened once, begun again where a worker is lost, and errors that say where."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from spade_faiss.cluster.pieces import PieceRunner, Work
from spade_faiss.cluster.plan import Piece, plan_pieces
from spade_faiss.cluster.session import RETRIES, connect
from spade_faiss.core.errors import BankError, ClusterError


class Asked(NamedTuple):
    """What a piece is of, and where it leaves a mark each time it is begun."""

    number: int
    marks: Path


class Worker:
    """What a worker opens."""

    def __init__(self, marks: Path) -> None:
        _mark(marks, f"opened-{os.getpid()}")

    def square(self, asked: Asked) -> int:
        return asked.number**2

    def lose_once(self, asked: Asked) -> int:
        if _mark(asked.marks, f"begun-{asked.number}") == 1 and asked.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return asked.number

    def lose_always(self, asked: Asked) -> int:
        _mark(asked.marks, f"begun-{asked.number}")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def refuse(self, asked: Asked) -> int:
        raise BankError("shard a.h5 is damaged")

    def refuse_first(self, asked: Asked) -> int:
        if asked.number == 0:
            raise BankError("shard a.h5 is damaged")
        time.sleep(0.5)  # the others are under way, or wait, when it is known
        return _mark(asked.marks, f"begun-{asked.number}")

    def fail(self, asked: Asked) -> int:
        raise ZeroDivisionError("by nothing")


def _mark(folder: Path, name: str) -> int:
    """Leave a mark; returns how many there are now."""
    with (folder / name).open("a") as file:
        file.write(".")
    return (folder / name).stat().st_size


def run(cluster: str, what: str, folder: Path, count: int = 6) -> list[tuple[Piece, int]]:
    with connect(cluster) as session:
        runner = PieceRunner(session, Work(partial(Worker, folder), getattr(Worker, what)))
        pieces = plan_pieces(count, batch=1, most=1, workers=1)
        return list(runner((piece, Asked(piece.number, folder)) for piece in pieces))


def test_results_come_in_order_of_workers_that_open_once(cluster: str, tmp_path: Path) -> None:
    found = run(cluster, "square", tmp_path, 40)
    assert [(piece.start, result) for piece, result in found] == [(number, number**2) for number in range(40)]
    opened = [path.stat().st_size for path in tmp_path.glob("opened-*")]
    assert set(opened) == {1}
    assert len(opened) <= 2


def test_a_piece_whose_worker_is_lost_is_begun_again(cluster: str, tmp_path: Path) -> None:
    assert [result for _, result in run(cluster, "lose_once", tmp_path)] == list(range(6))
    assert (tmp_path / "begun-2").stat().st_size == 2


@pytest.mark.slow
def test_a_piece_that_ends_every_worker_is_named(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=rf"piece 0 \(number 1 to 1\) was begun {RETRIES + 1} times"):
        run(cluster, "lose_always", tmp_path, 1)
    assert (tmp_path / "begun-0").stat().st_size == RETRIES + 1


def test_after_an_error_nothing_is_cancelled(cluster: str, tmp_path: Path) -> None:
    """Where Ray cancels a task that has just been sent to a worker, it may end the whole process: pieces end by themselves."""
    with pytest.raises(BankError):
        run(cluster, "refuse_first", tmp_path)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("begun-*"))) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    assert sorted(path.name for path in tmp_path.glob("begun-*")) == [f"begun-{number}" for number in range(1, 6)]
    assert [result for _, result in run(cluster, "square", tmp_path)] == [number**2 for number in range(6)]


def test_errors_say_on_which_node_and_in_which_piece(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"^shard a.h5 is damaged \[node \S+ \(\S+\), piece 0 \(number 1 to 1\)\]$"):
        run(cluster, "refuse", tmp_path)
    with pytest.raises(ClusterError, match=r"^a worker failed: ZeroDivisionError: by nothing \[node .*, piece 0 "):
        run(cluster, "fail", tmp_path)
