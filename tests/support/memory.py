"""By how much the memory of a process grows meanwhile, for tests that measure in a process of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Growth:
    """The most bytes by which the resident memory grew while it was watched."""

    most = 0


@contextmanager
def watched() -> Iterator[Growth]:
    growth, before, done = Growth(), _resident_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            growth.most = max(growth.most, _resident_bytes() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield growth
    finally:
        done.set()
        watching.join()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
