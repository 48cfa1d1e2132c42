"""Measures the process itself: its machine, its memory, what it read, and how long a call takes."""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import main_job
from spade_faiss.search.distances import import_faiss


def machine() -> dict[str, Any]:
    """Return what figures were measured on: the machine, versions, threads, and the libraries of linear algebra."""
    faiss = import_faiss()
    try:
        pools = importlib.import_module("threadpoolctl").threadpool_info()
    except ImportError:
        pools = []
    return {
        **main_job.machine(),
        "threads": faiss.omp_get_max_threads(),
        "faiss_compile_options": faiss.get_compile_options().split(),
        "blas": {Path(pool["filepath"]).name: pool["architecture"] for pool in pools if "architecture" in pool},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("OPENBLAS_", "OMP_"))},
    }


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Make the system forget the contents of files; those that this process maps stay."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes() -> int:
    """Return the bytes that the process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the most bytes that the process has held in memory.

    getrusage would not do: it says at least what the parent process held when this one began.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def read_bytes() -> int:
    """Return the bytes that this process has read from disks."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median and the range of some runs, and the runs."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}
