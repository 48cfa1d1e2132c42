"""What an engine changes: scores and verdicts of one bank, its network run by each engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.deployment.measure import Row
from benchmarks.deployment.places import ENGINES, Places
from spade_faiss import Bank, Decision, Detector, Method, Run, build_index, calibrate, load_recipe
from spade_faiss.core.declaring import ALL
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.rule import DecisionRule

RECIPES = ("exact", "ivf", "compact", "location", "clusters")
BASE = "torch"


def equality(places: Places) -> Iterator[Row]:
    """Verdicts that differ from those by torch, and the largest relative differences of image scores and of map maxima."""
    path, test = places.bank("mvtec_bottle"), [record.path for record in places.dataset("mvtec_bottle").test]
    for name in RECIPES:
        recipe = load_recipe(name)
        method = Method(k_gallery=ALL) if name == "clusters" else Method()
        build_index(Bank.open(path), recipe)
        calibrate(Detector.open(path, recipe=recipe, method=method))
        alarm, scores = {}, {}
        for engine in ENGINES:
            detector = Detector.open(path, recipe=recipe, method=method, run=Run(engine=engine))
            rule, notice = DecisionRule.of(detector, Decision())
            assert rule is not None, notice
            scores[engine] = detector.score(test)
            alarm[engine] = rule(scores[engine].image_scores, scores[engine].statistics).alarm
        for engine in ENGINES:
            if engine != BASE:
                yield {
                    "recipe": name,
                    "engine": engine,
                    "images": len(test),
                    "alarms": int(alarm[BASE].sum()),
                    "other_verdicts": int((alarm[engine] != alarm[BASE]).sum()),
                    "image_score": relative(scores[engine].image_score, scores[BASE].image_score),
                    "map_score": relative(scores[engine].map_score, scores[BASE].map_score),
                }


def relative(found: FloatArray, expected: FloatArray) -> float:
    """The largest difference of two numbers, relative to the expected one."""
    return float((np.abs(found - expected) / np.abs(expected)).max())
