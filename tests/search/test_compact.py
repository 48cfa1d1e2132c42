"""Compact search: distances of codes are lower bounds, and the true distances of the best candidates decide."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_faiss.core.types import Arrays
from spade_faiss.features.batch import Level
from spade_faiss.search import compact
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.compact import CompactSearch, project
from spade_faiss.testing import SearchCase, assert_same_hits
from tests.support.methods import Doubles, Floats, case_of, check, run, search_in
from tests.support.recipes import COMPACT, EXACT, built, queried


def trained_on(x: Floats, dims: int) -> Arrays:
    """What compact search learns from vectors (n, C)."""
    level = Level("level", x.shape[1], stride=1, height=1, width=len(x))
    found: Arrays = compact._train(Blocks(level, ArraySource(x[None])), compact.Build(dims=dims))
    return found


def distances(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Doubles:
    return np.asarray(np.linalg.norm(x[:, None].astype(np.float64) - y[None].astype(np.float64), axis=2))


@given(st.integers(0, 2**32 - 1), st.integers(2, 24), st.integers(0, 40), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=60)
def test_a_code_distance_is_a_lower_bound(seed: int, dims: int, more: int, scale: float) -> None:
    """Of vectors that were learned from, of others, of far away ones; but for float32's rounding."""
    rng, channels = np.random.default_rng(seed), 2 * dims + more
    mix = rng.normal(size=(5, channels))
    x, y, far = (
        scale * (rng.normal(size=(40, 5)) @ mix + rng.normal(0, spread, (40, channels)) + 3) for spread in (0.3, 0.3, 5)
    )
    trained = trained_on(x.astype(np.float32), dims)
    for one, other in ((x, x), (x, y), (y, far), (far, far)):
        a, b = one.astype(np.float32), other.astype(np.float32)
        true, bound = distances(a, b), distances(project(a, trained), project(b, trained))
        norms = distances(np.concatenate([a, b]), trained["mean"][None]).max()
        assert (bound <= true + 1e-4 * norms).all()


def test_the_rest_makes_a_bound_closer() -> None:
    case = case_of(seed=31, n=1, rows=3, shape=(6, 7, 32))
    blocks = case.vectors.reshape(-1, 32)
    trained = trained_on(blocks, 5)
    a, b = project(case.xq[0], trained), project(blocks, trained)
    assert (a.shape, b.shape, a.dtype.name) == ((42, 5), (126, 5), "float32")
    true = distances(case.xq[0], blocks)
    with_rest, without = distances(a, b), distances(a[:, :4], b[:, :4])
    assert (with_rest >= without).all()
    assert np.median(with_rest[true > 0] / true[true > 0]) > np.median(without[true > 0] / true[true > 0]) + 0.02
    # The components are those that hold most: any other four hold less.
    rng = np.random.default_rng(0)
    centered = blocks - trained["mean"]
    for _ in range(5):
        other = np.linalg.qr(rng.normal(size=(32, 4)))[0]
        assert (centered @ trained["components"]).var(axis=0).sum() > (centered @ other).var(axis=0).sum()


@pytest.mark.parametrize("kappa", [1, 3])
def test_generous_codes_find_what_exact_finds(kappa: int) -> None:
    case = case_of(seed=32, n=5, rows=9, k=6, shape=(6, 7, 32))
    hits = run(case, queried(built(COMPACT, dims=16), rerank=6), kappa)
    exact = run(case, EXACT, kappa)
    check(case, hits, kappa)
    assert np.isclose(hits.sq_dist, exact.sq_dist, rtol=2e-4).mean() > 0.9
    np.testing.assert_allclose(np.sqrt(hits.sq_dist).mean(), np.sqrt(exact.sq_dist).mean(), rtol=1e-2)


@pytest.mark.parametrize("kappa", [1, 2])
def test_more_candidates_never_raise_a_distance(kappa: int) -> None:
    case = case_of(seed=33, n=5, rows=9, k=6, shape=(6, 7, 32))
    poor = built(COMPACT, dims=2)
    dist = [run(case, queried(poor, rerank=rerank), kappa).sq_dist for rerank in (kappa, kappa + 1, 3, 6, 6 * kappa)]
    for few, more in pairwise(dist):
        assert (more <= few).all()
    assert (dist[-1] < dist[0]).any()


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kappa", [1, 2])
def test_there_may_be_fewer_candidates_than_are_asked_for(k: int, kappa: int) -> None:
    """Each neighbor gives as many as kappa: then all of them are evaluated."""
    case = case_of(seed=34, k=k)
    expected = run(case, queried(COMPACT, rerank=k * kappa), kappa)
    for rerank in (k * kappa + 1, 8, 1000):
        assert_same_hits(run(case, queried(COMPACT, rerank=max(rerank, k * kappa)), kappa), expected)


def test_narrow_levels_are_searched_exactly() -> None:
    case = case_of(seed=35, shape=(5, 7, 7))
    assert isinstance(search_in(case, COMPACT), type(search_in(case, EXACT)))
    assert_same_hits(run(case, COMPACT, 2), run(case, EXACT, 2))
    assert isinstance(search_in(case_of(shape=(5, 7, 8)), COMPACT), CompactSearch)


@pytest.mark.parametrize("exponent", [-20, -8, 8, 17])
def test_codes_do_not_depend_on_the_unit_of_features(exponent: int) -> None:
    """Any extractor's features, as small or large as a bank takes them: codes have a range of their own."""
    case = case_of(seed=36, shape=(6, 7, 32))
    usual = run(case, COMPACT)
    scale = np.float32(2.0**exponent)
    scaled = SearchCase(case.maps * scale, case.xq * scale, case.neighbors)
    hits = run(scaled, COMPACT)
    assert hits.location.min() >= 0
    assert np.sqrt(hits.sq_dist).mean() <= np.sqrt(usual.sq_dist).mean() * scale * 1.01
