"""Blocks: the maps of the normal images at one level, as searches read them, decoded once while the cache has room."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.core.once import once
from spade_faiss.core.types import Bools, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.features.codes import Decoder
from spade_faiss.search.cache import BlockCache

StoredArray = npt.NDArray[Any]

T = TypeVar("T")

# The center is the mean of this many blocks, and what is typical is taken from them.
SPREAD_BLOCKS = 8
# A sample is drawn from up to this many blocks.
_SAMPLE_BLOCKS = 500


class MapPart(NamedTuple):
    """One of the stored maps that blocks are put together from.

    Attributes:
        stored: returns the map of a bank row as a view, (h*w, C) float16 or float32, or codes.
        size: h and w, where the map is resized to the grid that is searched; None where it has that grid.
        decoder: what makes numbers of codes; None where numbers are stored as they are.
    """

    stored: Callable[[int], StoredArray]
    size: tuple[int, int] | None = None
    decoder: Decoder | None = None


class BlockSource:
    """Where the blocks of one level come from. A source implements `__len__` and `read`, and the rest where it gains by that.

    Attributes:
        decodes: whether `read` computes the block. Where it returns a view of what is stored, caching gains nothing.
        partial: whether blocks hold some of the level's locations, which differ from row to row: their number is m, not H*W.
        decoder: what makes numbers of the codes that `stored` returns; None where it returns numbers as they are.
    """

    decodes = True
    partial = False
    decoder: Decoder | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        """Read the block of a bank row.

        Args:
            row: the bank row.
            out: (H*W, C) float32, memory that a source which decodes may use for the block that it returns.

        Returns:
            (H*W, C) float32, not to be changed.
        """
        raise NotImplementedError

    def stored(self, row: int) -> StoredArray | None:
        """The block as it is stored, (H*W, C) float16 or float32, or codes, as a view; None where it is not one array."""
        return None

    def cells(self, row: int) -> IntArray:
        """The locations that the block of a bank row holds, ascending numbers; asked for where a source is `partial` alone."""
        raise NotImplementedError

    def parts(self) -> tuple[MapPart, ...] | None:
        """The stored maps whose channels, side by side, are the blocks; None where blocks are made in another way.

        Those of a source that is `partial` are whole: a block holds what lies at its `cells`.
        """
        return None

    def check(self) -> None:
        """Raise BankError if views that `stored` returned must not be read any more."""

    def prefetch(self, row: int) -> None:
        """Take note that a row will be read soon, so that the disk can start."""

    def release(self, rows: Iterable[int]) -> None:
        """Take note that some rows are not needed for now, so that their mapped pages need not stay in memory."""


class ArraySource(BlockSource):
    """Blocks that are in memory already, as one array (rows, H*W, C) of float16 or float32, or of codes with their decoder."""

    def __init__(self, maps: StoredArray, decoder: Decoder | None = None) -> None:
        self._maps = maps
        self.decoder = decoder
        self.decodes = maps.dtype != np.float32

    def __len__(self) -> int:
        return len(self._maps)

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        """See `BlockSource`."""
        return decoded(self._maps[row], self.decoder, out if self.decodes else None)

    def stored(self, row: int) -> StoredArray:
        """See `BlockSource`."""
        block: StoredArray = self._maps[row]
        return block

    def parts(self) -> tuple[MapPart, ...]:
        """See `BlockSource`."""
        return (MapPart(self.stored, decoder=self.decoder),)


def decoded(stored: StoredArray, decoder: Decoder | None, out: FloatArray | None = None) -> FloatArray:
    """The float32 vectors that stored numbers or codes stand for; in `out`, unless they are float32 already."""
    if decoder is not None:
        return decoder(stored, out)
    if out is None:
        return stored.astype(np.float32, copy=False)
    np.copyto(out, stored)
    return out


class _DerivedSource(BlockSource):
    """Blocks that a function computes from those of another source."""

    def __init__(self, of: BlockSource, compute: Callable[[int], FloatArray]) -> None:
        self._of = of
        self._compute = compute

    def __len__(self) -> int:
        return len(self._of)

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        return self._compute(row)

    def release(self, rows: Iterable[int]) -> None:
        self._of.release(rows)


class Blocks:
    """One level of a bank: `blocks(row)` is the map of the normal image at a bank row, (H*W, C) float32, not to be changed.

    Where a bank has a region of interest, H*W stands for the number of inspected locations, here and in all searches: there
    are no other vectors. `level.cells` says where they are in the map. Where images have regions of their own, a block holds
    those of its image, and `located` and `inspected` say where they are; few searches take such blocks.

    Args:
        level: the level's name and shape.
        source: where blocks are read from.
        cache: where decoded blocks are cached, if anywhere; several levels may share it.
        key: what they are cached under, unless by the level's name.
    """

    def __init__(self, level: Level, source: BlockSource, cache: BlockCache[Any] | None = None, key: str | None = None) -> None:
        self.level = level
        self.key = key or level.name
        self._source = source
        self._shared = cache
        self._cache = cache if source.decodes else None

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, row: int, out: FloatArray | None = None) -> FloatArray:
        """Return the block of a bank row; one that will not be cached may be decoded into `out`."""
        if self._cache is None or self._cache.capacity < self.block_bytes:
            return self._source.read(row, out)
        block: FloatArray = self._cache.get_or_make((self.key, row), lambda: self._source.read(row))
        return block

    def read(self, row: int) -> FloatArray:
        """Read the block of a bank row past the cache."""
        return self._source.read(row)

    def stored(self, row: int) -> StoredArray:
        """The block as the bank stores it, (H*W, C) float16, float32 or int8; decoded where it is not stored as one array."""
        stored = self._source.stored(row)
        return self(row) if stored is None else stored

    @property
    def decoder(self) -> Decoder | None:
        """See `BlockSource`."""
        return self._source.decoder

    def parts(self) -> tuple[MapPart, ...] | None:
        """See `BlockSource.parts`."""
        return self._source.parts()

    @property
    def partial(self) -> bool:
        """See `BlockSource`."""
        return self._source.partial

    def located(self, row: int, numbers: IntArray) -> IntArray:
        """The locations of vectors that have some numbers in the block of a bank row; -1 stays what it is."""
        return np.where(numbers < 0, -1, self._source.cells(row)[numbers]) if self.partial else numbers

    def inspected(self, row: int) -> Bools:
        """(H*W,), at which locations the block of a bank row holds vectors, where blocks are `partial`; it is cached."""

        def make() -> Bools:
            found = np.zeros(self.level.locations, np.bool_)
            found[self._source.cells(row)] = True
            found.flags.writeable = False
            return found

        return self.cached("inspected", row, make)

    def check(self) -> None:
        """See `BlockSource.check`."""
        self._source.check()

    def cached(self, name: str, row: int, make: Callable[[], T]) -> T:
        """Return what `make` makes of a block, something with `nbytes`; it is cached beside the decoded blocks.

        Args:
            name: what it is, to be told from what else is made of the block.
            row: the bank row of the block.
            make: makes it, where it is not in the cache.
        """
        if self._shared is None:
            return make()
        made: T = self._shared.get_or_make((self._key_of(name), row), make)
        return made

    def peek(self, name: str, row: int) -> Any:
        """Return what `cached` has made of a block, if the cache holds it."""
        return None if self._shared is None else self._shared.get((self._key_of(name), row))

    def reserve(self, nbytes: int) -> int:
        """Take up to so many bytes out of the cache for good, see `BlockCache`; without a cache there is no limit."""
        return nbytes if self._shared is None else self._shared.reserve(nbytes)

    def take(self, row: int, locations: IntArray) -> FloatArray:
        """(m, C) float32, the vectors at some locations of a bank row; where possible, only they are decoded."""
        block = None if self._cache is None else self._cache.get((self.key, row))
        if block is None:
            if (stored := self._source.stored(row)) is not None:
                return decoded(stored[locations], self.decoder)
            block = self(row)
        taken: FloatArray = block[locations].astype(np.float32, copy=False)
        return taken

    def sample(self, count: int, seed: int) -> FloatArray:
        """Draw about `count` vectors, as many from each image, from up to all images; the same ones for the same seed.

        Returns:
            (n, C) float32.
        """
        rng = np.random.default_rng(seed)
        locations = self.level.locations
        rows = np.sort(rng.permutation(len(self))[:_SAMPLE_BLOCKS])
        each = min(locations, -(-count // len(rows)))
        parts = []
        for row in rows.tolist():
            parts.append(self.read(row)[np.sort(rng.permutation(locations)[:each])])
            self.release(row)
        return np.concatenate(parts)

    def derived(self, name: str, compute: Callable[[int], FloatArray], channels: int) -> Blocks:
        """Blocks that are computed from these, in the same cache.

        Args:
            name: what they are.
            compute: makes the block of a bank row, (H*W, channels) float32.
            channels: number of values at each location.
        """
        level = replace(self.level, channels=channels, extracted=None, packed_bytes=None)
        return Blocks(level, _DerivedSource(self._source, compute), self._shared, self._key_of(name))

    def prefetch(self, row: int) -> None:
        """Say that a row will be read soon."""
        if self._cache is None or self._cache.get((self.key, row)) is None:
            self._source.prefetch(row)

    def release(self, *rows: int) -> None:
        """Say that some rows are not needed for now."""
        self._source.release(rows)

    @property
    def block_bytes(self) -> int:
        """Bytes of one decoded block."""
        return self.level.locations * self.level.channels * np.dtype(np.float32).itemsize

    @once
    def center(self) -> FloatArray:
        """(C,), about where the vectors of this level are: the mean of a few blocks spread over the bank.

        L2 does not depend on the origin, but rounding does: searches subtract the center before they multiply. It depends on
        the bank alone, so that a search returns the same numbers in any batch.
        """
        mean: FloatArray = np.mean([self.read(row).mean(axis=0) for row in self._spread], axis=0, dtype=np.float32)
        return mean

    def typical(self, count: int) -> FloatArray:
        """(n, C), up to `count` vectors of the blocks that the center is the mean of; the same ones at every call."""
        each = -(-count // len(self._spread))
        parts = [block[:: -(-len(block) // each)] for block in map(self.read, self._spread)]
        return np.concatenate(parts)

    @property
    def _spread(self) -> list[int]:
        return sorted({int(row) for row in np.linspace(0, len(self) - 1, SPREAD_BLOCKS)})

    def _key_of(self, name: str) -> str:
        return f"{self.key}/{name}"  # no level's name holds a '/'
