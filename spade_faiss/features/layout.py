"""Says what all features of a bank have in common, and brings a batch into the form that is stored and searched."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.declaring import for_each
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import NORMALIZE, POOL_BORDERS
from spade_faiss.core.roi import Roi
from spade_faiss.core.schema import check_at_least, check_choice
from spade_faiss.core.store import DTYPES, LEAST_BITS, LEAST_NUMBERS, MOST_BITS, MOST_NUMBERS, MOST_TURNED, Store
from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.features.batch import FeatureBatch, Level, check_ids, check_strings
from spade_faiss.features.pooling import pooled
from spade_faiss.features.roi import cells_with_any, mask_of, on_grid

# No value of a feature may be larger: the squared distance of two vectors must stay within float32.
LARGEST = 2e16
# What is smaller is rounded to a finite float16.
_BEYOND_FLOAT16 = 65520


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What all features of a bank have in common, and how maps are prepared before they are stored or searched.

    Queries pass through the same preparation, rounding to `dtype` included, so that an image is at distance 0 from itself.

    Args:
        levels: the pyramid levels, finest first.
        embedding_dim: d, the length of an embedding.
        input_size: (height, width) of the backbone's input, which is the size of score maps.
        dtype: the type of stored level maps, `float16` or `float32`, or `int8` for codes.
        normalize: `l2` scales the vector of each location to unit length, `none` leaves it.
        pool: the side of the square neighborhood that each location is averaged over, or one for each level; 1 leaves it alone.
        pool_border: `valid` averages over the locations that exist, `zero` counts those outside of the map as zeros; those
            outside of the region of interest are outside of the map.
        roi: the part of the input that is inspected; None for all of it. The levels get what it is on their grids.
        own_rois: whether each image has a part of its own that is inspected, which its `valid` says. Its maps are stored whole,
            and searched in part.
        numbers: the most numbers that a code has, see `Store`, one for all levels or one for each; the levels get fewer
            channels where they have more. None for codes of every channel, and where no codes are stored.
        bits: how many bits a number of a code takes on average, see `Store`; None for a byte each, and where no codes are
            stored.

    Raises:
        InputError: for a value out of its range.
    """

    levels: tuple[Level, ...]
    embedding_dim: int
    input_size: tuple[int, int]
    dtype: str = "float16"
    normalize: str = "none"
    pool: int | tuple[int, ...] = 1
    pool_border: str = "valid"
    roi: Roi | None = None
    own_rois: bool = False
    numbers: tuple[int, ...] | int | None = None
    bits: int | None = None

    @property
    def store(self) -> Store:
        """How maps are stored."""
        return Store(dtype=self.dtype, numbers=self._numbers, bits=self.bits)

    @property
    def stored_dtype(self) -> str:
        """The type of the stored arrays: `dtype`, or bytes of packed codes."""
        return self.dtype if self.bits is None else "uint8"

    @property
    def image_bytes(self) -> int:
        """The bytes that the features of an image take where they are stored."""
        values = sum(math.prod(level.stored_shape) for level in self.levels)
        return 4 * self.embedding_dim + values * np.dtype(self.stored_dtype).itemsize

    @property
    def whole_levels(self) -> tuple[Level, ...]:
        """The levels as the backbone makes them, whatever part of them is inspected, and however they are stored."""
        return tuple(
            replace(level, roi=None, channels=level.shape[-1], extracted=None, packed_bytes=None) for level in self.levels
        )

    def named(self) -> dict[str, Any]:
        """The layout as plain values to take a checksum of; without a region of interest or codes, they are what they always
        were.
        """
        values = self.written()
        for part in (values, *values["levels"]) if self.roi is None else ():
            del part["roi"]
        if not self.own_rois:
            del values["own_rois"]
        return values

    def written(self) -> dict[str, Any]:
        """The layout as a manifest holds it: without what only codes have, it is what older versions read."""
        values = asdict(self)
        for name in ("numbers", "bits"):
            if values[name] is None:
                del values[name]
        for level in values["levels"]:
            for name in ("extracted", "packed_bytes"):
                if level[name] is None:
                    del level[name]
        return values

    def inspected(self, n: int, valid: Bools | None) -> Bools | None:
        """(n, H, W), where the inputs of n images are inspected: where they show the image, and in the region of interest.

        Args:
            n: the number of images.
            valid: (n, H, W), where the inputs show the image; None for everywhere.

        Returns:
            The mask; None where all is inspected.
        """
        if self.roi is None:
            return valid
        mask = mask_of(self.roi)
        return np.broadcast_to(mask, (n, *mask.shape)) if valid is None else valid & mask

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError("a bank needs at least one level")
        object.__setattr__(self, "levels", tuple(self.levels))
        names = [level.name for level in self.levels]
        if len(set(names)) < len(names):
            raise InputError(f"level names must be distinct, got {names}")
        check_at_least("embedding_dim", self.embedding_dim, 1)
        if not isinstance(self.input_size, tuple) or len(self.input_size) != 2:
            raise InputError(f"input_size={self.input_size!r} must be a tuple (height, width)")
        for side in self.input_size:
            check_at_least("input_size", side, 1)
        if self.roi is not None and (self.roi.height, self.roi.width) != self.input_size:
            raise InputError(
                f"the region of interest is {self.roi.height} x {self.roi.width}, the input {self.input_size}: both are "
                "(height, width) in pixels and must be equal"
            )
        if self.roi is not None and self.own_rois:
            raise InputError("own_rois=True says that images have regions of interest of their own, roi that they share one")
        object.__setattr__(self, "levels", tuple(_with_roi(level, self.roi) for level in self.levels))
        check_choice("dtype", self.dtype, DTYPES)
        self._check_numbers()
        check_choice("normalize", self.normalize, NORMALIZE)
        check_choice("pool_border", self.pool_border, POOL_BORDERS)
        most = 2 * max(max(level.height, level.width) for level in self.levels) + 1
        for pool in for_each("pool", self.pool, len(self.levels)):
            check_at_least("pool", pool, 1)
            if pool % 2 == 0:
                raise InputError(f"pool={pool} must be odd, so that the neighborhood has a center")
            if pool > most:
                raise InputError(
                    f"pool={pool} is too large: {most} covers the largest map from each of its locations; lower it"
                )

    def _check_numbers(self) -> None:
        """Check `numbers` and `bits`, and give the levels the channels and bytes that they are stored with."""
        if self.numbers is not None and self.dtype != "int8":
            raise InputError(f"numbers={self.numbers} is of codes, and dtype={self.dtype!r} stores none; leave it out")
        given = self.numbers[0] if isinstance(self.numbers, tuple) and len(self.numbers) == 1 else self.numbers
        several: tuple[int | None, ...] = for_each("numbers", given, len(self.levels))
        for numbers in several if given is not None else ():
            check_at_least("numbers", numbers, LEAST_NUMBERS)
            if numbers is not None and numbers > MOST_NUMBERS:
                raise InputError(f"numbers={numbers} is more than a code has, {MOST_NUMBERS}; lower it")
        object.__setattr__(self, "numbers", None if given is None else several)
        if self.bits is not None:
            if self.dtype != "int8":
                raise InputError(f"bits={self.bits} is of codes, and dtype={self.dtype!r} stores none; leave it out")
            check_at_least("bits", self.bits, LEAST_BITS)
            if self.bits > MOST_BITS:
                raise InputError(f"bits={self.bits} is more than a packed number takes on average, {MOST_BITS}; lower it")
        levels = (_as_stored(level, numbers, self.bits) for level, numbers in zip(self.levels, several, strict=True))
        object.__setattr__(self, "levels", tuple(levels))
        for level in self.levels:
            if level.packed_bytes is not None and level.extracted is None and level.channels > MOST_TURNED:
                raise InputError(
                    f"level {level.name!r} has {level.channels} channels, and codes of a few bits turn at most {MOST_TURNED} "
                    f"into all of their principal directions; leave directions out: --store pca{MOST_NUMBERS}-int{self.bits}, "
                    f"or fewer"
                )

    @property
    def _numbers(self) -> tuple[int, ...] | None:
        """`numbers`, one for each level, as they are once they are checked."""
        assert not isinstance(self.numbers, int)
        return self.numbers


