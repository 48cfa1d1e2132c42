"""What `score_folder` and `evaluate` return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spade_faiss.decisions.rule import Decisions
from spade_faiss.features.datasets import Skipped
from spade_faiss.scoring.evaluation import Metrics


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a run over images; its files are in `out`.

    Args:
        out: the folder that the files were written to.
        images: the number of images that were scored.
        skipped: the images that could not be read, each with the reason.
        metrics: the metrics of a labeled set; None without labels.
        decisions: the verdicts and regions; None if there are none, then `notice` says why.
        notice: why there are no decisions; empty if there are.
        timing_s: seconds of each step; steps that ran in other threads overlap.
        total_s: the wall-clock time up to the report.
        peak_memory_bytes: the most memory that the process has used since it started.
    """

    out: Path
    images: int
    skipped: tuple[Skipped, ...]
    metrics: Metrics | None
    decisions: Decisions | None
    notice: str
    timing_s: dict[str, float]
    total_s: float
    peak_memory_bytes: int
