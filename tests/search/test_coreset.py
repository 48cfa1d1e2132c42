"""Coresets: greedy k-center picks what the plain algorithm picks; a random share is one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_faiss import Bank, Detector
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.index.build import build_index
from spade_faiss.search import coreset
from spade_faiss.search.coreset import is_chosen_by_chance, k_center
from spade_faiss.search.native.extension import import_native, usable_simd_level
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Recipe
from tests.support.oracle import bank_of, batch_of, product
from tests.support.recipes import queried

needs_kernel = pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")


def plain(xb: FloatArray, count: int, first: int) -> IntArray:
    """The picks of the algorithm as it is written down, in float64."""
    x, picks = xb.astype(np.float64), [first]
    sq_dist = np.square(x - x[first]).sum(axis=1)
    while len(picks) < count and sq_dist.max() > 0:
        picks.append(int(sq_dist.argmax()))
        sq_dist = np.minimum(sq_dist, np.square(x - x[picks[-1]]).sum(axis=1))
    return np.array(picks)


def features(seed: int, n: int, d: int) -> FloatArray:
    """Clusters of different widths far from the origin, with copies and near copies."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, 9, n)
    x = 20 + 5 * rng.normal(size=(9, d))[of] + rng.gamma(1, 1, (9, 1))[of] * rng.normal(size=(n, d))
    x[n // 2 : n // 2 + n // 8] = x[: n // 8]
    x[-(n // 8) :] = x[: n // 8] * (1 + 1e-4 * rng.normal(size=(n // 8, d)))
    return x.astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(400, 3), (700, 16), (900, 24), (1500, 152), (300, 40)])
def test_picks_are_those_of_the_plain_algorithm(n: int, d: int) -> None:
    for seed in range(4):
        xb = features(seed, n, d)
        picks, sq_radius = k_center(xb, n // 5)
        np.testing.assert_array_equal(picks, plain(xb, n // 5, int(picks[0])))
        left = np.square(xb.astype(np.float64)[:, None] - xb[picks]).sum(axis=2).min(axis=1).max()
        assert sq_radius == pytest.approx(left, rel=1e-5)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_ties_go_to_the_first_vector(n: int, d: int, count: int, seed: int) -> None:
    """Distances of whole numbers are exact: all picks are decided, and those are fewer where all that is left is a copy."""
    xb = np.random.default_rng(seed).integers(-2, 3, (n, d)).astype(np.float32)
    picks, sq_radius = k_center(xb, min(count, n))
    np.testing.assert_array_equal(picks, plain(xb, min(count, n), int(picks[0])))
    assert sq_radius == np.square(xb[:, None] - xb[picks]).sum(axis=2).min(axis=1).max()


@needs_kernel
def test_the_kernel_does_not_compute_most_distances_and_numpy_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    xb = features(5, 800, 24)
    expected, sq_radius = k_center(xb, 100)
    monkeypatch.setattr(coreset, "usable_simd_level", lambda: None)
    picks, by_numpy = k_center(xb, 100)
    np.testing.assert_array_equal(picks, expected)
    assert by_numpy == pytest.approx(sq_radius, rel=1e-5)


@needs_kernel
def test_shadows_that_lie_change_the_picks() -> None:
    """So the test above would notice a bound that is wrong."""
    xb, native = features(6, 800, 24), import_native()
    shadows, slack = coreset._shadows(xb, native.SHADOW)
    expected, _ = native.k_center(xb, 100, 3, shadows, slack)
    assert (native.k_center(xb, 100, 3, 3 * shadows, slack)[0] != expected).any()
    np.testing.assert_array_equal(native.k_center(xb, 100, 3, np.zeros_like(shadows), slack)[0], expected)
    for threads in (2, 5):
        np.testing.assert_array_equal(native.k_center(xb, 100, 3, shadows, slack, threads)[0], expected)


def test_chance_is_fair_and_looks_at_numbers_alone() -> None:
    xb = features(7, 20_000, 16)
    distinct = np.unique(xb, axis=0)
    for share in (0.01, 0.3, 1.0):
        chosen = is_chosen_by_chance(distinct, share)
        assert chosen.mean() == pytest.approx(share, abs=4 * (share / len(distinct)) ** 0.5)
        np.testing.assert_array_equal(is_chosen_by_chance(distinct[::-1], share), chosen[::-1])


@pytest.mark.parametrize("thin", ["kcenter", "random"])
def test_a_thinned_index_finds_what_it_holds(tmp_path_factory: pytest.TempPathFactory, thin: str) -> None:
    shapes, count, share = {"level": (9, 11, 16)}, 12, 0.1
    normals = product(1, count, shapes, 8)
    bank = bank_of(tmp_path_factory.mktemp("thin") / "bank", normals, input_size=(40, 43), shards=[5])
    recipe = Recipe(
        name="thin", build=Build(gallery="global_index", settings={"lists": 3, "dims": 8, "thin": thin, "share": share})
    )
    build_index(bank, recipe)
    vectors = normals.levels["level"].reshape(-1, 16)
    if thin == "kcenter":
        held = vectors[k_center(vectors, round(share * len(vectors)))[0]]
    else:
        held = vectors[is_chosen_by_chance(vectors, share)]
    queries = product(2, 2, shapes, 8, defect=True)
    method = Method(k_image=3, k_gallery=ALL)
    everything = queried(recipe, nprobe=3, rerank=2000)
    found = Detector.open(bank.path, recipe=everything, method=method).score_features(batch_of(queries))
    xq = queries.levels["level"].reshape(-1, 1, 16).astype(np.float64)
    expected = np.sqrt(np.square(xq - held).sum(axis=2).min(axis=1))
    np.testing.assert_allclose(found.level_dist["level"].ravel(), expected, rtol=1e-4, atol=1e-5)


def test_a_coreset_takes_in_what_lies_beyond_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An image that is unlike all others is covered as they are once it is in the bank."""
    shapes = {"level": (6, 7, 16)}
    normals = product(1, 10, shapes, 8)
    bank = bank_of(tmp_path_factory.mktemp("thin") / "bank", normals, input_size=(40, 43))
    recipe = Recipe(
        name="thin", build=Build(gallery="global_index", settings={"lists": 3, "dims": 8, "thin": "kcenter", "share": 0.05})
    )
    build_index(bank, recipe)
    other = product(3, 1, shapes, 8)
    other.levels["level"] += 50
    bank.append(batch_of(other, ["other"]))
    for _ in range(2):  # before it is indexed, and after
        detector = Detector.open(bank.path, recipe=queried(recipe, nprobe=3, rerank=2000), method=Method(k_image=3))
        assert (detector.score_features(batch_of(other)).level_dist["level"] == 0).all()
        build_index(bank, recipe)
    assert Bank.open(bank.path).ids[-1] == "other"


def test_settings_of_thinning() -> None:
    for share in (0, 1.5, -1):
        with pytest.raises(InputError, match=r"share=.* must be above 0 and at most 1"):
            resolve_recipe(Recipe(name="r", build=Build(gallery="global_index", settings={"share": share})))
    with pytest.raises(InputError, match="thin='some' is not one of none, random, kcenter"):
        resolve_recipe(Recipe(name="r", build=Build(gallery="global_index", settings={"thin": "some"})))
