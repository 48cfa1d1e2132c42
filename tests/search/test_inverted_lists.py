"""Lists of codes: laid out as FAISS reads them, and the nearest of many centroids found in groups."""

from __future__ import annotations

import numpy as np
import pytest

from spade_faiss.core.errors import BankError, InputError
from spade_faiss.search.distances import product_knn
from spade_faiss.search.inverted_lists import Centroids, InvertedLists, check_lists, encode_values, pack_lists, value_ranges
from spade_faiss.search.protocol import Pack


@pytest.mark.parametrize("left_out", [False, True])
def test_each_list_is_searched_for_its_codes_and_no_others(left_out: bool) -> None:
    """By brute force over the values that codes stand for; images that are gone or not allowed are not found."""
    rng = np.random.default_rng(1)
    images, locations, d, count = 5, 12, 16, 4
    x = rng.normal(size=(images * locations, d)).astype(np.float32)
    ranges = value_ranges(x)
    codes = encode_values(x, ranges)
    lists = rng.integers(0, count + left_out, (images, locations)).astype(np.uint32)
    rows = np.array([3, -1, 4, 7, 8])
    packed = pack_lists(lists, codes.reshape(images, locations, d), count)
    assert packed["sizes"].tolist() == [(lists == number).sum() for number in range(count)]
    index = InvertedLists(Pack(rows, packed), locations, ranges)
    check_lists(packed, d, count, images * locations)
    for wrong in (
        {**packed, "lists": packed["lists"][:-1]},
        {**packed, "sizes": packed["sizes"] + 1},
        {"sizes": packed["sizes"]},
    ):
        with pytest.raises(InputError, match=r"lists"):
            check_lists(wrong, d, count, images * locations)
    with pytest.raises(InputError, match=r"of 1 vectors"):
        check_lists(packed, d, count, 1)
    excluded = np.zeros(9, np.bool_)
    excluded[7] = True
    values = ranges[0] + (codes.astype(np.float64) + 0.5) / 255 * ranges[1]
    ids = (rows[:, None] * locations + np.arange(locations)).ravel()
    xq = rng.normal(size=(6, d)).astype(np.float32)
    probed = np.array([[0, 3], [1, 2], [2, 0], [3, -1], [1, 0], [2, 3]])
    for allowed, missing in ((index.allowed(None), [1]), (index.allowed(excluded), [1, 3])):
        D, I = index.search(xq, probed, 60, allowed)
        for query in range(6):
            inside = np.isin(lists, probed[query])
            inside[missing] = False
            at = np.flatnonzero(inside.ravel())
            sq_dist = np.square(values[at] - xq[query]).sum(axis=1)
            found = I[query] >= 0
            assert sorted(I[query, found].tolist()) == sorted(ids[at].tolist())
            np.testing.assert_allclose(D[query, found], np.sort(sq_dist), rtol=1e-4)


def test_groups_find_most_of_the_nearest_centroids_and_all_of_them_all() -> None:
    rng = np.random.default_rng(2)
    centers = 3 * rng.normal(size=(32, 8))
    xb = (centers[rng.integers(0, 32, 1000)] + rng.normal(size=(1000, 8))).astype(np.float32)
    xq = (centers[rng.integers(0, 32, 300)] + rng.normal(size=(300, 8))).astype(np.float32)
    _, expected = product_knn(xq, xb, 4)
    found = Centroids(xb, centers.astype(np.float32)).nearest(xq, 4)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(expected, found, strict=True)]) > 0.95
    np.testing.assert_array_equal(Centroids(xb, centers[:8].astype(np.float32)).nearest(xq, 4), expected)  # in all groups
    everything = Centroids(xb, centers.astype(np.float32)).nearest(xq[:2], 1000)
    assert (np.sort(everything, axis=1) == np.arange(1000)).all()


def test_ids_beyond_the_images_are_refused() -> None:
    """An index from anybody may name vectors that there are not."""
    d = 8
    x = np.random.default_rng(0).normal(size=(2 * 5, d)).astype(np.float32)
    ranges = value_ranges(x)
    packed = pack_lists(np.zeros((2, 5), np.uint32), encode_values(x, ranges).reshape(2, 5, d), 1)
    packed["lists"][-8:] = np.frombuffer(np.int64(10).tobytes(), np.uint8)  # the last id of the only list
    check_lists(packed, d, 1, 10)
    index = InvertedLists(Pack(np.arange(2), packed), 5, ranges)
    with pytest.raises(BankError, match="names vectors that the bank does not hold"):
        index.search(x, np.zeros((10, 1), np.int64), 10, index.allowed(None))
