"""The drift test as a page and as numbers."""

from __future__ import annotations

from typing import Any

from spade_faiss.decisions.drift import TESTED_SCORES, Drift
from spade_faiss.report import charts
from spade_faiss.report.model import Chart, Headline, Report, Table


def drift_page(found: Drift) -> Report:
    """Lay out the result of a drift test."""
    curves = {TESTED_SCORES[name]: p for name, p in found.p_values.items()}
    chart = Chart(
        title="P-values of recent images",
        svg=charts.rate_chart(curves, 1.0, "p-values of recent images"),
        note="Share of recent images with a p-value of at most alpha: on the diagonal if nothing has changed.",
    )
    table = Table(
        title="By score",
        header=("score", "distance", "p-value", "median p-value of images"),
        rows=tuple(
            (TESTED_SCORES[name], test.distance, f"{test.p_value:.2g}", test.median_p) for name, test in found.tests.items()
        ),
        note="Kolmogorov-Smirnov, recent against calibration scores.",
    )
    return Report(
        title="Drift",
        subtitle=found.verdict,
        notices=(found.outdated,) if found.outdated else (),
        headlines=(
            Headline(label="Drift", value="yes" if found.moved else "no", note=f"at level {found.level:g}"),
            Headline(label="P-value", value=f"{found.p_value:.2g}", note=f"{found.images} recent images"),
        ),
        summary=(table,),
        charts=(chart,),
    )


def drift_numbers(found: Drift) -> dict[str, Any]:
    """Every number of a drift test, for drift.json."""
    return {
        "moved": found.moved,
        "verdict": found.verdict,
        "p_value": found.p_value,
        "level": found.level,
        "defects": found.defects,
        "images": found.images,
        "calibration_images": len(found.calibration),
        "generation": found.calibration.generation,
        "notice": found.outdated or None,
        "tests": {name: dict(vars(test)) for name, test in found.tests.items()},
    }
