"""The table of few shots: means and ranges over the draws, and a page before anything was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.few_shots import table

MACHINE = {"date": "2026-01-02", "cpu": "a processor", "threads": 2, "faiss-cpu": "1"}


def row(seed: int, augment: str, knn: float) -> dict[str, Any]:
    found = {"knn": knn, "top": 0.9, "pixel_auroc": 0.8, "aupro": 0.7, "fit_s": 1.26, "ms": 12.4, "bank_bytes": 3 << 20}
    return {"set": "screw", "shots": 2, "seed": seed, "augment": augment, "entries": 36 if augment else 2, **found}


def test_rows_are_means_of_draws() -> None:
    rows = [row(0, "", 0.5), row(0, "flip", 0.6), row(1, "", 0.7), row(1, "flip", 0.9)]
    lines = table({"few_shots": {"machine": MACHINE, "rows": rows}}).splitlines()
    assert lines[2].startswith("| screw | 2 | none | 2 | 0.600 (0.500 to 0.700) | 0.900 (0.900 to 0.900) |")
    assert lines[3].startswith("| screw | 2 | `flip` | 36 | 0.750 (0.600 to 0.900) |")
    assert lines[3].endswith("| 1.3 | 12 | 3 MiB |")
    assert "Means of 2 draws" in lines[-1]


def test_nothing_measured_is_said() -> None:
    assert table({"few_shots": {"rows": []}}) == "*Not measured yet.*"
