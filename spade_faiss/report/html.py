"""`report.html`: a report as one page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from numbers import Integral

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import write_bytes
from spade_faiss.core.text import printable
from spade_faiss.report.csvfile import rank
from spade_faiss.report.metric_labels import SCORE_LABELS
from spade_faiss.report.model import Card, Cell, ImageRow, Match, Report, Table
from spade_faiss.report.pictures import (
    OUTLINE,
    Box,
    Color,
    Picture,
    check_picture,
    color_scale,
    heat_map,
    level_colors,
    outline,
    overlay,
)

MAX_ROWS = 10_000  # of the table of all images: as many as a browser sorts in about a second

_DASH = "–"
_QUALITY = 85  # of JPEG: 224 x 224 pixels in 10 to 15 kB
_MARGIN = 0.02  # of the picture's side, by which frames stand off their cell: a cell may be too small to see, and levels nest


def write_html(path: str | os.PathLike[str], report: Report) -> None:
    """Write `report` as the file `path`, atomically; it makes no request when opened, and equal reports give equal bytes.

    Args:
        path: the file to make or replace; its folder exists.
        report: what to show. Of more than `MAX_ROWS` images, the table lists the most anomalous.

    Raises:
        InputError: if a picture or mask does not have its map's size, a match is of none of the report's levels, a chart is
            no SVG, or there are cards but no color range.
    """
    page = _template().render(report=report, view=_View(report))
    write_bytes(path, page.encode("utf-8"))


@cache
def _template() -> Template:
    """The template, compiled once in a process. Not `optimized`: looking for constants takes longer than they do."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, optimized=False)
    environment.filters["shown"] = printable
    return environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))


