"""The content of a report as data, which `html.py` lays out."""

from __future__ import annotations

from dataclasses import dataclass

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.report.pictures import Box, Mask, Picture

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One of the few numbers at the top of the page; a float is shown with three decimals, a string as it is."""

    label: str
    value: Cell
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A small table; its first column names the rows. Floats get `decimals` decimals; None and NaN are shown as a dash."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    decimals: int = 3

    def __post_init__(self) -> None:
        if bad := next((row for row in self.rows if len(row) != len(self.header)), None):
            raise InputError(f"table {self.title!r}: row {bad} has {len(bad)} cells, the header has {len(self.header)}")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with its heading; `svg` comes from `charts.py` and goes into the page as it is."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One scored image.

    `scores` are its image scores by their names in `IMAGE_SCORES`; `kind` and `defective` are its label, None without labels;
    `p_value` and `alarm` are its verdict, None without one; `product` is what `Routes.at` says, None without products.
    """

    id: str
    scores: dict[str, float]
    neighbor_id: str
    neighbor_dist: float
    kind: str | None = None
    defective: bool | None = None
    p_value: float | None = None
    alarm: bool | None = None
    product: tuple[str, float | None, float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where in a normal image a level matched the strongest pixel: `corners` (y0, x0, y1, x1), see `pictures.cell_box`."""

    level: str
    corners: Box


@dataclass(frozen=True, eq=False, kw_only=True)
class NormalPicture:
    """One of an image's nearest normals.

    Args:
        id: its name.
        place: 1 for the nearest; None for an image that is not among the neighbors but was matched.
        distance: its distance to the image; NaN for an image that is not among the neighbors.
        picture: (H, W, 3) uint8 as the backbone saw it, or None: then `missing` says why there is none.
        matches: the levels that matched the strongest pixel to this image.
        group: the group that it belongs to; empty for none.
    """

    id: str
    place: int | None
    distance: float
    picture: Picture | None
    matches: tuple[Match, ...] = ()
    missing: str = ""
    group: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Card:
    """One image shown in full.

    Args:
        image: its row; equal to the one in `Report.images`.
        map: (H, W), its score map, as it is shown.
        peak: (y, x) of the strongest pixel, in the map's own pixels.
        picture: (H, W, 3) uint8 as the backbone saw it, or None: then `missing` says why there is none.
        mask: (H, W) ground truth, or None.
        normals: the normal images shown beside it, nearest first; those that a level matched are among them.
        regions: (y0, x0, y1, x1) of the parts of the map above the threshold.
        shrunk: how many of the map's own pixels are shown as one, along each axis; see `pictures.shrink`.
    """

    image: ImageRow
    map: FloatArray
    peak: tuple[int, int]
    picture: Picture | None
    mask: Mask | None = None
    normals: tuple[NormalPicture, ...] = ()
    missing: str = ""
    regions: tuple[Box, ...] = ()
    shrunk: int = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class CardGroup:
    """Cards under one heading, such as the most anomalous images, or the defects that scored lowest."""

    title: str
    cards: tuple[Card, ...]
    note: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Everything on the page, in its order.

    Args:
        title: the title of the page.
        subtitle: the line below it.
        notices: what the reader must know first, such as how many files could not be read.
        headlines: the result in up to six numbers.
        summary: the tables next to them, such as metrics by kind of defect.
        charts: charts made by `charts.py`.
        groups: the images shown in full.
        colors: the (low, high) scores of all their heat maps, see `pictures.color_range`; needed if there are cards.
        levels: the names of the levels that the cards show matches of, finest first; they get their colors in this order.
        images: every scored image, in any order, all with the same scores.
        score: the image score that they are ranked by.
        details: the tables at the end, such as settings and skipped files.
        run: tells the run from all others; empty if there is none.
    """

    title: str
    subtitle: str = ""
    notices: tuple[str, ...] = ()
    headlines: tuple[Headline, ...] = ()
    summary: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    groups: tuple[CardGroup, ...] = ()
    colors: tuple[float, float] | None = None
    levels: tuple[str, ...] = ()
    images: tuple[ImageRow, ...] = ()
    score: str = "knn"
    details: tuple[Table, ...] = ()
    run: str = ""
