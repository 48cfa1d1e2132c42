"""The doctor: what this machine has, a tested that its results are right, and how fast it is; with what to do where it ails."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss._version import __version__
from spade_faiss.bank.bank import Bank
from spade_faiss.core.device import Device, find_device
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.memory import format_bytes, parse_bytes
from spade_faiss.core.settings import Run
from spade_faiss.diagnostics.self_test import TOLERANCE, SelfTest, run_self_test
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.native.extension import INSTALL, UNITS, is_built, usable_unit, why_not
from spade_faiss.search.protocol import GallerySearch, resolve_recipe
from spade_faiss.search.recipe import load_recipe
from spade_faiss.search.workers import Workers

GREEN, AMBER, RED = "green", "amber", "red"

# Below these shares and speeds something is wrong with the machine, or others use it.
_LEAST_SHARE = 0.2
_SLOW_DISK = 150e6
# Features of a network, as a share of the largest: sums in another order, over tens of layers.
_NETWORK_TOLERANCE = 1e-3
_READ_BYTES = 256 << 20
_READ_STEP = 8 << 20
# What is searched to measure: test images, neighbors, a level.
_CPU_LOAD = (2, 4, Level("level", 256, stride=8, height=28, width=28))
_CARD_LOAD = (8, 16, Level("level", 256, stride=4, height=56, width=56))
_CPU_SIDE, _CARD_SIDE, _RUNS = 1024, 8192, 4


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at, its state (`green`, `amber` or `red`), what was found, what to do, and the numbers."""

    name: str
    state: str
    found: str
    advice: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All checks."""

    checks: tuple[Check, ...]

    @property
    def state(self) -> str:
        """The worst of them."""
        states = {check.state for check in self.checks}
        return next(state for state in (RED, AMBER, GREEN) if state in states)


def doctor(device: str = "auto", *, bank: str | Path | None = None) -> Diagnosis:
    """Look at this machine: what is installed, whether every recipe's results are right here, and how fast it is.

    Args:
        device: what to look at, see `Detector.open`.
        bank: a bank whose place on disk is measured.

    Raises:
        InputError: for a device that is not there.
    """
    found = find_device(device)
    engines = _engines(found)
    checks = [_versions(), _faiss(found), _kernel(), _processor(), _memory(), _cuda(found)]
    # The first engine is that of the recipe.
    checks += [_check_of(tested) for tested in run_self_test(device, engines[1:])]
    if found.kind == "cuda":
        checks.append(_network(found))
    checks.append(_speed(found, engines))
    if bank is not None:
        checks.append(_disk(Path(bank)))
    return Diagnosis(tuple(checks))


def _versions() -> Check:
    names = ("torch", "torchvision", "numpy", "h5py")
    numbers = {"spade-faiss": __version__, "python": platform.python_version(), "faiss": import_faiss().__version__}
    numbers |= {name: importlib.metadata.version(name) for name in names}
    return Check(name="versions", state=GREEN, found=", ".join(f"{k} {v}" for k, v in numbers.items()), numbers=numbers)


def wheel_flavor(compile_options: str, cards: bool) -> str:
    """`CPU`, `GPU` or `cuVS`, by what FAISS says of its build and whether it has functions for cards."""
    if "CUVS" in compile_options.upper():
        return "cuVS"
    return "GPU" if "GPU" in compile_options.split() or cards else "CPU"


def _faiss(device: Device) -> Check:
    faiss = import_faiss()
    flavor = wheel_flavor(faiss.get_compile_options(), hasattr(faiss, "StandardGpuResources"))
    installed = [name for name in ("faiss-cpu", "faiss-gpu") if _is_installed(name)]
    numbers = {"flavor": flavor, "simd": faiss.SIMDConfig.get_level_name(), "installed": installed}
    said = f"{flavor} build, {numbers['simd']} ({faiss.get_compile_options().strip()})"
    if len(installed) > 1:
        state, advice = RED, "they overwrite each other: pip uninstall -y faiss-cpu faiss-gpu, then install one of the two"
    elif device.kind == "cuda" and flavor == "CPU":
        state, advice = (
            AMBER,
            (
                "the image index stays on the CPU, the gallery search runs on the card; for both there: "
                "pip uninstall -y faiss-cpu && pip install 'spade-faiss[gpu]'"
            ),
        )
    elif numbers["simd"] == "NONE":
        state, advice = AMBER, "FAISS found no vector instructions of this processor; searching will be slow"
    else:
        state, advice = GREEN, ""
    return Check(name="faiss", state=state, found=said, advice=advice, numbers=numbers)


def _kernel() -> Check:
    """Which of the processor's units the compiled kernel multiplies with, and why none that would be faster."""
    reasons = why_not()
    unit = usable_unit()
    faster = UNITS if unit is None else UNITS[: UNITS.index(unit)]
    not_here = "; ".join(f"{name}: {reasons[name]}" for name in faster)
    if not is_built():
        state, said = AMBER, "it is not there: FAISS searches the maps"
        advice = f"exact search is faster with it: {INSTALL}"
    else:
        said = f"{unit} multiplies" if unit else "FAISS searches the maps"
        said += f" (not here: {not_here})" if not_here else ""
        refused = [name for name in faster if reasons[name].startswith("the system")]
        state = AMBER if refused else GREEN
        advice = f"the processor has {', '.join(refused)}, the system or its hypervisor must allow it" if refused else ""
    return Check(name="kernel", state=state, found=said, advice=advice, numbers={"unit": unit, "why_not": reasons})


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> Check:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = import_faiss().omp_get_max_threads()
    numbers = {"cores": cores, "faiss_threads": threads, "torch_threads": torch.get_num_threads()}
    numbers["wait_policy"] = policy = os.environ.get("OMP_WAIT_POLICY", "")
    said = (
        f"{cores} cores, {threads} threads of FAISS, {numbers['torch_threads']} of torch, idle ones {policy or 'as they like'}"
    )
    if threads > cores:
        state, advice = AMBER, f"more threads than cores slow each other down: set OMP_NUM_THREADS={cores}"
    elif policy.upper() != "PASSIVE":
        state, advice = AMBER, "idle threads spin and take cores from the others: set OMP_WAIT_POLICY=PASSIVE"
    else:
        state, advice = GREEN, ""
    return Check(name="processor", state=state, found=said, advice=advice, numbers=numbers)


