"""Progress bars on stderr. This is the only module that uses tqdm."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(total: int, label: str, shown: bool, unit: str = "img") -> tqdm[Any]:
    """Make a bar that advances over `total` units of work.

    Args:
        total: how many units there are.
        label: the text before the bar.
        shown: whether the caller wants to see it; it is never shown where stderr is not a terminal.
        unit: the name of a unit; `B` stands for bytes, which are shown as kB, MB and so on.
    """
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=None if shown else True)
