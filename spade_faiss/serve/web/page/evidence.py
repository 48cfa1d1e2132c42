"""What the page of a picture draws: its map, the regions, and the normal patches and pictures that it was compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.serve.history.records import Box, NearestNormal, ScoredPicture
from spade_faiss.serve.web.page.words import percent, picture_url, score_text

_REGIONS_SHOWN = 12
_NORMALS_SHOWN = 10
# Levels have as many colors as the stylesheet gives them.
_COLORS = 5
# Of the map's shorter side: how much of a picture a detail shows at least.
_DETAIL = 0.26
_MOST_STEPS = 1000
_SCORE_NAMES = {"knn": "nearest normals", "max": "map maximum", "top": "highest pixels", "structure": "structure"}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A rectangle on a picture, in pixels of the score map."""

    x: float
    y: float
    width: float
    height: float
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class RegionView(Frame):
    """A region with its numbers; `at` is its strongest pixel (x, y) in the original."""

    score: str
    p_value: float
    area: int
    at: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Detail:
    """The square of a picture around a patch, and the frame of the patch."""

    href: str
    width: int
    height: int
    x: float
    y: float
    side: float
    box: Frame
    label: str


@dataclass(frozen=True, kw_only=True)
class MatchView:
    """What a level matched: the patch of the picture, and that of a normal one."""

    level: str
    color: int
    id: str
    query: Detail
    normal: Detail


@dataclass(frozen=True, kw_only=True)
class NormalView:
    """A normal picture with the frames of the patches that were matched in it."""

    id: str
    href: str
    width: int
    height: int
    distance: str
    boxes: Sequence[Frame]


@dataclass(frozen=True, kw_only=True)
class Slider:
    """The range of the threshold's slider, and where it stands at first."""

    low: float
    high: float
    at: float


@dataclass(frozen=True, kw_only=True)
class PictureView:
    """A picture as its page draws it; sizes and places are in pixels of the score map."""

    width: int
    height: int
    has_map: bool
    low: float
    high: float
    verdict: str
    meaning: str
    regions: Sequence[RegionView]
    more_regions: int
    cross: str
    slider: Slider | None
    curve: Mapping[str, Any] | None
    scores: Sequence[tuple[str, str]]
    matches: Sequence[MatchView]
    normals: Sequence[NormalView]


def picture_view(picture: ScoredPicture, maxima: npt.ArrayLike | None, sizes: Mapping[str, tuple[int, int]]) -> PictureView:
    """How the page of a picture draws it.

    Args:
        picture: the record.
        maxima: the map maxima of the calibration that is served; None without one.
        sizes: (height, width) of normal pictures whose size is not that of the map, by their names in the bank.
    """
    height, width = picture.map_size or (picture.height, picture.width)
    curve = None if maxima is None else alpha_curve(maxima)
    low, high = picture.colors or (0.0, 1.0)
    regions = [_region(region) for region in picture.regions[:_REGIONS_SHOWN]]
    levels = _levels(picture)
    colors = {level: i % _COLORS for i, level in enumerate(levels)}
    shown = [normal for i, normal in enumerate(picture.nearest) if i < _NORMALS_SHOWN or normal.patches]
    return PictureView(
        width=width,
        height=height,
        has_map=picture.map_size is not None,
        low=low,
        high=max(high, float(np.nextafter(low, np.inf))),
        verdict="no verdict" if picture.alarm is None else "alarm" if picture.alarm else "normal",
        meaning=_meaning(picture),
        regions=regions,
        more_regions=len(picture.regions) - len(regions),
        cross=_cross(picture.peak, (height, width)),
        slider=_slider(picture, high, curve),
        curve=curve,
        scores=_scores(picture),
        matches=sorted(_matches(picture, shown, colors, sizes), key=lambda match: levels.index(match.level)),
        normals=[_normal(picture, normal, colors, sizes) for normal in shown],
    )


def alpha_curve(maxima: npt.ArrayLike) -> dict[str, Any]:
    """What a threshold on pixel scores promises, as data: of n normal pictures, how many have a pixel above each score.

    A threshold t means alpha = (1 + count above t) / (n + 1), as `conformal.threshold` has it the other way around. Of many
    scores, some are left out among the low ones; the count is then that of the next lower score, which promises less.

    Returns:
        `n`, and `scores` ascending with `above`, the number of pictures whose maximum is above each.
    """
    values, last = np.unique(np.asarray(maxima, np.float64), return_counts=True)
    above = len(np.ravel(np.asarray(maxima))) - np.cumsum(last)
    if len(values) > _MOST_STEPS:
        half = _MOST_STEPS // 2  # alphas that anybody chooses are at the high end
        low = np.unique(np.linspace(0, len(values) - half - 1, half).astype(int))
        chosen = np.concatenate([low, np.arange(len(values) - half, len(values))])
        values, above = values[chosen], above[chosen]
    return {"n": int(last.sum()), "scores": values.tolist(), "above": above.tolist()}


def region_box(region: Mapping[str, Any], size: Sequence[int]) -> tuple[float, float, float, float]:
    """(x, y, width, height) of the frame around a region in a small picture of a map of `size` (H, W), large enough to see."""
    x, y, width, height = region["input"]["box"]
    least = 0.14 * min(size)
    wide, high = max(width, least), max(height, least)
    left, top = x + (width - wide) / 2, y + (height - high) / 2
    left, top = min(max(left, 0), max(size[1] - wide, 0)), min(max(top, 0), max(size[0] - high, 0))
    return round(left, 1), round(top, 1), round(wide, 1), round(high, 1)


