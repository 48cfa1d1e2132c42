"""Values that are computed at their first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from spade_faiss.core.process import PerProcess

T = TypeVar("T")


class Once(Generic[T]):
    """A value that is computed at its first use, once for all threads.

    A fork computes it again only if its parent had not finished.

    Args:
        make: computes the value. It must not refer to the object that owns this one: the two would keep each other alive.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._lock = PerProcess(threading.Lock)

    def __call__(self) -> T:
        """Return the value, and compute it if this is the first call."""
        with self._lock():
            if not self._made:
                self._made.append(self._make())
            return self._made[0]
