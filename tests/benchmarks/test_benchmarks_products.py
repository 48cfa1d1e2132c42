"""The page on banks of several products: both banks side by side, and what is said before anything was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.products import left_out, table

MACHINE = {"date": "2026-01-02", "cpu": "a processor", "threads": 2, "faiss-cpu": "1"}
METRICS = {"auroc": 0.95, "pixel_auroc": 0.9, "aupro": 0.8}


def row(name: str, right: int, auroc: float) -> dict[str, Any]:
    shares = {"false_alarms": 0.05, "false_alarms_alone": 0.1, "low_p_of_normal": 0.0, "low_p_of_defective": 0.25}
    shares |= {"none_of_normal": 0.0, "none_of_defective": 0.125}
    found = {"set": name, "normals": 40, "images": 20, "normal_tests": 20, "right": right, "least_confidence": 0.875, **shares}
    return {**found, "one_bank": {**METRICS, "auroc": auroc}, "alone": METRICS}


def test_both_banks_stand_side_by_side() -> None:
    figures = {"machine": MACHINE, "rows": [row("a", 20, 0.95), row("b", 19, 0.948)], "product_ms": 0.5, "one_bank_ms": 50.0}
    text = table({"products": figures})
    assert "| b | 40 | 19 of 20 | 0.88 | 0.948 / 0.950 | 0.900 / 0.900 | 0.800 / 0.800 |" in text
    assert "| 5.0 % (0.1 to 24.9) / 10.0 % | 0.0 % / 25.0 % | 0.0 % / 12.5 % |" in text
    assert "39 of 40 test pictures (97.50 %); image AUROC is lower by at most 0.002" in text
    told = {"set": "a", "images": 20, "told": 18, "median_p": 0.001, "median_confidence": 0.5}
    assert "| a | 18 of 20 | 0.0010 | 0.50 |" in left_out({"products": {"left_out": [told]}})


def test_nothing_measured_is_said() -> None:
    nothing: dict[str, Any] = {"products": {"rows": [], "left_out": []}}
    assert table(nothing) == left_out(nothing) == "*Not measured yet.*"
