"""`scores.csv`: one line an image, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spade_faiss.errors import InputError
from spade_faiss.files import atomic_path

if TYPE_CHECKING:
    from spade_faiss.report.scorefile import ScoreFile
    from spade_faiss.scoring import Scores


def write_csv(path: str | os.PathLike[str], scores: Scores | ScoreFile, kinds: Sequence[str] | None = None) -> None:
    """Write id, image_score, map_score, rank (1: highest image_score), kind if there is one, neighbor_1, dist_1, and so on.

    Args:
        path: the file to make or replace, atomically; its folder exists.
        scores: of n images.
        kinds: n names, such as `good` or the kind of defect; None where images have no labels.

    Raises:
        InputError: `kinds` is not one name an image.
    """
    if kinds is not None and len(kinds) != len(scores):
        raise InputError(f"{len(kinds)} kinds for {len(scores)} images")
    ranks, map_score = rank(scores.image_score), scores.map_score
    neighbor_names = [name for i in range(1, scores.neighbor_ids.shape[1] + 1) for name in (f"neighbor_{i}", f"dist_{i}")]
    # The name of a file that is no valid UTF-8 is text with lone surrogates; surrogateescape gives back the bytes it has.
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "image_score", "map_score", "rank", *(["kind"] if kinds is not None else []), *neighbor_names])
        for i, image in enumerate(scores.ids):
            pairs = zip(scores.neighbor_ids[i], scores.neighbor_dist[i], strict=True)
            # str() of a float32 is the shortest text that reads back as the same float32.
            line = [image, scores.image_score[i], map_score[i], ranks[i]]
            line += [kinds[i]] if kinds is not None else []
            lines.writerow(line + [cell for pair in pairs for cell in pair])


def rank(scores: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """(n,) places by falling score, 1 for the highest; equal scores share the smaller place."""
    values = np.asarray(scores)
    return len(values) + 1 - np.searchsorted(np.sort(values), values, side="right").astype(np.int64)
