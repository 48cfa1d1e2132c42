"""Codes: maps as small integers, one byte a number, in a basis that is learned from the first pictures of a bank.

A vector x of a level, taken relative to the level's center, is first shortened to [B x, |x - B^T B x|]: its components along
the orthonormal rows of a basis B, and the length of what the basis leaves over. Where a level has no more channels than a code
has numbers, nothing is left over, and the vector stays as it is. Each number is then rounded to a multiple of its channel's
scale. The multiples are what a bank stores, as integers from -127 to 127; multiplied by the scales, they are the vectors that
are searched.

Shortening makes no distance larger, and keeps what matters of it: for the lengths r of the rests of q and x,

    |q - x|^2  >=  |B q - B x|^2 + (r_q - r_x)^2                                   (triangle inequality for what B leaves over)

A query is prepared in the same way, rounded to the same multiples, but not cut off at 127 of them: however far it lies from all
normal pictures, its distances say so. A picture of the bank that nothing was cut off from is at distance 0 from itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.directions import principal_directions
from spade_faiss.core.errors import InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import LARGEST, Layout

LARGEST_CODE = 127
SEED = 1234
# Vectors of a level that a code is learned from, about.
SAMPLE = 32_768
# Codes reach this much beyond the largest number of the sample.
_MARGIN = 1.25
# No channel's scale is a smaller share of the largest: where the sample hardly varies, pictures that come later may.
_LEAST_SCALE = 1 / 128
# How far from 1 or 0 products of a basis' rows may be.
_ORTHONORMAL = 1e-4

Codes8 = npt.NDArray[np.int8]
Maps = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class LevelCodes:
    """How the vectors of one level become codes.

    Attributes:
        center: (C,) float32, what is subtracted from a vector.
        basis: (N - 1, C) float32, orthonormal rows; None where vectors are not shortened.
        scale: (N,) float32, what the codes of each number are multiplied by; N is C without a basis.
    """

    center: FloatArray
    basis: FloatArray | None
    scale: FloatArray

    def encode(self, maps: Maps) -> Codes8:
        """Encode what is to be stored, (n, ..., C): (n, ..., N) int8."""
        codes = np.empty((*maps.shape[:-1], len(self.scale)), np.int8)
        for place, one in enumerate(maps):
            np.clip(self._multiples(one), -LARGEST_CODE, LARGEST_CODE, out=codes[place], casting="unsafe")
        return codes

    def query(self, maps: Maps) -> FloatArray:
        """Round what is to be searched, (n, ..., C), to the multiples of the scales: (n, ..., N) float32."""
        found = np.empty((*maps.shape[:-1], len(self.scale)), np.float32)
        for place, one in enumerate(maps):
            np.multiply(self._multiples(one).astype(np.float32), self.scale, out=found[place])
        # What lies beyond is beyond all that a network computes; its squares would leave float32.
        return np.clip(found, -LARGEST, LARGEST, out=found)

    def decode(self, codes: npt.NDArray[Any], out: FloatArray | None = None) -> FloatArray:
        """The vectors (..., N) float32 that codes (..., N) stand for."""
        vectors: FloatArray = np.multiply(codes, self.scale, out=out, dtype=np.float32)
        return vectors

    def cut_off(self, maps: Maps) -> float:
        """The share of the numbers of maps (n, ..., C) that are beyond what a code holds."""
        return float(np.mean([np.mean(np.abs(self._multiples(one)) > LARGEST_CODE) for one in maps]))

    def numbers(self, vectors: Maps) -> npt.NDArray[np.float64]:
        """What vectors (..., C) are shortened to, (..., N), before it is rounded.

        In float64: products of float32 numbers depend on how a library adds them up, and what is rounded must not.
        """
        x = vectors.astype(np.float64)
        x -= self.center
        if self.basis is None:
            return x
        parts = x @ self.basis.T.astype(np.float64)
        sq_rest = np.einsum("...c,...c->...", x, x) - np.einsum("...k,...k->...", parts, parts)
        return np.concatenate([parts, np.sqrt(np.maximum(sq_rest, 0))[..., np.newaxis]], axis=-1)

    def _multiples(self, one: Maps) -> npt.NDArray[np.float64]:
        """The whole multiples (..., N) of the scales that are nearest to one image's vectors (..., C)."""
        found = self.numbers(one)
        found /= self.scale
        return np.rint(found, out=found)


