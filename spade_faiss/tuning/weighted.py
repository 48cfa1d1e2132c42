"""Weights under which normal pictures vary as much at every level, and the maps that they make of what was searched already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spade_faiss.core.settings import Method
from spade_faiss.scoring.fusion import score_maps
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.scoring.scores import Scores

# Weights are rounded to so many digits: they are estimates, and are read by people.
_DIGITS = 3
# A level that varies so much more or less than the finest says nothing, or all of it.
_MOST_APART = 1e4


def light(scores: Scores) -> Scores:
    """The same scores without their maps, which `fused` makes again."""
    return replace(scores, maps=np.empty((len(scores), 0, 0), np.float32), nearest={})


def fused(scores: Scores, size: tuple[int, int], method: Method) -> Scores:
    """Scores with the maps, and what is made of them, that a detector of a method would give for the same distances."""
    maps = score_maps(list(scores.level_dist.values()), size, method.sigma, method.level_weights)
    if scores.valid is not None:
        maps *= scores.valid
    return replace(scores, maps=maps, statistics=map_statistics(maps, scores.valid, method.top_share))


def standardizing_weights(normal: Sequence[Scores]) -> tuple[float, ...]:
    """The weight of each level: the inverse of the standard deviation of its distances over all locations of normal pictures.

    As maps are compared with each other only, it makes no difference that means are not subtracted. The weights are given in
    units of that of the first level.

    Args:
        normal: the scores of normal pictures, each compared with all others.

    Returns:
        Nothing where there is one level, where a level does not vary, or where the weights would be the same.
    """
    deviations = [
        float(np.nanstd(np.concatenate([scores.level_dist[name].ravel() for scores in normal]), dtype=np.float64))
        for name in normal[0].level_dist
    ]
    if len(deviations) < 2 or min(deviations) <= 0 or max(deviations) > _MOST_APART * min(deviations):
        return ()
    weights = tuple(float(f"{deviations[0] / each:.{_DIGITS}g}") for each in deviations)
    return weights if len(set(weights)) > 1 else ()
