"""How much memory scoring takes: from the decoded images of a batch to its finished maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spade_faiss.features.batch import Level
from spade_faiss.features.layout import Layout
from spade_faiss.features.memory import forward_bytes

# Of what a forward pass takes, this much is for images that are being decoded, whatever else the budget leaves.
DECODE_BYTES = 32 << 20


def float32_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 array."""
    return math.prod(shape) * np.dtype(np.float32).itemsize


def working_bytes(images: int, layout: Layout, searched: Sequence[Level], search_bytes: int, *, forward: bool) -> int:
    """About how many bytes it takes to score so many images at a time.

    Args:
        images: the number of images.
        layout: the layout of the bank's features.
        searched: the levels that are searched.
        search_bytes: the most that the search of a level takes for so many images.
        forward: whether a backbone computes the features.
    """
    image = float32_bytes((3, *layout.input_size))
    network = forward_bytes(images, layout.input_size) if forward else 0
    # As they are computed and as they are searched, and those of the next images.
    features = images * sum((3 if forward else 2) * float32_bytes(level.shape) for level in layout.levels)
    # Distances and where they come from; score maps before and after smoothing. Those of the last images are being written.
    results = (2 if forward else 1) * images * sum(10 * float32_bytes((level.height, level.width)) for level in searched)
    results += (3 if forward else 2) * images * image
    return network + search_bytes + features + results  # the network computes the next images meanwhile
