"""Features of images, in order: threads decode ahead while the network computes."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.images import ImageRecord, Loaded, Skipped, check_skipped, load, to_input

_BATCHES_AHEAD = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Extracted:
    """The features of some images, their records, and the pictures that the backbone saw."""

    records: list[ImageRecord]
    loaded: list[Loaded]
    batch: FeatureBatch


@dataclass(frozen=True)
class Duplicate:
    """An image whose content is in the bank already, under the id `of`."""

    id: str
    of: str


class FeatureStream:
    """Features of images, in order, `batch_size` at a time: threads decode ahead while the network computes.

    Images that cannot be read are left out and listed in `skipped`; more than `run.max_skipped` of them stop the stream, and
    so does a stream of nothing else, unless `allow_none`. Where `known` is given, images whose content it names, by sha256, or
    that came before, are left out and listed in `duplicates`.
    """

    def __init__(
        self,
        backbone: Backbone,
        run: Run,
        *,
        batch_size: int,
        timings: Timings,
        allow_none: bool = False,
        known: dict[str, str] | None = None,
    ) -> None:
        self.skipped: list[Skipped] = []
        self.duplicates: list[Duplicate] = []
        self._backbone = backbone
        self._preprocess = backbone.source.preprocess
        self._run = run
        self._batch_size = batch_size
        self._timings = timings
        self._allow_none = allow_none
        self._known = known

    def __call__(self, root: Path, records: Sequence[ImageRecord], label: str) -> Iterator[Extracted]:
        """Yield the features of `records`.

        Args:
            root: the folder that the ids of the records start from.
            records: what to read, in this order.
            label: what the progress bar says.

        Raises:
            InputError: when more images than allowed were skipped, or all of them.
        """
        parts = [records[start : start + self._batch_size] for start in range(0, len(records), self._batch_size)]
        with (
            ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode") as pool,
            progress_bar(len(records), label, self._run.progress) as bar,
        ):
            ahead: deque[list[Future[_Input]]] = deque()
            waiting = iter(parts)
            try:
                for part in parts:
                    for coming in islice(waiting, _BATCHES_AHEAD - len(ahead)):
                        ahead.append([pool.submit(self._load, record) for record in coming])
                    if inputs := self._collect(part, ahead.popleft()):
                        yield self._forward(inputs, root)
                    bar.update(len(part))
            finally:
                pool.shutdown(cancel_futures=True)
        if records and len(self.skipped) == len(records) and not self._allow_none:
            raise InputError(f"none of the {len(records)} images could be read; the first: {self.skipped[0].reason}")

    def _load(self, record: ImageRecord) -> _Input:
        with self._timings("decode"):
            loaded = load(record, self._preprocess)
            return _Input(record, loaded, to_input(loaded.picture, self._preprocess))

    def _collect(self, records: Sequence[ImageRecord], futures: Sequence[Future[_Input]]) -> list[_Input]:
        inputs = []
        with self._timings("wait for decode"):
            for record, future in zip(records, futures, strict=True):
                try:
                    found = future.result()
                except InputError as error:
                    _log.warning("skipped %s", error)
                    self.skipped.append(Skipped(record.id, str(error)))
                    check_skipped(self.skipped, self._run.max_skipped)
                    continue
                known = {} if self._known is None else self._known
                if (first := known.setdefault(found.loaded.sha256, record.id)) != record.id:
                    self.duplicates.append(Duplicate(record.id, first))
                else:
                    inputs.append(found)
        return inputs

    def _forward(self, inputs: Sequence[_Input], root: Path) -> Extracted:
        with self._timings("forward"):
            embedding, levels = self._backbone(np.stack([item.x for item in inputs]))
        records, loaded = [item.record for item in inputs], [item.loaded for item in inputs]
        # Only letterbox leaves margins.
        has_margins = self._preprocess.resize_mode == "letterbox"
        batch = FeatureBatch(
            [record.id for record in records],
            embedding,
            levels,
            self._backbone.source,
            valid=np.stack([item.placement.valid for item in loaded]) if has_margins else None,
            paths=[os.path.relpath(record.path, root) for record in records],
            sha256=[item.sha256 for item in loaded],
            root=str(root.resolve()),
        )
        return Extracted(records, loaded, batch)


class _Input(NamedTuple):
    record: ImageRecord
    loaded: Loaded
    x: FloatArray
