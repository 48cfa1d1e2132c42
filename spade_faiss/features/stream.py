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

from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.copies import named
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.roi import Roi
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import Duplicate, ImageRecord, Skipped, check_skipped
from spade_faiss.features.decoding import MAX_PIXELS, naming_file
from spade_faiss.features.frames import Frame
from spade_faiss.features.memory import MemoryGate
from spade_faiss.features.pictures import LoadedImage, load_bytes, load_views, to_input
from spade_faiss.features.roi import mask_of
from spade_faiss.features.roi_files import place_roi
from spade_faiss.features.roi_folder import find_rois
from spade_faiss.features.tiles import Places, TileGrid, cut_out, tile_id
from spade_faiss.features.views import View, view_id

# Beside the batch that is used and the one that the network computes.
_BATCHES_AHEAD = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Extracted:
    """The features of some images, with their records and the pictures that the backbone saw.

    With an augmentation, the batch holds the features of their views as well, those of an image one after the other. Of an
    image that is cut into tiles, several batches may hold the features: its record and its picture are with the last.
    """

    records: list[ImageRecord]
    loaded: list[LoadedImage]
    batch: FeatureBatch


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image that is ready for the network.

    Args:
        record: the image.
        loaded: its picture.
        views: the views of that.
        x: the (3, H, W) float32 inputs that are made of the picture and its views; none if its tiles are the inputs.
        own_roi: what of the picture is its own region of interest; such pictures have neither views nor tiles.
    """

    record: ImageRecord
    loaded: LoadedImage
    views: list[View]
    x: list[FloatArray]
    own_roi: Roi | None

    @property
    def ids(self) -> list[str]:
        """The ids of the entries that are made of it."""
        return [self.record.id, *(view_id(self.record.id, view.name) for view in self.views)]

    @property
    def valid(self) -> Bools:
        """(1 + views, H, W), where the inputs are inspected."""
        shown = self.loaded.placement.valid
        inspected = shown if self.own_roi is None else shown & mask_of(self.own_roi)
        return np.stack([inspected, *(view.valid for view in self.views)])


@dataclass(frozen=True, eq=False)
class _Job:
    """What the network computes next.

    Args:
        images: images, with all of their views; one image where places are given.
        places: (n, 4) which tiles of that it is; None for whole images.
        is_last: whether no tiles of that follow.
    """

    images: Sequence[Decoded]
    places: Places | None = None
    is_last: bool = True

    @property
    def entries(self) -> list[tuple[Decoded, str]]:
        """The image and the id of each entry that is made of them."""
        if self.places is None:
            return [(image, name) for image in self.images for name in image.ids]
        (image,) = self.images
        return [(image, tile_id(image.record.id, place)) for place in self.places.tolist()]


_Decoding = Sequence[tuple[ImageRecord, "Future[Decoded]"]]


class FeatureStream:
    """Computes the features of images, in order, `batch_size` inputs at a time.

    All inputs that are made of an image are in one batch, which is as many larger where `batch_size` are not enough for one;
    those of an image that is cut into tiles are in as many batches as it takes.

    Images that cannot be read are left out and listed in `skipped`. Images whose content is known already are left out and
    listed in `duplicates`.

    Args:
        backbone: computes the features.
        run: says how many images may be skipped, whether progress is shown, and how much memory the images may take that are
            decoded at the same time; an image that takes more by itself is skipped.
        batch_size: inputs that the network takes at once; a batch has fewer where images were left out, and at the end of an
            image that is cut into tiles.
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

    def __call__(
        self, root: Path, records: Sequence[ImageRecord], label: str, augmentation: Augmentation | None = None
    ) -> Generator[Extracted, None, None]:
        """Yield the features of `records`.

        Args:
            root: the folder that the ids of the records start from.
            records: what to read, in this order.
            label: the title of the progress bar.
            augmentation: the views that are made of each image; None for the image alone.

        Raises:
            InputError: if more images than allowed were skipped, or all of them, or if one has no mask in `run.roi`.
        """
        if self._rois is not None:
            self._rois.check(records)
        with (
            progress_bar(len(records), label, self._run.progress) as bar,
            closing(self._decode_ahead(records, augmentation)) as batches,
            closing(self._compute_ahead(batches, root)) as computed,
        ):
            for done, extracted in computed:
                if extracted is not None:
                    yield extracted.result()
                bar.update(done)
        if records and len(self.skipped) == len(records) and not self._allow_none:
            raise InputError(f"none of the {len(records)} images could be read; the first: {self.skipped[0].reason}")

    def _compute_ahead(
        self, batches: Iterator[_Decoding], root: Path
    ) -> Generator[tuple[int, Future[Extracted] | None], None, None]:
        """Yield job after job whose features are being computed, each once the next one has begun, too, with the number of
        records that are done with it; None for a batch of which no image is left.
        """
        ahead: deque[tuple[int, Future[Extracted] | None]] = deque()
        last: Future[Extracted] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="forward") as pool:
            for futures in batches:
                try:
                    decoded = self._collect(futures)
                except BaseException:
                    yield from ahead  # what was computed before an error is used before it is raised
                    raise
                jobs: list[_Job | None] = [*self._jobs(decoded)] or [None]
                for job in jobs:
                    if job is not None:
                        last = pool.submit(self._compute_after, last, job, root)
                    ahead.append((len(futures) if job is None or job.is_last else 0, None if job is None else last))
                    if len(ahead) > 1:
                        yield ahead.popleft()
            yield from ahead

    def _jobs(self, decoded: Sequence[Decoded]) -> list[_Job]:
        """Split a batch of decoded images into what the network computes at once."""
        if self._preprocess.tile is None or not decoded:
            return [_Job(decoded)] if decoded else []
        (image,) = decoded
        places = TileGrid.of(image.loaded.placement.size, self._preprocess).places
        starts = range(0, len(places), self._batch_size)
        return [_Job(decoded, places[start : start + self._batch_size], start == starts[-1]) for start in starts]

    def _decode_ahead(
        self, records: Sequence[ImageRecord], augmentation: Augmentation | None
    ) -> Generator[_Decoding, None, None]:
        """Yield batch after batch of images that are being decoded, each while the next ones are decoded, too."""
        ahead: deque[_Decoding] = deque()
        # An image that is cut into tiles is large: one is decoded while another one is used.
        views = 1 if augmentation is None else augmentation.views
        size = max(1, self._batch_size // views) if self._preprocess.tile is None else 1
        with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode") as pool:
            try:
                for start in range(0, len(records), size):
                    part = records[start : start + size]
                    ahead.append([(record, pool.submit(self.decode, record, augmentation)) for record in part])
                    if len(ahead) == _BATCHES_AHEAD:
                        yield ahead.popleft()
                while ahead:
                    yield ahead.popleft()
            finally:
                pool.shutdown(cancel_futures=True)

    def decode(self, record: ImageRecord, augmentation: Augmentation | None = None, *, max_pixels: int = MAX_PIXELS) -> Decoded:
        """Decode an image, and the views of it; for whoever has no list of images, but one after the other.

        Raises:
            InputError: if it cannot be used; it names the file and the reason.
        """
        needed = load_bytes(record, self._preprocess, max_pixels=max_pixels, augmentation=augmentation)
        with naming_file(record.path), self._gate.hold(needed), self._timings("decode"):
            preprocess = self._preprocess if self._rois is None else self._rois.preprocess(record, self._preprocess)
            loaded, views = load_views(record, preprocess, augmentation, max_pixels=max_pixels)
            pictures = [loaded.picture, *(view.picture for view in views)] if preprocess.tile is None else []
            x = [to_input(picture, preprocess) for picture in pictures]
            return Decoded(record, loaded, views, x, None if self._rois is None else place_roi(preprocess))

    def extract(self, decoded: Sequence[Decoded], root: Path) -> Iterator[Extracted]:
        """Yield the features of images that were decoded, at most as many as the network takes at once: one if it is in tiles.

        Args:
            decoded: what `decode` returned.
            root: the folder that the paths of the images start from.
        """
        for job in self._jobs(decoded):
            yield self._compute(job, root)

    def _collect(self, futures: Sequence[tuple[ImageRecord, Future[Decoded]]]) -> list[Decoded]:
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

    def _compute_after(self, before: Future[Extracted] | None, job: _Job, root: Path) -> Extracted:
        """Compute the features of a job, unless the job before it failed: then nobody will ask for them."""
        if before is not None and before.exception() is not None:
            raise CancelledError
        return self._compute(job, root)

    def _compute(self, job: _Job, root: Path) -> Extracted:
        with self._timings("forward"):
            embedding, levels = self._forward(np.stack(self._inputs(job)))
        records, loaded = [image.record for image in job.images], [image.loaded for image in job.images]
        are_files = not any(isinstance(record, Frame) for record in records)
        # Only a letterbox leaves margins.
        in_part = self._preprocess.resize_mode == "letterbox" or self._rois is not None
        of = [image for image, _ in job.entries]
        batch = FeatureBatch(
            [name for _, name in job.entries],
            embedding,
            levels,
            self._backbone.source,
            valid=np.concatenate([image.valid for image in job.images]) if in_part else None,
            paths=[os.path.relpath(image.record.path, root) for image in of] if are_files else (),
            sha256=[image.loaded.sha256 for image in of] if are_files else (),
            root=named(str(root.resolve())) if are_files else "",
            pictures=[image.record.id for image in of] if job.places is not None or len(of) > len(records) else (),
            places=job.places,
        )
        return Extracted(records, loaded, batch) if job.is_last else Extracted([], [], batch)

    def _inputs(self, job: _Job) -> list[FloatArray]:
        """The (3, H, W) inputs of a job."""
        if job.places is None:
            return [x for image in job.images for x in image.x]
        (image,), size = job.images, self._preprocess.input_size[0]
        tiles = [cut_out(image.loaded.picture, left, top, size) for left, top, *_ in job.places.tolist()]
        return [to_input(tile, self._preprocess) for tile in tiles]

    def _forward(self, x: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Run the network on any number of inputs, `batch_size` at a time."""
        if len(x) <= self._batch_size:
            return self._backbone(x)
        parts = [self._backbone(x[start : start + self._batch_size]) for start in range(0, len(x), self._batch_size)]
        embedding = np.concatenate([part[0] for part in parts])
        return embedding, {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
