"""Progress bars on stderr. This is the only module that uses tqdm."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Protocol


class Bar(Protocol):
    """A progress bar."""

    def update(self, n: int = 1, /) -> object:
        """Advance by `n` units."""
        ...


class _HiddenBar(AbstractContextManager["_HiddenBar"]):
    """What stands for a bar that nobody sees. A hidden bar of tqdm would take locks that a fork may find held."""

    def update(self, n: int = 1, /) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def progress_bar(total: int, label: str, shown: bool, unit: str = "img") -> AbstractContextManager[Bar]:
    """Make a bar that advances over `total` units of work.

    Args:
        total: how many units there are.
        label: the text before the bar.
        shown: whether the caller wants to see it; it is never shown where stderr is not a terminal.
        unit: the name of a unit; `B` stands for bytes, which are shown as kB, MB and so on.
    """
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        return _HiddenBar()
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B")
