"""The benchmark of windows: all that it measures runs, and its search as AnomalyDINO's finds what ours finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import windows
from benchmarks.pages import windows as page
from benchmarks.sweep.sets import Places
from spade_faiss.core.declaring import ALL
from tests.support.benchmark_shapes import TINY
from tests.support.pictures import write_dataset

MACHINE = {"date": "2026-01-01", "cpu": "a processor", "threads": 2, "faiss-cpu": "1"}


def test_windows_are_measured_among_few_images_and_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(windows, "SPEED_SHAPES", {"lite0": TINY["square"]})
    monkeypatch.setattr(windows, "NORMALS", 7)
    monkeypatch.setattr(windows, "KS", (5, ALL))
    rows = list(windows.speed(Places(None, tmp_path)))
    assert [(row["k"], row["radius"]) for row in rows] == [(5, 1), (5, 3), (7, 1), (7, 3)]
    assert all(row["ms"]["window"]["median"] > 0 for row in rows)
    table = page.speed({"windows": {"speed": {"machine": MACHINE, "rows": rows}}})
    assert "| efficientnet_lite0, 224 | 7 | 3 |" in table


def test_windows_are_measured_as_a_bank_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(windows, "SHAPES", {"lite0": TINY["square"]})
    monkeypatch.setattr(windows, "GROWTH_NORMALS", (7, 9))
    monkeypatch.setattr(windows, "MANY", 6)
    monkeypatch.setattr(windows, "GROWTH_REPEATS", 2)
    rows = list(windows.growth(Places(None, tmp_path)))
    assert [row["normals"] for row in rows] == [7, 9]
    assert all(ms["median"] > 0 for row in rows for ms in row["ms"].values())
    assert "| 9 |" in page.growth({"windows": {"growth": {"machine": MACHINE, "rows": rows}}})


def test_anomaly_dinos_scores_are_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(windows, "NETWORK", "test_vit")
    monkeypatch.setattr(windows, "SIZE", 64)
    monkeypatch.setattr(windows, "LAST", 5)
    monkeypatch.setattr(windows, "PICTURES", 6)
    monkeypatch.setattr(windows, "TEST_PICTURES", 4)
    monkeypatch.setattr(windows, "FORWARD_REPEATS", 1)
    write_dataset(tmp_path / "mvtec_bottle")
    (row,) = windows.dino(Places(tmp_path, tmp_path))
    assert (row["normals"], row["tests"]) == (6, 4)
    for recipe in ("exact", "clusters"):
        assert row["off"][recipe] < 1e-3  # FAISS's distances are of matrix products
    assert "torch" in row["forward_ms"]
    assert "| `clusters` |" in page.dino({"windows": {"dino": {"machine": MACHINE, "rows": [row]}}})
