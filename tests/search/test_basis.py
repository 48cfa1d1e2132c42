"""The basis that vectors are shortened in: it is orthonormal, chosen only where it pays, and changes no result."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss.core.directions import principal_directions
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.engines import native
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.native.basis import COMPONENTS, choose_center
from spade_faiss.search.native.basis import choose_basis as choose_basis_around
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.workers import Workers
from spade_faiss.testing import assert_same_hits

Floats = npt.NDArray[np.float32]

SIMD_LEVEL = usable_simd_level() or ""
pytestmark = pytest.mark.skipif(not SIMD_LEVEL, reason="no SIMD level of the kernel runs here")


def maps(images: int, locations: int, channels: int, rank: int, noise: float) -> Floats:
    """(images, locations, channels): a few smooth factors in all channels, and noise; offset as features are."""
    rng = np.random.default_rng([images, channels, rank])
    mixing = rng.normal(size=(rank, channels))
    place = np.linspace(0, 6, locations)[:, None] * rng.normal(size=(1, rank))
    factors = np.sin(place + 0.2 * rng.normal(size=(images, 1, rank)))
    made = 5 + factors @ mixing + noise * rng.normal(size=(images, locations, channels))
    return np.asarray(made, np.float32)


def blocks_of(x: Floats, cache: BlockCache[Floats] | None = None) -> Blocks:
    level = Level("level", x.shape[2], stride=1, height=1, width=x.shape[1])
    return Blocks(level, ArraySource(x), cache)


def choose_basis(blocks: Blocks) -> Floats | None:
    return choose_basis_around(blocks, SIMD_LEVEL, choose_center(blocks))


def test_an_outlier_does_not_move_the_center() -> None:
    x = maps(5, 300, 24, 3, 0.1)
    center = choose_center(blocks_of(x))
    np.testing.assert_allclose(center, x.mean(axis=(0, 1)), atol=0.3)
    x[2, 100] = 1e6
    np.testing.assert_allclose(choose_center(blocks_of(x)), center, atol=0.05)


def test_directions_are_orthonormal_and_span_what_varies() -> None:
    x = maps(1, 2000, 96, 8, 0.01)[0]
    x = x - x.mean(axis=0)
    directions = principal_directions(x, 15)
    assert directions.shape == (15, 96)
    assert directions.flags.c_contiguous
    np.testing.assert_allclose(directions.astype(np.float64) @ directions.T, np.eye(15), atol=1e-6)
    left = x - (x @ directions.T) @ directions
    assert np.square(left).sum() < 0.01 * np.square(x).sum()
    strength = np.square(x @ directions.T).sum(axis=0)
    assert (np.diff(strength[:8]) < 0).all()


def test_vectors_are_shortened_where_it_pays() -> None:
    basis = choose_basis(blocks_of(maps(5, 300, 256, 8, 0.05)))
    assert basis is not None
    assert len(basis) in COMPONENTS
    assert len(basis) < 100
    np.testing.assert_allclose(basis.astype(np.float64) @ basis.T, np.eye(len(basis)), atol=1e-6)
    np.testing.assert_array_equal(basis, choose_basis(blocks_of(maps(5, 300, 256, 8, 0.05))))  # the same at every opening


def test_vectors_stay_as_they_are_where_it_does_not() -> None:
    white = np.random.default_rng(0).normal(size=(5, 300, 256)).astype(np.float32)
    assert choose_basis(blocks_of(white)) is None
    assert choose_basis(blocks_of(maps(5, 300, 16, 3, 0.05))) is None  # there is nothing to shorten
    assert choose_basis(blocks_of(maps(2, 300, 256, 8, 0.05))) is None  # there is nothing to try it on


def test_large_features_overflow_nothing() -> None:
    x = maps(5, 300, 256, 8, 0.05) * np.float32(1e16)
    assert choose_basis(blocks_of(x)) is not None
    assert choose_basis(blocks_of(np.full_like(x, 1e16))) is None


@pytest.mark.parametrize("kappa", [1, 3])
def test_no_basis_changes_a_bit_of_a_result(kappa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps(9, 100, 96, 8, 0.1)
    xq, neighbors = x[:3] + np.float32(0.05), np.array([[3, 4, 5], [8, 6, 4], [5, 7, 8]])
    found = []
    for basis in (None, principal_directions(x[0] - x[0].mean(axis=0), 15), np.eye(7, 96, dtype=np.float32)):
        monkeypatch.setattr(native, "choose_basis", lambda blocks, simd_level, center, basis=basis: basis)
        found.append(NativeSearch(blocks_of(x), Workers(2), SIMD_LEVEL)(xq, neighbors, kappa))
    assert_same_hits(found[0], found[1])
    assert_same_hits(found[0], found[2])


def test_packed_blocks_are_cached_while_there_is_room() -> None:
    x = maps(9, 100, 96, 8, 0.1)
    cache: BlockCache[Floats] = BlockCache(1 << 20)
    search = NativeSearch(blocks_of(x, cache), Workers(2), SIMD_LEVEL)
    first = search(x[:1] + 1, np.arange(1, 6)[None], 1)
    cached = {key: pack for key in list(cache._blocks) if (pack := cache.get(key)) is not None and "/" in key[0]}
    assert {row for _, row in cached} == set(range(1, 6))
    assert_same_hits(first, search(x[:1] + 1, np.arange(1, 6)[None], 1))
    assert all(cache.get(key) is pack for key, pack in cached.items())
    assert 0 < cache._bytes <= cache.capacity


def test_a_search_is_freed_when_it_is_no_longer_used() -> None:
    """What chooses the packing must not hold the search: a cycle would keep its blocks until the garbage collector runs."""
    x = maps(3, 100, 96, 8, 0.1)
    search = NativeSearch(blocks_of(x), Workers(1), SIMD_LEVEL)
    search(x[:1], np.array([[1, 2]]), 1)
    alive = weakref.ref(search)
    gc.disable()
    try:
        del search
        assert alive() is None
    finally:
        gc.enable()
