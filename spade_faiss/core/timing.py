"""A stopwatch: seconds spent in each stage of the work, summed over threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """Measures how long each named stage of the work takes. Threads may share it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time that the `with` block takes to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage. Stages in different threads overlap, so their sum may exceed `total_s`."""
        with self._lock:
            return dict(self._seconds)

    @property
    def total_s(self) -> float:
        """Wall-clock seconds since the stopwatch was created."""
        return time.perf_counter() - self._start
