"""Codes: maps as small integers, a byte or a few bits a number, in a basis that is learned from the first pictures of a bank.

A vector x of a level, taken relative to the level's center, is first shortened to [B x, |x - B^T B x|]: its components along
the orthonormal rows of a basis B, and the length of what the basis leaves over. Where a level has no more channels than a code
has numbers, nothing is left over: B turns the vector, or there is none, and it stays as it is.

Each number is then rounded: for a byte, to a multiple of its channel's scale, from -127 to 127 times; for fewer bits, to an odd
multiple, of which there are two to the power of the number's bits. The multiples are what a bank stores; multiplied by the
scales, they are the vectors that are searched.

Shortening makes no distance larger, and keeps what matters of it: for the lengths r of the rests of q and x,

    |q - x|^2  >=  |B q - B x|^2 + (r_q - r_x)^2                                   (triangle inequality for what B leaves over)

A few bits go where they save most: the squares of what rounding takes away add up to the same whichever number they are of, so
one bit after the other is given to the number that is off by most ("reverse water-filling"; Cover and Thomas, Elements of
Information Theory, section 10.3.3). In the principal directions, no other basis needs fewer bits.

A query is prepared in the same way, rounded to the same multiples, but not cut off at the last of them: however far it lies
from all normal pictures, its distances say so. A picture of the bank that nothing was cut off from is at distance 0 from
itself, and pictures that are searched for lie as far from the bank as its own pictures lie from each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.directions import OVERSAMPLED, principal_directions
from spade_faiss.core.errors import InputError
from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.bit_packing import MOST_NUMBER_BITS, Bits, pack, packed_bytes, unpack
from spade_faiss.features.layout import LARGEST, Layout
from spade_faiss.features.roi import cells_with_any

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

# The share of a sample's numbers that codes of a few bits may cut off. Steps for the least squared error would cut off a
# hundredth: then the bank's own pictures, which are cut off, too, would lie nearer to each other than new ones lie to them,
# and a calibration by them would promise too few false alarms.
_CUT_OFF = 1e-4
# Steps of a few bits reach at least this share of the largest number: what varies less is rounding, and may be 0 throughout.
_LEAST_REACH = 2.0**-20
# The numbers of vectors that are looked at together when bits are shared out: copies of a whole sample take much memory.
_COLUMNS = 64

Maps = npt.NDArray[np.floating[Any]]
Stored = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Decoder:
    """What makes numbers of stored codes.

    Attributes:
        scale: (N,) float32, what the codes of each number are multiplied by.
        bits: (N,) uint8, how many bits each number is packed in; None for a byte each.
    """

    scale: FloatArray
    bits: Bits | None = None

    def __call__(self, stored: Stored, out: FloatArray | None = None) -> FloatArray:
        """The vectors (..., N) float32 that stored codes stand for, (..., N) int8 or packed, (..., bytes) uint8."""
        codes = stored if self.bits is None else unpack(stored, self.bits)
        vectors: FloatArray = np.multiply(codes, self.scale, out=out, dtype=np.float32)
        return vectors


@dataclass(frozen=True, eq=False, kw_only=True)
class LevelCodes:
    """How the vectors of one level become codes.

    Attributes:
        center: (C,) float32, what is subtracted from a vector.
        basis: (N - 1, C) float32, orthonormal rows, or (C, C) where a vector is turned and none of it left over; None where
            vectors stay as they are.
        scale: (N,) float32, what the codes of each number are multiplied by; N is C where nothing is left over.
        bits: (N,) uint8, how many bits each number is packed in; None for a byte each.
    """

    center: FloatArray
    basis: FloatArray | None
    scale: FloatArray
    bits: Bits | None = None

    @property
    def has_rest(self) -> bool:
        """Whether the last number is the length of what the basis leaves over."""
        return self.basis is not None and len(self.basis) < len(self.scale)

    @property
    def decode(self) -> Decoder:
        """What makes vectors of what is stored."""
        return Decoder(self.scale, self.bits)

    def encode(self, maps: Maps) -> Stored:
        """Encode what is to be stored, (n, ..., C): (n, ..., N) int8, or packed, (n, ..., bytes) uint8."""
        last, dtype = (len(self.scale), np.int8) if self.bits is None else (packed_bytes(self.bits), np.uint8)
        codes = np.empty((*maps.shape[:-1], last), dtype)
        for place, one in enumerate(maps):
            multiples = self._multiples(one)
            if self.bits is None:
                np.clip(multiples, -LARGEST_CODE, LARGEST_CODE, out=codes[place], casting="unsafe")
            else:
                codes[place] = pack(multiples, self.bits)
        return codes

    def query(self, maps: Maps) -> FloatArray:
        """Round what is to be searched, (n, ..., C), to the multiples of the scales: (n, ..., N) float32."""
        found = np.empty((*maps.shape[:-1], len(self.scale)), np.float32)
        for place, one in enumerate(maps):
            # In float64: so many times a small scale may be more than float32 holds.
            values = self._multiples(one)
            values *= self.scale
            # What lies beyond is beyond all that a network computes; its squares would leave float32.
            found[place] = np.clip(values, -LARGEST, LARGEST, out=values)
        return found

    def cut_off(self, maps: Maps) -> float:
        """The share of the numbers of maps (n, ..., C) that are beyond what a code holds."""
        largest = _largest_codes(self.bits)
        return float(np.mean([np.mean(np.abs(self._multiples(one)) > largest) for one in maps]))

    def numbers(self, vectors: Maps) -> npt.NDArray[np.float64]:
        """What vectors (..., C) are shortened to, (..., N), before it is rounded.

        In float64: products of float32 numbers depend on how a library adds them up, and what is rounded must not.
        """
        x = vectors.astype(np.float64)
        x -= self.center
        if self.basis is None:
            return x
        parts = x @ self.basis.T.astype(np.float64)
        if not self.has_rest:
            return parts
        sq_rest = np.einsum("...c,...c->...", x, x) - np.einsum("...k,...k->...", parts, parts)
        return np.concatenate([parts, np.sqrt(np.maximum(sq_rest, 0))[..., np.newaxis]], axis=-1)

    def _multiples(self, one: Maps) -> npt.NDArray[np.float64]:
        """The multiples (..., N) of the scales that are nearest to one image's vectors (..., C): whole, or odd ones."""
        found = self.numbers(one)
        found /= self.scale
        return np.rint(found, out=found) if self.bits is None else _odd(found)


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
    return Codes({level.name: _learn(_sample_of(batch, level), level) for level in layout.levels})