def _as_stored(level: Level, numbers: int | None, bits: int | None) -> Level:
    channels = level.shape[-1]
    stored = channels if numbers is None else min(channels, numbers)
    extracted = None if stored == channels else channels
    packed = None if bits is None else -(-stored * bits // 8)
    is_same = (level.channels, level.extracted, level.packed_bytes) == (stored, extracted, packed)
    return level if is_same else replace(level, channels=stored, extracted=extracted, packed_bytes=packed)


def _with_roi(level: Level, roi: Roi | None) -> Level:
    found = None if roi is None else on_grid(roi, level.height, level.width)
    return level if level.roi == found else replace(level, roi=found)


def prepare(batch: FeatureBatch, layout: Layout) -> FeatureBatch:
    """Check a batch against a bank's layout and bring it into the form that is stored and searched.

    Returns:
        The batch with a float32 embedding and maps that are pooled, normalized and of `layout.dtype`; float32 where codes are
        stored, which `codes.Codes` makes of them. If the layout has a region of interest, the maps are (n, locations, C), and
        `valid` is False outside of it.

    Raises:
        InputError: for shapes that differ from the layout, missing or unknown levels, ids that are empty or repeated, pictures
            without an id, ids or paths that hold a NUL or are not valid Unicode, values that are not finite, or values beyond
            the range of float32, or of float16 if maps are stored in it.
    """
    n = len(batch)
    if n == 0:
        raise InputError("a feature batch needs at least one image")
    check_ids(batch.ids)
    for name in ("paths", "sha256", "pictures", "groups"):
        if len(getattr(batch, name)) not in (0, n):
            raise InputError(f"a batch of {n} images has {len(getattr(batch, name))} {name}")
        check_strings(name, getattr(batch, name))
    check_strings("root", [batch.root])
    if "" in batch.pictures:
        raise InputError("the id of a picture is empty; each entry is made of a picture that has an id")
    shape = (n, *layout.input_size)
    if batch.valid is not None and (batch.valid.dtype != np.bool_ or batch.valid.shape != shape):
        raise InputError(f"valid is {batch.valid.dtype} of shape {batch.valid.shape}, expected bool of shape {shape}")
    if layout.own_rois:
        _check_own_rois(batch)
    if batch.places is not None and (batch.places.dtype != np.int32 or batch.places.shape != (n, 4)):
        raise InputError(f"places is {batch.places.dtype} of shape {batch.places.shape}, expected int32 of shape {(n, 4)}")
    embedding = _to_float32("embedding", np.asarray(batch.embedding), (n, layout.embedding_dim))
    if set(batch.levels) != {level.name for level in layout.levels}:
        expected = [level.name for level in layout.levels]
        raise InputError(f"the batch has levels {sorted(batch.levels)}, the bank has {expected}")
    pools = for_each("pool", layout.pool, len(layout.levels))
    maps = {
        level.name: _prepare_maps(level, np.asarray(batch.levels[level.name]), n, batch.valid, layout, pool)
        for level, pool in zip(layout.levels, pools, strict=True)
    }
    return replace(batch, embedding=embedding, levels=maps, valid=layout.inspected(n, batch.valid))


def within_range(values: npt.NDArray[np.floating[Any]]) -> bool:
    """Tell whether all values are finite, and small enough for squared distances to stay within float32."""
    return not values.size or (float(values.max()) <= LARGEST and float(values.min()) >= -LARGEST)  # false for NaN


def _check_own_rois(batch: FeatureBatch) -> None:
    if batch.valid is None:
        raise InputError(
            "each image of this bank has a region of interest of its own, and the batch has none: give it as valid="
        )
    if empty := [name for name, inspected in zip(batch.ids, batch.valid, strict=True) if not inspected.any()]:
        raise InputError(f"nothing of {empty[0]!r} is inspected, valid is False everywhere; leave the image out")


def _prepare_maps(
    level: Level, maps: npt.NDArray[Any], n: int, valid: Bools | None, layout: Layout, pool: int
) -> npt.NDArray[Any]:
    values = _to_float32(f"level {level.name!r}", maps, (n, *level.shape))
    if pool > 1:
        exists = np.ones((1, *level.shape[:2], 1), np.float32)
        if layout.own_rois and valid is not None:
            exists = cells_with_any(valid, level.height, level.width)[..., np.newaxis].astype(np.float32)
        elif level.roi is not None:
            exists *= mask_of(level.roi)[:, :, np.newaxis]
        if not exists.all():
            values = values * exists
        values = pooled(values, pool)
        if layout.pool_border == "valid":
            # The mean is over the neighbors that exist: at the border the window is smaller, not padded.
            weight = pooled(exists, pool)
            values = np.divide(values, weight, out=values, where=exists > 0)
    if level.roi is not None:
        values = values.reshape(n, -1, level.shape[-1]).take(level.cells, axis=1)
    if layout.normalize == "l2":
        # The norm is computed in float64: the squares of values below 1e-22 leave the range of float32.
        norm = np.sqrt(np.einsum("...c,...c->...", values, values, dtype=np.float64))[..., np.newaxis]
        norm[norm == 0] = 1
        values = np.divide(values, norm, out=np.empty_like(values), casting="same_kind")
    if layout.dtype != "float16":
        return values
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if largest >= _BEYOND_FLOAT16:
        raise InputError(f"level {level.name!r} holds {largest:.4g}, beyond float16; create the bank with dtype float32")
    return values.astype(np.float16)


def _to_float32(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> FloatArray:
    """Check an array and return it as float32, C-contiguous; without a copy if it is that already."""
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, expected {shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} is of dtype {array.dtype}, expected floating point")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinite values")
    if not within_range(array):
        largest = max(float(array.max()), -float(array.min()))
        raise InputError(f"{name} holds {largest:.4g}; the squares of values beyond {LARGEST:g} leave the range of float32")
    return np.ascontiguousarray(array, np.float32)
