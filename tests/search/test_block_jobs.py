"""Block jobs: every task runs once with its block, each block is read once, and few blocks are held at a time."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import BlockJob, Task, block_jobs, in_flight, query_parts, run_block_jobs, slices
from spade_faiss.search.blocks import Blocks, BlockSource
from spade_faiss.search.workers import Workers

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LEVEL = Level("level", channels=1, stride=1, height=1, width=1)
# The work of a task: many of them make a batch, one makes a batch, one is more than the largest batch.
WORK = [1, 3_000_000, 25_000_000, 200_000_000]
# A wait that only ends so when something is stuck.
STUCK_S = 20


@cache
def workers_of(threads: int) -> Workers:
    return Workers(threads)


class Source(BlockSource):
    """Blocks from a function; `note` is told what is asked of which row."""

    def __init__(
        self, count: int, read: Callable[[int], Floats], note: Callable[[str, int], None] = lambda what, row: None
    ) -> None:
        self._count = count
        self._read = read
        self._note = note

    def __len__(self) -> int:
        return self._count

    def read(self, row: int, out: Floats | None = None) -> Floats:
        return self._read(row)

    def prefetch(self, row: int) -> None:
        self._note("prefetch", row)

    def release(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._note("release", row)


class Recorder:
    """Blocks that hold their row, and tasks that note what happens to them."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self.events: list[tuple[str, int]] = []
        self.ran: list[tuple[int, int, int]] = []  # image, column, the row in the block
        self._left: Counter[int] = Counter()
        self._flying: set[int] = set()
        self.most_flying = 0
        self.blocks = Blocks(LEVEL, Source(count, self._read, self._note))

    def _note(self, what: str, row: int) -> None:
        with self._lock:
            self.events.append((what, row))

    def _read(self, row: int) -> Floats:
        with self._lock:
            self.events.append(("read", row))
            self._flying.add(row)
            self.most_flying = max(self.most_flying, len(self._flying))
        return np.full((1, 1), row, np.float32)

    def prepare(self, row: int) -> tuple[int]:
        block = self.blocks(row)
        self._note("prepare", int(block[0, 0]))
        return (int(block[0, 0]),)

    def done(self, prepared: tuple[int]) -> None:
        self._note("done", prepared[0])

    def tasks_of(self, job: BlockJob, work: dict[int, int]) -> list[Task[tuple[int]]]:
        requests = list(job.requests)
        self._left[job.row] = len(requests)
        return [Task(partial(self._run, image, column), work[job.row]) for image, column in requests]

    def _run(self, image: int, column: int, prepared: tuple[int]) -> None:
        with self._lock:
            self.ran.append((image, column, prepared[0]))
            self.events.append(("run", prepared[0]))
            self._left[prepared[0]] -= 1
            if not self._left[prepared[0]]:
                self._flying.remove(prepared[0])


@st.composite
def galleries(draw: st.DrawFn) -> Ints:
    """(n, K) bank rows, distinct within a line."""
    n, count = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    k = draw(st.integers(1, count))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.stack([rng.permutation(count)[:k] for _ in range(n)])


def test_jobs_by_hand() -> None:
    jobs = block_jobs(np.array([[5, 2, 9], [2, 9, 4]]))
    assert [job.row for job in jobs] == [2, 4, 5, 9]
    assert [list(job.requests) for job in jobs] == [[(0, 1), (1, 0)], [(1, 2)], [(0, 0)], [(0, 2), (1, 1)]]


@given(galleries())
def test_every_place_of_every_gallery_is_in_one_job(rows: Ints) -> None:
    jobs = block_jobs(rows)
    assert [job.row for job in jobs] == np.unique(rows).tolist()
    requests = [(image, column, job.row) for job in jobs for image, column in job.requests]
    assert sorted(requests) == [(*place, int(rows[place])) for place in np.ndindex(rows.shape)]


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 4096))
def test_parts_cover_all_queries_once(queries: int, rows: int, channels: int) -> None:
    parts = query_parts(queries, rows, channels)
    covered = np.concatenate([np.arange(queries)[part] for part in parts])
    np.testing.assert_array_equal(covered, np.arange(queries))
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    # A part is small only where the image is: smaller products are slower.
    assert len(parts) == 1 or min(sizes) >= 500
    # They are a matter of the shapes alone: nothing that was asked before changes them.
    assert query_parts(queries, rows, channels) == parts


def test_large_images_have_parts_and_small_ones_do_not() -> None:
    assert len(query_parts(784, 784, 24)) == 1
    assert len(query_parts(56 * 56, 56 * 56, 256)) > 2
    assert slices(10, 3) == [slice(0, 3), slice(3, 6), slice(6, 10)]


@given(galleries(), st.data(), st.integers(1, 4))
def test_every_task_is_run_once_with_its_block(rows: Ints, data: st.DataObject, threads: int) -> None:
    jobs = block_jobs(rows)
    work = {job.row: data.draw(st.sampled_from(WORK)) for job in jobs}
    recorder = Recorder(int(rows.max()) + 1)
    tasks_of = partial(recorder.tasks_of, work=work)
    run_block_jobs(recorder.blocks, workers_of(threads), jobs, recorder.prepare, tasks_of, recorder.done)
    assert sorted(recorder.ran) == [(*place, int(rows[place])) for place in np.ndindex(rows.shape)]
    # Each block once: announced, read, prepared, and let go after all that was asked of it.
    for job in jobs:
        order = [what for what, row in recorder.events if row == job.row]
        assert order[: 3 + len(job.images)] == ["prefetch", "read", "prepare", *["run"] * len(job.images)]
        assert sorted(order[3 + len(job.images) :]) == ["done", "release"]
    assert recorder.most_flying <= in_flight(threads)


