"""A folder of pictures: the whole run, each of its stages alone on all cores, and what bounds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

from benchmarks.deployment.measure import Cost, Row, cost_of, in_turn, ratio, share_reached, spreads
from benchmarks.deployment.places import EXPORTED, PRESETS, SETS, Places, inputs_of
from benchmarks.process import spread
from spade_faiss import Detector, Run, score_folder
from spade_faiss.core.process import usable_cores
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord, Skipped
from spade_faiss.features.pictures import load_image, to_input
from spade_faiss.features.stream import Extracted, FeatureStream
from spade_faiss.scoring.scores import Scores
from spade_faiss.scoring.stream import ScoreStream


def folder(places: Places) -> Iterator[Row]:
    """The seconds of `score_folder` beside those of decoding, forward passes, search, and regions, files and report alone."""
    for name in SETS:
        test = places.dataset(name).test
        paths = [record.path for record in test]
        for engine, preset in product(EXPORTED, PRESETS):
            detector = places.detector(name, engine, preset)
            runs: dict[str, Callable[[], object]] = {
                "whole": partial(_whole, paths, detector, places.scratch),
                **_stages(test, paths, detector, places.scratch),
            }
            found = in_turn({of: partial(cost_of, run) for of, run in runs.items()}, places.repeats)
            whole = found.pop("whole")
            yield {
                "set": name,
                "engine": engine,
                "preset": preset,
                "images": len(test),
                "whole": spreads(whole),
                "ms": spread([1000 * cost.wall_s / len(test) for cost in whole]),
                "alone": {stage: spreads(costs) for stage, costs in found.items()},
                **share_reached(whole, found, usable_cores()),
                "cores": usable_cores(),
                "cpu_over_alone": _cpu_over(whole, found),
            }


def _cpu_over(whole: Sequence[Cost], alone: dict[str, list[Cost]]) -> Row:
    """The processor's seconds of the whole run, as a multiple of those of its stages alone."""
    together = [sum(costs) for costs in zip(*([cost.cpu_s for cost in costs] for costs in alone.values()), strict=True)]
    return ratio([cost.cpu_s for cost in whole], together)


def _whole(paths: list[Path], detector: Detector, scratch: Path) -> object:
    return score_folder(paths, bank=detector, out=scratch / "folder")


def _stages(test: list[ImageRecord], paths: list[Path], detector: Detector, scratch: Path) -> dict[str, Callable[[], object]]:
    """The stages, each with what it takes ready in memory, as the run divides it among threads and batches."""
    backbone, size = detector.backbone, detector.plan.batch
    preprocess = backbone.source.preprocess
    inputs = inputs_of(test, backbone)
    batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    features = FeatureStream(backbone, Run(), batch_size=size, timings=Timings())
    extracted = list(features(Path(os.path.commonpath(paths)), test, "extract"))
    scored = [(part, detector.score_features(part.batch)) for part in extracted]

    def decode() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda record: _decode(record, preprocess), test):
                pass

    def forward() -> None:
        for batch in batches:
            backbone(batch)

    def search() -> None:
        for part in extracted:
            detector.score_features(part.batch)

    replay = Replay(detector.bank, detector.recipe, detector.method, detector.run)
    replay.scored = scored
    write = partial(score_folder, paths, bank=replay, out=scratch / "written")
    _ = replay.backbone
    return {"decode": decode, "forward": forward, "search": search, "write": write}


def _decode(record: ImageRecord, preprocess: Any) -> FloatArray:
    return to_input(load_image(record, preprocess).picture, preprocess)


class Replay(Detector):
    """A detector that gives the scores it was told: a run with it does everything else, and nothing of what it replaces."""

    scored: Sequence[tuple[Extracted, Scores]] = ()

    def stream(self, timings: Timings, label: str, *, allow_none: bool = False) -> ScoreStream:
        """See `Detector.stream`."""
        return cast(ScoreStream, _ReplayStream(self.scored))


class _ReplayStream:
    skipped: tuple[Skipped, ...] = ()

    def __init__(self, scored: Sequence[tuple[Extracted, Scores]]) -> None:
        self._scored = scored

    def __call__(self, root: Path, records: Sequence[ImageRecord]) -> Iterator[tuple[Extracted, Scores]]:
        """Yield what was told, for the records of the same files."""
        rest = iter(records)
        for extracted, scores in self._scored:
            own = [next(rest) for _ in extracted.records]
            assert [record.path for record in own] == [record.path for record in extracted.records]
            yield replace(extracted, records=own), replace(scores, ids=[record.id for record in own])
