"""Metrics as headlines, tables and curves."""

from __future__ import annotations

from collections.abc import Iterator

from spade_faiss.report import charts
from spade_faiss.report.metric_labels import METRICS, SCORE_RANKINGS, metric_values, rankings
from spade_faiss.report.model import Chart, Headline, Table
from spade_faiss.scoring.evaluation import Metrics

_AUROC, _AUPRO = METRICS["auroc"], METRICS["aupro"]


# By the names in `IMAGE_SCORES`.
_NOTES = {
    "knn": "by distance to the nearest normals",
    "max": "by the map's maximum",
    "top": "by the mean of the map's top pixels",
    "structure": "by how the map is spread",
}
_SHORT = {"knn": "kNN", "max": "map", "top": "top", "structure": "structure"}


def metric_headlines(metrics: Metrics, score: str) -> Iterator[Headline]:
    """The few numbers that say how good the scores are: the one that ranks images, and one more."""
    for name in list(dict.fromkeys((score, "knn", "max")))[:2]:
        yield Headline(label=f"Image {_AUROC}", value=getattr(metrics, SCORE_RANKINGS[name]).auroc, note=_NOTES[name])
    if metrics.pixel is not None:
        yield Headline(label=f"Pixel {_AUROC}", value=metrics.pixel.auroc)
        note = f"to a false positive rate of {metrics.pixel.aupro_fpr_limit:g}"
        yield Headline(label=_AUPRO, value=metrics.pixel.aupro, note=note)


def metric_tables(metrics: Metrics) -> Iterator[Table]:
    """All metrics of all defects, and the main ones of each kind."""
    rows = []
    for label, found in rankings(metrics).items():
        values = metric_values(found)
        rows.append((label, found.auroc, found.ap, found.f1_max, found.f1_threshold, values.get("aupro")))
    header = ("ranking", _AUROC, METRICS["ap"], METRICS["f1_max"], "at threshold", _AUPRO)
    yield Table(title="Metrics", header=header, rows=tuple(rows))
    by = {name: attribute for name, attribute in SCORE_RANKINGS.items() if getattr(metrics, attribute) is not None}
    headings = [f"{_AUROC} by {_SHORT[name]}" for name in by]
    yield Table(
        title="By kind of defect",
        header=("kind", "images", "not visible", *headings, f"pixel {_AUROC}", _AUPRO),
        rows=tuple(
            (
                kind,
                found.images,
                found.not_visible,
                *(getattr(found, attribute).auroc for attribute in by.values()),
                found.pixel.auroc if found.pixel else None,
                found.pixel.aupro if found.pixel else None,
            )
            for kind, found in metrics.kinds.items()
        ),
        note="Each kind against all normal test images. Not visible: the mask has no pixel inside the region that was scored.",
    )


def metric_charts(metrics: Metrics) -> Iterator[Chart]:
    """The ROC curves and, with masks, the PRO curve."""
    curves = [charts.Curve(label, found.roc.x, found.roc.y, found.auroc) for label, found in rankings(metrics).items()]
    yield Chart(title="ROC", svg=charts.roc_chart(curves))
    if (pixel := metrics.pixel) is not None:
        curve = charts.Curve("regions", pixel.pro.x, pixel.pro.y, pixel.aupro)
        yield Chart(title="Per-region overlap", svg=charts.pro_chart([curve], pixel.aupro_fpr_limit))
