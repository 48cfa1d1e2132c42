"""Normal images against the others: as if each had been scored against a bank without it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Detector
from spade_faiss.bank.bank import Bank
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.batch import concatenate
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.search.recipe import Build, Query, Recipe
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.suspects import suspects
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


def bank_of_entries(folder: Path, features: Features, pictures: list[str], shards: list[int]) -> Bank:
    """A bank whose entries were made of these pictures, in shards of so many of them; the rest is the last one."""
    layout = Layout(levels=tuple(levels_of(features)), embedding_dim=DIM, input_size=INPUT, dtype="float32")
    bank = Bank.create(folder, layout)
    entries = replace(batch_of(features), pictures=pictures)
    for start, stop in itertools.pairwise([0, *np.cumsum(shards).tolist(), len(entries)]):
        bank.append(entries[start:stop])
    return bank


# Eleven entries of six pictures, some of which lie in several shards, and most of whose entries are no neighbors of each other.
PICTURES = ["a", "b", "a", "c", "d", "b", "a", "e", "e", "f", "c"]


@pytest.mark.parametrize("k_gallery", [2, ALL])
@pytest.mark.parametrize("memory", ["2GiB", "97MiB"])
def test_a_picture_is_left_out_with_all_of_its_entries(tmp_path: Path, k_gallery: int | str, memory: str) -> None:
    """Bit for bit as against a bank that was made without the picture."""
    method = Method(k_image=3, k_gallery=k_gallery, kappa=2)
    everything = batch_of(normals())
    bank = bank_of_entries(tmp_path / "bank", normals(), PICTURES, [5, 3])
    found = Detector.open(bank.path, method=method, run=Run(memory=memory)).score_rows(range(N))
    assert found.ids == PICTURES
    for row, picture in enumerate(PICTURES):
        kept = [other for other in range(N) if PICTURES[other] != picture]
        without = bank_of_entries(tmp_path / f"without {row}", normals()[kept], [f"as {PICTURES[other]}" for other in kept], [])
        expected = Detector.open(without.path, method=method).score_features(replace(everything[row : row + 1], ids=["query"]))
        np.testing.assert_array_equal(found.image_score[row], expected.image_score[0])
        np.testing.assert_array_equal(found.maps[row], expected.maps[0])
        assert [f"as {name}" for name in found.neighbor_ids[row]] == expected.neighbor_ids[0].tolist()


@pytest.mark.parametrize("factory", ["HNSW8,Flat", "IVF2,Flat"])
def test_an_approximate_index_leaves_a_picture_out_with_all_of_its_entries(tmp_path: Path, factory: str) -> None:
    """It is asked for as many neighbors more as the picture may take the places of."""
    features = normals()
    features.embedding[[0, 2, 6]] = features.embedding[0]  # the nearest of each are the entries of its own picture
    bank = bank_of_entries(tmp_path / "bank", features, PICTURES, [5, 3])
    query = Query(image="nprobe=2" if "IVF" in factory else "")
    recipe = Recipe(name="approximate", build=Build(image=factory), query=query)
    build_index(bank, recipe)
    method = Method(k_image=5, k_gallery=2, localize="none")
    found = Detector.open(bank.path, recipe=recipe, method=method).score_rows(range(N))
    sq_dist = np.square(features.embedding[:, None].astype(np.float64) - features.embedding).sum(axis=-1)
    for row, picture in enumerate(PICTURES):
        others = np.array([other for other in range(N) if PICTURES[other] != picture])
        nearest = others[np.argsort(sq_dist[row, others], kind="stable")[:5]]
        np.testing.assert_allclose(found.neighbor_dist[row], np.sqrt(sq_dist[row, nearest]), rtol=1e-5)
        assert set(found.neighbor_ids[row]) == {PICTURES[other] for other in nearest}


def test_a_bank_whose_largest_picture_leaves_too_few_entries_is_refused(tmp_path: Path) -> None:
    bank = bank_of_entries(tmp_path / "bank", normals(), PICTURES, [])
    detector = Detector.open(bank.path, method=Method(k_image=9, localize="none"))
    with pytest.raises(InputError, match=r"each of the 6 normal images \(11 entries\) in .* has 8 others, k=9"):
        detector.score_rows([4])
    with pytest.raises(InputError, match=r"k_image=12 is larger than the number of entries, 11 of 6 normal images"):
        Detector.open(bank.path, method=Method(k_image=12))


def test_a_picture_is_evidence_once(tmp_path: Path) -> None:
    """Calibrations and suspects take the original of each picture, held-out pictures included."""
    bank = bank_of_entries(tmp_path / "bank", normals(), PICTURES, [5, 3])
    detector = Detector.open(bank.path, method=Method(k_image=2, k_gallery=2))
    originals = [PICTURES.index(name) for name in "abcdef"]
    expected = detector.score_rows(originals)
    made = calibrate(detector)
    assert (made.images, made.available) == (tuple("abcdef"), 6)
    assert list(made.image_score) == expected.image_score.tolist()
    assert list(made.map_score) == expected.map_score.tolist()
    ranked = suspects(detector, out=tmp_path / "suspects")
    assert dict(zip(ranked.ids, ranked.image_score, strict=True)) == dict(zip("abcdef", expected.image_score, strict=True))
    assert "The 6 of 6 normal images (11 entries)" in (tmp_path / "suspects" / "report.html").read_text(encoding="utf-8")
    held_out = replace(batch_of(product(2, 4, SHAPES, DIM)), pictures=["x", "y", "x", "z"])
    split = calibrate(detector, holdout=held_out)
    assert split.images == ("x", "y", "z")
    assert list(split.image_score) == detector.score_features(held_out).image_score[[0, 1, 3]].tolist()
    with pytest.raises(InputError, match=r"1 held-out images are in the bank .*: c \(there c\)"):
        calibrate(detector, holdout=replace(held_out, pictures=["x", "c", "x", "z"]))
