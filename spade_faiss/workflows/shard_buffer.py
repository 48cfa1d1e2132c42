"""From features to shards: batches are gathered until a shard is full, and written while the network computes the next ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from spade_faiss.core.timing import Timings
from spade_faiss.features.batch import FeatureBatch, concatenate
from spade_faiss.features.layout import Layout, prepare
from spade_faiss.features.placement import Placement
from spade_faiss.features.stream import Extracted


class ShardBuffer:
    """Gathers batches into shards and writes them in a thread of its own, while the network computes the next ones.

    Args:
        write: writes a shard of prepared features.
        layout: the bank's.
        shard_bytes: how large a shard becomes.
        timings: takes the seconds of each stage.
    """

    def __init__(self, write: Callable[[FeatureBatch], object], layout: Layout, shard_bytes: int, timings: Timings) -> None:
        self._write = write
        self._layout = layout
        self._shard_bytes = shard_bytes
        self._timings = timings
        self._batches: list[FeatureBatch] = []
        self._bytes = 0
        self._whole = 0  # how many of the batches are of whole pictures
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._pending: Future[None] | None = None

    def fill(self, stream: Iterable[Extracted], group_of: Mapping[str, str]) -> list[Placement]:
        """Take all features of a stream; returns how its pictures lie in the input.

        Args:
            stream: the features.
            group_of: the group of each picture; empty where pictures have none.
        """
        placements: list[Placement] = []
        for extracted in stream:
            batch = extracted.batch
            if group_of:
                batch = replace(batch, groups=[group_of[name] for name in batch.picture_ids])
            self.add(batch, is_whole=bool(extracted.records))
            placements += (image.placement for image in extracted.loaded)
        return placements

    def add(self, batch: FeatureBatch, *, is_whole: bool) -> None:
        """Take a batch; `is_whole` says whether all entries of its pictures are there with it, so that a shard may end."""
        with self._timings("prepare"):
            prepared = prepare(batch, self._layout)
        self._batches.append(prepared)
        self._bytes += prepared.embedding.nbytes + sum(maps.nbytes for maps in prepared.levels.values())
        self._whole = len(self._batches) if is_whole else self._whole
        if is_whole and self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the pictures that were gathered, once the shard before has been written; a part of one is dropped."""
        self._wait()
        if whole := self._batches[: self._whole]:
            self._pending = self._pool.submit(self._write_shard, whole)
        self._batches, self._bytes, self._whole = [], 0, 0

    def _write_shard(self, batches: list[FeatureBatch]) -> None:
        with self._timings("write"):
            self._write(concatenate(batches))

    def _wait(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, None
            with self._timings("wait for write"):
                pending.result()

    def __enter__(self) -> ShardBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        # What was computed before an error or Ctrl-C is written too, so that the next run goes on from there.
        try:
            self.flush()
            self._wait()
        finally:
            self._pool.shutdown()
