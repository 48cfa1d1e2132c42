"""Forward passes: every engine in one process, in turn, on the same inputs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torchvision import models

from benchmarks.deployment.measure import Row, in_turn, ratio
from benchmarks.deployment.places import BACKBONE, Places, inputs_of
from benchmarks.process import seconds, spread
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.forward.choice import open_forward, usable_engines
from spade_faiss.features.forward.probe import difference
from spade_faiss.features.forward.protocol import Features
from spade_faiss.features.loading import load_backbone

BATCHES = (1, 8)
BASE = "torch float32"
# A repeat is the median of so many passes, each in turn with one of every other engine.
_PASSES = {"efficientnet_lite0": {1: 30, 8: 8}, "wide_resnet50_2": {1: 5, 8: 2}}
_SEED = 0

Pass = Callable[[FloatArray], Features]


def passes(places: Places) -> Iterator[Row]:
    """Milliseconds an image, and how far features are from those of torch in float32."""
    for name in _PASSES:
        plain, half = (_load(name, places, precision) for precision in ("float32", "bfloat16"))
        graph, levels = plain.export(), [level.name for level in plain.levels]
        engines: dict[str, Pass] = {BASE: plain, "torch bfloat16": half}
        for precision in ("float32", "bfloat16"):
            for engine in usable_engines(precision):
                engines[f"{engine} {precision}"] = open_forward(
                    engine, partial(_given, graph), levels, precision, plain.input_size
                )
        pictures = inputs_of(places.dataset("mvtec_bottle").test[: max(BATCHES)], plain)
        for batch in BATCHES:
            inputs, count = pictures[:batch], _PASSES[name][batch]
            expected = plain(inputs)
            runs = {engine: partial(_ms, run, inputs) for engine, run in engines.items()}
            rounds = [in_turn(runs, count, warm_up=1) for _ in range(places.repeats)]
            found = {engine: [statistics.median(taken[engine]) for taken in rounds] for engine in engines}
            for engine, run in engines.items():
                yield {
                    "backbone": name,
                    "batch": batch,
                    "engine": engine,
                    "ms": spread(found[engine]),
                    "fastest_ms": min(min(taken[engine]) for taken in rounds),
                    "times_torch": ratio(found[BASE], found[engine]),
                    "difference": difference(run(inputs), expected),
                }


def _load(name: str, places: Places, precision: str) -> Backbone:
    if name == BACKBONE:
        return load_backbone(name, precision=precision)
    weights = places.scratch / f"{name}.pt"
    if not weights.exists():
        torch.manual_seed(_SEED)
        torch.save(models.get_model(name, weights=None).state_dict(), weights)
    return load_backbone(name, weights=weights, precision=precision)


def _ms(run: Pass, inputs: FloatArray) -> float:
    """Milliseconds an image of a pass."""
    return 1000 * seconds(partial(run, inputs)) / len(inputs)


def _given(graph: bytes) -> bytes:
    return graph
