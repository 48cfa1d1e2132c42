"""How much of each defect maps find, from batch after batch."""

from __future__ import annotations

import numpy as np

from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.tuning.statistics import Doubles, map_areas

# Of the pixels that are not defective, every third in a row and in a column is enough to rank the others among.
_STEP = 3


class Overlaps:
    """Collects maps of normal pictures and of defective ones; then `areas` compares them."""

    def __init__(self) -> None:
        self._outside: list[FloatArray] = []
        self._defects: list[tuple[FloatArray, Bools]] = []

    def add_normal(self, maps: FloatArray, inside: Bools | None = None) -> None:
        """Add the maps (n, H, W) of normal pictures; `inside` says where they are inspected, everywhere unless given."""
        self._add(maps, np.ones(maps.shape, np.bool_) if inside is None else inside)

    def add_defects(self, maps: FloatArray, masks: Bools, inside: Bools | None = None) -> None:
        """Add the maps (n, H, W) of defective pictures, and where they are defective."""
        self._add(maps, ~masks if inside is None else inside & ~masks)
        self._defects.append((maps, masks))

    def _add(self, maps: FloatArray, normal: Bools) -> None:
        self._outside.append(maps[:, ::_STEP, ::_STEP][normal[:, ::_STEP, ::_STEP]])

    def areas(self, count: int) -> Doubles:
        """(count,) see `statistics.map_areas`; NaN for all where no masks were given."""
        if not self._defects:
            return np.full(count, np.nan)
        others = np.sort(np.concatenate(self._outside))
        return np.concatenate([map_areas(maps, masks, others) for maps, masks in self._defects])
