"""Normal images against the others: as if each had been scored against a bank without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Detector
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.batch import concatenate
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.search.recipe import Build, Recipe
from tests.support.oracle import Features, bank_of, batch_of, levels_of, product
from tests.support.recipes import queried

SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
INPUT = (40, 43)
DIM = 16
N = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of eleven normals, of which two are the same image. Do not change it."""
    path = tmp_path_factory.mktemp("leave_one_out") / "bank"
    bank_of(path, normals(), input_size=INPUT, shards=[5, 3])
    return path


def normals() -> Features:
    features = product(1, N, SHAPES, DIM)
    features.embedding[7] = features.embedding[2]
    for maps in features.levels.values():
        maps[7] = maps[2]
    return features


@pytest.mark.parametrize(("recipe", "memory"), [("exact", "2GiB"), ("exact", "97MiB"), ("location", "2GiB")])
def test_each_image_scores_as_against_a_bank_without_it(folder: Path, tmp_path: Path, recipe: str, memory: str) -> None:
    found = Detector.open(folder, recipe=recipe, method=Method(k_image=3, k_gallery=4), run=Run(memory=memory)).score_rows(
        range(N)
    )
    everything = batch_of(normals())
    for row in range(N):
        others = [everything[other : other + 1] for other in range(N) if other != row]
        without = Bank.open_or_create(tmp_path / f"without {row}", Bank.open(folder).layout)
        without.append(concatenate(others))
        query = replace(everything[row : row + 1], ids=["query"])
        expected = Detector.open(without.path, recipe=recipe, method=Method(k_image=3, k_gallery=4)).score_features(query)
        assert found.ids[row] == everything.ids[row]
        np.testing.assert_array_equal(found.image_score[row], expected.image_score[0])
        np.testing.assert_array_equal(found.neighbor_ids[row], expected.neighbor_ids[0])
        np.testing.assert_array_equal(found.maps[row], expected.maps[0])
    assert found.map_score[[2, 7]].tolist() == [0, 0], "the same image twice: each finds the other"
    assert (found.map_score > 0).any()


def test_an_image_among_many_of_its_kind_leaves_one_of_them_out(tmp_path: Path) -> None:
    features = product(1, 9, SHAPES, DIM)
    features.embedding[:] = features.embedding[0]
    bank_of(tmp_path / "bank", features, input_size=INPUT)
    found = Detector.open(tmp_path / "bank", method=Method(k_image=2, k_gallery=2, localize="none")).score_rows([8, 0])
    assert found.neighbor_dist.tolist() == [[0, 0], [0, 0]]
    assert found.neighbor_ids.shape == (2, 2)
    assert found.ids[0] not in found.neighbor_ids[0]
    assert found.ids[1] not in found.neighbor_ids[1]


@pytest.mark.parametrize("gallery", ["history", "global_index"])
def test_a_search_of_the_whole_bank_leaves_the_image_out(tmp_path: Path, gallery: str) -> None:
    """Whichever lists its vectors lie in: the nearest are those of brute force over all other images."""
    features = normals()
    bank = bank_of(tmp_path / "bank", features, input_size=INPUT, shards=[5, 3])
    bank.remove([bank.ids[4]])
    rows = [row for row in range(N) if row != 4]
    recipe = Recipe(
        name="all", build=Build(gallery=gallery, settings={"lists": 2, **({} if gallery == "history" else {"dims": 4})})
    )
    recipe = queried(recipe, nprobe=2, **({} if gallery == "history" else {"rerank": 2000}))
    build_index(bank, recipe)
    found = Detector.open(bank.path, recipe=recipe, method=Method(k_image=3)).score_rows(range(N - 1))
    for name, maps in features.levels.items():
        vectors = maps[rows].reshape(N - 1, -1, maps.shape[-1]).astype(np.float64)
        for image in range(N - 1):
            others = [other for other in range(N - 1) if other != image]
            gap = np.square(vectors[image][:, None, None] - vectors[others].swapaxes(0, 1)).sum(axis=-1)  # (HW, HW, N - 2)
            nearest = np.diagonal(gap).T.min(axis=1) if gallery == "history" else gap.min(axis=(1, 2))
            np.testing.assert_allclose(found.level_dist[name][image].ravel(), np.sqrt(nearest), rtol=1e-4, atol=1e-5)
            assert (found.nearest[name][image]["row"] != image).all()


def test_images_that_cannot_be_left_out_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"each of the 11 normal images .* has 10 others, k=11"):
        Detector.open(folder, method=Method(k_image=11, localize="none")).score_rows([0])
    with pytest.raises(IndexError):
        Detector.open(folder).score_rows([N])
    with pytest.raises(IndexError):
        Detector.open(folder).score_rows([-1])


def test_where_an_input_shows_no_image_its_map_is_0(tmp_path: Path) -> None:
    """As for a query: margins of a letterboxed normal image are no part of how normal images score."""
    features = product(1, N, SHAPES, DIM)
    valid = np.zeros((N, *INPUT), np.bool_)
    valid[:, 5:30] = True
    bank = Bank.create(
        tmp_path / "bank",
        Layout(levels=tuple(levels_of(features)), embedding_dim=DIM, input_size=INPUT, dtype="float32", normalize="none"),
    )
    bank.append(batch_of(features, valid=valid))
    found = Detector.open(bank.path).score_rows([4, 2])
    assert (found.maps[~valid[:2]] == 0).all()
    assert (found.maps[valid[:2]] > 0).any()
