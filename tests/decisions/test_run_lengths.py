"""Run lengths of masks: those that COCO's tools read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import Bools
from spade_faiss.decisions.run_lengths import decode, encode, from_text, to_text


def test_by_hand() -> None:
    # Columns: 0 0, 1 1, 1 0: two outside, three inside, one outside.
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert encode(mask) == (2, 3, 1)
    assert encode(np.array([[1, 0], [1, 1]], bool)) == (0, 2, 1, 1), "outside first, even if there is none"
    assert encode(mask, (1, 2), (4, 6)) == (13, 2, 2, 1, 6)


def test_as_pycocotools_writes_them() -> None:
    """Texts of `pycocotools.mask.encode`, version 2.0."""
    first = np.array([[0, 1, 0, 1], [1, 1, 0, 1], [0, 1, 1, 0]], bool)
    assert to_text(encode(first)) == "111210O"
    large = np.zeros((300, 400), bool)
    large[100:250, 50:390] = True
    text = to_text(encode(large))
    assert text.startswith("lg>f4f400000000000000000000000")
    assert to_text(encode(np.zeros((20, 20), bool))) == "`<"
    assert to_text(encode(np.ones((5, 5), bool))) == "0i0"
    assert from_text("lg>f4f40") == (15100, 150, 150, 150)


@given(mask=arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_round_trip(mask: Bools) -> None:
    counts = encode(mask)
    np.testing.assert_array_equal(decode(counts, (mask.shape[0], mask.shape[1])), mask)
    assert from_text(to_text(counts)) == counts
    assert sum(counts[1::2]) == mask.sum()
    assert all(count > 0 for count in counts[1:])


@given(counts=st.lists(st.integers(0, 1 << 33), max_size=12))
def test_text_of_any_numbers(counts: list[int]) -> None:
    assert list(from_text(to_text(counts))) == counts


@given(mask=arrays(np.bool_, (3, 4)), y=st.integers(0, 5), x=st.integers(0, 7))
def test_a_part_of_a_picture(mask: Bools, y: int, x: int) -> None:
    whole = np.zeros((8, 11), bool)
    whole[y : y + 3, x : x + 4] = mask
    assert encode(mask, (y, x), (8, 11)) == encode(whole)


@pytest.mark.parametrize("text", ["é", " ", "P", "0P"])
def test_no_mask(text: str) -> None:
    with pytest.raises(InputError, match="encoded mask"):
        from_text(text)


def test_runs_that_are_no_picture() -> None:
    for counts in ((3, 4), (5, 2, -1), ()):
        with pytest.raises(InputError, match="do not make a mask of 2 x 3"):
            decode(counts, (2, 3))


def test_a_part_of_repeated_columns_is_encoded_as_if_it_were_written_out() -> None:
    rng = np.random.default_rng(0)
    for trial in range(300):
        h, w, wide = (int(rng.integers(1, most)) for most in (9, 6, 14))
        mask = rng.random((h, w)) < (0.1, 0.5, 0.95)[trial % 3]
        columns = np.sort(rng.integers(0, w, wide))
        corner = (int(rng.integers(0, 4)), int(rng.integers(0, 4)))
        size = (h + corner[0] + int(rng.integers(0, 3)), wide + corner[1] + int(rng.integers(0, 3)))
        assert encode(mask, corner, size, columns) == encode(np.ascontiguousarray(mask[:, columns]), corner, size)
        picture = np.zeros(size, np.bool_)
        picture[corner[0] : corner[0] + h, corner[1] : corner[1] + wide] = mask[:, columns]
        np.testing.assert_array_equal(decode(encode(mask, corner, size, columns), size), picture)