@dataclass(frozen=True, eq=False)
class Codes:
    """How the maps of a bank become codes, by the names of its levels."""

    levels: Mapping[str, LevelCodes]

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """What a bank stores of a batch that `prepare` returned."""
        return replace(batch, levels={name: codes.encode(batch.levels[name]) for name, codes in self.levels.items()})

    def query(self, batch: FeatureBatch) -> FeatureBatch:
        """What is searched of a batch that `prepare` returned."""
        return replace(batch, levels={name: codes.query(batch.levels[name]) for name, codes in self.levels.items()})


def learn_codes(batch: FeatureBatch, layout: Layout) -> Codes:
    """Learn the codes of a bank from its first pictures; the same pictures give the same codes.

    Args:
        batch: what `prepare` returned for them.
        layout: the layout of the bank.
    """
    return Codes({level.name: _learn(sample_vectors(batch.levels[level.name]), level) for level in layout.levels})


def sample_vectors(maps: Maps, count: int = SAMPLE) -> FloatArray:
    """Draw about `count` vectors of maps (n, ..., C), as many from each image: (m, C) float32."""
    rng, vectors = np.random.default_rng(SEED), maps.reshape(len(maps), -1, maps.shape[-1])
    each = min(vectors.shape[1], -(-count // len(vectors)))
    return np.concatenate([one[np.sort(rng.permutation(len(one))[:each])] for one in vectors]).astype(np.float32, copy=False)


def _learn(sample: FloatArray, level: Level) -> LevelCodes:
    center = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Squares of large features exceed float32; directions do not depend on the length.
    centered = sample - center
    largest = float(np.abs(centered).max())
    basis = None
    if level.extracted is not None:
        basis = principal_directions(centered / max(largest, np.finfo(np.float32).tiny), level.channels - 1)
    unscaled = LevelCodes(center=center, basis=basis, scale=np.ones(level.channels, np.float32))
    reach = _MARGIN * np.abs(unscaled.numbers(sample)).max(axis=0)
    # Where nothing varies, any scale does.
    reach = np.maximum(reach, _LEAST_SCALE * reach.max()) if reach.max() > 0 else np.full_like(reach, LARGEST_CODE)
    scale = np.clip(reach / LARGEST_CODE, np.finfo(np.float32).tiny, LARGEST / LARGEST_CODE)
    return replace(unscaled, scale=scale.astype(np.float32))


def check_codes(codes: LevelCodes, level: Level) -> None:
    """Raise InputError unless codes may be those of a level: what a bank holds may come from anybody."""
    d, n = level.shape[-1], level.channels
    expected = {"center": (d,), "scale": (n,), **({} if level.extracted is None else {"basis": (n - 1, d)})}
    for name, array in vars(codes).items():
        shape = None if array is None else array.shape
        if shape != expected.get(name) or (array is not None and array.dtype != np.float32):
            raise InputError(f"{name} of level {level.name!r} is {shape}, expected {expected.get(name)} of float32")
    if not np.isfinite(codes.center).all() or np.abs(codes.center).max() > LARGEST:
        raise InputError(f"the center of level {level.name!r} holds values that are not finite, or beyond {LARGEST:g}")
    if not ((codes.scale > 0) & (codes.scale <= LARGEST / LARGEST_CODE)).all():  # false for NaN
        raise InputError(f"the scales of level {level.name!r} must be above 0 and at most {LARGEST / LARGEST_CODE:g}")
    if codes.basis is not None:
        basis = codes.basis.astype(np.float64)
        # Written so that NaN is refused, too.
        if not np.abs(basis @ basis.T - np.eye(len(basis))).max() <= _ORTHONORMAL:
            raise InputError(f"the basis of level {level.name!r} must be of orthonormal rows")
