"""Bit packing: the whole numbers of a vector one after the other, each in as many bits as it is given.

A number of b bits is one of 2^b odd numbers: 2 u + 1 - 2^b for u from 0 to 2^b - 1, so that as many lie above 0 as below. Its u
is what is stored, the lowest bit first, behind that of the number before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# The most bits of a number: what it stands for is an int8, and eight of them are read as one word of 64 bits.
MOST_NUMBER_BITS = 7

Bits = npt.NDArray[np.uint8]
Bytes = npt.NDArray[np.uint8]


def packed_bytes(bits: Bits) -> int:
    """The bytes of a packed vector."""
    return -(-int(bits.sum(dtype=np.int64)) // 8)


def pack(numbers: npt.NDArray[Any], bits: Bits) -> Bytes:
    """Pack vectors of odd numbers.

    Args:
        numbers: (..., N) whole numbers; those beyond what their bits hold are cut off.
        bits: (N,), those of each number.

    Returns:
        (..., `packed_bytes`).
    """
    packed = np.zeros((*numbers.shape[:-1], packed_bytes(bits)), np.uint8)
    for k, (byte, shift) in enumerate(zip(*places(bits), strict=True)):
        half = 1 << (int(bits[k]) - 1)
        stored = np.clip(numbers[..., k] // 2, -half, half - 1).astype(np.int64) + half << shift
        packed[..., byte] |= (stored & 0xFF).astype(np.uint8)
        if shift + bits[k] > 8:
            packed[..., byte + 1] |= (stored >> 8).astype(np.uint8)
    return packed


def unpack(packed: Bytes, bits: Bits) -> npt.NDArray[np.int8]:
    """The numbers (..., N) of packed vectors (..., `packed_bytes`)."""
    bytes_, shifts = places(bits)
    low = packed.take(bytes_, axis=-1).astype(np.int16)
    # The last number ends in the last byte: what follows it does not matter.
    low |= packed.take(np.minimum(bytes_ + 1, packed.shape[-1] - 1), axis=-1).astype(np.int16) << 8
    low = (low >> shifts) & ((1 << bits.astype(np.int16)) - 1)
    low *= 2
    low -= (1 << bits.astype(np.int16)) - 1
    return low.astype(np.int8)


def places(bits: Bits) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16]]:
    """The byte in which each number (N,) begins, and at which of its bits."""
    first = np.cumsum(bits, dtype=np.int64) - bits
    return first // 8, (first % 8).astype(np.int16)
