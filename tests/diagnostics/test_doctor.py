"""The doctor: green on this machine, red where something is wrong; it says what to do, for people and for programs."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss import doctor
from spade_faiss.cli import main
from spade_faiss.core.device import CPU, Device
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Run
from spade_faiss.diagnostics import doctor as doctor_module
from spade_faiss.diagnostics import software
from spade_faiss.diagnostics.checks import AMBER, GREEN, RED, Check, Diagnosis
from spade_faiss.diagnostics.correctness import check_network, check_recipe
from spade_faiss.diagnostics.hardware import check_card, check_memory, check_processor
from spade_faiss.diagnostics.self_test import SelfTest, run_self_test
from spade_faiss.diagnostics.software import check_faiss, check_kernel, wheel_flavor
from spade_faiss.diagnostics.speed import check_disk
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.engines.torch import TorchSearch
from spade_faiss.search.native.extension import SIMD_LEVELS, usable_simd_level
from spade_faiss.search.protocol import Hits
from spade_faiss.search.recipe import recipe_names

# The engines of a CPU; the first is the recipe's own.
ENGINES = ("native", "faiss", "torch") if usable_simd_level() else ("faiss", "torch")


@pytest.fixture(scope="module")
def diagnosis(fitted_bank: Path) -> Diagnosis:
    """The diagnosis of this machine."""
    return doctor("cpu", bank=fitted_bank)


def by_name(diagnosis: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in diagnosis.checks}


def test_this_machine_is_right(diagnosis: Diagnosis) -> None:
    """Results are; its speed, disk and memory may not be."""
    checks = by_name(diagnosis)
    assert {"versions", "faiss", "kernel", "processor", "memory", "cuda", "speed", "disk"} <= set(checks)
    self_tests = {name: check for name, check in checks.items() if name.startswith("recipe ")}
    assert set(self_tests) == {
        f"recipe {name}" for name in (*recipe_names(), *(f"exact by {engine}" for engine in ENGINES[1:]))
    }
    assert {check.state for check in self_tests.values()} == {GREEN}
    assert diagnosis.state != RED
    for name in ("recipe exact", "recipe exact by torch"):
        assert self_tests[name].numbers["error"] < 1e-5
        assert self_tests[name].numbers["locations_found"] == self_tests[name].numbers["images_found"] == 1
    assert all(check.advice for check in diagnosis.checks if check.state != GREEN)


def test_numbers_of_speed_and_disk(diagnosis: Diagnosis, fitted_bank: Path) -> None:
    checks = by_name(diagnosis)
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
        states = {tested.name: check_recipe(tested).state for tested in run_self_test("cpu", ("torch",))}
        assert {name for name, state in states.items() if state == RED} == {"exact by torch"}


def test_what_does_not_run_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TorchSearch, xq: Any, neighbors: Any, kappa: int) -> Hits:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(TorchSearch, "__call__", fail)
    (tested,) = [tested for tested in run_self_test("cpu", ("torch",)) if tested.name == "exact by torch"]
    check = check_recipe(tested)
    assert check.state == RED
    assert check.result == "failed: no kernel image is available for execution on the device"
    assert "spade-faiss doctor --device cpu" in check.advice


def test_an_approximate_recipe_may_miss_an_exact_one_may_not() -> None:
    assert SelfTest(name="ivf", exact=False, error=1e-6, locations_found=0.5, images_found=0.9).passed
    assert not SelfTest(name="exact", exact=True, error=1e-6, locations_found=0.5, images_found=0.9).passed
    assert not SelfTest(name="ivf", exact=False, error=2e-4, locations_found=1, images_found=1).passed
    assert not SelfTest(name="ivf", exact=False, error=0, locations_found=1, images_found=1, problem="it crashed").passed


def test_the_kernel_says_what_multiplies_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    here = check_kernel()
    assert here.numbers["simd_level"] == usable_simd_level()
    assert list(here.numbers["why_not"]) == list(SIMD_LEVELS)
    reasons = dict.fromkeys(SIMD_LEVELS, "")
    monkeypatch.setattr(software, "why_not", lambda: reasons)
    monkeypatch.setattr(software, "is_built", lambda: True)
    reasons["amx"] = "the processor has no amx_tile"
    monkeypatch.setattr(software, "usable_simd_level", lambda: "avx512vnni")
    check = check_kernel()
    assert (check.state, check.result) == (GREEN, "the kernel uses avx512vnni (not here: amx: the processor has no amx_tile)")
    reasons["amx"] = "the system refuses AMX tiles: Operation not permitted"
    check = check_kernel()
    assert (check.state, check.advice) == (AMBER, "the processor has amx, the system or its hypervisor must allow it")
    monkeypatch.setattr(software, "is_built", lambda: False)
    monkeypatch.setattr(software, "usable_simd_level", lambda: None)
    check = check_kernel()
    assert (check.state, check.result) == (AMBER, "it is not installed: FAISS searches the maps")
    assert "install g++" in check.advice


def test_a_card_that_something_else_uses_is_amber(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a card is a stand-in here."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda card: SimpleNamespace(name=f"Card {card}", major=9, minor=0)
    )
    for free, state in ((5 << 30, GREEN), (3 << 30, AMBER)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card, free=free: (free, 8 << 30))
        check = check_card(Device("cuda", 1))
        assert check.state == state
        assert f"Card 1 (compute 9.0), {free >> 30} GiB of 8 GiB free" in check.result
        assert check.numbers["card"] == {"name": "Card 1", "capability": "9.0", "free_bytes": free, "total_bytes": 8 << 30}
    assert check_card(CPU).numbers["card"] is None


def test_two_builds_of_faiss_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.1")
    check = check_faiss(CPU)
    assert (check.state, check.numbers["installed"]) == (RED, ["faiss-cpu", "faiss-gpu"])
    assert "pip uninstall -y faiss-cpu faiss-gpu" in check.advice


def test_a_card_without_the_gpu_build_is_amber() -> None:
    check = check_faiss(Device("cuda"))
    assert check.state == AMBER
    assert "the image index stays on the CPU" in check.advice
    assert check_faiss(CPU).state == GREEN


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
    assert "OMP_WAIT_POLICY=PASSIVE" in check_processor().advice
    monkeypatch.setattr(import_faiss(), "omp_get_max_threads", lambda: 10_000)
    check = check_processor()
    assert check.state == AMBER
    assert "set OMP_NUM_THREADS=" in check.advice


def test_a_network_is_compared_with_itself_on_the_cpu() -> None:
    """What runs on a card is the same code."""
    check = check_network(CPU)
    assert (check.state, check.numbers["error"]) == (GREEN, 0)


def test_little_memory_is_amber(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "memory", "900TB")
    check = check_memory()
    assert check.state == (AMBER if check.numbers else GREEN)  # a system that does not say is no reason to worry


def test_a_place_that_is_no_bank_is_red(tmp_path: Path) -> None:
    assert check_disk(tmp_path).state == RED


def test_the_worst_counts() -> None:
    checks = [Check(name=state, state=state, result="") for state in (GREEN, AMBER, RED)]
    assert [Diagnosis(tuple(checks[:n])).state for n in (1, 2, 3)] == [GREEN, AMBER, RED]


def test_the_command(diagnosis: Diagnosis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor_module, "doctor", lambda device, *, bank: diagnosis)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("green  versions")
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["state"] == diagnosis.state
    assert [check["name"] for check in numbers["checks"]] == [check.name for check in diagnosis.checks]
    wrong = Diagnosis((*diagnosis.checks, Check(name="test", state=RED, result="is wrong", advice="mend it")))
    monkeypatch.setattr(doctor_module, "doctor", lambda device, *, bank: wrong)
    assert main(["doctor"]) == 1
    assert "-> mend it\nred    all in all" in capsys.readouterr().out


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="there is no CUDA card that torch can use"):
        doctor("cuda")
