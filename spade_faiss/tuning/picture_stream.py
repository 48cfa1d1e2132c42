"""Computes the features of pictures as they are spoilt; those that cannot be read are skipped, as `fit` skips them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.progress import Bar, progress_bar
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import ImageRecord, Skipped, check_skipped
from spade_faiss.features.decoding import MAX_PIXELS, decode, naming_file
from spade_faiss.features.frames import Frame
from spade_faiss.features.pages import split_page
from spade_faiss.features.pictures import Picture
from spade_faiss.features.pixels import to_rgb
from spade_faiss.features.placement import Placement
from spade_faiss.features.stream import FeatureStream

# Of larger pictures a smaller copy is spoilt: the network sees no more of them.
_LONGEST_SIDE = 1024
_BATCH = 16

_log = logging.getLogger(__name__)


def longest_side(input_sizes: Sequence[tuple[int, int]]) -> int:
    """The longest side of a picture as it is spoilt, for inputs of these heights and widths."""
    return max(_LONGEST_SIDE, *(2 * max(size) for size in input_sizes))


def input_name(backbone: Backbone) -> str:
    """A backbone and its input, in a few words."""
    preprocess = backbone.source.preprocess
    size = preprocess.size
    shown = f"{size[0]}x{size[1]}" if isinstance(size, tuple) else str(size)
    enlarged = f" of {preprocess.resize}" if preprocess.resize_mode == "crop" and "resize" not in preprocess.derived else ""
    return f"{backbone.source.backbone}; {preprocess.resize_mode} {shown}{enlarged}"


@dataclass(frozen=True, eq=False)
class Computed:
    """Some pictures that could be read: their records, features, where each lies in the input, and the inputs as pictures."""

    records: list[ImageRecord]
    batch: FeatureBatch
    placements: list[Placement]
    pictures: list[Picture]


@dataclass(frozen=True, eq=False)
class PicturesOf:
    """Reads pictures as they are spoilt, and computes their features.

    Args:
        backbone: computes features.
        run: how images are read, and how many of them may be skipped.
        longest: the longest side of a picture as it is spoilt, see `longest_side`.
    """

    backbone: Backbone
    run: Run
    longest: int

    @contextmanager
    def stream(self, count: int, label: str) -> Iterator[PictureStream]:
        """Make a stream of so many pictures, with a bar that names them and the input."""
        with progress_bar(count, f"{label}, {input_name(self.backbone)}", self.run.progress) as bar:
            yield PictureStream(self, bar)

    def read(self, record: ImageRecord) -> Picture:
        """(H, W, 3) the picture as it is spoilt: upright, in RGB of 8 bits, and not larger than it has to be.

        Raises:
            InputError: if it cannot be read.
        """
        file, page = split_page(record.path)
        with naming_file(record.path):
            image = to_rgb(decode(file.read_bytes(), MAX_PIXELS, page), self.backbone.source.preprocess.bit_depth)
        if max(image.size) > self.longest:
            factor = self.longest / max(image.size)
            size = (max(1, round(image.size[0] * factor)), max(1, round(image.size[1] * factor)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        return np.asarray(image)


class PictureStream:
    """Computes features of records a few at a time, without their names: sets may have the same.

    Args:
        pictures: reads them, and has the backbone.
        bar: advances by each picture.
    """

    def __init__(self, pictures: PicturesOf, bar: Bar) -> None:
        self._pictures, self._bar, run = pictures, bar, pictures.run
        self._run = Run(device=run.device, memory=run.memory, max_skipped=run.max_skipped)
        self._skipped: list[Skipped] = []

    def __call__(self, records: Sequence[ImageRecord]) -> Iterator[Computed]:
        """Yield the features of some pictures after the other.

        Raises:
            InputError: if more pictures were skipped than `Run.max_skipped` allows.
        """
        for start in range(0, len(records), _BATCH):
            own: dict[int, ImageRecord] = {}
            frames = []
            for record in records[start : start + _BATCH]:
                if (frame := self._frame(record)) is not None:
                    own[id(frame)] = record
                    frames.append(frame)
            stream = FeatureStream(self._pictures.backbone, self._run, batch_size=_BATCH, timings=Timings(), allow_none=True)
            for extracted in stream(Path(), frames, "features"):
                yield Computed(
                    [own[id(frame)] for frame in extracted.records],
                    extracted.batch,
                    [image.placement for image in extracted.loaded],
                    [image.picture for image in extracted.loaded],
                )
            for skipped in stream.skipped:
                self._skip(skipped)
            self._bar.update(len(records[start : start + _BATCH]))

    def _frame(self, record: ImageRecord) -> Frame | None:
        if isinstance(record, Frame):
            return record
        try:
            return Frame(record.id, record.path, pixels=self._pictures.read(record))
        except InputError as error:
            _log.warning("skipped %s", error)
            self._skip(Skipped(record.id, str(error)))
            return None

    def _skip(self, skipped: Skipped) -> None:
        self._skipped.append(skipped)
        check_skipped(self._skipped, self._run.max_skipped)