def _memory() -> Check:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return Check(name="memory", state=GREEN, found="this system does not say")
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, available = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
    enough = available >= parse_bytes(Run.memory)
    return Check(
        name="memory",
        state=GREEN if enough else AMBER,
        found=f"{format_bytes(available)} of {format_bytes(total)} available",
        advice="" if enough else f"scoring takes up to --memory {Run.memory} unless told: end other programs, or pass less",
        numbers={"total_bytes": total, "available_bytes": available},
    )


def _cuda(device: Device) -> Check:
    import torch

    built = torch.version.cuda
    driver = Path("/proc/driver/nvidia/version")
    numbers: dict[str, Any] = {"torch_cuda": built, "driver": None, "cards": []}
    if driver.is_file():
        numbers["driver"] = driver.read_text(encoding="utf-8").splitlines()[0].partition("Module")[2].split()[0]
    for card in device.cards:
        properties = torch.cuda.get_device_properties(card)
        free, total = torch.cuda.mem_get_info(card)
        capability = f"{properties.major}.{properties.minor}"
        numbers["cards"].append({"name": properties.name, "capability": capability, "free_bytes": free, "total_bytes": total})
    cards = "; ".join(
        f"{card['name']} (compute {card['capability']}), {format_bytes(card['free_bytes'])} of "
        f"{format_bytes(card['total_bytes'])} free"
        for card in numbers["cards"]
    )
    said = f"torch for CUDA {built or 'none'}, driver {numbers['driver'] or 'none'}; {cards or 'the CPU computes'}"
    crowded = any(card["free_bytes"] < card["total_bytes"] / 2 for card in numbers["cards"])
    advice = "half of a card's memory is taken: end what else uses it (nvidia-smi names it)" if crowded else ""
    if not device.cards and numbers["driver"]:
        advice = "there is a driver, but no card is used: see what spade-faiss doctor --device cuda says"
    return Check(name="cuda", state=AMBER if advice else GREEN, found=said, advice=advice, numbers=numbers)


