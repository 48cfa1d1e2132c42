"""The benchmark of stores: all that it measures runs, and its page says what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import stores
from benchmarks.features import Product, write_bank
from benchmarks.pages import stores as page
from benchmarks.sweep.sets import PixelSet, Places
from spade_faiss import Bank
from tests.support.benchmark_shapes import TINY

MACHINE = {"date": "2026-01-01", "cpu": "a processor", "threads": 2, "faiss-cpu": "1"}
SHAPE = replace(
    TINY["square"],
    levels=(*TINY["square"].levels, replace(TINY["square"].levels[1], name="coarsest")),
    looks=(*TINY["square"].looks, TINY["square"].looks[1]),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SHAPES", {"lite0": SHAPE})
    monkeypatch.setattr(stores, "STORES", ("float32", "float16", "pca8-int8"))
    monkeypatch.setattr(stores, "COST_STORES", {"lite0": ("float16", "pca8-int8")})
    monkeypatch.setattr(stores, "COST_NORMALS", 7)
    monkeypatch.setattr(stores, "TESTS", 2)
    monkeypatch.setattr(stores, "REPEATS", 2)


@pytest.mark.usefixtures("small")
def test_quality_is_measured_for_each_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    product, rng = Product(SHAPE), np.random.default_rng(0)

    def pixel_set(name: str, places: Places) -> PixelSet:
        bank = write_bank(tmp_path / f"{name}.bank", product, 7)
        defective = np.array([False, True, True])
        masks = defective[:, None, None] & (rng.random((3, 224, 224)) < 0.1)
        return PixelSet(bank.path, product.tests(3), defective, masks, np.ones((3, 224, 224), np.bool_))

    monkeypatch.setattr(stores, "pixel_set", pixel_set)
    rows = list(stores.quality(Places(None, tmp_path), ["bottle"]))
    assert [(row["search"], row["store"]) for row in rows] == [
        (search, store) for search in ("spade", "default") for store in ("float32", "float16", "pca8-int8")
    ]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("knn_auroc", "map_auroc", "pixel_auroc", "aupro"))
    # The nearest pictures do not depend on how maps are stored.
    assert len({row["knn_auroc"] for row in rows}) == 1
    full, half, codes = (row["bytes"] for row in rows[:3])
    assert full > 1.7 * half > 2 * codes
    assert [len(row["losses"]) for row in rows[:3]] == [0, 0, 3]
    figures = {"stores": {"quality": {"machine": MACHINE, "rows": rows}}, "whole_bank": {"patchcore": {"rows": []}}}
    assert "| bottle | default | pca8-int8 |" in page.quality(figures)
    assert "| preset `default` | `pca8-int8` |" in page.losses(figures)


@pytest.mark.usefixtures("small")
def test_cost_is_measured_side_by_side(tmp_path: Path) -> None:
    rows = list(stores.cost(Places(None, tmp_path), []))
    assert [(row["search"], row["store"]) for row in rows] == [
        (search, store) for search in ("spade", "default") for store in ("float16", "pca8-int8")
    ]
    assert [row["times"] for row in rows if row["store"] == "float16"] == [1, 1]
    assert all(row["ms"]["median"] > row["prepare_ms"]["median"] > 0 for row in rows)
    assert "| efficientnet_lite0 | default | `pca8-int8` |" in page.cost(
        {"stores": {"cost": {"machine": MACHINE, "rows": rows}}}
    )


@pytest.mark.usefixtures("small")
def test_a_large_bank_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(stores, "_in_a_process", here)
    monkeypatch.setattr(stores, "_GENERATED", 5)
    monkeypatch.setattr(stores, "LARGE", 30)
    monkeypatch.setattr(stores, "LARGE_STEPS", (20, 30))
    monkeypatch.setattr(stores, "LARGE_SHARD", 8)
    monkeypatch.setattr(stores, "LARGE_ADDED", 6)
    places = Places(None, tmp_path)
    first = next(iter(stores.large(places, [])))
    assert (first["normals"], len(Bank.open(tmp_path / "large.bank"))) == (20, 20)
    rows = list(stores.large(places, []))
    assert [row["normals"] for row in rows] == [20, 30, 30]
    assert rows[-1]["removed"] == 3
    bank = Bank.open(tmp_path / "large.bank")
    assert len(bank) == 36
    # Each picture is the same whenever it is asked for, and like no other.
    again = stores._Pictures(Product(SHAPE))
    np.testing.assert_array_equal(again(3, 2).levels["fine"][1], again(4, 1).levels["fine"][0])
    assert len({maps.tobytes() for maps in again(0, 30).levels["fine"]}) == 30
    table = page.large({"stores": {"large": {"machine": MACHINE, "rows": rows}}})
    assert "| 30 | " in table
    assert "Adding 6 pictures to the 30 takes" in table


def test_the_powers_that_the_figures_of_many_pictures_grow_with() -> None:
    def row(count: int) -> dict[str, Any]:
        spread = {name: {"median": 3 * count**power, "min": 0, "max": 9} for name, power in (("cold", 0.25), ("warm", 0.5))}
        return {
            "normals": count,
            "bytes": 70_000,
            "build_per_s": None if count == 10 else {"median": 1.0},
            "open_s": 0.01 * count,
            "cold_ms": spread["cold"],
            "warm_ms": spread["warm"],
            "memory": "1GiB",
            "grown_bytes": 2**20 * count**0.75,
        }

    def table(*counts: int) -> list[str]:
        rows = [*map(row, counts), {"normals": 1, "added": 1, "add_s": 1, "removed": 1, "remove_s": 1, "restore_s": 1}]
        return page.large({"stores": {"large": {"machine": MACHINE, "rows": rows}}}).splitlines()

    assert "| grows to the power | 1.00 | – | 1.00 | 0.25 | 0.50 | 0.75 |" in table(10, 100, 1000)
    assert "| grows to the power | 1.00 | 0.00 | 1.00 | 0.25 | 0.50 | 0.75 |" in table(100, 300, 1000)
    # One point has no slope.
    assert not [line for line in table(10) if "power" in line]
