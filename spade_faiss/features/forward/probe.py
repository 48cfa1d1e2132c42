"""A probe: one input and its features, by which an engine is proven wherever a bank is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.features.forward.protocol import Features


@dataclass(frozen=True, eq=False)
class Probe:
    """One input, (1, 3, H, W), and the features that it must give; both float32."""

    inputs: FloatArray
    features: Features

    def difference(self, forward: Callable[[FloatArray], Features]) -> float:
        """How far the features that a network computes now are from those of the probe, see `difference`."""
        return difference(forward(self.inputs), self.features)


def difference(found: Features, expected: Features) -> float:
    """The largest difference of any feature, relative to the largest feature of the same output; the largest of all outputs.

    Raises:
        InputError: if outputs or their shapes differ.
    """
    if list(found[1]) != list(expected[1]):
        raise InputError(f"the network gives the levels {list(found[1])}, expected {list(expected[1])}")
    return max(
        _relative(a, b) for a, b in zip((found[0], *found[1].values()), (expected[0], *expected[1].values()), strict=True)
    )


def _relative(found: FloatArray, expected: FloatArray) -> float:
    if found.shape != expected.shape:
        raise InputError(f"the network gives features of the shape {found.shape}, expected {expected.shape}")
    largest = float(np.abs(expected).max())
    apart = float(np.abs(found - expected).max())
    return apart / largest if largest else apart
