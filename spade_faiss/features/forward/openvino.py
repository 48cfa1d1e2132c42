"""The forward pass by OpenVINO: an exported network on the CPU, in float32, or in bfloat16 where the processor has it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import format_bytes, is_out_of_memory
from spade_faiss.core.process import PerProcess, usable_cores
from spade_faiss.core.schema import cut
from spade_faiss.core.types import FloatArray
from spade_faiss.features.forward.protocol import EMBEDDING, INPUT, Features
from spade_faiss.features.memory import most_network_bytes

if TYPE_CHECKING:
    import openvino

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_SHOWN = 300
_TELEMETRY = "openvino_telemetry"


class OpenVinoForward:
    """Runs an exported network by OpenVINO.

    Args:
        read: returns the exported network; a fork of the process calls it again.
        levels: the names of its levels, finest first.
        precision: `float32` or `bfloat16`.
        input_size: the height and width of its inputs.

    Raises:
        InputError: if OpenVINO does not take the network.
    """

    engine = "openvino"

    def __init__(self, read: Callable[[], bytes], levels: Sequence[str], precision: str, input_size: tuple[int, int]) -> None:
        self._levels = tuple(levels)
        self._requests = PerProcess(partial(_Requests, read, precision, input_size))  # a fork has none of its parent's threads
        _ = self._requests()

    def __call__(self, inputs: FloatArray) -> Features:
        """Run the network, see `Forward`."""
        with self._requests().taken() as request:
            request.infer({INPUT: np.ascontiguousarray(inputs)}, share_inputs=True)
            # Copied: the next pass writes to the same memory.
            embedding, *maps = (np.array(request.get_tensor(name).data) for name in (EMBEDDING, *self._levels))
        return embedding, dict(zip(self._levels, maps, strict=True))


class _Requests:
    """A compiled network, and one place for inputs and outputs for each thread that runs it at the same time."""

    def __init__(self, read: Callable[[], bytes], precision: str, input_size: tuple[int, int]) -> None:
        self._compiled = _compile(read, precision, input_size)
        self._free: list[Any] = []

    @contextmanager
    def taken(self) -> Iterator[openvino.InferRequest]:
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            yield request
        finally:
            self._free.append(request)


def load_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry, which reports to its makers each time that it is imported.

    It would also write to the home of the user. Where it is missing, OpenVINO has a stand-in of its own. A program that has
    imported it before keeps it.
    """
    is_hidden = _TELEMETRY not in sys.modules
    if is_hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's mark of a module that is not there
    try:
        return importlib.import_module("openvino")
    finally:
        if is_hidden:
            sys.modules.pop(_TELEMETRY, None)


def _compile(read: Callable[[], bytes], precision: str, input_size: tuple[int, int]) -> openvino.CompiledModel:
    core = load_openvino().Core()
    settings = {
        # Without, OpenVINO computes in bfloat16 wherever the processor can.
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": usable_cores(),
    }
    graph = read()
    try:
        network = core.read_model(graph)
        _check_memory(network.clone(), most_network_bytes(len(graph), input_size), input_size)
        return core.compile_model(network, "CPU", settings)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"OpenVINO cannot open the network: {cut(str(error), _SHOWN)}; use another --engine") from error


def _check_memory(network: openvino.Model, limit: int, input_size: tuple[int, int]) -> None:
    """Raise InputError if all that a network computes of one image would take more than `limit` bytes; reshapes it."""
    network.reshape([1, 3, *input_size])
    outputs = (output for operator in network.get_ops() for output in operator.outputs())
    try:
        needed = sum(output.get_tensor().size for output in outputs)
    except RuntimeError as error:
        raise InputError("the network's sizes depend on what it is given; use another --engine") from error
    if needed > limit:
        raise InputError(f"the network takes {format_bytes(needed)} for one image, at most {format_bytes(limit)}")
