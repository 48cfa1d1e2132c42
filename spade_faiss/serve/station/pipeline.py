"""The bounded queue before a bank, and the threads that take pictures through decoding, the network, the search and the disk.

As in `ScoreStream`, the next batch is decoded while the network computes one, and the last one is searched meanwhile. There the
pictures are known beforehand; here they come one by one, and whatever is decoded when the network is free is a batch.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import NoReturn, Protocol

from spade_faiss.core.errors import SpadeError
from spade_faiss.core.files import is_full
from spade_faiss.features.stream import Decoded, Extracted
from spade_faiss.serve.errors import ConflictError, UnavailableError
from spade_faiss.serve.history.records import ScoredPicture
from spade_faiss.serve.metrics import Metrics
from spade_faiss.serve.station.verdicts import Scored, Upload

_log = logging.getLogger(__name__)

# Batches that are decoded while the network computes one.
_AHEAD = 2


@dataclass(eq=False)
class Job:
    """An upload on its way, and who waits for its verdict."""

    upload: Upload
    future: Future[ScoredPicture] = field(default_factory=Future)  # a client that has gone cancels nothing
    begun: float = field(default_factory=perf_counter)
    ready: float = 0.0

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """The scores of some pictures, and who waits for them."""

    jobs: Sequence[Job]
    scored: Scored


class Steps(Protocol):
    """What is done with pictures; each is called by one thread, `decode` by several."""

    def decode(self, upload: Upload) -> Decoded:
        """Decode a picture; raises InputError for one that cannot be read."""

    def extract(self, decoded: Sequence[Decoded]) -> Iterator[Extracted]:
        """Compute features of pictures, in one part, or in several if it is one in tiles."""

    def score(self, extracted: Extracted, *, first: bool) -> Scored | None:
        """Search for features; None if others of their picture follow. `first` begins a batch."""

    def record(self, batches: Sequence[ScoredBatch]) -> list[ScoredPicture | ConflictError]:
        """Store verdicts; they are on disk when this returns. A picture with the key of another one gets an error instead."""

    def drop(self, upload: Upload) -> None:
        """Remove what is left of a picture that gets no record."""


class Pipeline:
    """Takes pictures through the steps. What was taken is answered: with a record, or with an error.

    Args:
        name: of the bank.
        steps: what is done with pictures.
        batch: the most pictures of a batch.
        max_queue: the most pictures that are on their way.
        max_wait_s: how long the first picture of a batch waits for others.
        metrics: where it counts.
    """

    def __init__(self, name: str, steps: Steps, *, batch: int, max_queue: int, max_wait_s: float, metrics: Metrics) -> None:
        self._name = name
        self._steps = steps
        self._batch = batch
        self._max_queue = max_queue
        self._max_wait_s = max_wait_s
        self._metrics = metrics
        self._changed = threading.Condition()
        self._taken = 0  # on their way
        self._coming = 0  # of these, not decoded yet
        self._decoded: deque[tuple[Job, Decoded]] = deque()
        self._closing = False
        self._ahead = threading.BoundedSemaphore(_AHEAD * batch)
        self._extracted: queue.Queue[tuple[Sequence[Job], Extracted, bool] | None] = queue.Queue(1)
        self._scored: queue.Queue[ScoredBatch | None] = queue.Queue(2)
        self._decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=f"decode {name}")
        self._threads = [
            threading.Thread(target=run, name=f"{run.__name__.strip('_')} {name}", daemon=True)
            for run in (self._run_network, self._run_search, self._run_records)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def taken(self) -> int:
        """How many pictures are on their way."""
        return self._taken

    def submit(self, uploads: Sequence[Upload]) -> list[Job]:
        """Take pictures, all or none.

        Raises:
            UnavailableError: if the queue has no room for them, or the server ends.
        """
        with self._changed:
            if self._closing:
                raise UnavailableError("the server is shutting down; send it again soon", 5)
            if self._taken + len(uploads) > self._max_queue:
                self.refuse(len(uploads))
            self._taken += len(uploads)
            self._coming += len(uploads)
            jobs = [Job(upload) for upload in uploads]
            for job in jobs:
                self._decoders.submit(self._decode, job)
            self._metrics.waiting.labels(self._name).set(self._taken)
        return jobs

    def refuse(self, count: int) -> NoReturn:
        """Raise UnavailableError for pictures that have no room."""
        self._metrics.verdicts.labels(self._name, "refused").inc(count)
        raise UnavailableError(
            f"{self._taken} pictures are waiting, at most {self._max_queue} may (see --max-queue); send it again later"
        )

    def close(self) -> None:
        """Take nothing more, and return when all that was taken is answered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._decoders.shutdown()
        for thread in self._threads:
            thread.join()

    def _decode(self, job: Job) -> None:
        self._ahead.acquire()
        try:
            with self._metrics.stage(self._name, "decode"):
                decoded = self._steps.decode(job.upload)
        except Exception as error:  # outermost frame of a thread
            self._ahead.release()
            with self._changed:
                self._coming -= 1
            self._fail([job], error)
            return
        with self._changed:
            job.ready = perf_counter()
            self._coming -= 1
            self._decoded.append((job, decoded))
            self._changed.notify_all()

    def _gather(self) -> list[tuple[Job, Decoded]]:
        """Wait for a batch; empty once nothing more comes."""

        def has_ended() -> bool:
            return self._closing and not self._taken

        with self._changed:
            self._changed.wait_for(lambda: bool(self._decoded) or has_ended())
            if not self._decoded:
                return []
            rest = self._decoded[0][0].ready + self._max_wait_s - perf_counter()
            # Who is being decoded may join: images of a batch are computed side by side, a single one by threads that wait for
            # each other. Nobody waits for a picture that has not arrived.
            self._changed.wait_for(lambda: len(self._decoded) >= self._batch or not self._coming or self._closing, rest)
            count = min(self._batch, len(self._decoded))
            found = [self._decoded.popleft() for _ in range(count)]
        for _ in found:
            self._ahead.release()
        return found

    def _run_network(self) -> None:
        while found := self._gather():
            jobs, now = [job for job, _ in found], perf_counter()
            for job in jobs:
                self._metrics.observe(self._name, "queue", now - job.ready)
            self._metrics.batch.labels(self._name).observe(len(jobs))
            try:
                first, start = True, perf_counter()
                for extracted in self._steps.extract([decoded for _, decoded in found]):
                    self._metrics.observe(self._name, "forward", perf_counter() - start)
                    self._extracted.put((jobs, extracted, first))
                    first, start = False, perf_counter()
            except Exception as error:  # outermost frame of a thread
                self._fail(jobs, error)
        self._extracted.put(None)

    def _run_search(self) -> None:
        while (item := self._extracted.get()) is not None:
            jobs, extracted, first = item
            if jobs[0].future.done():  # a part of it has failed before
                continue
            try:
                with self._metrics.stage(self._name, "score"):
                    scored = self._steps.score(extracted, first=first)
            except Exception as error:  # outermost frame of a thread
                self._fail(jobs, error)
                continue
            if scored is not None:
                self._scored.put(ScoredBatch(jobs, scored))
        self._scored.put(None)

    def _run_records(self) -> None:
        ended = False
        while not ended:
            batches = [self._scored.get()]
            while not self._scored.empty():
                batches.append(self._scored.get())
            ended = batches[-1] is None
            whole = [batch for batch in batches if batch is not None]
            if not whole:
                continue
            jobs = [job for batch in whole for job in batch.jobs]
            try:
                with self._metrics.stage(self._name, "record"):
                    records = self._steps.record(whole)
            except Exception as error:  # outermost frame of a thread
                self._fail(jobs, error)
                continue
            ended_well = [(job, record) for job, record in zip(jobs, records, strict=True) if isinstance(record, ScoredPicture)]
            self._end([job for job, _ in ended_well])
            for job, record in zip(jobs, records, strict=True):
                if isinstance(record, ConflictError):
                    self._fail([job], record)
            for job, record in ended_well:
                verdict = "unjudged" if record.alarm is None else "alarm" if record.alarm else "normal"
                self._metrics.verdicts.labels(self._name, verdict).inc()
                self._metrics.observe(self._name, "total", perf_counter() - job.begun)
                job.future.set_result(record)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        if not isinstance(error, SpadeError) and is_full(error):
            error = UnavailableError(f"the disk has no room: {error}; nothing was stored", 10)
        if not isinstance(error, SpadeError):
            _log.error("pictures of %s could not be scored", self._name, exc_info=error)
        is_readable = not isinstance(error, SpadeError) or isinstance(error, UnavailableError | ConflictError)
        kind = "failed" if is_readable else "unreadable"
        jobs = [job for job in jobs if not job.future.done()]
        self._metrics.verdicts.labels(self._name, kind).inc(len(jobs))
        self._end(jobs)
        for job in jobs:
            try:
                self._steps.drop(job.upload)
            except OSError as left:  # the next start removes it; who waits is answered, and the thread goes on
                _log.warning("what is left of picture %s cannot be removed: %s", job.upload.id, left)
            finally:
                job.future.set_exception(error)

    def _end(self, jobs: Sequence[Job]) -> None:
        """Make room for others."""
        with self._changed:
            self._taken -= len(jobs)
            self._metrics.waiting.labels(self._name).set(self._taken)
            self._changed.notify_all()
