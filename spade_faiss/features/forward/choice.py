"""Which engine runs the forward pass: the one that was asked for, or the fastest that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spade_faiss.core.device import Device
from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.core.process import processor_flags

if TYPE_CHECKING:  # numpy is not imported before a command runs
    from spade_faiss.features.forward.protocol import Forward

# The fastest first, see the benchmark of forward passes. Torch is no part of it: it runs what is loaded, not what is exported.
_EXPORTED = {"float32": ("onnxruntime", "openvino"), "bfloat16": ("openvino",)}
_INSTALL = {"onnxruntime": "spade-faiss[onnxruntime]", "openvino": "spade-faiss[openvino]", "torch": "spade-faiss[torch]"}
# What Linux calls the instructions for bfloat16.
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def usable_engines(precision: str) -> tuple[str, ...]:
    """The engines for exported networks that are installed and compute in a precision on this machine, the fastest first."""
    if precision == "bfloat16" and not processor_flags() & _BFLOAT16:
        return ()
    return tuple(engine for engine in _EXPORTED[precision] if is_installed(engine))


def choose_engine(engine: str, precision: str, device: Device, *, exported: bool = True) -> str:
    """Choose the engine of the forward pass.

    Args:
        engine: one of `ENGINES`; `auto` stands for the fastest that is installed.
        precision: the precision that is asked for.
        device: where it runs.
        exported: whether the network has been exported or will be; otherwise `auto` stands for torch.

    Raises:
        InputError: for an engine that does not run on the device or in the precision.
        DependencyError: for an engine that is not installed.
    """
    if engine == "auto":
        fastest = usable_engines(precision) if exported and device.kind == "cpu" else ()
        return next(iter(fastest), "torch")
    if not is_installed(engine):
        raise DependencyError(f"engine={engine!r} is not installed; install it with: pip install '{_INSTALL[engine]}'")
    if engine != "torch":
        if device.kind != "cpu":
            raise InputError(f"engine={engine!r} runs on the CPU, device={device} was asked for; use --engine torch")
        if engine not in _EXPORTED[precision]:
            raise InputError(f"engine={engine!r} does not compute in {precision}; use --engine openvino or torch")
        if engine not in usable_engines(precision):
            raise InputError(f"this processor does not compute in {precision}; use --precision float32")
    return engine


def check_torch() -> None:
    """Raise DependencyError unless torch is installed."""
    if not is_installed("torch"):
        raise DependencyError(
            f"loading a network takes torch, which is not installed: pip install '{_INSTALL['torch']}'; or use a bank that "
            f"carries its network, and onnxruntime or openvino: pip install 'spade-faiss[edge]'"
        )


def is_installed(engine: str) -> bool:
    """Whether an engine can be imported; it is not."""
    return importlib.util.find_spec(engine) is not None


def open_forward(
    engine: str, read: Callable[[], bytes], levels: Sequence[str], precision: str, input_size: tuple[int, int]
) -> Forward:
    """Open an exported network by an engine other than torch.

    Args:
        engine: `onnxruntime` or `openvino`.
        read: returns the exported network.
        levels: the names of its levels, finest first.
        precision: the precision to compute in.
        input_size: the height and width of its inputs.

    Raises:
        InputError: if the engine does not take the network, or the network takes more memory than any that is known.
    """
    if engine == "onnxruntime":
        from spade_faiss.features.forward.onnxruntime import OnnxRuntimeForward

        return OnnxRuntimeForward(read, levels, input_size)
    from spade_faiss.features.forward.openvino import OpenVinoForward

    return OpenVinoForward(read, levels, precision, input_size)
