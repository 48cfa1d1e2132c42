"""Where the time goes: seconds by stage, summed over threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """A stopwatch with a name for each stage of the work; safe to share between threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside the `with` block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage; timings that run in other threads overlap, so that the sum may exceed `total_s`."""
        with self._lock:
            return dict(self._seconds)

    @property
    def total_s(self) -> float:
        """Wall-clock seconds since the stopwatch was made."""
        return time.perf_counter() - self._start
