"""Draws the charts of the benchmark as SVG text, each a file of its own: Pareto fronts, scaling curves and bars."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.sweep.measures import exponent

# The colors of Okabe and Ito, which can be told apart with every kind of color vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a00")
_MARKS = "osD^vPX*"
_INK, _MUTED, _LINE = "#1d2127", "#5b6470", "#d9dde3"
_WIDTH, _HEIGHT = 7.2, 4.4


@dataclass(frozen=True)
class Dot:
    """A point of a Pareto chart: the lower its y, the better; the larger its x, the faster."""

    x: float
    y: float
    label: str
    family: str


@dataclass(frozen=True)
class Line:
    """A line of a scaling chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def front_of(dots: Sequence[Dot]) -> list[Dot]:
    """Return the dots that no other dot beats in both, the fastest first."""
    front: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (-dot.x, dot.y)):
        if not front or dot.y < front[-1].y:
            front.append(dot)
    return front


def knee_of(front: Sequence[Dot], floor: float) -> Dot:
    """Return the dot of a front beyond which more speed costs much more.

    It is the farthest from the line between the ends of the front, on logarithmic axes; of fewer than three dots, the fastest.

    Args:
        front: the dots, see `front_of`.
        floor: the least y that counts; dots below it are equally good.

    Source: Satopaa et al., "Finding a Kneedle in a Haystack", ICDCS Workshops 2011, section 3.
    """
    x, y = (np.log(values) for values in ([d.x for d in front], [max(d.y, floor) for d in front]))
    if len(front) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return front[0]
    # Fast and good is the lower right corner of the unit square.
    return front[int(np.argmax((x - x.min()) / np.ptp(x) - (y - y.min()) / np.ptp(y)))]


def pareto(title: str, dots: Sequence[Dot], *, x: str, y: str, floor: float | None) -> str:
    """Draw speed and loss as a scatter plot; a line joins the dots of the front, which are labeled.

    Args:
        title: the title of the chart.
        dots: what was measured.
        x: the name of the x axis.
        y: the name of the y axis.
        floor: where a logarithmic y axis ends, and where 0 is drawn; None for a linear axis.
    """
    figure, axes = _chart(title)
    drawn = [Dot(dot.x, max(dot.y, floor) if floor else dot.y, dot.label, dot.family) for dot in dots]
    front = front_of(drawn)
    axes.plot([dot.x for dot in front], [dot.y for dot in front], color=_MUTED, linewidth=1, zorder=1)
    for number, family in enumerate(dict.fromkeys(dot.family for dot in drawn)):
        of_family = [dot for dot in drawn if dot.family == family]
        axes.scatter(
            [dot.x for dot in of_family],
            [dot.y for dot in of_family],
            s=34,
            color=COLORS[number % len(COLORS)],
            marker=_MARKS[number % len(_MARKS)],
            label=family,
            zorder=2,
        )
    axes.set(xscale="log", xlabel=x, ylabel=y)
    if floor:
        axes.set_yscale("log")
    axes.margins(0.12)
    for number, dot in enumerate(front):
        above = number % 2 == 0
        axes.annotate(
            dot.label,
            (dot.x, dot.y),
            xytext=(-5, 5) if above else (5, -5),
            textcoords="offset points",
            fontsize=6.5,
            color=_INK,
            ha="right" if above else "left",
            va="bottom" if above else "top",
        )
    _legend(axes)
    return _svg(figure, title)


def scaling(title: str, lines: Sequence[Line], *, x: str, y: str) -> str:
    """Draw curves on logarithmic axes, each with its fitted exponent."""
    figure, axes = _chart(title)
    for number, line in enumerate(lines):
        power = f"  (power {exponent(line.x, line.y):.2f})" if len(line.x) > 1 else ""
        style = {"color": COLORS[number % len(COLORS)], "marker": _MARKS[number % len(_MARKS)]}
        axes.plot(line.x, line.y, linewidth=1.6, markersize=5, label=f"{line.label}{power}", **style)  # type: ignore[arg-type]
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    ticks = sorted({value for line in lines for value in line.x})
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return _svg(figure, title)


def bars(title: str, values: Mapping[str, Mapping[str, float]], *, x: str) -> str:
    """Draw a horizontal bar for each label, stacked from named parts."""
    parts = list(dict.fromkeys(part for of_label in values.values() for part in of_label))
    figure, axes = _chart(title, max(1.6, 0.9 + 0.24 * len(values)))
    labels, start = list(values)[::-1], np.zeros(len(values))
    for number, part in enumerate(parts):
        length = np.array([values[label].get(part, 0) for label in labels])
        axes.barh(labels, length, left=start, color=COLORS[number], label=part, height=0.7)
        start += length
    for place, total in enumerate(start):
        axes.annotate(f"{total:,.3g}", (total, place), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xlabel(x)
    axes.margins(x=0.12)
    if len(parts) > 1:
        _legend(axes)
    return _svg(figure, title)


def _chart(title: str, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.set_axisbelow(True)
    axes.grid(True, color=_LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(length=0, labelsize=8, labelcolor=_MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_MUTED, fontsize=9)
    return figure, axes


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best", frameon=False, fontsize=7.5, labelcolor=_INK)


def _svg(figure: Figure, title: str) -> str:
    FigureCanvasSVG(figure)
    text = io.StringIO()
    # matplotlib takes these two settings from its rcParams only.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    return re.sub(r"[ \t]*\n\s*", "\n", svg).strip() + "\n"
