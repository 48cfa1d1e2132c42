"""The compiled extension module: whether it is there, which SIMD level it uses, how much memory its packs take.

It finds exact nearest neighbors by a filter of small integers whose errors are bounded; see `src/packs.hpp`. It is optional:
FAISS searches where the package was built without a compiler, or where the processor has none of the SIMD levels.
"""

from __future__ import annotations

from types import ModuleType

from spade_faiss.core.errors import DependencyError, InputError

_problem = ""
try:
    from spade_faiss.search.native import _native
except ImportError as error:  # it was built without a compiler, for another processor, or against libraries that are not here
    _native, _problem = None, str(error)  # type: ignore[assignment]

# Instruction sets that multiply bytes, the fastest first: tiles of them (AMX), 512 and 256 bits at a time with sums of 32 bits
# (AVX-512 VNNI, AVX-VNNI), and 256 bits at a time with sums of 16 bits (AVX2).
SIMD_LEVELS = ("amx", "avx512vnni", "avxvnni", "avx2")
AUTO = "auto"
INSTALL = "install g++ and run: pip install --force-reinstall --no-deps spade-faiss"

# The cost for AVX2 was measured (benchmarks/kernel.py); the others follow from how much faster their products are.
_REFINE_COSTS = {"avx2": 20.0, "avxvnni": 30.0, "avx512vnni": 60.0, "amx": 240.0}
# The most vectors, and the most codes of each, that packs are padded to a multiple of; and the fewest digits behind the codes.
_PADDED_VECTORS, _PADDED_CODES, _DIGITS = 16, 64, 4
# A query has its codes as bytes and as 16-bit integers, and a packed vector a few float32 numbers beside its codes.
_CODE_BYTES, _NUMBERS_BYTES = 3, 36


def is_built() -> bool:
    """Whether the extension module can be imported."""
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
    """Why this machine does not run each SIMD level; an empty string if it does."""
    if _native is None:
        return dict.fromkeys(SIMD_LEVELS, "the compiled kernel is not there")
    reasons = dict(_native.simd_levels())
    return {level: reasons[level] for level in SIMD_LEVELS}


def usable_simd_level(channels: int = 1) -> str | None:
    """The fastest SIMD level that this machine runs for vectors with so many channels; None if there is none."""
    if _native is None or channels > _native.MOST_CHANNELS:
        return None
    return next((level for level, why in why_not().items() if not why), None)


def find_simd_level(simd_level: str, channels: int) -> str:
    """The given SIMD level if it runs here, or the fastest one that does for `auto`.

    Raises:
        DependencyError: if the kernel was not built.
        InputError: if this machine does not run it, or vectors have too many channels.
    """
    most = import_native().MOST_CHANNELS
    if channels > most:
        raise InputError(f"engine='native' takes up to {most} channels, got {channels}; use engine='faiss'")
    found = usable_simd_level() if simd_level == AUTO else simd_level
    why = "the processor has none of the SIMD levels that it needs" if found is None else why_not()[found]
    if found is None or why:
        raise InputError(f"engine='native', simd_level={simd_level!r} does not run on this machine: {why}; use engine='faiss'")
    return found


def refine_cost(simd_level: str) -> float:
    """How many multiply-adds of the filter take as long as one channel of a vector whose distance is computed directly."""
    return _REFINE_COSTS.get(simd_level, _REFINE_COSTS["avx2"])


def pack_bytes(count: int, channels: int) -> int:
    """An upper bound of the bytes that a pack of `count` vectors takes."""
    padded = -(-(channels + _DIGITS) // _PADDED_CODES) * _PADDED_CODES
    return (count + _PADDED_VECTORS) * (_CODE_BYTES * padded + _NUMBERS_BYTES)
