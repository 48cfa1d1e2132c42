"""Examines this machine: what it has, whether results are right on it, how fast it is, and what to do where it falls short."""

from __future__ import annotations

from pathlib import Path

from spade_faiss.core.device import Device, find_device
from spade_faiss.core.process import fork_safe
from spade_faiss.diagnostics.checks import Diagnosis
from spade_faiss.diagnostics.correctness import check_network, check_recipe
from spade_faiss.diagnostics.forward import check_forward
from spade_faiss.diagnostics.hardware import check_card, check_memory, check_processor
from spade_faiss.diagnostics.self_test import run_self_test
from spade_faiss.diagnostics.software import check_faiss, check_kernel, check_versions
from spade_faiss.diagnostics.speed import check_disk, check_speed
from spade_faiss.features.forward.choice import is_installed
from spade_faiss.search.native.extension import usable_simd_level


@fork_safe
def doctor(device: str = "auto", *, bank: str | Path | None = None) -> Diagnosis:
    """Examine this machine: what is installed, whether the results of every recipe are right here, and how fast it is.

    Args:
        device: the device to examine, see `Detector.open`.
        bank: a bank whose disk is measured, and whose network the engines for the forward pass are compared on.

    Raises:
        InputError: for a device that is not there.
    """
    examined = find_device(device)
    engines = _engines(examined)
    checks = [
        check_versions(),
        check_faiss(examined),
        check_kernel(),
        check_processor(),
        check_memory(),
        check_card(examined),
    ]
    # The first engine is the recipe's own, which is tested with the recipe.
    checks += [check_recipe(tested) for tested in run_self_test(device, engines[1:])]
    if examined.kind == "cuda":
        checks.append(check_network(examined))
    checks.append(check_speed(examined, engines))
    if bank is not None:
        checks += [check_forward(Path(bank)), check_disk(Path(bank))]
    return Diagnosis(tuple(checks))


def _engines(device: Device) -> tuple[str, ...]:
    """The engines of the exact recipe that run on a device; the first is what the recipe takes there."""
    if device.kind == "cuda":
        return ("torch",)
    by_torch = ("torch",) if is_installed("torch") else ()
    return ("native", "faiss", *by_torch) if usable_simd_level() else ("faiss", *by_torch)
