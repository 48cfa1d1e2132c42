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
    # Number by number, each of all vectors: what is computed then lies side by side.
    half = 1 << (bits[:, np.newaxis].astype(np.int64) - 1)
    words = np.floor(numbers.reshape(-1, len(bits)).T / 2)
    words = (np.clip(words, -half, half - 1, out=words) + half).astype(np.uint16)
    packed = np.zeros((packed_bytes(bits), words.shape[1]), np.uint8)
    for k, (byte, shift) in enumerate(zip(*places(bits), strict=True)):
        word = words[k] << np.uint16(shift)
        packed[byte] |= word.astype(np.uint8)
        if shift + bits[k] > 8:
            packed[byte + 1] |= (word >> 8).astype(np.uint8)
    return np.ascontiguousarray(packed.T).reshape(*numbers.shape[:-1], len(packed))


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
