"""Shapes that benchmarks run on in a moment."""

from __future__ import annotations

from benchmarks.features import SHAPES, Shape
from spade_faiss import Level

LOOKS = SHAPES["lite0"].looks


TINY = {
    "square": Shape((Level("fine", 8, 4, 12, 12), Level("coarse", 24, 8, 6, 6)), LOOKS[:2], 16),
    "oblong": Shape((Level("only", 40, 4, 9, 14),), LOOKS[1:2], 16),
}