def _network(device: Device) -> Check:
    """Features of a small network there and on the CPU."""
    import torch
    from torchvision import models

    from spade_faiss.core.settings import Preprocess
    from spade_faiss.features.backbone import Backbone
    from spade_faiss.features.network import Network

    taps = {"layer1": "layer1", "layer2": "layer2"}
    found = []
    for where in ("cpu", device.torch_names[0]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = models.get_model("resnet18", weights=None)
        settings = Preprocess(resize=72, crop=64)
        network = Backbone(
            Network.from_module(module, name="probe", taps=taps, embedding="avgpool"), preprocess=settings, device=where
        )
        found.append(network(np.random.default_rng(0).random((2, 3, 64, 64), np.float32)))
    pairs = [(found[0][0], found[1][0]), *((found[0][1][level], found[1][1][level]) for level in taps)]
    error = max(float(np.abs(here - there).max() / np.abs(here).max()) for here, there in pairs)
    right = error <= _NETWORK_TOLERANCE
    return Check(
        name="network",
        state=GREEN if right else RED,
        found=f"features differ from the CPU's by {error:.1g} of the largest, at most",
        advice="" if right else "do not extract here into a bank that is queried elsewhere, and report it",
        numbers={"error": error},
    )


def _engines(device: Device) -> tuple[str, ...]:
    if device.kind == "cpu":
        return ("native", "faiss", "torch") if usable_unit() else ("faiss", "torch")
    return ("torch", "knn_gpu") if hasattr(import_faiss(), "StandardGpuResources") else ("torch",)


def _check_of(tested: SelfTest) -> Check:
    numbers = {"error": tested.error, "found": tested.found, "images": tested.images}
    name = f"recipe {tested.name}"
    if tested.problem:
        advice = f"do not use it here; compare with: spade-faiss doctor --device cpu, and report {tested.name!r} with this line"
        return Check(name=name, state=RED, found=f"failed: {tested.problem}", advice=advice, numbers=numbers)
    said = f"distances right to {tested.error:.1g}, nearest found at {100 * tested.found:.1f} % of the locations"
    if not tested.holds:
        advice = f"results are wrong beyond {TOLERANCE:g}: do not use it on this device, and report it with these lines"
        return Check(name=name, state=RED, found=said, advice=advice, numbers=numbers)
    return Check(name=name, state=GREEN, found=said, numbers=numbers)


def _speed(device: Device, engines: tuple[str, ...]) -> Check:
    """A bare matrix product, and what share of its speed each engine reaches."""
    import torch

    on_cpu = device.kind == "cpu"
    side, (images, k, level) = (_CPU_SIDE, _CPU_LOAD) if on_cpu else (_CARD_SIDE, _CARD_LOAD)
    where = torch.device(device.torch_names[0])
    wait: Callable[[], object] = (lambda: None) if on_cpu else (lambda: torch.cuda.synchronize(where))
    a, b = torch.randn(side, side, device=where), torch.randn(side, side, device=where)
    peak = 2 * side**3 / _fastest(lambda: torch.mm(a, b), wait)
    numbers: dict[str, Any] = {"peak_flops": peak, "engines": {}}
    flop = 2 * images * k * (level.height * level.width) ** 2 * level.channels
    rng = np.random.default_rng(0)
    maps = rng.random((k, level.height * level.width, level.channels), np.float32)
    xq = rng.random((images, *maps.shape[1:]), np.float32)
    neighbors = np.tile(np.arange(k), (images, 1))
    workers = Workers(device=Device(device.kind, device.cards[:1]))
    for engine in engines:
        try:
            search = _open(engine, Blocks(level, k, maps.__getitem__), workers)
            seconds = _fastest(lambda search=search: search(xq, neighbors, 1), wait)  # type: ignore[misc]
        except (SpadeError, RuntimeError) as error:
            numbers["engines"][engine] = {"problem": str(error)[:300]}
            continue
        numbers["engines"][engine] = {
            "images_per_s": images / seconds,
            "pixels_per_s": images * level.height * level.width / seconds,
            "flops": flop / seconds,
            "share_of_peak": flop / seconds / peak,
        }
    ran = {name: found for name, found in numbers["engines"].items() if "flops" in found}
    if not ran:
        return Check(name="speed", state=RED, found="no engine ran", advice="see the recipes above", numbers=numbers)
    numbers["fastest"] = fastest = max(ran, key=lambda name: ran[name]["flops"])
    each = ", ".join(f"{name} {found['flops'] / 1e9:.0f} ({100 * found['share_of_peak']:.0f} %)" for name, found in ran.items())
    said = f"a matrix product runs at {peak / 1e9:.0f} GFLOP/s, the gallery search by {each}; fastest: --set engine={fastest}"
    slow = ran[fastest]["share_of_peak"] < _LEAST_SHARE
    advice = "less than a fifth of what a product reaches: does something else use this machine?" if slow else ""
    return Check(name="speed", state=AMBER if slow else GREEN, found=said, advice=advice, numbers=numbers)


def _open(engine: str, blocks: Blocks, workers: Workers) -> GallerySearch:
    chosen = resolve_recipe(load_recipe("exact").with_query({"engine": engine}))
    return chosen.method.open(blocks, workers, chosen.build, chosen.query, None)


def _fastest(task: Callable[[], object], wait: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    seconds = []
    for _ in range(_RUNS):
        wait()
        start = time.perf_counter()
        task()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _disk(path: Path) -> Check:
    """How fast the largest files of a bank are read, out of the system's cache where it lets us drop them."""
    try:
        held = Bank.open(path)
    except (SpadeError, OSError) as error:
        return Check(name="disk", state=RED, found=str(error), advice=f"is {path} a bank? spade-faiss info {path}")
    seconds, count, cold = 0.0, 0, hasattr(os, "posix_fadvise")
    for file in sorted((file for file in held.path.rglob("*") if file.is_file()), key=lambda file: -file.stat().st_size):
        for spent, size in _read(file):
            seconds, count = seconds + spent, count + size
            if count >= _READ_BYTES:
                break
        if count >= _READ_BYTES:
            break
    speed = count / max(seconds, 1e-9)
    slow = speed < _SLOW_DISK
    return Check(
        name="disk",
        state=AMBER if slow else GREEN,
        found=f"{held.path}: {len(held)} images, {format_bytes(held.bytes_on_disk)}, read at {speed / 1e6:.0f} MB/s"
        + ("" if cold else ", perhaps from the system's cache"),
        advice="put the bank on a local SSD, or give the machine memory to cache it" if slow else "",
        numbers={"bytes_per_s": speed, "bytes": count, "cold": cold},
    )


def _read(file: Path) -> Iterator[tuple[float, int]]:
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while True:
            start = time.perf_counter()
            size = len(stream.read(_READ_STEP))
            if size == 0:
                return
            yield time.perf_counter() - start, size
