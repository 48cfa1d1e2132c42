"""Charts as inline SVG text: score histograms, ROC curves, the PRO curve, false-alarm rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.report.metric_labels import METRICS
from spade_faiss.report.plot import INK, LINE, MUTED, Plot, steps_of

# Okabe and Ito's blue, vermilion, green, purple and orange: told apart by every kind of color vision. The page may set the CSS
# variables for a dark ground.
NORMAL, DEFECTIVE, THIRD = "var(--normal, #0072b2)", "var(--defective, #d55e00)", "var(--third, #009e73)"
_FOURTH, _FIFTH = "var(--fourth, #cc79a7)", "var(--fifth, #e69f00)"
_STYLES = ((NORMAL, ""), (DEFECTIVE, "6 3"), (THIRD, "8 3 2 3"), (_FOURTH, "2 3"), (_FIFTH, "12 4"))
_MARKS = ("6 3", "2 3", "8 3 2 3")

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
    groups = [("", NORMAL, scores)]
    if defective is not None:
        labels = np.asarray(defective, dtype=bool)
        groups = [("normal", NORMAL, scores[~labels]), ("defective", DEFECTIVE, scores[labels])]
    counts = [np.histogram(values, edges)[0] for _, _, values in groups]
    highest = max(int(count.max()) for count in counts)
    low, high = min([edges[0], *marks.values()]), max([edges[-1], *marks.values()])
    plot = Plot((low, high), (0, 1.05 * highest), title, "images", whole_y=True)
    for (label, color, values), count in zip(groups, counts, strict=True):
        outline = np.concatenate([[[edges[0], 0]], steps_of(edges, [*count, 0]), [[edges[-1], 0]]])
        plot.area(outline, color)
        plot.line(outline, color, width=1.5, label=f"{label} ({len(values)})" if label else "")
    for (name, at), dashes in zip(marks.items(), _MARKS, strict=False):
        plot.line(np.array([[at, 0], [at, 1.05 * highest]]), INK, dashes=dashes, width=1.2, label=name)
    return plot.svg()


def roc_chart(curves: Sequence[Curve]) -> str:
    """An SVG chart of ROC curves: x is the false positive rate, y the true positive rate."""
    plot = Plot((-0.01, 1.01), (-0.01, 1.01), "false positive rate", "true positive rate")
    plot.line(np.array([[0.0, 0], [1, 1]]), LINE, width=1)
    _draw(plot, curves)
    return plot.svg(METRICS["auroc"])


def pro_chart(curves: Sequence[Curve], limit: float) -> str:
    """An SVG chart of PRO curves: x is the false positive rate up to `limit`, y the overlap with each defect, averaged."""
    plot = Plot((-limit / 100, limit * 1.01), (-0.01, 1.01), "false positive rate", "per-region overlap")
    _draw(plot, curves)
    return plot.svg(f"{METRICS['aupro']} to {limit:g}")


def rate_chart(groups: Mapping[str, Values], limit: float) -> str:
    """An SVG chart of p-values: x is a rate alpha up to `limit`, y the share of p-values of at most alpha.

    Args:
        groups: (n,) p-values of each group by its name in the legend.
        limit: the largest alpha that is shown.
    """
    if len(groups) > len(_STYLES):
        raise InputError(f"a chart tells {len(_STYLES)} groups apart, got {len(groups)}")
    plot = Plot((0, limit), (-0.01, 1.01), "alpha", "share of alarms")
    plot.line(np.array([[0.0, 0], [limit, limit]]), MUTED, width=1, label="observed = promised")
    for (name, p), (color, dashes) in zip(groups.items(), _STYLES, strict=False):
        ordered = np.sort(np.asarray(p, np.float64))
        x, count = np.unique(ordered[ordered <= limit], return_counts=True)
        y = np.cumsum(count) / max(1, len(ordered))
        last = y[-1] if len(y) else 0.0
        plot.line(steps_of([0, *x, limit], [0, *y, last]), color, dashes=dashes, label=name)
    return plot.svg()


def _draw(plot: Plot, curves: Sequence[Curve]) -> None:
    if len(curves) > len(_STYLES):
        raise InputError(f"a chart tells {len(_STYLES)} curves apart, got {len(curves)}")
    for curve, (color, dashes) in zip(curves, _STYLES, strict=False):
        if curve.x.shape != curve.y.shape or not len(curve.x):
            raise InputError(f"curve {curve.label!r} needs as many x as y, got {curve.x.shape} and {curve.y.shape}")
        points = np.stack([curve.x, curve.y], axis=1).astype(np.float64)
        plot.line(points, color, dashes=dashes, label=f"{curve.label}  {curve.area:.3f}")
