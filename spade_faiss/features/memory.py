"""How much memory a network takes, and a gate that keeps the images that are decoded at the same time within a budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import BATCH_SIZE, format_bytes

# A network's forward pass takes about this much, and so many times the bytes of each input (measured on efficientnet_lite0 and
# wide_resnet50_2). The images that are decoded ahead, and the inputs that are made of them, are counted in it.
_FORWARD_BYTES = 64 << 20
_FORWARD_INPUTS = 25
_MOST_FORWARD_BYTES = 1 << 30
# Of images that are cut into tiles, for each of their pixels: four images of 8 bits, the one whose results are written, the one
# that is scored and two that are decoded ahead; two maps, and what smoothing, reducing and writing one take beside it.
_TILED_PIXEL_BYTES = 4 * 3 + 5 * 4
# What decoding it takes meanwhile, see `pictures.load_bytes`; rare formats take more.
_DECODED_PIXEL_BYTES = 28


def forward_bytes(images: int, input_size: tuple[int, int]) -> int:
    """About how many bytes it takes to run a network on so many images at a time, of a height and width."""
    height, width = input_size
    return _FORWARD_BYTES + images * _FORWARD_INPUTS * 3 * height * width * np.dtype(np.float32).itemsize


def tiled_bytes(pixels: int) -> int:
    """About how many bytes images of so many pixels take while they are scored in tiles, decoding not counted."""
    return _TILED_PIXEL_BYTES * pixels


def most_tiled_bytes(pixels: int) -> int:
    """The same, with what decoding one takes meanwhile."""
    return (_TILED_PIXEL_BYTES + _DECODED_PIXEL_BYTES) * pixels


def most_network_bytes(graph_bytes: int, input_size: tuple[int, int]) -> int:
    """The most memory that an exported network may take: several times what any takes that is known.

    A graph of a few hundred bytes can ask for all memory that there is, and a bank may come from anybody.

    Args:
        graph_bytes: the length of its file, most of which are weights.
        input_size: the height and width of its inputs.
    """
    return _MOST_FORWARD_BYTES + 4 * (graph_bytes + forward_bytes(BATCH_SIZE, input_size))


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