def learning_bytes(layout: Layout, pictures: int) -> int:
    """About how many bytes it takes to learn the codes of a bank from so many pictures, beside these: those of one level."""
    found = []
    for level in layout.levels:
        vectors = pictures * min(-(-SAMPLE // pictures), level.locations)
        # The sample, centered and scaled, and its numbers in float64; what bits would lose, of a few numbers at a time.
        columns = 0 if level.packed_bytes is None else min(level.channels, _COLUMNS)
        rows = _basis_rows(level)
        of_basis = 48 * level.shape[-1] * (rows + OVERSAMPLED) if rows else 0
        found.append(vectors * 24 * (level.shape[-1] + columns) + of_basis)
    return max(found)


def sample_vectors(maps: Maps, inside: Bools | None = None) -> FloatArray:
    """Draw some `SAMPLE` vectors of maps (n, ..., C), as many from each image: (m, C) float32.

    Args:
        maps: the maps.
        inside: (n, locations), where vectors are drawn; at least one of each image. None for everywhere.
    """
    rng, vectors = np.random.default_rng(SEED), maps.reshape(len(maps), -1, maps.shape[-1])
    drawn = []
    for place, one in enumerate(vectors):
        of_image = np.arange(len(one)) if inside is None else np.flatnonzero(inside[place])
        drawn.append(one[np.sort(rng.permutation(of_image)[: -(-SAMPLE // len(vectors))])])
    return np.concatenate(drawn).astype(np.float32, copy=False)


def _sample_of(batch: FeatureBatch, level: Level) -> FloatArray:
    """A sample of a level's vectors, without those of the margins of a letterbox, which are all alike."""
    maps = batch.levels[level.name]
    inside = None
    if batch.valid is not None:
        inside = cells_with_any(batch.valid, level.height, level.width).reshape(len(maps), -1)[:, level.cells]
        shown = inside.any(axis=1)
        maps, inside = (maps[shown], inside[shown]) if shown.any() else (maps, None)
    return sample_vectors(maps, inside)


def _learn(sample: FloatArray, level: Level) -> LevelCodes:
    center = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Squares of large features exceed float32; directions do not depend on the length.
    centered = sample - center
    largest = max(float(np.abs(centered).max()), float(np.finfo(np.float32).tiny))
    basis = None
    if rows := _basis_rows(level):
        basis = principal_directions(centered / largest, rows)
    unscaled = LevelCodes(center=center, basis=basis, scale=np.ones(level.channels, np.float32))
    numbers = unscaled.numbers(sample)
    reach = np.abs(numbers).max(axis=0)
    # Where nothing varies, any scale does.
    reach = np.maximum(reach, _LEAST_SCALE * reach.max()) if reach.max() > 0 else np.full_like(reach, LARGEST_CODE / _MARGIN)
    if level.packed_bytes is None:
        return replace(unscaled, scale=_as_scale(_MARGIN * reach / LARGEST_CODE, None))
    bits, scale = _share_bits(numbers, reach, 8 * level.packed_bytes)
    return replace(unscaled, scale=_as_scale(scale, bits), bits=bits)


def _basis_rows(level: Level) -> int:
    """The rows of the basis of a level; 0 for none."""
    if level.extracted is not None:
        return level.channels - 1
    return 0 if level.packed_bytes is None else level.channels


def _as_scale(scale: npt.NDArray[np.float64], bits: Bits | None) -> FloatArray:
    return np.clip(scale, np.finfo(np.float32).tiny, _largest_scales(bits)).astype(np.float32)


def _largest_codes(bits: Bits | None) -> npt.NDArray[np.int64]:
    """The largest code of each number (N,), or of all numbers, of a byte each."""
    return np.array(LARGEST_CODE) if bits is None else (1 << bits.astype(np.int64)) - 1


def _largest_scales(bits: Bits | None) -> FloatArray:
    """The largest scale of each number (N,), or of all: no code stands for more than `LARGEST`."""
    return (LARGEST / _largest_codes(bits)).astype(np.float32)


def _odd(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The odd numbers that are nearest to some; of two, the larger one. In place."""
    numbers /= 2
    np.floor(numbers, out=numbers)
    numbers *= 2
    numbers += 1
    return numbers


def _share_bits(
    numbers: npt.NDArray[np.float64], reach: npt.NDArray[np.float64], total: int
) -> tuple[Bits, npt.NDArray[np.float64]]:
    """Share bits out among the numbers of a vector, for the least squared error, so that hardly any number is cut off.

    Args:
        numbers: (n, N), of a sample.
        reach: (N,), the largest magnitude of each.
        total: the bits of a vector, at least N.

    Returns:
        (N,) the bits of each number, at least one, and (N,) its scale.
    """
    count = len(reach)
    sq_error, step = np.full((MOST_NUMBER_BITS + 1, count), np.inf), np.empty((MOST_NUMBER_BITS + 1, count))
    for first in range(0, count, _COLUMNS):
        of = slice(first, first + _COLUMNS)
        # Numbers between -1 and 1: their squares, and those of their errors, are in range.
        some = numbers[:, of] / reach[of]
        # A little more: the largest itself is not cut off.
        most = 1.001 * np.quantile(np.abs(some), 1 - _CUT_OFF, axis=0, method="higher")
        most = np.maximum(most, _LEAST_REACH * reach.max() / reach[of])
        for bits in range(1, MOST_NUMBER_BITS + 1):
            step[bits, of] = most / (1 << bits)
            rounded = _odd(some / step[bits, of])
            rounded *= step[bits, of]
            rounded -= some
            sq_error[bits, of] = np.einsum("nk,nk->k", rounded, rounded)
    sq_error *= np.square(reach / reach.max())
    bits_of, columns = np.ones(count, np.intp), np.arange(count)
    saved = sq_error[1] - sq_error[2]
    for _ in range(min(total, MOST_NUMBER_BITS * count) - count):
        best = int(saved.argmax())
        bits_of[best] += 1
        at = bits_of[best]
        saved[best] = sq_error[at, best] - sq_error[at + 1, best] if at < MOST_NUMBER_BITS else -np.inf
    return bits_of.astype(np.uint8), step[bits_of, columns] * reach


def check_codes(codes: LevelCodes, level: Level) -> None:
    """Raise InputError unless codes may be those of a level: what a bank holds may come from anybody."""
    d, n, rows = level.shape[-1], level.channels, _basis_rows(level)
    expected: dict[str, tuple[tuple[int, ...], type]] = {"center": ((d,), np.float32), "scale": ((n,), np.float32)}
    if rows:
        expected["basis"] = ((rows, d), np.float32)
    if level.packed_bytes is not None:
        expected["bits"] = ((n,), np.uint8)
    for name, array in vars(codes).items():
        found, wanted = None if array is None else (array.shape, array.dtype), expected.get(name)
        if found != wanted:
            said = "none" if wanted is None else f"{wanted[0]} of {np.dtype(wanted[1])}"
            raise InputError(f"{name} of level {level.name!r} is {None if array is None else array.shape}, expected {said}")
    if not np.isfinite(codes.center).all() or np.abs(codes.center).max() > LARGEST:
        raise InputError(f"the center of level {level.name!r} holds values that are not finite, or beyond {LARGEST:g}")
    if codes.bits is not None and (
        codes.bits.min() < 1 or codes.bits.max() > MOST_NUMBER_BITS or packed_bytes(codes.bits) != level.packed_bytes
    ):
        raise InputError(
            f"the bits of level {level.name!r} must be 1 to {MOST_NUMBER_BITS} each, and {level.packed_bytes} bytes together"
        )
    if not ((codes.scale > 0) & (codes.scale <= _largest_scales(codes.bits))).all():  # false for NaN
        raise InputError(f"the scales of level {level.name!r} must be above 0, and no code may stand for more than {LARGEST:g}")
    if codes.basis is not None:
        basis = codes.basis.astype(np.float64)
        # Written so that NaN is refused, too.
        if not np.abs(basis @ basis.T - np.eye(len(basis))).max() <= _ORTHONORMAL:
            raise InputError(f"the basis of level {level.name!r} must be of orthonormal rows")
