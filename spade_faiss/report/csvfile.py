"""`scores.csv` with a line for each image and `regions.csv` with a line for each region, for spreadsheets and scripts.

Names and other text are written by `cells.text_cell`, and read by `cells.read_text`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.settings import Method
from spade_faiss.decisions.run_lengths import to_text
from spade_faiss.report.cells import csv_line, defused, text_cell
from spade_faiss.report.metric_labels import SCORE_COLUMNS
from spade_faiss.report.selection import lowest_for_nan

if TYPE_CHECKING:
    from spade_faiss.decisions.calibration import Verdicts
    from spade_faiss.decisions.regions import Region
    from spade_faiss.report.scorefile import ScoreFile
    from spade_faiss.scoring.scores import Scores


def write_csv(
    path: str | os.PathLike[str],
    scores: Scores | ScoreFile,
    kinds: Sequence[str] | None = None,
    verdicts: Verdicts | None = None,
    ranks: npt.NDArray[np.int64] | None = None,
    times_s: Sequence[float | None] | None = None,
) -> None:
    """Write id, image_score, map_score, top_score, rank (1: the highest), kind if there is one, time_s of frames of videos,
    product, confidence and p_none in a bank of several products, neighbor_1, dist_1, and so on.

    With verdicts, p_image, p_map, p_top, p_structure, p_value and alarm (1 or 0) come before the neighbors; those of maps are
    empty without a map, and all of them for a product without a calibration. structure_score comes before rank if there is one.

    Args:
        path: the file to make or replace, atomically; its folder exists.
        scores: the scores of n images.
        kinds: n names, such as `good` or the kind of defect; None if the images have no labels.
        verdicts: the verdicts on the n images, or None.
        ranks: (n,) the rank of each image; None ranks them among each other by the usual score.
        times_s: when each of n frames is shown in its video, None for an image that is none; None if no image is one.

    Raises:
        InputError: if there is not one kind for each image.
    """
    if kinds is not None and len(kinds) != len(scores):
        raise InputError(f"{len(kinds)} kinds for {len(scores)} images")
    of_image = scores.image_scores
    ranks = rank(of_image[Method.score]) if ranks is None else ranks
    neighbor_names = [name for i in range(1, scores.neighbor_ids.shape[1] + 1) for name in (f"neighbor_{i}", f"dist_{i}")]
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        kind_name = [*(["kind"] if kinds is not None else []), *(["time_s"] if times_s is not None else [])]
        kind_name += ["product", "confidence", "p_none"] if scores.routes is not None else []
        verdict_names = ["p_image", "p_map", "p_top", "p_structure", "p_value", "alarm"] if verdicts is not None else []
        file.write(
            csv_line(["id", *(SCORE_COLUMNS[name] for name in of_image), "rank", *kind_name, *verdict_names, *neighbor_names])
        )
        for i, image in enumerate(scores.ids):
            neighbors = map(text_cell, scores.neighbor_ids[i].tolist())
            distances = ["" if math.isnan(dist) else dist for dist in scores.neighbor_dist[i]]
            pairs = zip(neighbors, distances, strict=True)
            # str() of a float32 is the shortest text that reads back as the same float32.
            line: list[object] = [text_cell(image), *(values[i] for values in of_image.values()), ranks[i]]
            line += [text_cell(kinds[i])] if kinds is not None else []
            if times_s is not None:
                line.append("" if times_s[i] is None else times_s[i])
            if scores.routes is not None:
                product, *numbers = scores.routes.at(i)
                line += [text_cell(product), *("" if number is None else number for number in numbers)]
            if verdicts is not None:
                found = [
                    p[i] for p in (verdicts.p_image, verdicts.p_map, verdicts.p_top, verdicts.p_structure, verdicts.p_value)
                ]
                line += ["" if math.isnan(p) else p for p in found]
                line.append("" if (alarm := verdicts.alarm_of(i)) is None else int(alarm))
            file.write(csv_line(line + [cell for pair in pairs for cell in pair]))


def write_regions_csv(path: str | os.PathLike[str], ids: Sequence[str], regions: Sequence[Sequence[Region]]) -> None:
    """Write a line for each region: its image, number, score and p-value, then where it is in the input and in the original.

    The columns of the two places begin with `input_` and `original_`: x, y, width, height of the box, area, peak_x, peak_y in
    pixels, the size of the picture as HEIGHTxWIDTH, and the mask as COCO's run lengths in text, after an apostrophe if they
    begin with one of = and @.

    Args:
        path: the file to make or replace, atomically; its folder exists.
        ids: n image names.
        regions: the regions of each image, strongest first.
    """
    names = ("x", "y", "width", "height", "area", "peak_x", "peak_y", "size", "mask")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        places = (f"{at}_{name}" for at in ("input", "original") for name in names)
        file.write(csv_line(["id", "region", "score", "p_value", *places]))
        for image, found in zip(ids, regions, strict=True):
            for number, region in enumerate(found, 1):
                line: list[object] = [text_cell(image), number, region.score, region.p_value]
                for extent in (region.input, region.original):
                    size = f"{extent.size[0]}x{extent.size[1]}"
                    line += [*extent.box, extent.area, extent.peak[1], extent.peak[0], size, defused(to_text(extent.counts))]
                file.write(csv_line(line))


def rank(scores: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """(n,) ranks by falling score, 1 for the highest; equal scores share the smaller rank, NaN is below all."""
    values = lowest_for_nan(np.asarray(scores))
    return len(values) + 1 - np.searchsorted(np.sort(values), values, side="right").astype(np.int64)
