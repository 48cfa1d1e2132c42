"""Memory sizes as people write them, and how a memory budget is divided between a batch and a cache."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spade_faiss.core.errors import InputError

# The largest number of images that are scored together: larger batches are not faster.
BATCH_SIZE = 16

_OUT_OF_MEMORY = (
    *("out of memory", "cannot allocate memory", "can't allocate memory", "not enough memory", "bad_alloc"),
    *("failed to map segment", "can't start new thread"),
)
# Of control groups, version 2 and 1.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate("kMGT")})
_UNITS.update({f"{prefix}iB": 1024 ** (power + 1) for power, prefix in enumerate("KMGT")})


def parse_bytes(text: str | int, name: str = "memory") -> int:
    """Convert a size such as `2GiB`, `500MB` or `1073741824` to bytes.

    Raises:
        InputError: for a text that is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise InputError(f"{name}={text!r} is not a size; write for example 500MB or 2GiB")
    size = float(found[1]) * units[found[2].lower()]
    if not math.isfinite(size):
        raise InputError(f"{name}={text!r} is more than any machine has; write for example 2GiB")
    return round(size)


def format_bytes(count: float) -> str:
    """Write a size in units of 1024, for people and `parse_bytes` to read; rounded up, so that it is never too small."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{math.ceil(count * 100) / 100:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def physical_bytes() -> int | None:
    """Return the memory of this machine, or of this container if that is less; None where the system does not tell."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return min([machine, *_container_bytes()])


def _container_bytes() -> list[int]:
    """The limits of the container that this process runs in, where Linux has any."""
    texts = []
    for path in _CONTAINER_LIMITS:
        with suppress(OSError):
            texts.append(Path(path).read_text(encoding="ascii").strip())
    return [int(text) for text in texts if text.isdecimal()]


def check_address_space(needed: int, name: str) -> None:
    """Raise MemoryError if a limit of the process (`ulimit -v`) leaves less than `needed` bytes to load a library.

    Some libraries crash where they meet the limit while they are loaded.
    """
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    if limit != resource.RLIM_INFINITY and limit - used < needed:
        raise MemoryError(
            f"{name} takes {format_bytes(needed)}, the limit (ulimit -v) leaves {format_bytes(max(0, limit - used))}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory, or what the system needs for another thread, is exhausted.

    NumPy and FAISS raise MemoryError; torch, the loader of libraries and the start of threads say so only in the error's text.
    """
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError | ImportError | OSError) and any(part in text for part in _OUT_OF_MEMORY))
    )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a memory budget is divided.

    Args:
        batch: the number of images that are scored together.
        working_bytes: what scoring such a batch needs, the image index included.
        cache_bytes: what is left for decoded blocks.
    """

    batch: int
    working_bytes: int
    cache_bytes: int


def plan_memory(
    budget: int,
    working_bytes: Callable[[int], int],
    cacheable_bytes: int,
    *,
    decodes: bool = False,
    picture_bytes: int = 0,
    index_bytes: int = 0,
) -> MemoryPlan:
    """Choose the largest batch that fits, up to `BATCH_SIZE` images, and give the rest of the budget to the cache.

    Args:
        budget: how many bytes the process may grow by.
        working_bytes: the bytes that a batch of a given number of images needs; it increases with that number.
        cacheable_bytes: the bytes of everything that could be cached.
        decodes: whether images are decoded meanwhile: then the cache takes at most half of the rest.
        picture_bytes: what images take that are cut into tiles, whose tiles are what is scored; it is left free.
        index_bytes: what of the working bytes the image index takes, however many images are scored together.

    Raises:
        InputError: if not even one image fits; the message names a budget that is large enough.
    """
    if (least := picture_bytes + working_bytes(1)) > budget:
        how, much = "tile by tile" if picture_bytes else "image by image", index_bytes > least // 2
        of_index = f", of which {format_bytes(index_bytes)} are the embeddings of the image index" if much else ""
        raise InputError(
            f"memory={format_bytes(budget)} is too small: scoring {how} takes {format_bytes(least)}{of_index}; allow at least "
            f"that, or {'take a recipe whose image index is smaller, such as SQ8' if much else 'lower k_gallery or kappa'}"
        )
    budget -= picture_bytes
    batch = max(size for size in range(1, BATCH_SIZE + 1) if working_bytes(size) <= budget)
    rest = budget - working_bytes(batch)
    cache_bytes = min(rest // 2 if decodes else rest, cacheable_bytes)
    return MemoryPlan(batch=batch, working_bytes=working_bytes(batch), cache_bytes=cache_bytes)
