"""The index of recipe `global`: mapped from the files of its shards, added to, and without images that were removed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector, Scores
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from spade_faiss.core.types import Arrays, Bools, FloatArray, IntArray
from spade_faiss.index import gallery_build
from spade_faiss.index.build import build_index
from spade_faiss.search import global_index
from spade_faiss.search.engines import lists
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe
from spade_faiss.search.workers import Workers
from spade_faiss.testing import EncodedInMemory, open_method
from tests.support.methods import case_of
from tests.support.oracle import Features, bank_of, batch_of, product
from tests.support.recipes import GLOBAL, built, queried

SHAPES = {"fine": (9, 11, 16), "coarse": (5, 6, 12)}
INPUT = (40, 43)
DIM = 8
COUNT = 12
# All lists, and so many candidates that all vectors are evaluated: what is found does not depend on what was trained.
EVERYTHING = queried(GLOBAL, nprobe=6, rerank=2000)


def normals() -> Features:
    return product(1, COUNT, SHAPES, DIM)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of three shards with the index built. Do not change it."""
    bank = bank_of(tmp_path_factory.mktemp("store") / "bank", normals(), input_size=INPUT, shards=[5, 4])
    build_index(bank, GLOBAL)
    return bank.path


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Bank:
    """The same, to be changed."""
    return Bank.open(shutil.copytree(made, tmp_path / "bank"))


def add(bank: Bank, count: int) -> None:
    late = product(1, COUNT + count, SHAPES, DIM)[COUNT:]
    bank.append(batch_of(late, [f"late {number}" for number in range(count)]))


def scores_of(bank: Bank, recipe: Recipe = EVERYTHING) -> Scores:
    method = Method(k_image=3, k_gallery=ALL)
    return Detector.open(bank.path, recipe=recipe, method=method).score_features(
        batch_of(product(2, 3, SHAPES, DIM, defect=True))
    )


def check_exact(bank: Bank) -> None:
    """Everything is found that a search without an index finds."""
    exact, found = scores_of(bank, Recipe(name="exact")), scores_of(bank)
    for name, dist in exact.level_dist.items():
        np.testing.assert_allclose(found.level_dist[name], dist, rtol=1e-4, atol=1e-5)


def encoded_images(monkeypatch: pytest.MonkeyPatch, bank: Bank) -> tuple[int, str]:
    """How many images a build encodes, and what it says."""
    count, method = [], global_index.METHOD
    assert method.encode is not None
    plain = method.encode

    def encode(block: FloatArray, trained: Arrays, build: global_index.Build) -> Arrays:
        count.append(1)
        return plain(block, trained, build)

    with monkeypatch.context() as patch:
        patch.setattr(global_index, "METHOD", replace(method, encode=encode))
        built = build_index(bank, GLOBAL)
    assert built is not None
    return len(count) // len(SHAPES), built.done["gallery"]


def test_files_are_mapped_where_they_lie(bank: Bank) -> None:
    """What is searched in the files is what is searched in memory."""
    mapped = scores_of(bank, GLOBAL)
    shutil.rmtree(bank.path / "indexes" / "global" / "gallery")
    build_index(bank, GLOBAL)
    again = scores_of(bank, GLOBAL)
    np.testing.assert_array_equal(mapped.maps, again.maps)
    check_exact(bank)


