"""Holds what a backbone hands to the engine: for each image of a batch, an embedding and a feature map per pyramid level."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Source
from spade_faiss.core.roi import Roi
from spade_faiss.core.schema import check_at_least, shorten
from spade_faiss.core.types import IntArray
from spade_faiss.features.roi import cells_of

# The most bytes of an id, a path or a checksum: those of the longest path of any system. A report names an image many times.
LONGEST_TEXT = 1 << 15


@dataclass(frozen=True)
class Level:
    """One pyramid level: `channels` values at each of `height` x `width` locations, `stride` input pixels apart.

    `roi` says which of them are inspected, in a bank that has a region of interest: the others are neither stored nor searched.
    None inspects all. `extracted` is the number of channels that the backbone makes, in a bank whose codes have fewer numbers;
    None if they are stored and searched as they are. `packed_bytes` is what the codes of a vector take, in a bank that packs
    them; None where each number is stored by itself.
    """

    name: str
    channels: int
    stride: int
    height: int
    width: int
    roi: Roi | None = None
    extracted: int | None = None
    packed_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or "/" in self.name or self.name[:1] in ("", "."):
            raise InputError(f"level name {self.name!r} must be non-empty and printable, hold no '/', and not start with '.'")
        for name in ("channels", "stride", "height", "width"):
            check_at_least(f"level {self.name}: {name}", getattr(self, name), 1)
        if self.extracted is not None:
            check_at_least(f"level {self.name}: extracted", self.extracted, self.channels + 1)
        if self.packed_bytes is not None:
            check_at_least(f"level {self.name}: packed_bytes", self.packed_bytes, 1)
        if self.roi is not None and (self.roi.height, self.roi.width) != (self.height, self.width):
            raise InputError(
                f"level {self.name} has {self.height} x {self.width} locations, its region of interest "
                f"{self.roi.height} x {self.roi.width}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image's map, as the backbone makes it."""
        return self.height, self.width, self.channels if self.extracted is None else self.extracted

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of one image's map as it is stored: (height, width, channels), or (locations, channels) where a part is
        inspected; of packed codes, the last is `packed_bytes`.
        """
        last = self.channels if self.packed_bytes is None else self.packed_bytes
        return (self.height, self.width, last) if self.roi is None else (self.locations, last)

    @property
    def locations(self) -> int:
        """The number of locations that are inspected, of which each image has a vector."""
        return self.height * self.width if self.roi is None else len(cells_of(self.roi))

    @property
    def cells(self) -> IntArray:
        """(locations,), where they are in the map: `y * W + x`, ascending."""
        return np.arange(self.locations) if self.roi is None else cells_of(self.roi)


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """The features of n images, from our backbones or from any other extractor.

    Args:
        ids: n distinct, non-empty names.
        embedding: (n, d), the pooled feature of each image.
        levels: the maps of each pyramid level by its name, (n, H, W, C), channels last; once prepared for a bank that has a
            region of interest, (n, locations, C). Numbers of floating point, or int8 codes that a bank stores or stored.
        source: what made the features; if a bank knows its own source, the two must be equal.
        valid: (n, H, W) at the size of the input, False where nothing is inspected: in the margins of a letterbox, and, once
            prepared, outside of the bank's region of interest; score maps are 0 there. None says that everything is.
        paths: n image paths, relative to `root`; empty where there are no files.
        sha256: n hex digests of the image files; empty where there are no files.
        root: the folder that `paths` start from.
        pictures: n ids of the pictures that the entries were made of, where one picture may have several entries: views of it,
            or parts. The first entry of a picture is the original. Empty where each entry is a picture of its own.
        groups: n names of groups of pictures that belong together, such as several shots of one part; empty text for a picture
            that belongs to none. All entries of a picture have one group. Empty where no picture has one.
        places: (n, 4) int32, where the entries are tiles of pictures: see `tiles.TILE_COLUMNS`. All tiles of a picture follow
            each other, row by row. None where entries are whole pictures.
    """

    ids: Sequence[str]
    embedding: npt.NDArray[np.floating[Any]]
    levels: Mapping[str, npt.NDArray[Any]]
    source: Source | None = None
    valid: npt.NDArray[np.bool_] | None = field(default=None, kw_only=True)
    paths: Sequence[str] = field(default=(), kw_only=True)
    sha256: Sequence[str] = field(default=(), kw_only=True)
    root: str = field(default="", kw_only=True)
    pictures: Sequence[str] = field(default=(), kw_only=True)
    groups: Sequence[str] = field(default=(), kw_only=True)
    places: npt.NDArray[np.int32] | None = field(default=None, kw_only=True)

    @property
    def picture_ids(self) -> Sequence[str]:
        """The n ids of the pictures that the entries were made of: their own ids, unless `pictures` says otherwise."""
        return self.pictures or self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> FeatureBatch:
        """Return some of the images; arrays are views."""
        return replace(
            self,
            ids=self.ids[part],
            embedding=self.embedding[part],
            levels={name: maps[part] for name, maps in self.levels.items()},
            valid=None if self.valid is None else self.valid[part],
            paths=self.paths[part],
            sha256=self.sha256[part],
            pictures=self.pictures[part],
            groups=self.groups[part],
            places=None if self.places is None else self.places[part],
        )


def originals(batch: FeatureBatch) -> FeatureBatch:
    """The first entry of each picture under the picture's id; the batch itself where each entry is a picture of its own."""
    if not batch.pictures:
        return batch
    first = {name: place for place, name in reversed(list(enumerate(batch.pictures)))}
    found = concatenate([batch[place : place + 1] for place in sorted(first.values())])
    return replace(found, ids=found.pictures, pictures=())


