"""The doctor: green on this machine, red where something is wrong, with what to do, for people and for programs."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss import doctor
from spade_faiss.cli import main
from spade_faiss.core.device import CPU, Device
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Run
from spade_faiss.diagnostics import doctor as diagnosis
from spade_faiss.diagnostics.doctor import AMBER, GREEN, RED, Check, Diagnosis, wheel_flavor
from spade_faiss.diagnostics.self_test import SelfTest, run_self_test
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.engines.torch import TorchSearch
from spade_faiss.search.native.extension import SIMD_LEVELS, usable_simd_level
from spade_faiss.search.protocol import Hits
from spade_faiss.search.recipe import recipe_names

# Of a CPU; the first is the recipe's own.
ENGINES = ("native", "faiss", "torch") if usable_simd_level() else ("faiss", "torch")


@pytest.fixture(scope="module")
def found(fitted_bank: Path) -> Diagnosis:
    """Of this machine."""
    return doctor("cpu", bank=fitted_bank)


def by_name(found: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


def test_this_machine_is_right(found: Diagnosis) -> None:
    """Its speed, disk and memory may not be."""
    checks = by_name(found)
    assert {"versions", "faiss", "kernel", "processor", "memory", "cuda", "speed", "disk"} <= set(checks)
    proofs = {name: check for name, check in checks.items() if name.startswith("recipe ")}
    assert set(proofs) == {f"recipe {name}" for name in (*recipe_names(), *(f"exact by {engine}" for engine in ENGINES[1:]))}
    assert {check.state for check in proofs.values()} == {GREEN}
    assert found.state != RED
    for name in ("recipe exact", "recipe exact by torch"):
        assert proofs[name].numbers["error"] < 1e-5
        assert proofs[name].numbers["found"] == proofs[name].numbers["images"] == 1
    assert all(check.advice for check in found.checks if check.state != GREEN)


def test_numbers_of_the_probes(found: Diagnosis, fitted_bank: Path) -> None:
    checks = by_name(found)
    speed = checks["speed"].numbers
    assert set(speed["engines"]) == set(ENGINES)
    for engine in speed["engines"].values():
        assert engine["share_of_peak"] == pytest.approx(engine["flops"] / speed["peak_flops"])
        assert engine["pixels_per_s"] == pytest.approx(784 * engine["images_per_s"])
    assert speed["fastest"] == max(speed["engines"], key=lambda name: speed["engines"][name]["flops"])
    disk = checks["disk"].numbers
    assert disk["bytes"] == sum(file.stat().st_size for file in fitted_bank.rglob("*") if file.is_file())
    assert disk["bytes_per_s"] > 0


def test_a_wrong_distance_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TorchSearch.__call__

    def off(self: TorchSearch, xq: Any, neighbors: Any, kappa: int) -> Hits:
        hits = before(self, xq, neighbors, kappa)
        return Hits(hits.sq_dist * np.float32(1.001), hits.row, hits.location)

    def elsewhere(self: TorchSearch, xq: Any, neighbors: Any, kappa: int) -> Hits:
        hits = before(self, xq, neighbors, kappa)
        return Hits(hits.sq_dist, hits.row, hits.location // 2)

    for wrong in (off, elsewhere):
        monkeypatch.setattr(TorchSearch, "__call__", wrong)
        states = {tested.name: diagnosis._check_of(tested).state for tested in run_self_test("cpu", ("torch",))}
        assert {name for name, state in states.items() if state == RED} == {"exact by torch"}


def test_what_does_not_run_is_red() -> None:
    (tested,) = [tested for tested in run_self_test("cpu", ("knn_gpu",)) if tested.name == "exact by knn_gpu"]
    check = diagnosis._check_of(tested)
    assert check.state == RED
    assert "engine='knn_gpu' needs a CUDA card" in check.found
    assert "spade-faiss doctor --device cpu" in check.advice


def test_an_approximate_recipe_may_miss_an_exact_one_may_not() -> None:
    assert SelfTest(name="ivf", exact=False, error=1e-6, found=0.5, images=0.9).holds
    assert not SelfTest(name="exact", exact=True, error=1e-6, found=0.5, images=0.9).holds
    assert not SelfTest(name="ivf", exact=False, error=2e-4, found=1, images=1).holds
    assert not SelfTest(name="ivf", exact=False, error=0, found=1, images=1, problem="it crashed").holds


def test_the_kernel_says_what_multiplies_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    here = diagnosis._kernel()
    assert here.numbers["simd_level"] == usable_simd_level()
    assert list(here.numbers["why_not"]) == list(SIMD_LEVELS)
    reasons = dict.fromkeys(SIMD_LEVELS, "")
    monkeypatch.setattr(diagnosis, "why_not", lambda: reasons)
    monkeypatch.setattr(diagnosis, "is_built", lambda: True)
    reasons["amx"] = "the processor has no amx_tile"
    monkeypatch.setattr(diagnosis, "usable_simd_level", lambda: "avx512vnni")
    check = diagnosis._kernel()
    assert (check.state, check.found) == (GREEN, "avx512vnni multiplies (not here: amx: the processor has no amx_tile)")
    reasons["amx"] = "the system refuses AMX tiles: Operation not permitted"
    check = diagnosis._kernel()
    assert (check.state, check.advice) == (AMBER, "the processor has amx, the system or its hypervisor must allow it")
    monkeypatch.setattr(diagnosis, "is_built", lambda: False)
    monkeypatch.setattr(diagnosis, "usable_simd_level", lambda: None)
    check = diagnosis._kernel()
    assert (check.state, check.found) == (AMBER, "it is not there: FAISS searches the maps")
    assert "install g++" in check.advice


def test_two_builds_of_faiss_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.1")
    check = diagnosis._faiss(CPU)
    assert (check.state, check.numbers["installed"]) == (RED, ["faiss-cpu", "faiss-gpu"])
    assert "pip uninstall -y faiss-cpu faiss-gpu" in check.advice


def test_a_card_without_the_gpu_build_is_amber() -> None:
    check = diagnosis._faiss(Device("cuda", (0,)))
    assert check.state == AMBER
    assert "the image index stays on the CPU" in check.advice
    assert diagnosis._faiss(CPU).state == GREEN


@pytest.mark.parametrize(
    ("options", "cards", "flavor"),
    [
        ("OPTIMIZE DD AVX2 AVX512 ", False, "CPU"),
        ("OPTIMIZE AVX2 GPU ", True, "GPU"),
        ("OPTIMIZE AVX2 ", True, "GPU"),
        ("OPTIMIZE AVX2 GPU NVIDIA_CUVS ", True, "cuVS"),
    ],
)
def test_flavors_of_the_wheel(options: str, cards: bool, flavor: str) -> None:
    assert wheel_flavor(options, cards) == flavor


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "OMP_WAIT_POLICY=PASSIVE" in diagnosis._processor().advice
    monkeypatch.setattr(import_faiss(), "omp_get_max_threads", lambda: 10_000)
    check = diagnosis._processor()
    assert check.state == AMBER
    assert "set OMP_NUM_THREADS=" in check.advice


def test_a_network_is_compared_with_itself_on_the_cpu() -> None:
    """What runs on a card is the same code."""
    check = diagnosis._network(CPU)
    assert (check.state, check.numbers["error"]) == (GREEN, 0)


def test_little_memory_is_amber(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "memory", "900TB")
    check = diagnosis._memory()
    assert check.state == (AMBER if check.numbers else GREEN)  # a system that does not say is no reason to worry


def test_a_place_that_is_no_bank_is_red(tmp_path: Path) -> None:
    assert diagnosis._disk(tmp_path).state == RED


def test_the_worst_counts() -> None:
    checks = [Check(name=state, state=state, found="") for state in (GREEN, AMBER, RED)]
    assert [Diagnosis(tuple(checks[:n])).state for n in (1, 2, 3)] == [GREEN, AMBER, RED]


def test_the_command(found: Diagnosis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(diagnosis, "doctor", lambda device, *, bank: found)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("green  versions")
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["state"] == found.state
    assert [check["name"] for check in numbers["checks"]] == [check.name for check in found.checks]
    wrong = Diagnosis((*found.checks, Check(name="test", state=RED, found="is wrong", advice="mend it")))
    monkeypatch.setattr(diagnosis, "doctor", lambda device, *, bank: wrong)
    assert main(["doctor"]) == 1
    assert "-> mend it\nred    all in all" in capsys.readouterr().out


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="there is no CUDA card that torch can use"):
        doctor("cuda")
