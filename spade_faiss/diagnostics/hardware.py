"""Checks what the machine has: cores and threads, memory, the CUDA card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spade_faiss.core.device import Device
from spade_faiss.core.memory import format_bytes, parse_bytes
from spade_faiss.core.process import cores
from spade_faiss.core.settings import Run
from spade_faiss.diagnostics.checks import AMBER, GREEN, Check
from spade_faiss.features.forward.choice import is_installed
from spade_faiss.search.distances import import_faiss


def check_processor() -> Check:
    """Check that there are no more threads than cores, and that idle ones sleep."""
    there = cores()
    threads = import_faiss().omp_get_max_threads()
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    numbers: dict[str, Any] = {"cores": there, "faiss_threads": threads, "wait_policy": policy}
    result = f"{there} cores, {threads} threads of FAISS"
    if is_installed("torch"):
        import torch

        numbers["torch_threads"] = torch.get_num_threads()
        result += f", {numbers['torch_threads']} of torch"
    result += f"; OMP_WAIT_POLICY is {policy or 'not set'}"
    if threads > there:
        state, advice = AMBER, f"more threads than cores slow each other down: set OMP_NUM_THREADS={there}"
    elif policy.upper() != "PASSIVE":
        state, advice = AMBER, "idle threads spin and take cores from the others: set OMP_WAIT_POLICY=PASSIVE"
    else:
        state, advice = GREEN, ""
    return Check(name="processor", state=state, result=result, advice=advice, numbers=numbers)


def check_memory() -> Check:
    """Check that the memory that scoring takes by default is available."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return Check(name="memory", state=GREEN, result="this system does not tell how much is available")
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, available = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
    is_enough = available >= parse_bytes(Run.memory)
    return Check(
        name="memory",
        state=GREEN if is_enough else AMBER,
        result=f"{format_bytes(available)} of {format_bytes(total)} available",
        advice="" if is_enough else f"scoring takes up to --memory {Run.memory} by default: end other programs, or pass less",
        numbers={"total_bytes": total, "available_bytes": available},
    )


def check_card(device: Device) -> Check:
    """Say what torch and the driver support, and check that nothing else uses the card of the device."""
    if not is_installed("torch"):
        return Check(name="cuda", state=GREEN, result="torch is not installed; the CPU computes", numbers={"torch_cuda": None})
    import torch

    built, driver = torch.version.cuda, _driver_version()
    numbers: dict[str, Any] = {"torch_cuda": built, "driver": driver, "card": None}
    computes, advice = "the CPU computes", ""
    if device.kind == "cuda":
        properties = torch.cuda.get_device_properties(device.card)
        free, total = torch.cuda.mem_get_info(device.card)
        capability = f"{properties.major}.{properties.minor}"
        numbers["card"] = {"name": properties.name, "capability": capability, "free_bytes": free, "total_bytes": total}
        computes = f"{properties.name} (compute {capability}), {format_bytes(free)} of {format_bytes(total)} free"
        if free < total / 2:
            advice = "half of the card's memory is taken: end what else uses it (nvidia-smi names it)"
    elif driver:
        advice = "there is a driver, but no card is used: see what spade-faiss doctor --device cuda says"
    torch_text = f"torch was built for CUDA {built}" if built else "torch was built without CUDA"
    driver_text = f"the driver is {driver}" if driver else "there is no driver"
    result = f"{torch_text}, {driver_text}; {computes}"
    return Check(name="cuda", state=AMBER if advice else GREEN, result=result, advice=advice, numbers=numbers)


def _driver_version() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    return path.read_text(encoding="utf-8").splitlines()[0].partition("Module")[2].split()[0]
