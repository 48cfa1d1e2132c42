"""A torch device as searches use it: what goes onto it, and what of its memory they may take."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from spade_faiss.core.device import Device
from spade_faiss.core.errors import InputError
from spade_faiss.core.process import PerProcess
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.gpu_memory import CPU_TILE_BYTES, split_memory


@dataclass(frozen=True, eq=False)
class Uploaded:
    """An array on its way to a device; `ready` is what a stream waits for before it reads it, None if it is there."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.tensor.nbytes

    def wait(self) -> Tensor:
        """The tensor, for the current stream to use."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.ready)
            # It was allocated for the copying stream: its memory must not be used again before this one is done with it.
            self.tensor.record_stream(stream)
        return self.tensor


class Accelerator:
    """A device, its memory, and the blocks that are kept on it. Safe to share between threads.

    Args:
        device: torch's.
        tile_bytes: what one step of a search may take.
        cache_bytes: what blocks may take.
    """

    def __init__(self, device: torch.device, tile_bytes: int, cache_bytes: int) -> None:
        self.device = device
        self.tile_bytes = tile_bytes
        self.cache: BlockCache[Uploaded] = BlockCache(cache_bytes)
        self._copies: torch.cuda.Stream | None = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lock = PerProcess(threading.Lock)

    def upload(self, array: npt.NDArray[Any]) -> Uploaded:
        """Copy an array to the device; on a GPU beside what it computes, from memory that its copy engine can read."""
        host = torch.empty(array.shape, dtype=torch_dtype(array), pin_memory=self._copies is not None)
        host.numpy()[...] = array
        if self._copies is None:
            return Uploaded(host)
        with torch.cuda.stream(self._copies):
            try:
                copied = host.to(self.device, non_blocking=True)
            except torch.OutOfMemoryError:
                self._make_room()
                copied = host.to(self.device, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._copies)
        return Uploaded(copied, ready)

    def shrink(self, tile_bytes: int) -> None:
        """After a step of `tile_bytes` failed: smaller ones, and no blocks for the moment."""
        with self._lock():  # threads that fail together shrink it once
            self.tile_bytes = min(self.tile_bytes, max(1, tile_bytes // 4))
        self._make_room()

    def _make_room(self) -> None:
        self.cache.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def torch_dtype(array: npt.NDArray[Any]) -> torch.dtype:
    """torch's name for the type of an array."""
    found: torch.dtype = getattr(torch, array.dtype.name)
    return found


def open_accelerators(device: Device) -> list[Accelerator]:
    """One for each card of a device, with the memory that is free now; the CPU is one, too.

    Raises:
        InputError: if float32 products of this process are set to be rounded: nothing could be certified.
    """
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        raise InputError(
            f"torch's float32 products are set to {precision!r} precision in this process, an exact search needs 'highest'; "
            f"call torch.set_float32_matmul_precision('highest'); --set product=bfloat16 is what allows for rounding"
        )
    if device.kind == "cpu":
        return [Accelerator(torch.device("cpu"), CPU_TILE_BYTES, 0)]
    opened = []
    for name in device.torch_names:
        free, _ = torch.cuda.mem_get_info(torch.device(name))
        memory = split_memory(free)
        opened.append(Accelerator(torch.device(name), memory.tile_bytes, memory.cache_bytes))
    return opened
