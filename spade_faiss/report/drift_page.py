"""The drift test as a page and as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spade_faiss.decisions.drift import TESTED_SCORES, Drift
from spade_faiss.report import charts
from spade_faiss.report.model import Chart, Headline, Report, Table


def drift_page(found: Drift) -> Report:
    """Lay out the result of a drift test."""
    curves = {TESTED_SCORES[name]: p for name, p in found.p_values.items()}
    chart = Chart(
        title="P-values of recent images",
        svg=charts.rate_chart(curves, 1.0),
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


def product_drift_page(found: Mapping[str, Drift | str]) -> Report:
    """Lay out the results of the drift tests of several products."""
    tested = {name: item for name, item in found.items() if isinstance(item, Drift)}
    moved = [name for name, item in tested.items() if item.moved]
    rows = tuple(
        (name, None, None, None, item)
        if isinstance(item, str)
        else (name, item.images, "yes" if item.moved else "no", f"{item.p_value:.2g}", item.outdated)
        for name, item in found.items()
    )
    curves = {f"{name} ({item.images})": item.p_values["image"] for name, item in tested.items()}
    note = "Share of recent images with a p-value of at most alpha: on the diagonal if nothing has changed."
    svg = charts.rate_chart(curves, 1.0) if curves else ""
    return Report(
        title="Drift",
        subtitle=product_drift_verdict(found),
        headlines=(Headline(label="Drift", value=len(moved), note=f"of {len(tested)} products that were tested"),),
        summary=(
            Table(
                title="By product",
                header=("product", "recent images", "drift", "p-value", "notice"),
                rows=rows,
                note="Kolmogorov-Smirnov, recent against calibration scores of the product.",
            ),
        ),
        charts=(Chart(title="P-values of recent images", svg=svg, note=note),) if curves else (),
    )


def product_drift_verdict(found: Mapping[str, Drift | str]) -> str:
    """What the tests of all products say, in a sentence."""
    tested = {name: item for name, item in found.items() if isinstance(item, Drift)}
    moved = [name for name, item in tested.items() if item.moved]
    if moved:
        return f"Scores of {len(moved)} of {len(tested)} products have drifted: {', '.join(moved)}."
    return f"No drift found in {len(tested)} products."


def product_drift_numbers(found: Mapping[str, Drift | str]) -> dict[str, Any]:
    """Every number of the drift tests of several products, for drift.json."""
    each = {name: {"notice": item} if isinstance(item, str) else drift_numbers(item) for name, item in found.items()}
    moved = [name for name, item in found.items() if isinstance(item, Drift) and item.moved]
    return {"moved": bool(moved), "verdict": product_drift_verdict(found), "products": each}