def _levels(picture: ScoredPicture) -> list[str]:
    """The levels that matched something, the finest first."""
    found = {patch.level: patch.query for normal in picture.nearest for patch in normal.patches}
    return sorted(found, key=lambda level: (found[level][2] - found[level][0], level))


def _meaning(picture: ScoredPicture) -> str:
    if picture.p_value is None or picture.alpha is None:
        of = "bank" if picture.product is None else "product"
        return f"The {of} has no calibration, so there is no p-value and no verdict."
    share = f"{percent(picture.p_value)} of normal pictures would look at least as unusual"
    bound = "at or below" if picture.alarm else "above"
    return f"At most {share}; that is {bound} the promised rate of false alarms, {percent(picture.alpha)}."


def _region(region: Mapping[str, Any]) -> RegionView:
    x, y, width, height = region["input"]["box"]
    row, column = region["original"]["peak"]
    return RegionView(
        x=x,
        y=y,
        width=width,
        height=height,
        score=score_text(region["score"]),
        p_value=region["p_value"],
        area=region["original"]["area"],
        at=(column, row),
    )


def _cross(peak: tuple[int, int] | None, size: tuple[int, int]) -> str:
    """The path of a ring with four strokes around the strongest pixel."""
    if peak is None:
        return ""
    r = round(0.04 * min(size), 1)
    y, x = peak[0] + 0.5, peak[1] + 0.5
    far = round(1.9 * r, 1)
    ring = f"M{x - r} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0"
    return f"{ring}M{x} {y - far}V{y - r}M{x} {y + r}V{y + far}M{x - far} {y}H{x - r}M{x + r} {y}H{x + far}"


def _slider(picture: ScoredPicture, high: float, curve: Mapping[str, Any] | None) -> Slider | None:
    if picture.map_size is None:
        return None
    peak = picture.scores.get("max") or high
    scores = curve["scores"] if curve else []
    at = picture.threshold if picture.threshold is not None else high
    top = max(1.05 * peak, 1.05 * at, *(scores[-1:] or [0.0]))
    low = min(0.5 * peak, 0.5 * at, *(0.9 * score for score in scores[:1]))
    return Slider(low=low, high=top, at=at)


def _scores(picture: ScoredPicture) -> list[tuple[str, str]]:
    return [
        (_SCORE_NAMES.get(name, name) + (" (ranks)" if name == picture.ranked_by else ""), score_text(value))
        for name, value in picture.scores.items()
        if value is not None
    ]


def _matches(
    picture: ScoredPicture,
    shown: Sequence[NearestNormal],
    colors: Mapping[str, int],
    sizes: Mapping[str, tuple[int, int]],
) -> list[MatchView]:
    assert picture.map_size is not None or not any(normal.patches for normal in shown)
    found = []
    for normal in shown:
        for patch in normal.patches:
            own_size = picture.map_size or (1, 1)
            own = _detail(f"{picture_url(picture.id)}/view", own_size, patch.query, f"{patch.level}: the patch of this picture")
            size = sizes.get(normal.id, own_size)
            label = f"{patch.level}: the most similar patch of {normal.id}"
            other = _detail(_normal_url(picture, normal), size, patch.box, label)
            found.append(MatchView(level=patch.level, color=colors[patch.level], id=normal.id, query=own, normal=other))
    return found


def _normal(
    picture: ScoredPicture,
    normal: NearestNormal,
    colors: Mapping[str, int],
    sizes: Mapping[str, tuple[int, int]],
) -> NormalView:
    height, width = sizes.get(normal.id, picture.map_size or (picture.height, picture.width))
    return NormalView(
        id=normal.id,
        href=_normal_url(picture, normal),
        width=width,
        height=height,
        distance="" if normal.distance is None else score_text(normal.distance),
        boxes=[_frame(patch.box, colors[patch.level], (height, width)) for patch in normal.patches],
    )


def _normal_url(picture: ScoredPicture, normal: NearestNormal) -> str:
    return f"{picture_url(picture.id)}/normals/{picture.nearest.index(normal)}"


def _detail(href: str, size: tuple[int, int], box: Box, label: str) -> Detail:
    (height, width), (y0, x0, y1, x1) = size, box
    side = min(max(2.2 * max(y1 - y0, x1 - x0), _DETAIL * min(size)), float(min(size)))
    x = min(max((x0 + x1 - side) / 2, 0.0), width - side)
    y = min(max((y0 + y1 - side) / 2, 0.0), height - side)
    return Detail(
        href=href,
        width=width,
        height=height,
        x=round(x, 2),
        y=round(y, 2),
        side=round(side, 2),
        box=Frame(x=x0, y=y0, width=x1 - x0, height=y1 - y0),
        label=label,
    )


def _frame(box: Box, color: int, size: tuple[int, int]) -> Frame:
    """A frame that stands off its patch by a little, so that it is seen, and levels nest."""
    y0, x0, y1, x1 = box
    off = 0.02 * min(size)
    left, top = max(x0 - off, 1.0), max(y0 - off, 1.0)
    right, bottom = min(x1 + off, size[1] - 1.0), min(y1 + off, size[0] - 1.0)
    return Frame(x=round(left, 1), y=round(top, 1), width=round(right - left, 1), height=round(bottom - top, 1), color=color)
