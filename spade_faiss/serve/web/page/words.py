"""Numbers, times and changes as the words that the page shows."""

from __future__ import annotations

import math
from datetime import datetime
from urllib.parse import quote

from spade_faiss.serve.history.records import Change

_DASH = "–"


def p_text(value: float | None) -> str:
    """A p-value with two digits that count, such as 0.0048 or 0.31; very small ones are told apart by nobody."""
    if value is None or math.isnan(value):
        return _DASH
    return f"{value:#.2g}" if value >= 0.0001 else "< 0.0001"


def percent(value: float | None) -> str:
    """A share as percent with two digits that count, such as 1.8 %."""
    if value is None or math.isnan(value):
        return _DASH
    shown = 100 * value
    if shown == 0 or shown >= 99.95:
        return f"{shown:.0f}\u202f%"
    decimals = min(max(1 - math.floor(math.log10(shown)), 0), 4)
    return f"{shown:.{decimals}f}\u202f%"


def number(value: int) -> str:
    """A count with its thousands apart."""
    return f"{value:,}"


def score_text(value: float | None) -> str:
    """A score with four digits."""
    if value is None or not math.isfinite(value):
        return _DASH
    decimals = min(max(3 - math.floor(math.log10(abs(value))), 0), 8) if value else 0
    return f"{value:.{decimals}f}"


def when(moment: datetime) -> str:
    """A time as the clock of the server shows it."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def speed_text(per_second: float) -> str:
    """Pictures per second."""
    return f"{per_second:.1f}" if per_second < 10 else f"{per_second:.0f}"


def size_text(count: int) -> str:
    """A number of bytes."""
    for unit, size in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def drift_words(p: float | None) -> str:
    """What the p-value of the drift test says."""
    if p is None:
        return ""
    return "new pictures differ" if p <= 0.01 else "maybe; look again" if p <= 0.05 else "none seen"


def counted(count: int, one: str, more: str) -> str:
    """A number with its noun, such as `1 alarm` or `7 alarms`."""
    return f"{count:,} {one if count == 1 else more}"


def effect(change: Change, picture_id: str | None = None) -> str:
    """What a change of the bank did to alarms, in a sentence.

    Args:
        change: the change.
        picture_id: the picture that was answered, which is then called "this alarm".
    """
    gone = len(change.alarms_gone)
    parts = []
    if picture_id is not None:
        others = gone - (picture_id in change.alarms_gone)
        if picture_id in change.alarms_gone:
            parts.append("this alarm is gone" + (f", and {counted(others, 'older one', 'older ones')}" if others else ""))
        elif others:
            parts.append(f"{counted(others, 'other alarm is', 'other alarms are')} gone")
        else:
            parts.append("no alarm is gone")
    else:
        parts.append(f"{counted(gone, 'alarm is', 'alarms are')} gone" if gone else "no alarm is gone")
    if change.alarms_left:
        parts.append(f"{counted(change.alarms_left, 'alarm stays', 'alarms stay')}")
    return "; ".join(parts) + "."


def bank_url(name: str) -> str:
    """The page of a bank."""
    return f"/banks/{quote(name, safe='')}"


def picture_url(name: str) -> str:
    """The page of a picture."""
    return f"/pictures/{quote(name, safe='')}"
