"""What a backbone hands to the engine: an embedding and one feature map a pyramid level, for a batch of images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from spade_faiss.config import DTYPES, NORMALIZE, Source, check_at_least, check_choice
from spade_faiss.errors import InputError

FloatArray = npt.NDArray[np.float32]

# Of any feature: the squared distance of two vectors of these must stay within float32.
_LARGEST = 2e16


@dataclass(frozen=True)
class Level:
    """One pyramid level: `channels` values at each of `height` x `width` locations, `stride` input pixels apart."""

    name: str
    channels: int
    stride: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or "/" in self.name or self.name[:1] in ("", "."):
            raise InputError(f"level name {self.name!r} must be non-empty and printable, hold no '/', and not start with '.'")
        for name in ("channels", "stride", "height", "width"):
            check_at_least(f"level {self.name}: {name}", getattr(self, name), 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image's map."""
        return self.height, self.width, self.channels


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """The features of n images, from our backbones or from any other extractor.

    Args:
        ids: n distinct, non-empty names.
        embedding: (n, d), the pooled feature of each image.
        levels: for each pyramid level by name, (n, H, W, C): channels last.
        source: who made the features; where a bank knows its own source, the two must be equal.
        valid: (n, H, W) at the input's size, False where the input shows no image (letterbox's margins): maps are 0 there.
            None: it shows the image everywhere.
        paths: n image paths, relative to `root`; empty where there are no files.
        sha256: n hex digests of the image files; empty where there are no files.
        root: the folder that `paths` start from.
    """

    ids: Sequence[str]
    embedding: npt.NDArray[np.floating[Any]]
    levels: Mapping[str, npt.NDArray[np.floating[Any]]]
    source: Source | None = None
    valid: npt.NDArray[np.bool_] | None = field(default=None, kw_only=True)
    paths: Sequence[str] = field(default=(), kw_only=True)
    sha256: Sequence[str] = field(default=(), kw_only=True)
    root: str = field(default="", kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> FeatureBatch:
        """Some of the images: views."""
        return replace(
            self,
            ids=self.ids[part],
            embedding=self.embedding[part],
            levels={name: maps[part] for name, maps in self.levels.items()},
            valid=None if self.valid is None else self.valid[part],
            paths=self.paths[part],
            sha256=self.sha256[part],
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What every feature of a bank has in common, and how its maps are prepared before they are stored or searched.

    `input_size`: (height, width) of the backbone's input, the size of score maps. `dtype`: of stored level maps.
    `pool`: side of the square neighbourhood that each location is averaged over (1: none). `normalize`: `l2` scales each
    location's vector to unit length. Queries pass through the same preparation, rounding to `dtype` included, so that an
    image meets itself at distance 0.
    """

    levels: tuple[Level, ...]
    embedding_dim: int
    input_size: tuple[int, int]
    dtype: str = "float16"
    normalize: str = "none"
    pool: int = 1

    @property
    def image_bytes(self) -> int:
        """Of one image's features as they are stored."""
        values = sum(math.prod(level.shape) for level in self.levels)
        return 4 * self.embedding_dim + values * np.dtype(self.dtype).itemsize

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError("a bank needs at least one level")
        names = [level.name for level in self.levels]
        if len(set(names)) < len(names):
            raise InputError(f"level names must be distinct, got {names}")
        check_at_least("embedding_dim", self.embedding_dim, 1)
        if not isinstance(self.input_size, tuple) or len(self.input_size) != 2:
            raise InputError(f"input_size={self.input_size!r} must be a tuple (height, width)")
        for side in self.input_size:
            check_at_least("input_size", side, 1)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("normalize", self.normalize, NORMALIZE)
        check_at_least("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise InputError(f"pool={self.pool} must be odd, so that the neighbourhood has a centre")


def prepare(batch: FeatureBatch, layout: Layout) -> FeatureBatch:
    """Check a batch against a bank's layout and bring it into the form that is stored and searched.

    Returns:
        The batch with a float32 embedding and maps that are pooled, normalised and of `layout.dtype`.

    Raises:
        InputError: for shapes that differ from the layout, missing or unknown levels, ids that are empty or repeated, ids or
            paths that hold a NUL or are not valid Unicode, values that are not finite, or values beyond the range of float32,
            or of float16 where maps are stored so.
    """
    n = len(batch)
    if n == 0:
        raise InputError("a feature batch needs at least one image")
    check_ids(batch.ids)
    for name in ("paths", "sha256"):
        if len(getattr(batch, name)) not in (0, n):
            raise InputError(f"a batch of {n} images has {len(getattr(batch, name))} {name}")
        _check_strings(name, getattr(batch, name))
    _check_strings("root", [batch.root])
    shape = (n, *layout.input_size)
    if batch.valid is not None and (batch.valid.dtype != np.bool_ or batch.valid.shape != shape):
        raise InputError(f"valid is {batch.valid.dtype} of shape {batch.valid.shape}, expected bool of shape {shape}")
    embedding = _to_float32("embedding", np.asarray(batch.embedding), (n, layout.embedding_dim))
    if set(batch.levels) != {level.name for level in layout.levels}:
        expected = [level.name for level in layout.levels]
        raise InputError(f"the batch has levels {sorted(batch.levels)}, the bank has {expected}")
    maps = {level.name: _prepare_maps(level, np.asarray(batch.levels[level.name]), n, layout) for level in layout.levels}
    return replace(batch, embedding=embedding, levels=maps)


def concatenate(batches: Sequence[FeatureBatch]) -> FeatureBatch:
    """One batch of several that share their levels, source and root, and of which all or none have `valid`."""
    valid = [batch.valid for batch in batches if batch.valid is not None]
    return replace(
        batches[0],
        ids=[name for batch in batches for name in batch.ids],
        embedding=np.concatenate([batch.embedding for batch in batches]),
        levels={level: np.concatenate([batch.levels[level] for batch in batches]) for level in batches[0].levels},
        valid=np.concatenate(valid) if valid else None,
        paths=[path for batch in batches for path in batch.paths],
        sha256=[digest for batch in batches for digest in batch.sha256],
    )


def _prepare_maps(level: Level, maps: npt.NDArray[Any], n: int, layout: Layout) -> npt.NDArray[Any]:
    values = _to_float32(f"level {level.name!r}", maps, (n, *level.shape))
    if layout.pool > 1:
        # The mean of those neighbours that exist: at the border the window is smaller, not padded.
        size = (1, layout.pool, layout.pool, 1)
        inside = ndimage.uniform_filter(np.ones((1, *level.shape[:2], 1), np.float32), size, mode="constant")
        values = ndimage.uniform_filter(values, size, mode="constant") / inside
    if layout.normalize == "l2":
        # In float64: the squares of values below 1e-22 leave the range of float32.
        norm = np.sqrt(np.einsum("nhwc,nhwc->nhw", values, values, dtype=np.float64))[..., np.newaxis]
        norm[norm == 0] = 1
        values = np.divide(values, norm, out=np.empty_like(values), casting="same_kind")
    if layout.dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    if not np.isfinite(stored).all():
        largest = float(np.abs(values).max())
        raise InputError(f"level {level.name!r} holds {largest:.4g}, beyond float16; create the bank with dtype float32")
    return stored


def check_ids(ids: Sequence[str]) -> None:
    """Raise InputError for ids that are empty or repeated, or that HDF5 cannot hold."""
    _check_strings("image id", ids)
    if "" in ids:
        raise InputError("an image id is empty; ids must be non-empty")
    if len(set(ids)) < len(ids):
        repeated = next(name for name, count in Counter(ids).items() if count > 1)
        raise InputError(f"image id {repeated!r} appears more than once in the batch; ids must be distinct")


def _check_strings(name: str, values: Sequence[str]) -> None:
    """Refuse what HDF5 cannot hold."""
    for value in values:
        if not isinstance(value, str) or "\0" in value:
            raise InputError(f"{name} {value!r} must be a string without NUL")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} {value!r} is not valid Unicode: {error.reason}") from error


def _to_float32(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> FloatArray:
    """A checked array, C-contiguous; the array itself where it is that already."""
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, expected {shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} is of dtype {array.dtype}, expected floating point")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinite values")
    if (largest := max(float(array.max()), -float(array.min()))) > _LARGEST:
        raise InputError(f"{name} holds {largest:.4g}; the squares of values beyond {_LARGEST:g} leave the range of float32")
    return np.ascontiguousarray(array, np.float32)
