"""Bit packing: what is unpacked is what was packed, as a reader of one bit after the other sees it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.features.bit_packing import MOST_NUMBER_BITS, pack, packed_bytes, unpack

BITS = st.lists(st.integers(1, MOST_NUMBER_BITS), min_size=1, max_size=40).map(lambda bits: np.array(bits, np.uint8))


def test_a_vector_worked_out_by_hand() -> None:
    """Numbers of 1, 3, 7 and 2 bits: 1 of {-1, 1}, -7 of {-7 ... 7}, 127 and -1 of {-3, -1, 1, 3}."""
    bits = np.array([1, 3, 7, 2], np.uint8)
    packed = pack(np.array([[1, -7, 127, -1]]), bits)
    assert packed_bytes(bits) == 2
    # From the lowest bit: 1, 000, 1111111, 10 (which is u = 1, its lowest bit first).
    assert packed.tolist() == [[0b11110001, 0b00001111]]
    assert unpack(packed, bits).tolist() == [[1, -7, 127, -1]]


@given(BITS, st.integers(0, 99))
def test_what_is_packed_is_unpacked(bits: np.ndarray, seed: int) -> None:
    most = (1 << bits.astype(int)) - 1
    numbers = 2 * np.random.default_rng(seed).integers(0, most + 1, (3, 2, len(bits))) - most
    packed = pack(numbers, bits)
    assert packed.shape == (3, 2, packed_bytes(bits))
    np.testing.assert_array_equal(unpack(packed, bits), numbers)
    # A reader of one bit after the other, the lowest first.
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    at = np.cumsum(bits, dtype=int) - bits
    for k, (begin, count) in enumerate(zip(at, bits, strict=True)):
        u = stream[..., begin : begin + count] @ (1 << np.arange(int(count)))
        np.testing.assert_array_equal(2 * u - most[k], numbers[..., k])
    # Where a vector ends within a byte, the rest of that is zeros.
    assert not stream[..., int(bits.sum(dtype=int)) :].any()


def test_numbers_beyond_their_bits_are_cut_off() -> None:
    bits = np.array([1, 2, 7], np.uint8)
    numbers = np.array([[9, -999, 1e9], [-3, 5, -129]])
    assert unpack(pack(numbers, bits), bits).tolist() == [[1, -3, 127], [-1, 3, -127]]
