"""Cases that searches are tested on: seeded, of odd sizes, with near duplicates, exact copies and ties."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import ArraySource, Blocks

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class SearchCase:
    """A search to run.

    Attributes:
        maps: (rows, H, W, C) float32, the maps of the normal images.
        xq: (n, HW, C) float32, the vectors of the test images.
        neighbors: (n, K) int64, the gallery of each test image.
    """

    maps: FloatArray
    xq: FloatArray
    neighbors: IntArray

    @property
    def vectors(self) -> FloatArray:
        """(rows, HW, C), the vectors of the normal images."""
        rows, _, _, channels = self.maps.shape
        return self.maps.reshape(rows, -1, channels)

    @property
    def level(self) -> Level:
        """The level of the maps."""
        _, height, width, channels = self.maps.shape
        return Level("level", channels, stride=1, height=height, width=width)

    @property
    def blocks(self) -> Blocks:
        """The maps as blocks in memory."""
        return Blocks(self.level, ArraySource(self.vectors))

    def part(self, images: slice) -> SearchCase:
        """The search of some of the test images."""
        return replace(self, xq=self.xq[images], neighbors=self.neighbors[images])


def structured_case(seed: int, *, n: int = 4, rows: int = 7, k: int = 5, shape: Shape = (5, 7, 16)) -> SearchCase:
    """A case like features of one product: smooth maps of a few patterns, mixed into correlated channels with an offset.

    A corner of each map is flat, half of it the same vector in all images. Of the normal images, the third is the second but
    for a little noise, and the fifth equals the fourth to the bit.

    Args:
        seed: decides all of it.
        n: number of test images.
        rows: number of normal images.
        k: number of neighbors of a test image.
        shape: height, width and channels of the maps.
    """
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    mix, offset = rng.normal(size=(4, channels)), rng.uniform(2, 4, channels)
    y, x = np.linspace(0, 6, height)[:, None, None], np.linspace(0, 5, width)[None, :, None]
    shift = 0.3 * rng.normal(size=(rows + n, 1, 1, 4))
    waves = np.concatenate([np.sin(y * [1, 2] + shift[..., :2]) + 0 * x, np.cos(x * [2, 1] + shift[..., 2:]) + 0 * y], axis=-1)
    maps = waves @ mix + offset + 0.05 * rng.normal(size=(rows + n, *shape))
    half = (width + 3) // 6
    maps[:, : (height + 2) // 3, : 2 * half] = offset
    maps[:, : (height + 2) // 3, half : 2 * half] *= 1 + 1e-4 * rng.normal(size=(rows + n, (height + 2) // 3, half, channels))
    for copy, original, noise in ((2, 1, 1e-3), (4, 3, 0.0)):
        if copy < rows:
            maps[copy] = maps[original] * (1 + noise * rng.normal(size=shape))
    made = np.ascontiguousarray(maps, np.float32)
    neighbors = np.stack([rng.permutation(rows)[:k] for _ in range(n)])
    return SearchCase(made[:rows], made[rows:].reshape(n, -1, channels), neighbors)


def whole_number_case(seed: int, *, shape: Shape = (3, 5, 8)) -> SearchCase:
    """A case of small whole numbers: squared distances are exact, and ties are everywhere; every second image is a copy."""
    rng = np.random.default_rng(seed)
    n, rows, k = 3, 8, 6
    maps = rng.integers(-1, 2, (rows, *shape)).astype(np.float32)
    maps[1::2] = maps[[0, 0, 4, 2]]
    xq = rng.integers(-1, 2, (n, shape[0] * shape[1], shape[2])).astype(np.float32)
    return SearchCase(maps, xq, np.stack([rng.permutation(rows)[:k] for _ in range(n)]))