def test_no_jobs_are_nothing_to_do() -> None:
    recorder = Recorder(1)
    run_block_jobs(recorder.blocks, workers_of(2), [], recorder.prepare, partial(recorder.tasks_of, work={}))
    assert recorder.events == []


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_large_jobs_are_not_read_far_ahead(threads: int) -> None:
    count, lock, busy = 12, threading.Lock(), threading.Event()
    read, done = list[int](), Counter[int]()

    def read_block(row: int) -> Floats:
        with lock:
            read.append(row)
            if len(read) == min(threads, 2):
                busy.set()
        return np.full((1, 1), row, np.float32)

    def run(block: Floats) -> None:
        assert busy.wait(STUCK_S)  # nothing ends before another block is being read, where there is a thread for it
        with lock:
            assert len(read) - sum(runs == 2 for runs in done.values()) <= in_flight(threads)
            done[int(block[0, 0])] += 1

    def tasks(job: BlockJob) -> list[Task[Floats]]:
        return [Task(run, WORK[-1])] * 2

    blocks = Blocks(LEVEL, Source(count, read_block))
    run_block_jobs(blocks, workers_of(threads), block_jobs(np.arange(count)[None]), blocks, tasks)
    assert done == Counter(dict.fromkeys(range(count), 2))


def test_the_next_block_is_read_before_this_one_is_searched() -> None:
    """Its page faults and its decoding overlap with the searches, even where one thread does everything."""
    recorder = Recorder(4)
    jobs = block_jobs(np.array([[0, 1, 2, 3], [3, 2, 1, 0]]))
    work = dict.fromkeys(range(4), WORK[-1])
    run_block_jobs(recorder.blocks, workers_of(1), jobs, recorder.prepare, partial(recorder.tasks_of, work=work))
    order = [(what, row) for what, row in recorder.events if what in ("read", "run")]
    assert order == [("read", 0)] + [
        event for row in range(4) for event in ([("read", row + 1)] * (row < 3) + [("run", row)] * 2)
    ]


def test_small_jobs_hold_few_blocks() -> None:
    """Jobs that are submitted together hold one block after the other: few are alive at a time, as memory was planned for."""
    threads = 4
    together = threading.Barrier(threads)
    lock, alive, most = threading.Lock(), [0], [0]

    def gone() -> None:
        with lock:
            alive[0] -= 1

    def read(row: int) -> Floats:
        block = np.full((1, 1), row, np.float32)
        weakref.finalize(block, gone)
        with lock:
            alive[0] += 1
        together.wait(STUCK_S)  # all workers are here, each with what it holds
        with lock:
            most[0] = max(most[0], alive[0])
        together.wait(STUCK_S)
        return block

    def tasks(job: BlockJob) -> list[Task[Floats]]:
        return [Task(lambda block: None, 10_000_000)]  # two make a batch

    blocks = Blocks(LEVEL, Source(8, read))
    run_block_jobs(blocks, workers_of(threads), block_jobs(np.arange(8)[None]), blocks, tasks)
    assert threads <= most[0] <= in_flight(threads)


def test_what_was_not_begun_is_not_done_after_an_exception() -> None:
    """Nobody waits for it: it would go on in the background, and keep the threads from whatever comes next."""
    over, ran = threading.Event(), list[int]()

    def run(number: int, block: Floats) -> None:
        ran.append(number)
        if number == 0:
            raise ValueError("on purpose")
        if not over.wait(STUCK_S):
            over.set()  # nothing came out: that one wait was long enough to say so

    def tasks(job: BlockJob) -> list[Task[Floats]]:
        return [Task(partial(run, number), WORK[-1]) for number in range(5)]

    workers, blocks = workers_of(1), Blocks(LEVEL, Source(9, lambda row: np.zeros((1, 1), np.float32)))
    try:
        with pytest.raises(ValueError, match="on purpose"):
            run_block_jobs(blocks, workers, block_jobs(np.arange(9)[None]), blocks, tasks)
    finally:
        over.set()
    workers.submit(lambda: None).result(STUCK_S)
    assert ran in ([0], [0, 1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["read", "prepare", "run", "tasks_of"])
@pytest.mark.parametrize("work", [1, WORK[-1]])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_comes_out_and_nothing_is_stuck(where: str, work: int, threads: int, error: type[BaseException]) -> None:
    workers, read = workers_of(threads), list[int]()
    blocks = Blocks(LEVEL, Source(40, lambda row: read_block(row)))

    def fail(here: str) -> None:
        if here == where:
            raise error("on purpose")

    def read_block(row: int) -> Floats:
        read.append(row)
        fail("read")
        return np.zeros((1, 1), np.float32)

    def prepare(row: int) -> Floats:
        fail("prepare")
        return blocks(row)

    def run(block: Floats) -> None:
        fail("run")

    def tasks(job: BlockJob) -> list[Task[Floats]]:
        fail("tasks_of")
        return [Task(run, work)] * 4

    with pytest.raises(error, match="on purpose"):
        run_block_jobs(blocks, workers, block_jobs(np.arange(40)[None]), prepare, tasks)
    # Every thread of the pool is there for the next one, and what was not begun is not begun any more.
    together = threading.Barrier(threads)
    for task in [workers.submit(together.wait, STUCK_S) for _ in range(threads)]:
        task.result(STUCK_S)
    assert len(read) <= in_flight(threads)
    recorder = Recorder(3)
    jobs = block_jobs(np.arange(3)[None])
    run_block_jobs(
        recorder.blocks, workers, jobs, recorder.prepare, partial(recorder.tasks_of, work=dict.fromkeys(range(3), work))
    )
    assert sorted(recorder.ran) == [(0, 0, 0), (0, 1, 1), (0, 2, 2)]
