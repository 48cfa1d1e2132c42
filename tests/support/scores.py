"""Scores of images that do not exist, under names that are hard to write down, and score files of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from spade_faiss.report.scorefile import ScoreWriter
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.scoring.scores import NEAREST_DTYPE, Scores

NASTY = [
    "a,b.png",
    'say "cheese".png',
    "two\nlines\r\n.png",
    "=1+1",
    "@x",
    "日本/ä ö.png",
    "<script>alert(1)</script>",
    "caf\udce9.png",
]


def make_scores(n: int = 8, seed: int = 0) -> Scores:
    """Random scores with two levels."""
    rng = np.random.default_rng(seed)
    nearest = {}
    for level, (h, w) in {"layer2": (6, 7), "layer10": (3, 3)}.items():  # not in alphabetical order
        nearest[level] = np.zeros((n, h, w), NEAREST_DTYPE)
        for name, bound in (("neighbor", 3), ("y", h), ("x", w)):
            nearest[level][name] = rng.integers(0, bound, (n, h, w))
    return Scores(
        ids=[NASTY[i % len(NASTY)] + str(i // len(NASTY)) for i in range(n)],
        image_score=rng.random(n, dtype=np.float32),
        maps=(maps := rng.random((n, 20, 24), dtype=np.float32)),
        statistics=map_statistics(maps, None, 0.01),
        neighbor_ids=np.array([[NASTY[(i + j) % len(NASTY)] for j in range(3)] for i in range(n)], dtype=np.str_),
        neighbor_dist=rng.random((n, 3), dtype=np.float32),
        level_dist={},
        nearest=nearest,
        distance="l2",
    )


def part(scores: Scores, rows: slice) -> Scores:
    """The scores of some of the images."""
    names = ("ids", "image_score", "maps", "statistics", "neighbor_ids", "neighbor_dist")
    changed = {name: getattr(scores, name)[rows] for name in names}
    return replace(scores, **changed, nearest={level: nearest[rows] for level, nearest in scores.nearest.items()})


def write_scores(path: Path, scores: Scores, batch: int | None = None, settings: str = "{}") -> Path:
    """Write a score file, in batches of so many images."""
    step = batch or len(scores)
    with ScoreWriter(path, settings) as writer:
        for start in range(0, len(scores), step):
            writer.append(part(scores, slice(start, start + step)))
    return path


def leftovers(folder: Path) -> list[str]:
    """The names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())
