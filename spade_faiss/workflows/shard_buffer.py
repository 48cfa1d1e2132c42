"""From features to shards: batches are gathered until a shard is full, and written while the network computes the next ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from spade_faiss.core.timing import Timings
from spade_faiss.features.batch import FeatureBatch, concatenate
from spade_faiss.features.layout import Layout, prepare
from spade_faiss.features.placement import Placement
from spade_faiss.features.stream import Extracted


class Belonging(NamedTuple):
    """Where pictures belong, by their ids.

    Attributes:
        group_of: the group of each; empty where pictures have none.
        product_of: the product of each; empty where there are none.
    """

    group_of: Mapping[str, str]
    product_of: Mapping[str, str]

    def part(self, names: Iterable[str]) -> Belonging:
        """Where some of the pictures belong."""
        listed = list(names)
        return Belonging(*({name: of[name] for name in listed} if of else {} for of in self))


class ShardBuffer:
    """Gathers batches into shards and writes them in a thread of its own, while the network computes the next ones.

    Args:
        write: writes a shard of prepared features, which are of one product.
        layout: the bank's.
        shard_bytes: how large a shard becomes.
        timings: takes the seconds of each stage.
    """

    def __init__(
        self, write: Callable[[FeatureBatch, str], object], layout: Layout, shard_bytes: int, timings: Timings
    ) -> None:
        self._write = write
        self._layout = layout
        self._shard_bytes = shard_bytes
        self._timings = timings
        self._batches: list[FeatureBatch] = []
        self._bytes = 0
        self._product = ""
        self._whole = 0  # how many of the batches are of whole pictures
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._pending: Future[None] | None = None

    def fill(self, stream: Iterable[Extracted], belongs: Belonging) -> list[Placement]:
        """Take all features of a stream; returns how its pictures lie in the input.

        Args:
            stream: the features.
            belongs: where the pictures belong.
        """
        placements: list[Placement] = []
        for extracted in stream:
            batch = extracted.batch
            if belongs.group_of:
                batch = replace(batch, groups=[belongs.group_of[name] for name in batch.picture_ids])
            for part, product in _by_product(batch, belongs.product_of):
                self.add(part, is_whole=bool(extracted.records), product=product)
            placements += (image.placement for image in extracted.loaded)
        return placements

    def add(self, batch: FeatureBatch, *, is_whole: bool, product: str = "") -> None:
        """Take a batch; `is_whole` says whether all entries of its pictures are there with it, so that a shard may end.

        A shard ends where another product begins.
        """
        if product != self._product:
            self.flush()
            self._product = product
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
            self._pending = self._pool.submit(self._write_shard, whole, self._product)
        self._batches, self._bytes, self._whole = [], 0, 0

    def _write_shard(self, batches: list[FeatureBatch], product: str) -> None:
        with self._timings("write"):
            self._write(concatenate(batches), product)

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


def _by_product(batch: FeatureBatch, product_of: Mapping[str, str]) -> Iterator[tuple[FeatureBatch, str]]:
    """The parts of a batch that are of one product each; the batch itself where there are no products."""
    if not product_of:
        yield batch, ""
        return
    start = 0
    for product, entries in itertools.groupby(batch.picture_ids, lambda name: product_of[name]):
        end = start + len(list(entries))
        yield batch[start:end], product
        start = end
