"""One picture after the other in a process that has everything open, beside the bare forward pass and the decoding of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.deployment.measure import Row, percentiles, ratio
from benchmarks.deployment.places import EXPORTED, PRESETS, Places
from benchmarks.process import seconds, spread
from spade_faiss import Detector
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord, find_images
from spade_faiss.features.pictures import load_image, to_input

CALLS = 200
_WARM_UP = 20


def warm(places: Places) -> Iterator[Row]:
    """Milliseconds of `Detector.score(one picture)`, of its forward pass and decoding alone, and of its stages."""
    paths = [record.path for record in places.dataset("mvtec_bottle").test]
    for engine, preset in product(EXPORTED, PRESETS):
        detector = places.detector("mvtec_bottle", engine, preset)
        runs = [_in_turn(detector, paths) for _ in range(places.repeats)]
        yield {
            "engine": engine,
            "preset": preset,
            "normals": len(detector.bank),
            "calls": CALLS,
            **{
                name: {part: spread([percentiles(run[name])[part] for run in runs]) for part in ("p50", "p95")}
                for name in ("score", "decode", "forward", "bare")
            },
            # Of the medians of each run: single calls are disturbed one by one.
            "times_bare": ratio(*([float(np.median(run[name])) for run in runs] for name in ("score", "bare"))),
            "times_bare_p95": ratio(*([percentiles(run[name])["p95"] for run in runs] for name in ("score", "bare"))),
            "stages_ms": _stages(detector, paths),
        }


def _in_turn(detector: Detector, paths: list[Path]) -> dict[str, list[float]]:
    """Seconds of each call, in turn with the bare work on the same picture."""
    found: dict[str, list[float]] = {"score": [], "decode": [], "forward": [], "bare": []}
    backbone, preprocess = detector.backbone, detector.backbone.source.preprocess

    def decode(record: ImageRecord, inputs: list[FloatArray]) -> None:
        inputs.append(to_input(load_image(record, preprocess).picture, preprocess))

    for call in range(-_WARM_UP, CALLS):
        path = paths[call % len(paths)]
        inputs: list[FloatArray] = []
        taken = {
            "score": seconds(partial(detector.score, path)),
            "decode": seconds(partial(decode, ImageRecord(path.name, path), inputs)),
            "forward": seconds(partial(backbone, inputs[0][None])),
        }
        taken["bare"] = taken["decode"] + taken["forward"]
        if call >= 0:
            for name, value in taken.items():
                found[name].append(value)
    return found


def _stages(detector: Detector, paths: list[Path]) -> Row:
    """Milliseconds a picture of each stage of `Detector.score`, as it counts them itself; their means."""
    timings = Timings()
    for call in range(CALLS):
        for _ in detector.stream(timings, "score")(*find_images(paths[call % len(paths)])):
            pass
    return {name: 1000 * taken / CALLS for name, taken in timings.seconds.items()}
