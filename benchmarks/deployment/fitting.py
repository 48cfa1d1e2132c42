"""Extraction of normal pictures into a bank, beside the bare forward passes of the same engine on the same inputs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.deployment.measure import Row, cost_of, in_turn, ratio, spreads
from benchmarks.deployment.places import BACKBONE, EXPORTED, SETS, Places, by_engine, inputs_of
from spade_faiss import Extraction, extract
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.memory import BATCH_SIZE
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.loading import load_backbone
from spade_faiss.features.pictures import load_image, to_input


def fitting(places: Places) -> Iterator[Row]:
    """Seconds of `extract` with a network that is open already, of its forward passes alone, and of decoding alone."""
    network = load_backbone(BACKBONE)
    for name in SETS:
        train = places.dataset(name).train
        images = train[0].path.parent
        inputs = inputs_of(train, network)
        for engine in EXPORTED:
            backbone = by_engine(network, engine, inputs)
            bank = places.scratch / "fitting" / f"{name}-{engine}.bank"
            found = in_turn(
                {
                    "extract": partial(cost_of, partial(_extract, images, backbone, bank)),
                    "forward": partial(cost_of, partial(_forward, backbone, inputs)),
                    "decode": partial(cost_of, partial(_decode, train, backbone.source.preprocess)),
                },
                places.repeats,
            )
            wall = {part: [cost.wall_s for cost in costs] for part, costs in found.items()}
            yield {
                "set": name,
                "engine": engine,
                "images": len(train),
                **{part: spreads(costs) for part, costs in found.items()},
                "times_forward": ratio(wall["extract"], wall["forward"]),
                # What remains if the two do not overlap at all: the same cores do both.
                "times_both": ratio(wall["extract"], [sum(both) for both in zip(wall["forward"], wall["decode"], strict=True)]),
            }


def _extract(images: Path, backbone: Backbone, bank: Path) -> None:
    shutil.rmtree(bank, ignore_errors=True)
    # The network is not exported again: that has been done, and counts as loading.
    extract(images, bank=bank, extraction=Extraction(backbone=backbone, network=False), preset="spade")


def _forward(backbone: Backbone, inputs: FloatArray) -> None:
    for start in range(0, len(inputs), BATCH_SIZE):
        backbone(inputs[start : start + BATCH_SIZE])


def _decode(records: list[ImageRecord], preprocess: Preprocess) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda record: to_input(load_image(record, preprocess).picture, preprocess), records):
            pass
