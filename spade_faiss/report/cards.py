"""The images that a report shows in full: each with its heat map, its nearest normal images and what matched its peak."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from spade_faiss.decisions.regions import Region
from spade_faiss.report.inputs import ReportInputs
from spade_faiss.report.model import Card, CardGroup, ImageRow, Match, NormalPicture
from spade_faiss.report.pictures import Box, cell_box, shrink, shrink_box, shrink_factor, shrink_map, shrink_mask
from spade_faiss.report.selection import select_images

_NORMALS_SHOWN = 5


def card_groups(inputs: ReportInputs, rows: Sequence[ImageRow], shown: int) -> Iterator[CardGroup]:
    """The images that are shown in full, by group.

    Args:
        inputs: the run.
        rows: the row of each image in the table of all images.
        shown: how many images to show.
    """
    for selection in select_images(inputs.ranked, inputs.scores.localized, inputs.defective, shown):
        cards = tuple(_card(inputs, i, rows[i]) for i in selection.images)
        yield CardGroup(title=selection.title, cards=cards, note=selection.note)


def _card(inputs: ReportInputs, i: int, row: ImageRow) -> Card:
    scores, decisions = inputs.scores, inputs.results.decisions
    picture, missing = inputs.picture(i)
    own_map = scores.map(i)
    mask = None if inputs.masks is None or inputs.records[i].mask is None else inputs.masks[i]
    peak_y, peak_x = scores.peak[i].tolist()
    regions = [] if decisions is None else [_corners(region) for region in decisions.regions[i]]
    return Card(
        image=row,
        map=shrink_map(own_map),
        peak=(peak_y, peak_x),
        picture=None if picture is None else shrink(picture),
        mask=None if mask is None else shrink_mask(mask),
        normals=tuple(_normals(inputs, i)),
        missing=missing,
        regions=tuple(shrink_box(box, own_map.shape) for box in regions),
        shrunk=shrink_factor(own_map.shape),
    )


def _normals(inputs: ReportInputs, i: int) -> Iterator[NormalPicture]:
    """The nearest normal images, nearest first, then other normal images that a level matched."""
    scores = inputs.scores
    # Neighbors are named by their column, the other images that a level matched by -1 - their row in the bank.
    matches: dict[int, list[Match]] = {}
    rows: dict[int, int] = {}  # of those that were matched: where that is lies in the entry of the row
    for level, match in scores.match.items():
        column, y, x, row = match[i].tolist()
        corners = shrink_box(cell_box((y, x), scores.grid[level], scores.size), scores.size)
        at = column if column >= 0 else -1 - row
        matches.setdefault(at, []).append(Match(level=level, corners=corners))
        rows[at] = row
    nearest = range(min(_NORMALS_SHOWN, scores.neighbor_ids.shape[1]))
    for column in sorted({*nearest, *matches}, key=lambda at: (at < 0, at)):
        is_neighbor = column >= 0
        name = str(scores.neighbor_ids[i, column]) if is_neighbor else inputs.normal_ids[-1 - column]
        picture, missing = inputs.normal_picture(name, rows.get(column))
        yield NormalPicture(
            id=name,
            place=column + 1 if is_neighbor else None,
            distance=float(scores.neighbor_dist[i, column]) if is_neighbor else math.nan,
            picture=picture,
            matches=tuple(matches.get(column, ())),
            missing=missing,
        )


def _corners(region: Region) -> Box:
    x, y, width, height = region.input.box
    return y, x, y + height, x + width
