"""Jobs over the neighbors' blocks: each block is read once for all test images that need it, ahead of its search."""

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

# Blocks in flight beyond one for each worker: one that is decoded while others are searched, and one whose last task runs.
_SPARE_BLOCKS = 2
# Multiply-adds that are submitted to the workers at a time: enough that Python's share of the time is small, few enough that no
# core waits long for another. Where there is little to do, it is submitted in smaller batches, but in none below the second.
_BATCH_WORK = 150_000_000
_LEAST_BATCH_WORK = 20_000_000
# Parts of an image's queries are not made smaller than this: smaller products are slower.
_PART_QUERIES = 768


class BlockJob(NamedTuple):
    """One normal image to search.

    Attributes:
        row: its bank row.
        images: the test images that have it in their gallery.
        columns: for each of those, the column of its gallery that it stands in.
    """

    row: int
    images: IntArray
    columns: IntArray

    @property
    def requests(self) -> Iterator[tuple[int, int]]:
        """Each test image that needs the block, with the column."""
        return zip(self.images.tolist(), self.columns.tolist(), strict=True)


class Task(NamedTuple, Generic[Prepared]):
    """A part of a job: what to run on the prepared block, and about how many multiply-adds that takes."""

    run: Callable[[Prepared], None]
    work: int


# Jobs that are submitted together: the bank row of each, and its tasks.
_Group = list[tuple[int, list[Task[Prepared]]]]


class _Submitted(NamedTuple, Generic[Prepared]):
    """What was submitted together; for a job that is spread over several futures also its bank row and its block."""

    futures: list[Future[None]]
    spread: tuple[int, Future[Prepared]] | None


def block_jobs(neighbors: IntArray) -> list[BlockJob]:
    """One job for each bank row in `neighbors` (n, K), in ascending order of the rows."""
    order = np.argsort(neighbors, axis=None, kind="stable")
    rows, starts = np.unique(neighbors.ravel()[order], return_index=True)
    return [
        BlockJob(int(row), *np.divmod(places, neighbors.shape[1]))
        for row, places in zip(rows, np.split(order, starts[1:]), strict=True)
    ]


def query_parts(queries: int, rows: int, channels: int) -> list[slice]:
    """The parts of a test image's queries that are searched in a block at a time.

    They depend on the shapes alone, so that a product has the same shape, and rounds alike, in any batch.

    Args:
        queries: number of locations of the test image.
        rows: number of vectors in the block.
        channels: number of channels of a vector.
    """
    most = max(1, queries // _PART_QUERIES)
    count = min(most, max(1, round(queries * rows * channels / _BATCH_WORK)))
    return slices(queries, count)


def slices(length: int, count: int) -> list[slice]:
    """`count` slices of nearly equal size that cover `length`."""
    edges = np.linspace(0, length, count + 1).astype(int).tolist()
    return [slice(*edge) for edge in pairwise(edges)]


def in_flight(threads: int) -> int:
    """The most blocks that are decoded or searched at a time."""
    return threads + _SPARE_BLOCKS


def run_block_jobs(
    blocks: Blocks,
    workers: Workers,
    jobs: Iterable[BlockJob],
    prepare: Callable[[int], Prepared],
    tasks_of: Callable[[BlockJob], list[Task[Prepared]]],
    done: Callable[[Prepared], object] = lambda prepared: None,
) -> None:
    """Run the tasks of each job on its block.

    A large job is spread over the workers; several small ones run in one of them, one after the other.

    Args:
        blocks: what `prepare` reads from; a row is released when its job is done.
        workers: the threads that everything runs in.
        jobs: the jobs, in the order in which they are begun.
        prepare: reads the block of a bank row and makes of it what the tasks work on; it runs once for each job.
        tasks_of: lists the tasks of a job.
        done: is told when the tasks of a prepared block have run, so that its memory can be used again.
    """
    running: deque[_Submitted[Prepared]] = deque()

    def finish_oldest() -> None:
        futures, spread = running[0]
        for future in futures:
            future.result()
        running.popleft()
        if spread is not None:
            row, block = spread
            blocks.release(row)
            done(block.result())

    def run_batch(batch: Sequence[Task[Prepared]], block: Future[Prepared]) -> None:
        prepared = block.result()  # this wait ends: workers begin in order, and the block was submitted before
        for task in batch:
            task.run(prepared)

    def run_group(group: _Group[Prepared]) -> None:
        for row, tasks in group:
            prepared = prepare(row)
            for task in tasks:
                task.run(prepared)
            blocks.release(row)
            done(prepared)
            del prepared  # before the next one is made

    def begin(group: _Group[Prepared]) -> Callable[[], None]:
        """Start to read a large job's block; returns what submits the searches."""
        row, tasks = group[0]
        batches = list(_batches(tasks, enough))
        if len(group) > 1 or len(batches) == 1:
            return lambda: running.append(_Submitted([workers.submit(run_group, group)], None))
        block = workers.submit(prepare, row)
        return lambda: running.append(_Submitted([workers.submit(run_batch, batch, block) for batch in batches], (row, block)))

    begun: deque[Callable[[], None]] = deque()

    try:
        work = [(job.row, tasks_of(job)) for job in jobs]
        fair = sum(task.work for _, tasks in work for task in tasks) // (2 * workers.threads)
        enough = min(_BATCH_WORK, max(fair, _LEAST_BATCH_WORK))
        for group in _groups(work, enough):
            for row, _ in group:
                blocks.prefetch(row)
            if len(running) + 1 == in_flight(workers.threads):
                finish_oldest()
            # The reading of this block is queued before the searches of the previous one.
            begun.append(begin(group))
            if len(begun) > 1:
                begun.popleft()()
        while begun:
            begun.popleft()()
        while running:
            finish_oldest()
    except BaseException:
        for futures, _ in running:
            for future in futures:
                future.cancel()
        raise


def _groups(jobs: _Group[Prepared], enough: int) -> Iterator[_Group[Prepared]]:
    """Consecutive jobs that together are worth submitting."""
    group, work = [], 0
    for row, tasks in jobs:
        group.append((row, tasks))
        work += sum(task.work for task in tasks)
        if work >= enough:
            yield group
            group, work = [], 0
    if group:
        yield group


def _batches(tasks: list[Task[Prepared]], enough: int) -> Iterator[list[Task[Prepared]]]:
    """Consecutive tasks of one job that together are worth submitting."""
    batch, work = [], 0
    for task in tasks:
        batch.append(task)
        work += task.work
        if work >= enough:
            yield batch
            batch, work = [], 0
    if batch:
        yield batch
