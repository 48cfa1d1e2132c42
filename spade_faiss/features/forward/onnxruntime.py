"""The forward pass by ONNX Runtime: an exported network on the CPU, in float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import is_out_of_memory
from spade_faiss.core.process import PerProcess, usable_cores
from spade_faiss.core.schema import cut
from spade_faiss.core.types import FloatArray
from spade_faiss.features.forward.protocol import EMBEDDING, INPUT, Features
from spade_faiss.features.memory import most_network_bytes

if TYPE_CHECKING:
    import onnxruntime

# Errors are raised; on the terminal they would stand beside ours.
_FATAL_ONLY = 4
_AS_REQUESTED = 1
_SHOWN = 300


class OnnxRuntimeForward:
    """Runs an exported network by ONNX Runtime. What it computes depends neither on the batch nor on the number of threads.

    Args:
        read: returns the exported network; a fork of the process calls it again.
        levels: the names of its levels, finest first.
        input_size: the height and width of its inputs.

    Raises:
        InputError: if ONNX Runtime does not take the network.
    """

    engine = "onnxruntime"

    def __init__(self, read: Callable[[], bytes], levels: Sequence[str], input_size: tuple[int, int]) -> None:
        self._levels = tuple(levels)
        self._cores = usable_cores()
        # A fork has none of its parent's threads. Each session holds the weights: the second is opened when it is needed.
        self._whole = PerProcess(partial(_open, read, input_size, self._cores))
        self._single = PerProcess(partial(_open, read, input_size, 1))
        self._pool = PerProcess(partial(ThreadPoolExecutor, self._cores, "onnxruntime"))
        _ = self._whole()

    def __call__(self, inputs: FloatArray) -> Features:
        """Run the network, see `Forward`.

        Raises:
            InputError: if ONNX Runtime cannot run it.
        """
        if self._cores == 1 or len(inputs) < self._cores:
            embedding, *maps = self._run(self._whole(), inputs)
        else:
            # Each image by one thread: threads that share an image wait for each other after every layer, and wait long where a
            # core has something else to do.
            single = self._single()
            parts = list(self._pool().map(partial(self._run, single), np.array_split(inputs, len(inputs))))
            embedding, *maps = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
        return embedding, dict(zip(self._levels, maps, strict=True))

    def _run(self, session: onnxruntime.InferenceSession, inputs: FloatArray) -> list[FloatArray]:
        try:
            found: list[FloatArray] = session.run([EMBEDDING, *self._levels], {INPUT: np.ascontiguousarray(inputs)})
        except Exception as error:  # ONNX Runtime's own types have no common one
            if is_out_of_memory(error):
                raise
            raise InputError(f"ONNX Runtime cannot run the network: {cut(str(error), _SHOWN)}; use another --engine") from error
        return found


_opening = PerProcess(threading.Lock)


def _open(read: Callable[[], bytes], input_size: tuple[int, int], threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait spin, which makes a pass up to twice as fast; after it, they must not take the cores from the search.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = _FATAL_ONLY
    # Its memory comes from what was registered last when it is opened.
    options.add_session_config_entry("session.use_env_allocators", "1")
    graph = read()
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limit = {"max_mem": most_network_bytes(len(graph), input_size), "arena_extend_strategy": _AS_REQUESTED}
    try:
        with _opening():
            onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(limit))
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own types have no common one
        if is_out_of_memory(error):
            raise
        raise InputError(f"ONNX Runtime cannot open the network: {cut(str(error), _SHOWN)}; use another --engine") from error
