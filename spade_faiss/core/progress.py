"""Progress bars: on stderr, if that is a terminal and the caller wants one."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(total: int, label: str, shown: bool, unit: str = "img") -> tqdm[Any]:
    """A bar over `total` units of work.

    Args:
        total: how many units there are.
        label: what the bar says.
        shown: whether the caller wants it; it is never shown where stderr is no terminal.
        unit: what is counted; `B` is scaled, as bytes are.
    """
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=None if shown else True)
