"""The forward pass by OpenVINO: an exported network on the CPU, in float32, or in bfloat16 where the processor has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import is_out_of_memory
from spade_faiss.core.process import PerProcess, usable_cores
from spade_faiss.core.schema import cut
from spade_faiss.core.types import FloatArray
from spade_faiss.features.forward.protocol import EMBEDDING, INPUT, Features

if TYPE_CHECKING:
    import openvino

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_SHOWN = 300


class OpenVinoForward:
    """Runs an exported network by OpenVINO.

    Args:
        read: returns the exported network; a fork of the process calls it again.
        levels: the names of its levels, finest first.
        precision: `float32` or `bfloat16`.

    Raises:
        InputError: if OpenVINO does not take the network.
    """

    engine = "openvino"

    def __init__(self, read: Callable[[], bytes], levels: Sequence[str], precision: str = "float32") -> None:
        self._levels = tuple(levels)
        self._requests = PerProcess(partial(_Requests, read, precision))  # a fork has none of its parent's threads
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

    def __init__(self, read: Callable[[], bytes], precision: str) -> None:
        self._compiled = _compile(read, precision)
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


def _compile(read: Callable[[], bytes], precision: str) -> openvino.CompiledModel:
    import openvino

    core = openvino.Core()
    settings = {
        # Without, OpenVINO computes in bfloat16 wherever the processor can.
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": usable_cores(),
    }
    try:
        return core.compile_model(core.read_model(read()), "CPU", settings)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"OpenVINO cannot open the network: {cut(str(error), _SHOWN)}; use another --engine") from error
