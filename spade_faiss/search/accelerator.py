"""A torch device as searches use it: how arrays are copied to it, and how much of its memory searches may take."""

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
    """An array on its way to a device.

    Attributes:
        tensor: the array on the device.
        ready: what a stream waits for before it reads the tensor; None if the tensor is there already.
    """

    tensor: Tensor
    ready: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.tensor.nbytes

    def wait(self) -> Tensor:
        """Return the tensor, once the current stream may use it."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.ready)
            # The tensor was allocated for the copying stream: its memory must not be used again before this stream is done.
            self.tensor.record_stream(stream)
        return self.tensor


class Accelerator:
    """A device, its memory, and the cache of blocks on it. Safe to share between threads.

    Args:
        device: the torch device.
        tile_bytes: the memory that one step of a search may take.
        cache_bytes: the memory that cached blocks may take.
    """

    def __init__(self, device: torch.device, tile_bytes: int, cache_bytes: int) -> None:
        self.device = device
        self.tile_bytes = tile_bytes
        self.cache: BlockCache[Uploaded] = BlockCache(cache_bytes)
        self._copies: torch.cuda.Stream | None = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lock = PerProcess(threading.Lock)

    def upload(self, array: npt.NDArray[Any]) -> Uploaded:
        """Copy an array to the device; a GPU goes on computing meanwhile, since the copy is made from pinned memory."""
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
        """Make later steps smaller, after one of `tile_bytes` ran out of memory, and drop the cached blocks."""
        with self._lock():  # threads that fail together shrink it once
            self.tile_bytes = min(self.tile_bytes, max(1, tile_bytes // 4))
        self._make_room()

    def _make_room(self) -> None:
        self.cache.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def torch_dtype(array: npt.NDArray[Any]) -> torch.dtype:
    """The torch type of an array's numbers."""
    found: torch.dtype = getattr(torch, array.dtype.name)
    return found


def open_accelerator(device: Device) -> Accelerator:
    """Open the accelerator of a device; on a card, with the memory that is free now.

    Raises:
        InputError: if this process has torch round float32 products: no result could be certified then.
    """
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        raise InputError(
            f"torch's float32 products are set to {precision!r} precision in this process, an exact search needs 'highest'; "
            f"call torch.set_float32_matmul_precision('highest'); --set product=bfloat16 is what allows for rounding"
        )
    if device.kind == "cpu":
        return Accelerator(torch.device("cpu"), CPU_TILE_BYTES, 0)
    free, _ = torch.cuda.mem_get_info(device.card)
    memory = split_memory(free)
    return Accelerator(torch.device(device.torch_name), memory.tile_bytes, memory.cache_bytes)
