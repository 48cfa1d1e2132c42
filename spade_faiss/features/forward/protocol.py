"""What an engine for the forward pass is."""

from __future__ import annotations

from typing import Protocol

from spade_faiss.core.types import FloatArray

# The names that an exported network gives its input and its first output; the others have the names of the levels.
INPUT = "input"
EMBEDDING = "embedding"


# The embedding (n, d) and, by the name of the level, finest first, maps (n, H, W, C); all float32 and contiguous.
Features = tuple[FloatArray, dict[str, FloatArray]]


class Forward(Protocol):
    """Runs a network. Safe to share between threads, and to use in a fork of the process."""

    @property
    def engine(self) -> str:
        """One of `core.extraction.ENGINES`."""

    def __call__(self, inputs: FloatArray) -> Features:
        """Run it on n images.

        Args:
            inputs: (n, 3, H, W) float32, preprocessed.
        """
