"""Visiting the neighbors' blocks: each once for all the test images that chose it, read ahead, searched by all workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from spade_faiss.core.types import IntArray
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.workers import Workers

Prepared = TypeVar("Prepared")

# Beyond one for each worker: a block that is decoded while others are searched, and one whose last task is still running.
_SPARE_BLOCKS = 2
# Multiply-adds that are worth a task of their own: enough that Python's share of the time is small, few enough that no core
# waits long for another; the least where there is little to do.
_TASK_WORK = 150_000_000
_LEAST_WORK = 20_000_000
_PART_QUERIES = 768


class Visit(NamedTuple):
    """A normal image to search, and who asked: test images, and the column of it in each one's gallery."""

    row: int
    images: IntArray
    columns: IntArray

    @property
    def asked(self) -> Iterator[tuple[int, int]]:
        """Each test image that asked, with its column."""
        return zip(self.images.tolist(), self.columns.tolist(), strict=True)


class Piece(NamedTuple, Generic[Prepared]):
    """Something to do with a block, and how many multiply-adds it takes, more or less."""

    run: Callable[[Prepared], None]
    work: int


# Rows of blocks, and what to do with each.
_Group = list[tuple[int, list[Piece[Prepared]]]]


def visits_of(rows: IntArray) -> list[Visit]:
    """One visit for each bank row in `rows` (n, K), ascending."""
    order = np.argsort(rows, axis=None, kind="stable")
    found, starts = np.unique(rows.ravel()[order], return_index=True)
    return [
        Visit(int(row), *np.divmod(places, rows.shape[1]))
        for row, places in zip(found, np.split(order, starts[1:]), strict=True)
    ]


def parts_of(queries: int, rows: int, channels: int) -> list[slice]:
    """A test image's queries in parts that are searched in a block at a time; they depend on the shapes alone."""
    most = max(1, queries // _PART_QUERIES)
    count = min(most, max(1, round(queries * rows * channels / _TASK_WORK)))
    return slices(queries, count)


def slices(length: int, count: int) -> list[slice]:
    """`count` slices of nearly one size that cover `length`."""
    edges = np.linspace(0, length, count + 1).astype(int).tolist()
    return [slice(*edge) for edge in pairwise(edges)]


def in_flight(threads: int) -> int:
    """How many blocks are decoded or searched at a time."""
    return threads + _SPARE_BLOCKS


def sweep(
    blocks: Blocks,
    workers: Workers,
    visits: Iterable[Visit],
    prepare: Callable[[int], Prepared],
    pieces_of: Callable[[Visit], list[Piece[Prepared]]],
    done: Callable[[Prepared], object] = lambda prepared: None,
) -> None:
    """Do each visit's pieces of work with its block, in the workers.

    A large visit is spread over the workers, several small ones are one task.

    Args:
        blocks: what `prepare` reads from; a row is released after its visit.
        workers: where everything runs.
        visits: in the order they are begun in.
        prepare: reads the block of a row and makes of it what its pieces work on; it runs once for each visit.
        pieces_of: what to do with a visit's block.
        done: told when a visit's pieces have run, so that memory can be used again.
    """
    # Tasks, and of a visit that is spread over several of them its row and block.
    running: deque[tuple[list[Future[None]], tuple[int, Future[Prepared]] | None]] = deque()

    def finish() -> None:
        tasks, spread = running[0]
        for task in tasks:
            task.result()
        running.popleft()
        if spread is not None:
            blocks.release(spread[0])
            done(spread[1].result())

    def search(pieces: Sequence[Piece[Prepared]], block: Future[Prepared]) -> None:
        prepared = block.result()  # its decoding began before this did: the wait ends
        for piece in pieces:
            piece.run(prepared)

    def visit_all(group: _Group[Prepared]) -> None:
        for row, pieces in group:
            prepared = prepare(row)
            for piece in pieces:
                piece.run(prepared)
            blocks.release(row)
            done(prepared)
            del prepared  # before the next is made

    def begin(group: _Group[Prepared]) -> Callable[[], None]:
        row, pieces = group[0]
        tasks = list(_tasks(pieces, enough))
        if len(group) > 1 or len(tasks) == 1:
            return lambda: running.append(([workers.submit(visit_all, group)], None))
        block = workers.submit(prepare, row)
        return lambda: running.append(([workers.submit(search, task, block) for task in tasks], (row, block)))

    begun: deque[Callable[[], None]] = deque()

    try:
        work = [(visit.row, pieces_of(visit)) for visit in visits]
        fair = sum(piece.work for _, pieces in work for piece in pieces) // (2 * workers.threads)
        enough = min(_TASK_WORK, max(fair, _LEAST_WORK))
        for group in _groups(work, enough):
            for row, _ in group:
                blocks.prefetch(row)
            if len(running) + 1 == in_flight(workers.threads):
                finish()
            # The decoding of this one stands before the searches of the one before.
            begun.append(begin(group))
            if len(begun) > 1:
                begun.popleft()()
        while begun:
            begun.popleft()()
        while running:
            finish()
    except BaseException:
        for tasks, _ in running:
            for task in tasks:
                task.cancel()
        raise


def _groups(visits: _Group[Prepared], enough: int) -> Iterator[_Group[Prepared]]:
    """Visits that together are worth a task."""
    group, work = [], 0
    for row, pieces in visits:
        group.append((row, pieces))
        work += sum(piece.work for piece in pieces)
        if work >= enough:
            yield group
            group, work = [], 0
    if group:
        yield group


def _tasks(pieces: list[Piece[Prepared]], enough: int) -> Iterator[list[Piece[Prepared]]]:
    """Pieces of one visit that together are worth a task."""
    task, work = [], 0
    for piece in pieces:
        task.append(piece)
        work += piece.work
        if work >= enough:
            yield task
            task, work = [], 0
    if task:
        yield task
