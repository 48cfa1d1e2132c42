"""The kernel's benchmark: what it measures runs, and it does not pass over a kernel that is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import kernel
from spade_faiss.search.native.extension import import_native, usable_simd_level
from tests.support.benchmark_shapes import TINY

pytestmark = pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"SHAPES": {"square": TINY["square"]}, "NORMALS": 50, "TESTS": 2, "SPEED": ((2, 1, 1), (2, 2, 1)), "_RUNS": 1}
    for name, value in (settings | {"QUERIES": 200, "STEP": 100, "ROWS": 40}).items():
        monkeypatch.setattr(kernel, name, value)


def test_speed_and_parts(tmp_path: Path) -> None:
    rows = list(kernel.speed(tmp_path, None))
    assert [(row["k"], row["batch"]) for row in rows] == [(2, 1), (2, 2)]
    assert all(set(row["times_that_of"]) == {"faiss", "knn", "knn_low_threshold"} for row in rows)
    parts = list(kernel.parts(tmp_path, None))
    assert {(row["level"], row["k"]) for row in parts} == {(level, k) for level in ("fine", "coarse") for k in (5, 50)}
    assert all(row["filter_ms"] > 0 and 0 < row["evaluated_per_query"] <= 50 * 144 for row in parts)


def test_equality_sees_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(kernel.equality(tmp_path, None))
    assert len(rows) == 2 * len(kernel.HOSTILE) + 1
    assert all(row["queries"] == 200 for row in rows[:-1])
    assert all(row["missed"] == 0 and row["worst"] <= kernel.TOLERANCE for row in rows)
    native = import_native()

    def off(*arguments: Any) -> Any:
        D, *rest = native.search(*arguments)
        return (D * np.float32(1.001), *rest)

    def elsewhere(*arguments: Any) -> Any:
        D, I, *rest = native.search(*arguments)
        return D, np.where(I >= 0, 39 - I, I), *rest

    for wrong in (off, elsewhere):
        fake = SimpleNamespace(search=wrong, Packing=native.Packing, RowPack=native.RowPack, QueryPack=native.QueryPack)
        monkeypatch.setattr(kernel, "import_native", lambda fake=fake: fake)
        with pytest.raises(RuntimeError, match="not exact"):
            list(kernel.equality(tmp_path, None))
