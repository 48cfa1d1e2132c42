"""The names of image scores, rankings and metrics: the one table that files, pages, charts and the terminal take them from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spade_faiss.scoring.evaluation import KindMetrics
    from spade_faiss.scoring.metrics import Detection

# By the names in `IMAGE_SCORES`: what people call them, their columns in files, their attributes of `KindMetrics`.
SCORE_LABELS = {"knn": "image score", "max": "map maximum", "top": "top mean", "structure": "structure"}
SCORE_COLUMNS = {"knn": "image_score", "max": "map_score", "top": "top_score", "structure": "structure_score"}
SCORE_RANKINGS = {"knn": "by_knn", "max": "by_map", "top": "by_top", "structure": "by_structure"}
# By the attributes of `KindMetrics`.
RANKINGS = {
    "by_knn": "image, by kNN",
    "by_map": "image, by map maximum",
    "by_top": "image, by top mean",
    "by_structure": "image, by structure",
    "pixel": "pixel",
}
# By the attributes of `Detection` and `Localization`.
METRICS = {"auroc": "AUROC", "ap": "AP", "f1_max": "F1-max", "aupro": "AUPRO"}


def rankings(metrics: KindMetrics) -> dict[str, Detection]:
    """The rankings that there are, by their label."""
    found = {label: getattr(metrics, name) for name, label in RANKINGS.items()}
    return {label: ranking for label, ranking in found.items() if ranking is not None}


def metric_values(ranking: Detection) -> dict[str, float]:
    """The metrics of a ranking by their name in `METRICS`; AUPRO is one of pixels only."""
    return {name: getattr(ranking, name) for name in METRICS if hasattr(ranking, name)}
