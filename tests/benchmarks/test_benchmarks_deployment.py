"""The benchmark of deployment: what it computes of measured costs is right, and the cost of a process is its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.deployment.equality import relative
from benchmarks.deployment.measure import Cost, folder_bytes, in_turn, percentiles, ratio, run_alone, share_reached, spreads
from benchmarks.pages import deployment as page

MACHINE = {"date": "2026-01-01", "cpu": "a processor", "cores": 2, "threads": 2}


def test_runs_take_turns_and_the_first_round_counts_for_nothing() -> None:
    calls: list[str] = []

    def call(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = in_turn({"a": lambda: call("a"), "b": lambda: call("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [3, 5], "b": [4, 6]}


def test_ratios_are_of_runs_side_by_side() -> None:
    # The second pair was disturbed, both halves of it: its ratio is that of the others.
    assert ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == {"median": 2.0, "min": 2.0, "max": 4.0, "runs": [2.0, 2.0, 4.0]}
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles([0.001 * value for value in range(101)]) == pytest.approx({"p50": 50, "p95": 95})


def test_spreads_are_of_each_field() -> None:
    found = spreads([Cost(1.0, 2.0), Cost(3.0, 1.0), Cost(2.0, 9.0)])
    assert (found["wall_s"]["median"], found["cpu_s"]["median"], found["cpu_s"]["max"]) == (2.0, 2.0, 9.0)


def test_shares_are_of_the_slowest_stage_and_of_what_the_cores_need() -> None:
    whole = [Cost(10.0, 18.0), Cost(8.0, 16.0)]
    alone = {"decode": [Cost(4.0, 8.0), Cost(4.0, 8.0)], "forward": [Cost(6.0, 8.0), Cost(6.0, 4.0)]}
    found = share_reached(whole, alone, cores=2)
    assert found["slowest"] == "forward"
    assert found["of_slowest"]["runs"] == [0.6, 0.75]
    assert found["cores_s"]["runs"] == [8.0, 6.0]
    assert found["of_cores"]["runs"] == [0.8, 0.75]


def test_the_cost_of_a_process_is_its_own() -> None:
    held = np.ones(40 << 20)  # 320 MiB in this process, which began the other one
    small = run_alone([sys.executable, "-c", "pass"])
    large = run_alone([sys.executable, "-c", "held = b'1' * (200 << 20)"])
    busy = run_alone([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"])
    assert held.nbytes > 100 << 20 > small.peak_bytes
    assert 200 << 20 < large.peak_bytes < 260 << 20
    assert busy.cpu_s >= 0.3 > small.cpu_s
    assert busy.wall_s >= 0.3
    with pytest.raises(RuntimeError, match=r"ended with 3: .*it was in vain"):
        run_alone([sys.executable, "-c", "import sys\nprint('it was in vain')\nsys.exit(3)"])


def test_a_folder_takes_what_its_files_take(tmp_path: Path) -> None:
    empty = folder_bytes(tmp_path)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_bytes(b"1" * 1_000_000)
    (tmp_path / "link").symlink_to(tmp_path / "inside" / "file")
    assert 1_000_000 <= folder_bytes(tmp_path) - empty < 1_100_000


def test_differences_are_relative_to_what_was_expected() -> None:
    assert relative(np.array([1.0, 11.0], np.float32), np.array([2.0, 10.0], np.float32)) == 0.5


def test_a_page_says_what_is_missed_and_what_was_disturbed() -> None:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value}

    row = {
        "engine": "onnxruntime",
        "environment": "edge",
        "wall_s": spread(1.4),
        "cpu_s": spread(1.3),
        "peak_bytes": spread(300e6),
    }
    calm = {
        "machine": MACHINE,
        "load_before": 0.1,
        "load_after": 1.2,
        "rows": [row, {**row, "preset": "default"}, {"subject": "torch", "not_measured": "a reason"}],
    }
    text = page.cold({"deployment": {"cold": calm}})
    for preset in ("spade", "default"):  # once, there was but one
        assert f"| onnxruntime, `{preset}` | edge | 1.40 | 1.30 | 300 | missed: CPU |" in text
    assert "Not measured: torch; a reason." in text
    assert "left alone" in text
    assert "others disturbed" in page.cold({"deployment": {"cold": {**calm, "load_before": 3.0}}})
    # The load after it is also that of what was measured.
    assert "left alone" in page.cold({"deployment": {"cold": {**calm, "load_after": 3.0}}})
    assert page.cold({"deployment": {}}) == "Not measured yet."
