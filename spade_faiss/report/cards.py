"""The images that a report shows in full: each with its heat map, its nearest normal images and what matched its peak."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from spade_faiss.core.process import usable_cores
from spade_faiss.decisions.regions import Region
from spade_faiss.report.inputs import ReportInputs
from spade_faiss.report.model import Card, CardGroup, ImageRow, Match, NormalPicture
from spade_faiss.report.pictures import Box, cell_box, shrink, shrink_box, shrink_factor, shrink_map, shrink_mask
from spade_faiss.report.selection import select_images

_NORMALS_SHOWN = 5


class _Normal(NamedTuple):
    """A normal image that a card shows: its column in `neighbor_ids`, or -1 - its row; its id, the row of the entry that was
    matched, if one was, and what matched.
    """

    column: int
    name: str
    row: int | None
    matches: tuple[Match, ...]


def card_groups(inputs: ReportInputs, rows: Sequence[ImageRow], shown: int) -> Iterator[CardGroup]:
    """The images that are shown in full, by group.

    Args:
        inputs: the run.
        rows: the row of each image in the table of all images.
        shown: how many images to show.
    """
    selections = select_images(inputs.ranked, inputs.scores.localized, inputs.defective, shown)
    chosen = {i: list(_chosen(inputs, i)) for selection in selections for i in selection.images}
    # Most of a report's time goes into decoding these: all cores do it.
    with ThreadPoolExecutor(usable_cores(), "normals") as pool:
        wanted = dict.fromkeys((normal.name, normal.row) for normals in chosen.values() for normal in normals)
        list(pool.map(lambda of: inputs.normal_picture(*of), wanted))
    for selection in selections:
        cards = tuple(_card(inputs, i, rows[i], chosen[i]) for i in selection.images)
        yield CardGroup(title=selection.title, cards=cards, note=selection.note)


def _card(inputs: ReportInputs, i: int, row: ImageRow, chosen: Sequence[_Normal]) -> Card:
    scores, decisions = inputs.scores, inputs.results.decisions
    picture, missing = inputs.picture(i)
    own_map = scores.map(i)
    height, width = own_map.shape
    mask = None if inputs.masks is None or inputs.records[i].mask is None else inputs.masks[i, :height, :width]
    peak_y, peak_x = scores.peak[i].tolist()
    regions = [] if decisions is None else [_corners(region) for region in decisions.regions[i]]
    return Card(
        image=row,
        map=shrink_map(own_map),
        peak=(peak_y, peak_x),
        picture=None if picture is None else shrink(picture),
        mask=None if mask is None else shrink_mask(mask),
        normals=tuple(_shown(inputs, i, normal) for normal in chosen),
        missing=missing,
        regions=tuple(shrink_box(box, own_map.shape) for box in regions),
        shrunk=shrink_factor(own_map.shape),
    )


def _chosen(inputs: ReportInputs, i: int) -> Iterator[_Normal]:
    """The nearest normal images, nearest first, then other normal images that a level matched."""
    scores = inputs.scores
    # Neighbors are named by their column, the other images that a level matched by -1 - their row in the bank.
    matches: dict[int, list[Match]] = {}
    # Several tiles of one normal image are shown as one, at the place of the nearest.
    is_tiled, names = inputs.normal_places is not None, scores.neighbor_ids[i].tolist()
    first = {name: column for column, name in reversed(list(enumerate(names)))} if is_tiled else {}
    rows: dict[int, int] = {}  # of those that were matched: where that is lies in the entry of the row
    for level, match in scores.match.items():
        column, y, x, row = match[i].tolist()
        corners = _matched(inputs, level, (y, x), row)
        at = column if column >= 0 else -1 - row
        if is_tiled:
            at = first.get(inputs.normal_ids[row], -1 - list(inputs.normal_ids).index(inputs.normal_ids[row]))
        matches.setdefault(at, []).append(Match(level=level, corners=corners))
        rows[at] = row
    known = [column for column, name in enumerate(names) if name]  # a product of few images has fewer neighbors than others
    nearest = (sorted(first.values()) if is_tiled else known)[:_NORMALS_SHOWN]
    for column in sorted({*nearest, *matches}, key=lambda at: (at < 0, at)):
        name = str(scores.neighbor_ids[i, column]) if column >= 0 else inputs.normal_ids[-1 - column]
        yield _Normal(column, name, rows.get(column), tuple(matches.get(column, ())))


def _shown(inputs: ReportInputs, i: int, normal: _Normal) -> NormalPicture:
    picture, missing = inputs.normal_picture(normal.name, normal.row)
    is_neighbor = normal.column >= 0
    return NormalPicture(
        id=normal.name,
        place=normal.column + 1 if is_neighbor else None,
        distance=float(inputs.scores.neighbor_dist[i, normal.column]) if is_neighbor else math.nan,
        picture=picture,
        matches=normal.matches,
        missing=missing,
        group=inputs.normal_group.get(normal.name, ""),
    )


def _matched(inputs: ReportInputs, level: str, cell: tuple[int, int], row: int) -> Box:
    """The pixels that a cell of a row's map covers, in the picture of the normal image as it is shown."""
    place = None if inputs.normal_places is None else inputs.normal_places[row].tolist()
    return shrink_box(*matched_box(cell, inputs.scores.grid[level], inputs.scores.size, place))


def matched_box(
    cell: tuple[int, int], grid: Sequence[int], size: Sequence[int], place: Sequence[int] | None
) -> tuple[Box, tuple[int, int]]:
    """The pixels that a cell covers in the normal picture that it is of, and the height and width of that picture.

    Args:
        cell: (y, x) of the cell.
        grid: the height and width of the level's maps, in cells.
        size: the height and width of the backbone's input.
        place: where the entry lies in its picture, if it is a tile, see `tiles.TILE_COLUMNS`.
    """
    y0, x0, y1, x1 = cell_box(cell, grid, size)
    if place is None:
        return (y0, x0, y1, x1), (size[0], size[1])
    left, top, width, height = place
    # A tile may be larger than its picture, and the cell lie in its margins.
    y0, x0 = min(max(0, top + y0), height - 1), min(max(0, left + x0), width - 1)
    y1, x1 = max(y0 + 1, min(height, top + y1)), max(x0 + 1, min(width, left + x1))
    return (y0, x0, y1, x1), (height, width)


def _corners(region: Region) -> Box:
    x, y, width, height = region.input.box
    return y, x, y + height, x + width