def test_only_new_images_are_encoded(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    files = bank.path / "indexes" / "global" / "gallery"
    before = {path.name: path.stat().st_ino for path in files.iterdir()}
    assert encoded_images(monkeypatch, bank) == (0, "is up to date")
    add(bank, 3)
    check_exact(bank)  # they are found although they are not in the index
    assert encoded_images(monkeypatch, bank) == (3, "added 3 images to it")
    assert before.items() <= {path.name: path.stat().st_ino for path in files.iterdir()}.items()
    check_exact(bank)


def test_shards_share_a_file(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as one file may hold; all of them in one find what each in its own finds."""

    def files() -> list[str]:
        return [path.name for path in (bank.path / "indexes" / "global" / "gallery").glob("000-*.h5")]

    assert len(files()) == 1
    shutil.rmtree(bank.path / "indexes")
    monkeypatch.setattr(gallery_build, "_PACKED_VECTORS", 9 * 99)
    build_index(bank, GLOBAL)
    assert len(files()) == 2
    check_exact(bank)
    add(bank, 3)
    build_index(bank, GLOBAL)
    assert len(files()) == 3
    bank.remove([bank.ids[1]])
    bank.compact()
    check_exact(bank)
    build_index(bank, GLOBAL)
    check_exact(bank)


def test_removed_images_are_not_found(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole shard, some of another; they come back, and go for good."""
    gone = bank.ids[3:11]
    bank.remove(gone)
    check_exact(bank)
    assert encoded_images(monkeypatch, bank)[0] == 0
    bank.restore(gone[:2])
    check_exact(bank)
    bank.compact()
    check_exact(bank)
    build_index(bank, GLOBAL)
    check_exact(bank)


def test_an_interrupted_build_goes_on(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(bank.path / "indexes")
    monkeypatch.setattr(gallery_build, "_PACKED_VECTORS", 5 * 99)  # a file of five images, one of four, one of three
    method = global_index.METHOD
    assert method.pack is not None
    pack, calls = method.pack, []

    def interrupted(stacked: Arrays, trained: Arrays, build: global_index.Build) -> Arrays:
        calls.append(1)
        if len(calls) > len(SHAPES):
            raise KeyboardInterrupt
        return pack(stacked, trained, build)

    with monkeypatch.context() as patch:
        patch.setattr(global_index, "METHOD", replace(method, pack=interrupted))
        with pytest.raises(KeyboardInterrupt):
            build_index(bank, GLOBAL)
    assert encoded_images(monkeypatch, bank) == (COUNT - 5, "built")
    check_exact(bank)


def test_without_the_kernel_the_same_is_found(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever all vectors of the lists are candidates."""
    every = queried(GLOBAL, rerank=2000)
    expected = scores_of(bank, every)
    monkeypatch.setattr(lists, "usable_simd_level", lambda channels: None)
    found = scores_of(bank, every)
    for name, dist in expected.level_dist.items():
        np.testing.assert_allclose(found.level_dist[name], dist, rtol=1e-5, atol=1e-6)
        assert (found.nearest[name] == expected.nearest[name]).mean() > 0.99  # but for near duplicates


def test_without_the_kernel_other_candidates_are_taken_at_ties_alone(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two sum in another order: the last candidate and the first that is none may change places if rounding decides."""
    expected = scores_of(bank, GLOBAL)
    ties: list[Bools] = []

    class Watched(lists.NumpyLists):
        def __call__(
            self, xq: FloatArray, projected: FloatArray, allowed: Sequence[Bools], nprobe: int, rerank: int, kappa: int
        ) -> tuple[FloatArray, IntArray]:
            every = range(len(self._centroids))
            estimate = np.sort(np.concatenate([self._estimates(projected, number, allowed)[0] for number in every], axis=1))
            # Float32 adds numbers of the size of a squared distance to a centroid.
            size = np.square(projected[:, None] - self._centroids).sum(axis=2).max(axis=1)
            ties.append(estimate[:, rerank] - estimate[:, rerank - 1] <= 1e-6 * size)
            return super().__call__(xq, projected, allowed, nprobe, rerank, kappa)

    monkeypatch.setattr(lists, "usable_simd_level", lambda channels: None)
    monkeypatch.setattr(lists, "NumpyLists", Watched)
    monkeypatch.setattr(global_index, "slices", lambda length, count: [slice(0, length)])  # parts may end in any order
    found = scores_of(bank, GLOBAL)
    differs = [~np.isclose(found.level_dist[name], dist, rtol=1e-5, atol=1e-6) for name, dist in expected.level_dist.items()]
    tied = np.concatenate(ties)
    at = np.concatenate([each.ravel() for each in differs])
    assert len(at) == len(tied)
    assert not (at & ~tied).any()
    assert tied.mean() < 0.2, "where most are ties, this shows nothing"


def test_more_lists_and_candidates_find_nearer_vectors(bank: Bank) -> None:
    means = [
        float(scores_of(bank, queried(GLOBAL, nprobe=nprobe, rerank=rerank)).level_dist["fine"].mean())
        for nprobe, rerank in ((1, 1), (2, 4), (6, 2000))
    ]
    assert means[0] > means[1] > means[2]
    assert means[1] < 1.1 * means[2]


@pytest.mark.parametrize("dims", [16, 9])
def test_codes_stand_for_about_the_projected_vectors(dims: int) -> None:
    """Off by half a step in each value; with fewer components than channels, one value is the length of the rest."""
    case = case_of(seed=5, n=1, rows=6, k=6, shape=(5, 7, 16))
    chosen = resolve_recipe(built(GLOBAL, dims=dims))
    trained = EncodedInMemory(chosen.method, case.blocks, chosen.build).trained
    assert chosen.method.encode is not None
    components, alike = trained["components"].astype(np.float64), float(trained["alike"][0])
    assert components.shape == (16, 16 if dims == 16 else 8)
    assert trained["centroids"].shape[1] == dims
    for block in case.vectors:
        encoded = chosen.method.encode(block, trained, chosen.build)
        centered = block.astype(np.float64) - trained["mean"]
        projected = centered @ components
        rest = np.square(centered - projected @ components.T).sum(axis=1)
        if dims < 16:
            assert 0 <= alike <= 1
            projected = np.concatenate([projected, np.sqrt(alike * rest)[:, None]], axis=1)
        residual = encoded["step"][:, None] * (encoded["code"][:, :dims].astype(np.float64) - 128)
        stands_for = residual + trained["centroids"][encoded["list"]]
        assert (np.abs(stands_for - projected) <= encoded["step"][:, None] * 0.51 + 1e-4).all()
        assert (encoded["code"][:, dims:] == 128).all()
        expected = np.square(residual).sum(axis=1) + (1 - alike if dims < 16 else 0) * rest
        np.testing.assert_allclose(2 * encoded["half_sq_norm"], expected, rtol=1e-3, atol=1e-4)
        nearest = np.square(projected[:, None] - trained["centroids"]).sum(axis=2)
        assert (nearest[np.arange(35), encoded["list"]] <= nearest.min(axis=1) + 1e-3).all()


def test_queries_that_are_no_numbers_find_nothing_and_disturb_no_others() -> None:
    case = case_of(seed=6, n=2, rows=5, k=5, shape=(5, 7, 16))
    chosen = resolve_recipe(GLOBAL)
    search = open_method(chosen.method, case.blocks, Workers(2), chosen.build, chosen.query)
    expected, broken = search(case.xq, case.neighbors, 1), case.xq.copy()
    broken[1, 3] = np.nan
    hits = search(broken, case.neighbors, 1)
    assert (hits.row[1, 3], hits.location[1, 3]) == (-1, 0)
    others = np.ones((2, 35), np.bool_)
    others[1, 3] = False
    np.testing.assert_array_equal(hits.sq_dist[others], expected.sq_dist[others])


def test_kappa_is_at_most_the_number_of_vectors(bank: Bank) -> None:
    case = case_of(rows=3, k=3, shape=(2, 3, 8))
    chosen = resolve_recipe(built(GLOBAL, lists=2))
    search = open_method(chosen.method, case.blocks, Workers(1), chosen.build, chosen.query)
    assert np.isfinite(search(case.xq, case.neighbors, 18).sq_dist).all()
    with pytest.raises(InputError, match="kappa=19 is larger than the number of vectors that are indexed; lower it"):
        search(case.xq, case.neighbors, 19)
