"""How much memory a network takes, and a gate that keeps the images that are decoded at the same time within a budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import format_bytes

# A network's forward pass takes about this much, and so many times the bytes of each input (measured on efficientnet_lite0 and
# wide_resnet50_2). The images that are decoded ahead, and the inputs that are made of them, are counted in it.
_FORWARD_BYTES = 64 << 20
_FORWARD_INPUTS = 25


def forward_bytes(images: int, input_size: tuple[int, int]) -> int:
    """About how many bytes it takes to run a network on so many images at a time, of a height and width."""
    height, width = input_size
    return _FORWARD_BYTES + images * _FORWARD_INPUTS * 3 * height * width * np.dtype(np.float32).itemsize


class MemoryGate:
    """Lets threads in as long as what they take together fits into `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Wait until `count` bytes are free, and take them for as long as the block runs.

        Raises:
            InputError: if there will never be as many.
        """
        if count > self._limit:
            raise InputError(
                f"decoding it takes {format_bytes(count)} of memory, and {format_bytes(self._limit)} are left for that; "
                f"allow more with --memory, or scale the image down"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._taken + count <= self._limit)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()