def by_picture(batch: FeatureBatch) -> Iterator[FeatureBatch]:
    """Yield the entries of one picture after the other; arrays are views."""
    start = 0
    for _, entries in itertools.groupby(batch.picture_ids):
        end = start + len(list(entries))
        yield batch[start:end]
        start = end


def concatenate(batches: Sequence[FeatureBatch]) -> FeatureBatch:
    """Join batches that share their levels, source and root, and of which all or none have `valid`, and `places`."""
    valid = [batch.valid for batch in batches if batch.valid is not None]
    places = [batch.places for batch in batches if batch.places is not None]
    return replace(
        batches[0],
        ids=[name for batch in batches for name in batch.ids],
        embedding=np.concatenate([batch.embedding for batch in batches]),
        levels={level: np.concatenate([batch.levels[level] for batch in batches]) for level in batches[0].levels},
        valid=np.concatenate(valid) if valid else None,
        paths=[path for batch in batches for path in batch.paths],
        sha256=[digest for batch in batches for digest in batch.sha256],
        pictures=[name for batch in batches for name in batch.picture_ids] if any(batch.pictures for batch in batches) else (),
        groups=[name for batch in batches for name in batch.groups or [""] * len(batch)]
        if any(batch.groups for batch in batches)
        else (),
        places=np.concatenate(places) if places else None,
    )


def check_ids(ids: Sequence[str]) -> None:
    """Raise InputError for ids that are empty or repeated, or that HDF5 cannot hold."""
    check_strings("image id", ids)
    if "" in ids:
        raise InputError("an image id is empty; ids must be non-empty")
    if len(set(ids)) < len(ids):
        repeated = next(name for name, count in Counter(ids).items() if count > 1)
        raise InputError(f"image id {repeated!r} appears more than once in the batch; ids must be distinct")


def check_strings(name: str, values: Sequence[str]) -> None:
    """Raise InputError for strings that a bank cannot hold: with NUL, not valid Unicode, or longer than `LONGEST_TEXT`."""
    for value in values:
        if not isinstance(value, str) or "\0" in value:
            raise InputError(f"{name} {shorten(value)} must be a string without NUL")
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            raise InputError(f"{name} {shorten(value)} is not valid Unicode: {error.reason}") from error
        if size > LONGEST_TEXT:
            raise InputError(f"{name} {shorten(value)} takes {size} bytes, at most {LONGEST_TEXT}; make it shorter")
