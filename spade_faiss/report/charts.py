"""Charts as inline SVG text: score histograms, ROC curves, the PRO curve, false-alarm rates."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.report.metric_labels import METRICS

# Matplotlib is imported where a chart is drawn: that takes longer than to score an image.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's blue, vermilion, green, purple and orange: told apart by every kind of color vision.
NORMAL, DEFECTIVE, THIRD, _FOURTH, _FIFTH = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
# Ink, muted ink and hairlines follow the page: the page may set these CSS variables for a dark ground.
_INK, _MUTED, _LINE = "#1d2127", "#5b6470", "#d9dde3"
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    NORMAL: "--normal",
    DEFECTIVE: "--defective",
    THIRD: "--third",
    _FOURTH: "--fourth",
    _FIFTH: "--fifth",
}
_STYLES = ((NORMAL, "-"), (DEFECTIVE, "--"), (THIRD, "-."), (_FOURTH, ":"), (_FIFTH, (0, (7, 2))))
_WIDTH, _HEIGHT = 5.0, 2.8  # inches; small, so that text stays readable on a phone

Values = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Curve:
    """A named curve of rising `x` and its `y`, both (n,) in [0, 1], and the `area` under it for the legend."""

    label: str
    x: Values
    y: Values
    area: float


def histogram(
    title: str,
    scores: Values,
    defective: npt.NDArray[np.bool_] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> str:
    """An SVG histogram of scores, with normal and defective images apart if there are labels.

    Args:
        title: what the scores are; the label of the x axis.
        scores: (n,), finite.
        defective: (n,) labels, or None.
        thresholds: scores to mark with a line, by their name in the legend; infinite ones are left out.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not len(scores) or not np.isfinite(scores).all():
        raise InputError(f"{title}: a histogram needs finite scores, got {len(scores)} scores")
    marks = {name: at for name, at in (thresholds or {}).items() if math.isfinite(at)}
    edges = np.histogram_bin_edges(scores, bins=int(np.clip(2 * np.sqrt(len(scores)), 12, 48)))
    figure, axes = _chart()
    groups = [("", NORMAL, scores)]
    if defective is not None:
        labels = np.asarray(defective, dtype=bool)
        groups = [("normal", NORMAL, scores[~labels]), ("defective", DEFECTIVE, scores[labels])]
    for label, color, values in groups:
        name = f"{label} ({len(values)})" if label else None
        counts = np.histogram(values, edges)[0]
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.3)
        axes.stairs(counts, edges, color=color, linewidth=1.5, label=name)
    axes.set_xlabel(title)
    axes.set_ylabel("images")
    for (name, at), dashes in zip(marks.items(), ("--", ":", "-."), strict=False):
        axes.axvline(at, color=_INK, linestyle=dashes, linewidth=1.2, label=name)
    axes.set_xlim(min([edges[0], *marks.values()]), max([edges[-1], *marks.values()]))
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if defective is not None or marks:
        _legend(axes, "best")
    return _svg(figure, title)


def roc_chart(curves: Sequence[Curve]) -> str:
    """An SVG chart of ROC curves: x is the false positive rate, y the true positive rate."""
    figure, axes = _chart()
    axes.plot([0, 1], [0, 1], color=_LINE, linewidth=1)
    _draw(axes, curves)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false positive rate", ylabel="true positive rate")
    _legend(axes, "lower right", title=METRICS["auroc"])
    return _svg(figure, "ROC curves")


def pro_chart(curves: Sequence[Curve], limit: float) -> str:
    """An SVG chart of PRO curves: x is the false positive rate up to `limit`, y the overlap with each defect, averaged."""
    figure, axes = _chart()
    _draw(axes, curves)
    axes.set(xlim=(-limit / 100, limit * 1.01), ylim=(-0.01, 1.01), xlabel="false positive rate", ylabel="per-region overlap")
    _legend(axes, "lower right", title=f"{METRICS['aupro']} to {limit:g}")
    return _svg(figure, "PRO curve")


def rate_chart(groups: Mapping[str, Values], limit: float, title: str = "promised and observed rates") -> str:
    """An SVG chart of p-values: x is a rate alpha up to `limit`, y the share of p-values of at most alpha.

    Args:
        groups: (n,) p-values of each group by its name in the legend.
        limit: the largest alpha that is shown.
        title: the name of the chart.
    """
    figure, axes = _chart()
    axes.plot([0, limit], [0, limit], color=_MUTED, linewidth=1, label="observed = promised")
    if len(groups) > len(_STYLES):
        raise InputError(f"a chart tells {len(_STYLES)} groups apart, got {len(groups)}")
    for (name, p), (color, dashes) in zip(groups.items(), _STYLES, strict=False):
        ordered = np.sort(np.asarray(p, np.float64))
        x, count = np.unique(ordered, return_counts=True)
        y = np.cumsum(count) / max(1, len(ordered))
        axes.step([0, *x, 1], [0, *y, 1], where="post", color=color, linestyle=dashes, linewidth=1.8, label=name)
    axes.set(xlim=(0, limit), ylim=(-0.01, 1.01), xlabel="alpha", ylabel="share of alarms")
    _legend(axes, "best")
    return _svg(figure, title)


def _draw(axes: Axes, curves: Sequence[Curve]) -> None:
    if len(curves) > len(_STYLES):
        raise InputError(f"a chart tells {len(_STYLES)} curves apart, got {len(curves)}")
    for curve, (color, dashes) in zip(curves, _STYLES, strict=False):
        if curve.x.shape != curve.y.shape or not len(curve.x):
            raise InputError(f"curve {curve.label!r} needs as many x as y, got {curve.x.shape} and {curve.y.shape}")
        axes.plot(curve.x, curve.y, color=color, linestyle=dashes, linewidth=1.8, label=f"{curve.label}  {curve.area:.3f}")


def _chart() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(True, color=_LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(length=0, labelsize=9, labelcolor=_MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_MUTED, fontsize=9.5)
    return figure, axes


def _legend(axes: Axes, place: Literal["best", "lower right"], title: str = "") -> None:
    legend = axes.legend(loc=place, frameon=False, fontsize=9, labelcolor=_INK, title=title, alignment="left")
    legend.get_title().set(color=_MUTED, fontsize=9)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element: deterministic, without size (the page sets it), in the page's font and colors."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.text import Text

    FigureCanvasSVG(figure)
    for name in figure.findobj(Text):
        name.set_parse_math(False)  # a name between dollar signs is no formula
    text = io.StringIO()
    # The two settings that matplotlib takes from nowhere but its rcParams.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1, ...: ids that a page with two charts would hold twice
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable}, {color})")
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
