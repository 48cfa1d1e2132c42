"""Streams features of images, in order: threads decode ahead and the network computes ahead of who uses the features."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.roi import Roi
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import Duplicate, ImageRecord, Skipped, check_skipped
from spade_faiss.features.decoding import naming_file
from spade_faiss.features.frames import Frame
from spade_faiss.features.memory import MemoryGate
from spade_faiss.features.pictures import LoadedImage, load_bytes, load_image, to_input
from spade_faiss.features.roi import Bools, mask_of
from spade_faiss.features.roi_files import place_roi
from spade_faiss.features.roi_folder import find_rois

# Beside the batch that is used and the one that the network computes.
_BATCHES_AHEAD = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Extracted:
    """The features of some images, with their records and the pictures that the backbone saw."""

    records: list[ImageRecord]
    loaded: list[LoadedImage]
    batch: FeatureBatch


@dataclass(frozen=True, eq=False)
class _Decoded:
    """An image that is ready for the network: `x` is its input, (3, H, W) float32; `own_roi` what of it is its own region."""

    record: ImageRecord
    loaded: LoadedImage
    x: FloatArray
    own_roi: Roi | None

    @property
    def inspected(self) -> Bools:
        """(H, W), where the input is inspected."""
        valid = self.loaded.placement.valid
        return valid if self.own_roi is None else valid & mask_of(self.own_roi)


_Decoding = Sequence[tuple[ImageRecord, "Future[_Decoded]"]]


class FeatureStream:
    """Computes the features of images, in order, `batch_size` at a time.

    Images that cannot be read are left out and listed in `skipped`. Images whose content is known already are left out and
    listed in `duplicates`.

    Args:
        backbone: computes the features.
        run: says how many images may be skipped, whether progress is shown, and how much memory the images may take that are
            decoded at the same time; an image that takes more by itself is skipped.
        batch_size: images that the network takes at once; a batch has fewer where some of them were left out.
        timings: takes the seconds of each stage.
        allow_none: whether a stream may end with all of its images skipped.
        known: the id of each known image, by the sha256 of its file. The images of the stream are added to it. With None,
            images are not compared.

    Raises:
        InputError: if images of the backbone's bank have regions of interest of their own, and `run.roi` is missing, or the
            other way round.
        NotFoundError: if `run.roi` is no folder.
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
        self._rois = find_rois(self._preprocess, run.roi)
        self._gate = MemoryGate(parse_bytes(run.memory))

    def __call__(self, root: Path, records: Sequence[ImageRecord], label: str) -> Iterator[Extracted]:
        """Yield the features of `records`.

        Args:
            root: the folder that the ids of the records start from.
            records: what to read, in this order.
            label: the title of the progress bar.

        Raises:
            InputError: if more images than allowed were skipped, or all of them, or if one has no mask in `run.roi`.
        """
        if self._rois is not None:
            self._rois.check(records)
        with (
            progress_bar(len(records), label, self._run.progress) as bar,
            closing(self._decode_ahead(records)) as batches,
            closing(self._compute_ahead(batches, root)) as computed,
        ):
            for futures, extracted in computed:
                if extracted is not None:
                    yield extracted.result()
                bar.update(len(futures))
        if records and len(self.skipped) == len(records) and not self._allow_none:
            raise InputError(f"none of the {len(records)} images could be read; the first: {self.skipped[0].reason}")

    def _compute_ahead(
        self, batches: Iterator[_Decoding], root: Path
    ) -> Generator[tuple[_Decoding, Future[Extracted] | None], None, None]:
        """Yield batch after batch whose features are being computed, each once the next one has begun, too; None for a batch of
        which no image is left.
        """
        ahead: deque[tuple[_Decoding, Future[Extracted] | None]] = deque()
        last: Future[Extracted] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="forward") as pool:
            for futures in batches:
                try:
                    decoded = self._collect(futures)
                except BaseException:
                    yield from ahead  # what was computed before an error is used before it is raised
                    raise
                if decoded:
                    last = pool.submit(self._compute_after, last, decoded, root)
                ahead.append((futures, last if decoded else None))
                if len(ahead) > 1:
                    yield ahead.popleft()
            yield from ahead

    def _decode_ahead(self, records: Sequence[ImageRecord]) -> Generator[_Decoding, None, None]:
        """Yield batch after batch of images that are being decoded, each while the next ones are decoded, too."""
        ahead: deque[_Decoding] = deque()
        with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode") as pool:
            try:
                for start in range(0, len(records), self._batch_size):
                    part = records[start : start + self._batch_size]
                    ahead.append([(record, pool.submit(self._decode, record)) for record in part])
                    if len(ahead) == _BATCHES_AHEAD:
                        yield ahead.popleft()
                while ahead:
                    yield ahead.popleft()
            finally:
                pool.shutdown(cancel_futures=True)

    def _decode(self, record: ImageRecord) -> _Decoded:
        needed = load_bytes(record, self._preprocess)
        with naming_file(record.path), self._gate.hold(needed), self._timings("decode"):
            preprocess = self._preprocess if self._rois is None else self._rois.preprocess(record, self._preprocess)
            loaded = load_image(record, preprocess)
            own_roi = None if self._rois is None else place_roi(preprocess)
            return _Decoded(record, loaded, to_input(loaded.picture, preprocess), own_roi)

    def _collect(self, futures: Sequence[tuple[ImageRecord, Future[_Decoded]]]) -> list[_Decoded]:
        """Wait for the images of a batch; those that cannot be read or are known already are left out."""
        decoded = []
        with self._timings("wait for decode"):
            for record, future in futures:
                try:
                    image = future.result()
                except InputError as error:
                    _log.warning("skipped %s", error)
                    self.skipped.append(Skipped(record.id, str(error)))
                    check_skipped(self.skipped, self._run.max_skipped)
                    continue
                first = record.id if self._known is None else self._known.setdefault(image.loaded.sha256, record.id)
                if first != record.id:
                    self.duplicates.append(Duplicate(record.id, first))
                else:
                    decoded.append(image)
        return decoded

    def _compute_after(self, before: Future[Extracted] | None, decoded: Sequence[_Decoded], root: Path) -> Extracted:
        """Compute the features of a batch, unless the batch before it failed: then nobody will ask for them."""
        if before is not None and before.exception() is not None:
            raise CancelledError
        return self._compute(decoded, root)

    def _compute(self, decoded: Sequence[_Decoded], root: Path) -> Extracted:
        with self._timings("forward"):
            embedding, levels = self._backbone(np.stack([image.x for image in decoded]))
        records, loaded = [image.record for image in decoded], [image.loaded for image in decoded]
        are_files = not any(isinstance(record, Frame) for record in records)
        # Only a letterbox leaves margins.
        in_part = self._preprocess.resize_mode == "letterbox" or self._rois is not None
        batch = FeatureBatch(
            [record.id for record in records],
            embedding,
            levels,
            self._backbone.source,
            valid=np.stack([image.inspected for image in decoded]) if in_part else None,
            paths=[os.path.relpath(record.path, root) for record in records] if are_files else (),
            sha256=[image.sha256 for image in loaded] if are_files else (),
            root=str(root.resolve()) if are_files else "",
        )
        return Extracted(records, loaded, batch)
