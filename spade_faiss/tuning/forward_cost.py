"""What the forward pass of a network costs for an image, measured once and kept."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spade_faiss.core.files import atomic_path
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.pictures import Picture, to_input

# So many images at a time, and as often after the first time, which is not counted.
_BATCH, _REPEATS = 4, 5


def forward_ms(kept: Path, backbone: Backbone, pictures: Sequence[Picture]) -> float:
    """The milliseconds that the network takes for an image, by this machine's clock: the median of several batches.

    Args:
        kept: the file that holds it once it was measured.
        backbone: the network.
        pictures: a few pictures as it sees them.
    """
    if not kept.exists():
        inputs = [to_input(picture, backbone.source.preprocess) for picture in pictures]
        batch = np.stack([inputs[place % len(inputs)] for place in range(_BATCH)])
        seconds = []
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            backbone(batch)
            seconds.append(time.perf_counter() - start)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as temporary:
            temporary.write_text(json.dumps({"ms": 1000 * statistics.median(seconds[1:]) / _BATCH}), encoding="utf-8")
    return float(json.loads(kept.read_bytes())["ms"])