class _View:
    """The texts, colors and pictures of a report as the template places them."""

    def __init__(self, report: Report) -> None:
        self._report = report
        numbers = itertools.count(1)
        self.groups = [(group, [(f"card-{next(numbers)}", card) for card in group.cards]) for group in report.groups]
        cards = [pair for _, pairs in self.groups for pair in pairs]
        if cards and report.colors is None:
            raise InputError("a report with cards needs `colors`, the range of their heat maps; see pictures.color_range")
        if bad := next((chart for chart in report.charts if not chart.svg.startswith("<svg")), None):
            raise InputError(f"the chart {bad.title!r} is no <svg> element; make it with report.charts")
        self._by = report.score
        ranks = rank([image.scores[self._by] for image in report.images]).tolist()
        order = sorted(zip(ranks, report.images, strict=True), key=lambda pair: (pair[0], pair[1].id))
        self._ranks = {image.id: place for place, image in order}
        self.rows = [image for _, image in order[:MAX_ROWS]]
        self.score = _number_format(value for image in report.images for value in (image.scores["knn"], image.neighbor_dist))
        self.map_score = _number_format([image.scores["max"] for image in report.images])
        self.score_labels = {name: SCORE_LABELS[name] for image in report.images[:1] for name in image.scores}
        structure = _number_format(image.scores.get("structure", math.nan) for image in report.images)
        self._formats = {"knn": self.score, "max": self.map_score, "top": self.map_score, "structure": structure}
        ranked = [image.scores[self._by] for image in self.rows]
        self._highest = max(filter(math.isfinite, ranked), default=0.0)
        self._anchors = {card.image.id: anchor for anchor, card in reversed(cards)}  # the first card of each image
        self.levels = {level: _css(color) for level, color in level_colors(report.levels).items()}
        self.outline = _css(OUTLINE)
        self.scale = [_css(color) for color in color_scale(9)]
        self.has_labels = any(image.kind is not None for image in report.images)
        self.has_verdicts = any(image.alarm is not None for image in report.images)
        self.has_products = any(image.product is not None for image in report.images)
        self.has_regions = any(card.regions for _, card in cards)
        self.has_masks = any(card.mask is not None for _, card in cards)

    def rank(self, image: ImageRow) -> str:
        """The rank of an image among all; a dash for an image that is not in the table."""
        return str(self._ranks.get(image.id, _DASH))

    def p_value(self, image: ImageRow) -> str:
        """An image's p-value as text."""
        return _DASH if image.p_value is None else f"{image.p_value:.2g}"

    def route(self, image: ImageRow, at: int) -> str:
        """The confidence (1) in an image's product, or the p-value (2) as a normal one of any, as text; a dash without one."""
        number = None if image.product is None else image.product[at]
        return _DASH if number is None else f"{number:.2g}"

    def of_image(self, image: ImageRow, score: str) -> str:
        """One of an image's scores as text."""
        return self._formats[score](image.scores[score])

    def share(self, image: ImageRow) -> str:
        """The score that ranks an image as a percentage of the highest, for the bar behind it."""
        share = image.scores[self._by] / self._highest if self._highest > 0 else 0.0
        return f"{100 * min(max(share, 0.0), 1.0):.1f}%" if math.isfinite(share) else "0%"

    def anchor(self, image: ImageRow) -> str | None:
        """The id of an image's first card; None if the image has no card."""
        return self._anchors.get(image.id)

    def photo(self, picture: Picture) -> str:
        """A picture as a data URI."""
        check_picture(picture)
        return _data_uri(picture, crisp=False)

    def heat(self, card: Card) -> str:
        """The card's heat map over its picture (alone, if that is missing) with the ground truth's outline, as a data URI."""
        assert self._report.colors is not None
        low, high = self._report.colors
        shaded = heat_map(card.map, low, high) if card.picture is None else overlay(card.picture, card.map, low, high)
        return _data_uri(shaded if card.mask is None else outline(shaded, card.mask), crisp=True)

    def frame(self, match: Match, picture: Picture) -> Box:
        """(x, y, width, height) of the frame around a match, in pixels of its picture."""
        y0, x0, y1, x1 = match.corners
        height, width = picture.shape[:2]
        margin = max(1, round(_MARGIN * min(height, width)))
        left, top, right, bottom = (
            max(x0 - margin, 1),
            max(y0 - margin, 1),
            min(x1 + margin, width - 1),
            min(y1 + margin, height - 1),
        )
        return left, top, right - left, bottom - top

    def color(self, match: Match) -> str:
        """The CSS color of a match's level."""
        if match.level not in self.levels:
            raise InputError(f"a match is of level {match.level!r}, the report has levels {', '.join(self.levels) or 'none'}")
        return self.levels[match.level]

    def numeric_columns(self, table: Table) -> list[bool]:
        """Which columns hold only numbers, with or without a unit: they are aligned to the right."""
        columns = zip(table.header, *table.rows, strict=True)
        return [len(cells) > 0 and all(_is_numeric(cell) for cell in cells) for _, *cells in columns]

    def cell(self, value: Cell, decimals: int | None) -> str:
        """A table cell or headline as text; with `decimals` None, as many decimals as the number has."""
        if isinstance(value, str):
            return printable(value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, Integral):
            return f"{value:,}"
        if value is None or math.isnan(value):
            return _DASH
        return f"{value:g}" if decimals is None else f"{value:,.{decimals}f}"


def _is_numeric(cell: Cell) -> bool:
    return cell[:1].isdigit() if isinstance(cell, str) else not isinstance(cell, bool)


def _number_format(values: Iterable[float]) -> Callable[[float], str]:
    """A format for a column, with as many decimals as show four digits of its largest value."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    decimals = min(max(3 - math.floor(math.log10(largest)), 0), 8) if largest > 0 else 0
    return lambda value: f"{value:.{decimals}f}" if math.isfinite(value) else _DASH


def _data_uri(picture: Picture, *, crisp: bool) -> str:
    data = io.BytesIO()
    # Half the color resolution does not show on a photo, but it frays the edges of drawn colors. Not `optimize`: with it
    # Pillow cannot write a picture that takes more than about a byte a pixel.
    Image.fromarray(picture).save(data, format="JPEG", quality=_QUALITY, subsampling=0 if crisp else 2)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _css(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
