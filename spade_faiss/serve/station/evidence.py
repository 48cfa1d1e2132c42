"""What is shown beside a verdict: the normal pictures that a picture was compared with, and the patches that were matched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.report.cards import matched_box
from spade_faiss.report.pictures import Box, cell_box
from spade_faiss.report.scorefile import match_at
from spade_faiss.scoring.scores import Scores
from spade_faiss.serve.history.records import MatchedPatch, NearestNormal

_NEAREST = 5


def nearest_normals(scores: Scores, bank: Snapshot) -> list[tuple[NearestNormal, ...]]:
    """For each of n pictures, the normal ones that are nearest, and others that a level matched at the peak of its map."""
    n, size = len(scores), bank.layout.input_size
    corners = np.zeros((n, 2), np.int64) if scores.corners is None else scores.corners
    peaks = scores.peak - corners
    has_map = np.isfinite(scores.map_score)
    matches = {level: match_at(peaks, size, nearest) for level, nearest in scores.nearest.items()}
    places = bank.tile_places
    found = []
    for i in range(n):
        patches: dict[str, list[MatchedPatch]] = {}
        for level, match in matches.items() if has_map[i] else ():
            _, y, x, row = match[i].tolist()
            grid = scores.nearest[level].shape[1:]
            place = None if places is None else places[row].tolist()
            box, shown = matched_box((y, x), grid, size, place)
            patch = MatchedPatch(level=level, box=box, size=shown, query=_query_box(peaks[i], corners[i], grid, size))
            patches.setdefault(bank.pictures.names(np.array([row]))[0], []).append(patch)
        names = [name for name in scores.neighbor_ids[i].tolist() if name]  # a product of few images has fewer neighbors
        distance = {name: float(dist) for name, dist in reversed(list(zip(names, scores.neighbor_dist[i], strict=False)))}
        shown_names = [*list(dict.fromkeys(names))[:_NEAREST]]
        shown_names += [name for name in patches if name not in shown_names]
        found.append(
            tuple(
                NearestNormal(id=name, distance=distance.get(name), patches=tuple(patches.get(name, ())))
                for name in shown_names
            )
        )
    return found


def _query_box(peak: Sequence[int], corner: Sequence[int], grid: Sequence[int], size: Sequence[int]) -> Box:
    """The cell of the picture's own map that its peak lies in, in pixels of the map."""
    cell = int(peak[0]) * grid[0] // size[0], int(peak[1]) * grid[1] // size[1]
    y0, x0, y1, x1 = cell_box(cell, grid, size)
    top, left = int(corner[0]), int(corner[1])
    return top + y0, left + x0, top + y1, left + x1
