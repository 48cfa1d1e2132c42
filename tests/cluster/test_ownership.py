"""Who owns a shard, and how what owners found is merged: pure functions."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.cluster.merging import PartHits, merge_hits, merge_neighbors
from spade_faiss.cluster.ownership import partition, ranked_owners
from spade_faiss.core.errors import ClusterError
from spade_faiss.core.types import IntArray
from spade_faiss.search.protocol import Hits
from spade_faiss.search.running_best import RunningBest

SHARDS = [(number, hashlib.sha256(str(number).encode()).hexdigest()) for number in range(400)]
OWNERS = [f"node-{number}" for number in range(5)]


@pytest.mark.parametrize("replica", [0, 1, 4, 7])
def test_each_shard_has_one_owner_at_a_time(replica: int) -> None:
    found = partition(SHARDS, OWNERS, replica)
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(400))
    assert all(one < two for numbers in found.values() for one, two in pairwise(numbers))
    assert all(50 < len(numbers) < 110 for numbers in found.values())  # 80 each, by chance


def test_replicas_are_on_different_nodes() -> None:
    one, two = (
        {number: owner for owner, numbers in partition(SHARDS, OWNERS, replica).items() for number in numbers}
        for replica in (0, 1)
    )
    assert all(one[number] != two[number] for number, _ in SHARDS)


def test_only_a_lost_owners_shards_move_and_to_their_next_owners() -> None:
    before = {number: owner for owner, numbers in partition(SHARDS, OWNERS).items() for number in numbers}
    after = {number: owner for owner, numbers in partition(SHARDS, OWNERS[1:]).items() for number in numbers}
    for number, sha256 in SHARDS:
        expected = before[number] if before[number] != OWNERS[0] else ranked_owners(sha256, OWNERS)[1]
        assert after[number] == expected
    assert len({after[number] for number in before if before[number] == OWNERS[0]}) == 4


def test_without_an_owner_there_is_no_search() -> None:
    with pytest.raises(ClusterError, match="all nodes"):
        partition(SHARDS, [])


@given(
    seed=st.integers(0, 1000),
    kappa=st.integers(1, 4),
    owners=st.integers(1, 4),
    values=st.integers(1, 6),
)
def test_merged_hits_are_those_of_one_search(seed: int, kappa: int, owners: int, values: int) -> None:
    """Against `RunningBest`, which one process merges with, on distances with many ties and vectors that are no numbers."""
    rng, images, queries, rows, locations = np.random.default_rng(seed), 3, 5, 7, 4
    D = rng.integers(0, values, (images, queries, rows, locations)).astype(np.float32)
    D[0, 0] = np.nan
    owner_of = rng.integers(0, owners, rows)
    asked = rng.random((images, rows)) < 0.7
    asked[:, 0] = True
    whole = RunningBest(images, queries, kappa, locations)
    parts = []
    everywhere: IntArray = np.tile(np.arange(locations), (queries, 1))
    for owner in range(owners):
        at = np.flatnonzero(asked[:, owner_of == owner].any(axis=1))
        mine = RunningBest(len(at), queries, kappa, locations)
        for place, image in enumerate(at.tolist()):
            for row in np.flatnonzero(asked[image] & (owner_of == owner)).tolist():
                whole.merge(image, slice(0, queries), row, everywhere, D[image, :, row])
                mine.merge(place, slice(0, queries), row, everywhere, D[image, :, row])
        if len(at):
            parts.append(PartHits(at, mine.hits(), np.ones(len(at), np.int64)))
    expected, found = whole.hits(), merge_hits(parts, images, queries, kappa)
    np.testing.assert_array_equal(found.sq_dist, expected.sq_dist)
    np.testing.assert_array_equal(found.row, expected.row)
    np.testing.assert_array_equal(found.location, expected.location)


def test_the_share_that_was_passed_over_is_weighed() -> None:
    def part(share: float, vectors: int) -> PartHits:
        hits = Hits(np.zeros((1, 2, 1), np.float32), np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64), np.array([share]))
        return PartHits(np.array([0]), hits, np.array([vectors]))

    merged = merge_hits([part(0.5, 30), part(1.0, 10)], 1, 2, 1)
    assert merged.passed_over is not None
    np.testing.assert_allclose(merged.passed_over, [0.625])


def test_merged_neighbors_are_ordered_by_distance_and_row() -> None:
    parts = [
        (np.array([[1.0, 2.0, 2.0]], np.float32), np.array([[4, 0, 9]])),
        (np.array([[1.0, 2.0]], np.float32), np.array([[3, 5]])),
    ]
    D, rows = merge_neighbors(parts, 4)
    assert D.tolist() == [[1, 1, 2, 2]]
    assert rows.tolist() == [[3, 4, 0, 5]]
