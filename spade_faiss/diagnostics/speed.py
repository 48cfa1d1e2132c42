"""Checks how fast the machine is: a matrix product, the engines of the gallery search, and the disk of a bank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.core.device import Device
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.memory import format_bytes
from spade_faiss.diagnostics.checks import AMBER, GREEN, RED, Check
from spade_faiss.features.batch import Level
from spade_faiss.features.forward.choice import is_installed
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.protocol import GallerySearch, resolve_recipe
from spade_faiss.search.recipe import load_recipe
from spade_faiss.search.workers import Workers

# Below this share of a matrix product's speed, and below this speed of a disk, something is wrong with the machine, or others
# use it.
_LEAST_SHARE = 0.2
_SLOW_DISK = 150e6
_READ_BYTES = 256 << 20
_READ_STEP = 8 << 20
_RUNS = 4


@dataclass(frozen=True, kw_only=True)
class _Load:
    """What is computed to measure: a product of matrices with sides of `side`, and a search for `images` in `k` neighbors."""

    side: int
    images: int
    k: int
    level: Level

    @property
    def search_flop(self) -> int:
        return 2 * self.images * self.k * (self.level.height * self.level.width) ** 2 * self.level.channels


_CPU_LOAD = _Load(side=1024, images=2, k=4, level=Level("level", 256, stride=8, height=28, width=28))
_CARD_LOAD = _Load(side=8192, images=8, k=16, level=Level("level", 256, stride=4, height=56, width=56))


def check_speed(device: Device, engines: tuple[str, ...]) -> Check:
    """Measure a matrix product, and what share of its speed each engine reaches.

    Args:
        device: where to compute.
        engines: the engines of the exact recipe to measure.
    """
    load = _CPU_LOAD if device.kind == "cpu" else _CARD_LOAD
    product, wait = _product(device, load.side)
    peak = 2 * load.side**3 / least_seconds(product, wait)
    speeds = {engine: _measure_engine(engine, device, load, peak, wait) for engine in engines}
    numbers: dict[str, Any] = {"peak_flops": peak, "engines": speeds}
    ran = {engine: speed for engine, speed in speeds.items() if "flops" in speed}
    if not ran:
        return Check(name="speed", state=RED, result="no engine ran", advice="see the recipes above", numbers=numbers)
    numbers["fastest"] = fastest = max(ran, key=lambda engine: float(ran[engine]["flops"]))
    each = ", ".join(
        f"{engine} {speed['flops'] / 1e9:.0f} ({100 * speed['share_of_peak']:.0f} %)" for engine, speed in ran.items()
    )
    result = f"a matrix product runs at {peak / 1e9:.0f} GFLOP/s, the gallery search by {each}; fastest: --set engine={fastest}"
    is_slow = ran[fastest]["share_of_peak"] < _LEAST_SHARE
    advice = "less than a fifth of what a product reaches: does something else use this machine?" if is_slow else ""
    return Check(name="speed", state=AMBER if is_slow else GREEN, result=result, advice=advice, numbers=numbers)


def _product(device: Device, side: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A product of two matrices of a side, and what waits for its end; by NumPy where there is no torch."""
    if not is_installed("torch"):
        rng = np.random.default_rng(0)
        x, y = (rng.standard_normal((side, side), np.float32) for _ in range(2))
        return lambda: x @ y, lambda: None
    import torch

    place = torch.device(device.torch_name)
    a, b = (torch.randn(side, side, device=place) for _ in range(2))
    return lambda: torch.mm(a, b), (lambda: None) if device.kind == "cpu" else (lambda: torch.cuda.synchronize(place))


def _measure_engine(engine: str, device: Device, load: _Load, peak: float, wait: Callable[[], object]) -> dict[str, Any]:
    """The speed of an engine on generated maps, or the problem that kept it from running."""
    level = load.level
    rng = np.random.default_rng(0)
    maps = rng.random((load.k, level.height * level.width, level.channels), np.float32)
    xq = rng.random((load.images, *maps.shape[1:]), np.float32)
    neighbors = np.tile(np.arange(load.k), (load.images, 1))
    workers = Workers(device=device)
    try:
        search = _open(engine, Blocks(level, ArraySource(maps)), workers)
        seconds = least_seconds(lambda: search(xq, neighbors, 1), wait)
    except (SpadeError, RuntimeError) as error:
        return {"problem": str(error)[:300]}
    return {
        "images_per_s": load.images / seconds,
        "pixels_per_s": load.images * level.height * level.width / seconds,
        "flops": load.search_flop / seconds,
        "share_of_peak": load.search_flop / seconds / peak,
    }


def _open(engine: str, blocks: Blocks, workers: Workers) -> GallerySearch:
    chosen = resolve_recipe(load_recipe("exact").with_query({"engine": engine}))
    return chosen.method.open(blocks, workers, chosen.build, chosen.query, None)


def least_seconds(task: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest of a few runs; the first, which warms up, does not count. `wait` waits for the end of one."""
    seconds = []
    for _ in range(_RUNS):
        wait()
        start = time.perf_counter()
        task()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def check_disk(path: Path) -> Check:
    """Measure how fast the largest files of a bank are read; the system's cache is dropped before if the system allows it."""
    try:
        bank = Bank.open(path)
    except (SpadeError, OSError) as error:
        return Check(name="disk", state=RED, result=str(error), advice=f"is {path} a bank? spade-faiss info {path}")
    seconds, count, is_cold = 0.0, 0, hasattr(os, "posix_fadvise")
    for step_s, size in _read_largest(bank.path):
        seconds, count = seconds + step_s, count + size
        if count >= _READ_BYTES:
            break
    speed = count / max(seconds, 1e-9)
    is_slow = speed < _SLOW_DISK
    return Check(
        name="disk",
        state=AMBER if is_slow else GREEN,
        result=f"{bank.path}: {len(bank.pictures)} images, {format_bytes(bank.bytes_on_disk)}, read at {speed / 1e6:.0f} MB/s"
        + ("" if is_cold else ", perhaps from the system's cache"),
        advice="put the bank on a local SSD, or give the machine memory to cache it" if is_slow else "",
        numbers={"bytes_per_s": speed, "bytes": count, "cold": is_cold},
    )


def _read_largest(folder: Path) -> Iterator[tuple[float, int]]:
    """Read the files below a folder, the largest first; yield the seconds and bytes of each step."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(sorted(files), key=lambda file: -file.stat().st_size):
        with file.open("rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while True:
                start = time.perf_counter()
                size = len(stream.read(_READ_STEP))
                if size == 0:
                    break
                yield time.perf_counter() - start, size
