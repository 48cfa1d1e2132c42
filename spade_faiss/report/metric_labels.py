"""The names of rankings and metrics: the one table that pages, charts and the terminal take them from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spade_faiss.scoring.evaluation import KindMetrics
    from spade_faiss.scoring.metrics import Detection

# By the attributes of `KindMetrics`.
RANKINGS = {"by_knn": "image, by kNN", "by_map": "image, by map maximum", "pixel": "pixel"}
# By the attributes of `Detection` and `Localization`.
METRICS = {"auroc": "AUROC", "ap": "AP", "f1_max": "F1-max", "aupro": "AUPRO"}


def rankings(metrics: KindMetrics) -> dict[str, Detection]:
    """The rankings that there are, by their label."""
    found = {label: getattr(metrics, name) for name, label in RANKINGS.items()}
    return {label: ranking for label, ranking in found.items() if ranking is not None}


def metric_values(ranking: Detection) -> dict[str, float]:
    """The metrics of a ranking by their name in `METRICS`; AUPRO is one of pixels only."""
    return {name: getattr(ranking, name) for name in METRICS if hasattr(ranking, name)}
