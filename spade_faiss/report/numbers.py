"""Every number of a run, for report.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spade_faiss.features.video_frames import VideoFrame
from spade_faiss.report.csvfile import rank
from spade_faiss.report.inputs import ReportInputs
from spade_faiss.report.metric_labels import RANKINGS, SCORE_COLUMNS
from spade_faiss.report.products import product_numbers
from spade_faiss.scoring.evaluation import Metrics

# What `Routes.at` says, by the names that it has in results.
_ROUTE = ("product", "confidence", "p_none")


def run_numbers(inputs: ReportInputs) -> dict[str, Any]:
    """Every number of a run, as nested plain values."""
    results, scores = inputs.results, inputs.scores
    metrics, decisions = results.metrics, results.decisions
    ranks = rank(inputs.ranked)
    return {
        "method": inputs.facts.settings,
        "bank": inputs.facts.bank,
        **results.inspected_numbers(),
        "localized": int(scores.localized.sum()),
        "passed_over": results.passed_over,
        "metrics": None if metrics is None else _metric_numbers(metrics),
        **({"products": product_numbers(results.products)} if results.products else {}),
        "calibration": None if decisions is None else decisions.numbers(),
        "calibration_notice": results.notice or None,
        "time": {"total_s": results.total_s, "timing_s": results.timing_s},
        "peak_memory_bytes": results.peak_memory_bytes,
        "memory": asdict(inputs.facts.memory),
        "scores": [
            {
                "id": record.id,
                "kind": record.kind,
                **({"time_s": record.time_s} if isinstance(record, VideoFrame) else {}),
                **{SCORE_COLUMNS[name]: values[i] for name, values in scores.image_scores.items()},
                "rank": ranks[i],
                **(
                    {}
                    if scores.routes is None
                    else {**dict(zip(_ROUTE, scores.routes.at(i), strict=True)), "none": scores.routes.none[i]}
                ),
                **({} if decisions is None else decisions.image_numbers(i)),
                "neighbors": [
                    {
                        "id": str(name),
                        "dist": dist,
                        **({"group": inputs.normal_group.get(str(name))} if inputs.normal_group else {}),
                    }
                    for name, dist in zip(scores.neighbor_ids[i], scores.neighbor_dist[i], strict=True)
                    if name
                ],
            }
            for i, record in enumerate(inputs.records)
        ],
    }


def _metric_numbers(metrics: Metrics) -> dict[str, Any]:
    """All metrics; the curves only of all defects together, as the page draws them."""
    numbers = asdict(metrics)
    for kind in numbers["kinds"].values():
        for found in filter(None, (kind[name] for name in RANKINGS)):
            for curve in ("roc", "precision_recall", "pro"):
                found.pop(curve, None)
    return numbers
