"""Times calls in turn, and commands in processes of their own."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.process import spread

Row = dict[str, Any]
T = TypeVar("T")

ROOT = Path(__file__).parents[2]
REPEATS = 5
# Above this load of the last minute, others take cores from what is measured.
CALM_LOAD = 0.5
_LAUNCHER = Path(__file__).with_name("launch.py")
_SHOWN = 2000


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and of the processor, over all threads."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class ProcessCost(Cost):
    """What a process and those that it started cost; `peak_bytes` is the most memory that one of them held."""

    peak_bytes: int


def cost_of(run: Callable[[], object]) -> Cost:
    """What a call costs this process."""
    before, start = _cpu_seconds(), time.perf_counter()
    run()
    return Cost(time.perf_counter() - start, _cpu_seconds() - before)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def in_turn(runs: Mapping[str, Callable[[], T]], repeats: int = REPEATS, *, warm_up: int = 1) -> dict[str, list[T]]:
    """What each run returns in each repeat; every repeat goes once through all runs.

    Args:
        runs: the runs, in the order in which they take turns.
        repeats: how often each is measured.
        warm_up: how many rounds go before that count for nothing.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    for repeat in range(-warm_up, repeats):
        for name, run in runs.items():
            value = run()
            if repeat >= 0:
                found[name].append(value)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> Row:
    """The spread of the ratios of runs that were measured side by side.

    Raises:
        ValueError: unless there are as many of the ones as of the others.
    """
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spreads(costs: Sequence[Cost]) -> Row:
    """The spread of each field of some costs."""
    return {name: spread([getattr(cost, name) for cost in costs]) for name in vars(costs[0])}


def percentiles(seconds: Sequence[float]) -> Row:
    """The median and the 95th percentile of some seconds, in milliseconds."""
    p50, p95 = np.percentile(1000 * np.asarray(seconds), (50, 95))
    return {"p50": float(p50), "p95": float(p95)}


def share_reached(whole: Sequence[Cost], alone: Mapping[str, Sequence[Cost]], cores: int) -> Row:
    """How near a run that overlaps stages comes to two bounds.

    Args:
        whole: the whole run, once a repeat.
        alone: each stage by itself, in the same repeats.
        cores: the number of cores that all stages share.

    Returns:
        The slowest stage by its median, its seconds, and the share of the whole run that they are; the seconds that the cores
        need for all stages, if none ever waits, and that share.
    """
    slowest = max(alone, key=lambda name: statistics.median(cost.wall_s for cost in alone[name]))
    of_cores = [sum(costs) / cores for costs in zip(*([c.cpu_s for c in alone[name]] for name in alone), strict=True)]
    wall = [cost.wall_s for cost in whole]
    return {
        "slowest": slowest,
        "slowest_s": spread([cost.wall_s for cost in alone[slowest]]),
        "of_slowest": ratio([cost.wall_s for cost in alone[slowest]], wall),
        "cores_s": spread(of_cores),
        "of_cores": ratio(of_cores, wall),
    }


def run_alone(command: Sequence[object], *, extra: Mapping[str, str] | None = None) -> ProcessCost:
    """Run a command from the project's folder in a process of its own, which writes bytecode as it does for users.

    Raises:
        RuntimeError: if it fails; the message has the end of what it printed.
    """
    environment = {**os.environ, **(extra or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # The launcher imports nothing: what the system calls the peak memory of a process counts that of the one that began it.
    launch = [sys.executable, "-I", "-S", str(_LAUNCHER), *map(str, command)]
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(launch[4:9])} ended with {done.returncode}: {done.stderr[-_SHOWN:]}")
    return ProcessCost(**json.loads(done.stdout.splitlines()[-1]))


def load() -> float:
    """How many processes wanted a core in the last minute, on average."""
    return os.getloadavg()[0]


def wait_for_calm(most_s: float) -> float:
    """Wait until others leave the machine alone, but no longer than that; the load then."""
    end = time.monotonic() + most_s
    while load() > CALM_LOAD and time.monotonic() < end:
        time.sleep(2)
    return load()


def folder_bytes(folder: Path) -> int:
    """The bytes that a folder takes on disk, links not followed."""
    return sum(path.lstat().st_blocks * 512 for path in (folder, *folder.rglob("*")))
