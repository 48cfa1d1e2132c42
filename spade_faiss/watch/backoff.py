"""How long to wait before something that failed is tried again: twice as long each time, and not all at once."""

from __future__ import annotations

import random


class Backoff:
    """Gives the seconds to wait after each failure in a row.

    Args:
        first_s: about how long after the first one.
        most_s: never longer.
    """

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0

    def next_s(self, asked_s: float = 0.0) -> float:
        """Return how long to wait now, and no less than was asked for."""
        wait = min(self._most_s, self._first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return max(min(asked_s, 10 * self._most_s), wait * random.uniform(0.75, 1))

    def reset(self) -> None:
        """Begin anew after a success."""
        self._failures = 0
