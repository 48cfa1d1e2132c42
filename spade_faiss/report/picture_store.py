"""The pictures that were scored, kept for the report: the few that it shows, or all of them in a temporary file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from spade_faiss.core.types import Bools
from spade_faiss.report.pictures import Picture, shrink
from spade_faiss.report.selection import Values, shortlist


class PictureStore(Protocol):
    """Takes the pictures of a run batch by batch, and gives back those that its report shows."""

    def add(self, pictures: Sequence[Picture], image_score: Values, localized: Bools, defective: Bools | None) -> None:
        """Take the pictures of the next n images.

        Args:
            pictures: n pictures (H, W, 3), uint8.
            image_score: (n,) image scores.
            localized: (n,) whether an image has a map; only these are shown.
            defective: (n,) labels, or None.
        """
        ...

    def __getitem__(self, i: int) -> Picture:
        """The picture of the image that came as number `i`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class ShortlistedPictures:
    """Holds the pictures in memory that a report of `shown` images may show, see `selection.shortlist`; shrunk, if large."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._count = 0
        self._pictures: dict[int, Picture] = {}
        self._score: dict[int, float] = {}
        self._defective: dict[int, bool] = {}

    def add(self, pictures: Sequence[Picture], image_score: Values, localized: Bools, defective: Bools | None) -> None:
        """See `PictureStore.add`."""
        for i in np.flatnonzero(localized).tolist():
            self._pictures[self._count + i] = shrink(pictures[i])
            self._score[self._count + i] = float(image_score[i])
            if defective is not None:
                self._defective[self._count + i] = bool(defective[i])
        self._count += len(pictures)
        images = list(self._pictures)
        labels = None if defective is None else np.array([self._defective[i] for i in images], np.bool_)
        kept = shortlist(np.array([self._score[i] for i in images]), labels, self._shown)
        for i in {*images} - {images[place] for place in kept}:
            del self._pictures[i], self._score[i]

    def __getitem__(self, i: int) -> Picture:
        return self._pictures[i]

    def __len__(self) -> int:
        return len(self._pictures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pictures.clear()


class SpooledPictures:
    """Holds the pictures of all images that have a map, in a temporary file in `folder`."""

    def __init__(self, folder: Path) -> None:
        # Beside the results, which take as much room: a system's folder for temporary files is often in memory.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by __exit__
        self._count = 0
        # Where the picture of each image begins, and its shape.
        self._place: dict[int, tuple[int, tuple[int, ...]]] = {}

    def add(self, pictures: Sequence[Picture], image_score: Values, localized: Bools, defective: Bools | None) -> None:
        """See `PictureStore.add`."""
        for i in np.flatnonzero(localized).tolist():
            self._place[self._count + i] = self._file.seek(0, os.SEEK_END), pictures[i].shape
            self._file.write(np.ascontiguousarray(pictures[i]).data)
        self._count += len(pictures)

    def __getitem__(self, i: int) -> Picture:
        start, shape = self._place[i]
        self._file.seek(start)
        return np.frombuffer(self._file.read(math.prod(shape)), np.uint8).reshape(shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
