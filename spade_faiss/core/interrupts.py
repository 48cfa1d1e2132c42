"""Signals that end the process wait while something is half made or half cleared."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold what SIGINT, SIGTERM and SIGHUP raise until the block has ended; for what takes a moment.

    What the system does without asking Python, such as ending the process at once, stays as it is. Python raises what a signal
    raises in the main thread alone: in others, there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    held = {number: handler for number, handler in before.items() if callable(handler)}
    received = list[int]()
    try:
        for number in held:
            signal.signal(number, lambda got, frame: received.append(got))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if received:
            held[signal.Signals(received[0])](received[0], None)
