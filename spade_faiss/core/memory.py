"""What fits into memory: sizes as people write them, the batch and cache that follow from a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from spade_faiss.core.errors import InputError

# Images that are scored at a time where memory allows: beyond, nothing gets faster.
BATCH_SIZE = 16

_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate("kMGT")})
_UNITS.update({f"{prefix}iB": 1024 ** (power + 1) for power, prefix in enumerate("KMGT")})


def parse_bytes(text: str | int) -> int:
    """Bytes of a size such as `2GiB`, `500MB` or `1073741824`.

    Raises:
        InputError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise InputError(f"memory={text!r} is no size; write for instance 500MB or 2GiB")
    size = float(found[1]) * units[found[2].lower()]
    if not math.isfinite(size):
        raise InputError(f"memory={text!r} is more than any machine has; write for instance 2GiB")
    return round(size)


def format_bytes(count: float) -> str:
    """A size as people read it and `parse_bytes` does, in units of 1024; rounded up, so that it is never too little."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{math.ceil(count * 100) / 100:.2f}".rstrip("0").rstrip(".") + f" {unit}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a budget is spent: `batch` images at a time need `working_bytes`, `cache_bytes` keep decoded blocks."""

    batch: int
    working_bytes: int
    cache_bytes: int


def plan(budget: int, working_bytes: Callable[[int], int], cacheable_bytes: int, *, decodes: bool = False) -> Plan:
    """The largest batch that fits, up to `BATCH_SIZE`, and a cache of what is left.

    Args:
        budget: bytes that the process may grow by.
        working_bytes: what a batch of so many images needs, increasing.
        cacheable_bytes: all that could ever be kept.
        decodes: whether images are decoded meanwhile: then the cache takes half of what is left at most.

    Raises:
        InputError: if not even one image fits; it says what would.
    """
    if (least := working_bytes(1)) > budget:
        raise InputError(
            f"memory={format_bytes(budget)} is too small: scoring image by image takes {format_bytes(least)}; "
            f"allow as much, or lower k_gallery or kappa"
        )
    batch = max(size for size in range(1, BATCH_SIZE + 1) if working_bytes(size) <= budget)
    rest = budget - working_bytes(batch)
    cache_bytes = min(rest // 2 if decodes else rest, cacheable_bytes)
    return Plan(batch=batch, working_bytes=working_bytes(batch), cache_bytes=cache_bytes)
