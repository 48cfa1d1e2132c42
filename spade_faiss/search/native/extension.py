"""The compiled kernel: what it needs, which of this processor's units it uses, how much its packed vectors take.

It finds exact nearest neighbors by a filter of small integers whose errors are known; see `src/packs.hpp`. It is optional:
where the package was built without a compiler, or the processor has none of its units, FAISS searches.
"""

from __future__ import annotations

from types import ModuleType

from spade_faiss.core.errors import DependencyError, InputError

_problem = ""
try:
    from spade_faiss.search.native import _native
except ImportError as error:  # built without a compiler, for another kind of processor, or with libraries that are not here
    _native, _problem = None, str(error)  # type: ignore[assignment]

# Instructions that multiply bytes, the fastest first: tiles of them (AMX), 512 and 256 bits at a time with sums of 32 bits
# (AVX-512 VNNI, AVX-VNNI), 256 bits with sums of 16 (AVX2).
UNITS = ("amx", "avx512vnni", "avxvnni", "avx2")
AUTO = "auto"
INSTALL = "install g++ and run: pip install --force-reinstall --no-deps spade-faiss"

# Measured for AVX2 (benchmarks/kernel.py); for the others what follows from how much faster their products are.
_LOOK_COSTS = {"avx2": 20.0, "avxvnni": 30.0, "avx512vnni": 60.0, "amx": 240.0}
# The most that vectors and their numbers are padded to; beside its codes, of which a query has three bytes each, a packed
# vector has a few numbers.
_PADDED_VECTORS, _PADDED_NUMBERS = 16, 64
_CODE_BYTES, _NUMBERS_BYTES = 3, 24


def is_built() -> bool:
    """Whether the extension module is there."""
    return _native is not None


def import_native() -> ModuleType:
    """The extension module.

    Raises:
        DependencyError: if it was not built.
    """
    if _native is None:
        raise DependencyError(
            f"the compiled kernel is not there: the package was built without a C++ compiler, or not for x86-64 ({_problem}); "
            f"{INSTALL}, or use engine=faiss"
        )
    return _native


def why_not() -> dict[str, str]:
    """Each unit, and why this machine does not run it; an empty text if it does."""
    if _native is None:
        return dict.fromkeys(UNITS, "the compiled kernel is not there")
    said = dict(_native.units())
    return {unit: said[unit] for unit in UNITS}


def usable_unit(channels: int = 1) -> str | None:
    """The fastest unit that this machine runs, for vectors of so many channels; None if there is none."""
    if _native is None or channels > _native.MOST_CHANNELS:
        return None
    return next((unit for unit, why in why_not().items() if not why), None)


def find_unit(unit: str, channels: int) -> str:
    """A unit that runs here: the one that is named, or the fastest for `auto`.

    Raises:
        DependencyError: if the kernel was not built.
        InputError: if this machine does not run it, or vectors have too many channels.
    """
    most = import_native().MOST_CHANNELS
    if channels > most:
        raise InputError(f"engine='native' takes up to {most} channels, got {channels}; use engine='faiss'")
    found = usable_unit() if unit == AUTO else unit
    why = "the processor has none of its units" if found is None else why_not()[found]
    if found is None or why:
        raise InputError(f"engine='native', unit={unit!r} does not run on this machine: {why}; use engine='faiss'")
    return found


def look_cost(unit: str) -> float:
    """How many multiply-adds of a unit take as long as one channel of a vector that is looked at again."""
    return _LOOK_COSTS.get(unit, _LOOK_COSTS["avx2"])


def pack_bytes(count: int, channels: int) -> int:
    """The most bytes that so many packed vectors take."""
    padded = -(-channels // _PADDED_NUMBERS) * _PADDED_NUMBERS
    return (count + _PADDED_VECTORS) * (_CODE_BYTES * padded + _NUMBERS_BYTES)
