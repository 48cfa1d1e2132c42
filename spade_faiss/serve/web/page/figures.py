"""What the overview of a bank draws: the rate of alarms beside the promise, the pictures of each hour, the last pictures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from spade_faiss.serve.history.records import Achieved, Overview, Page, Rate, ScoredPicture
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.web.page.words import drift_words, number, percent, speed_text

# The gauge's line in units of its drawing; rates from 0.01 % to 100 % lie on it by their square roots, so that both a
# promise of one in a thousand and a broken lamp can be seen.
_LEFT, _RIGHT = 6.0, 294.0
_HOURS_WIDTH, _HOURS_HEIGHT = 240, 52


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """A rate with its interval on a line, and what was promised.

    Args:
        at, low, high: where the rate and the ends of its interval are drawn.
        promise: where the promised rate is drawn; None if there is none.
        above: whether even the low end of the interval is above the promise.
        label: the same in words.
    """

    at: float
    low: float
    high: float
    promise: float | None
    above: bool
    label: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """An hour: where its bar begins, and how high the pictures and the alarms of it are drawn."""

    x: float
    all: float
    alarms: float


@dataclass(frozen=True, kw_only=True)
class BankPlace:
    """Where a bank is, how many pictures it holds, and what it is about: `opening`, `ready`, `changing`, `failed`, and why."""

    path: str
    normals: int
    state: str
    message: str

    @staticmethod
    def of(station: Station) -> BankPlace:
        """The same of a station."""
        return BankPlace(path=str(station.path), normals=station.normals, state=station.state, message=station.message)


@dataclass(frozen=True, kw_only=True)
class LiveView:
    """A bank's overview as it is drawn.

    Args:
        key: names the part of the page, made of the bank's name.
        overview: the numbers.
        place: where the bank is, and how large.
        recent: its last pictures.
        size: how many of those are shown at most.
        gauge: of the rate of alarms; None if nothing was scored.
        bars: of the hours; empty if nothing was scored.
        stamp: differs whenever anything that is shown differs.
    """

    key: str
    overview: Overview
    place: BankPlace
    recent: Sequence[ScoredPicture]
    size: int
    gauge: Gauge | None
    bars: Sequence[Bar]
    stamp: str

    @property
    def drift(self) -> str:
        """What the drift test says."""
        return drift_words(self.overview.drift_p)

    @property
    def speed(self) -> str:
        """The throughput."""
        return speed_text(self.overview.pictures_per_s)

    @property
    def most(self) -> int:
        """The most pictures of an hour."""
        return max((scored for _, scored, _ in self.overview.per_hour), default=0)

    @property
    def bars_label(self) -> str:
        """The hours in words."""
        return (
            f"Pictures by hour in the last 24 hours: {number(self.overview.scored)} in all, "
            f"{number(self.overview.alarms)} of them alarms, at most {number(self.most)} in an hour"
        )


def live_view(overview: Overview, place: BankPlace, newest: Page[ScoredPicture]) -> LiveView:
    """How the overview of a bank is drawn."""
    recent = newest.items
    shown = (overview, place, [(item.id, item.answer, item.now, item.kept) for item in recent])
    return LiveView(
        key=_digest(overview.bank)[:12],
        overview=overview,
        place=place,
        recent=recent,
        size=newest.size,
        gauge=_gauge(overview),
        bars=_bars(overview),
        stamp=_digest(repr(shown))[:16],
    )


def stamp_of(pictures: Sequence[ScoredPicture], *more: object) -> str:
    """Differs whenever what a list shows of pictures does."""
    return _digest(repr([[(item.id, item.answer, item.now) for item in pictures], *more]))[:16]


@dataclass(frozen=True, kw_only=True)
class RateRow:
    """A line of the table of rates."""

    label: str
    of: str
    promised: str
    achieved: str
    count: str
    interval: str


def rate_rows(achieved: Achieved) -> list[RateRow]:
    """The promised and the achieved rates, as a table has them."""

    def row(label: str, of: str, promised: float | None, rate: Rate) -> RateRow:
        found = rate.interval
        return RateRow(
            label=label,
            of=of,
            promised=percent(promised),
            achieved=percent(rate.rate),
            count=f"{number(rate.count)} of {number(rate.of)}",
            interval="" if found is None else f"{percent(found[0])} to {percent(found[1])}",
        )

    return [
        row("false alarms", "of all but known defects", achieved.alpha, achieved.false_alarms_of_all),
        row("false alarms", "of pictures answered “normal”", None, achieved.false_alarms),
        row("misses", "of pictures answered “defect”", None, achieved.misses),
    ]


def _gauge(overview: Overview) -> Gauge | None:
    if overview.rate is None or overview.interval is None:
        return None
    low, high = overview.interval
    most = max(high, 1.25 * (overview.alpha or 0.0), 1e-9)

    def place(rate: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * math.sqrt(min(rate / most, 1.0)), 1)

    words = f"Rate of alarms {percent(overview.rate)}, 95 % interval {percent(low)} to {percent(high)}"
    above = overview.alpha is not None and low > overview.alpha
    if overview.alpha is not None:
        words += f"; promised {percent(overview.alpha)}" + (", which it is above" if above else "")
    return Gauge(
        at=place(overview.rate),
        low=place(low),
        high=place(high),
        promise=None if overview.alpha is None else place(overview.alpha),
        above=above,
        label=words,
    )


def _bars(overview: Overview) -> list[Bar]:
    most = max((scored for _, scored, _ in overview.per_hour), default=0)
    if not most:
        return []
    step = _HOURS_WIDTH / len(overview.per_hour)

    def height(count: int) -> float:
        return round(max(1.5, _HOURS_HEIGHT * count / most), 1) if count else 0.0

    return [
        Bar(x=round(i * step + 1, 1), all=height(scored), alarms=height(alarms))
        for i, (_, scored, alarms) in enumerate(overview.per_hour)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
