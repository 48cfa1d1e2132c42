"""The index over embeddings, against brute force in float64; damaged, missing and unfit indexes are refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import image_index
from spade_faiss.bank import Bank
from spade_faiss.errors import BankError, InputError
from spade_faiss.features import FeatureBatch, FloatArray, Level
from spade_faiss.image_index import Description, ImageIndex, build_image_index, built_indexes, index_folder
from spade_faiss.knn import import_faiss
from spade_faiss.recipe import Build, Query, Recipe

DIM = 12
LEVEL = Level("x", channels=1, stride=1, height=1, width=1)

FLAT = Recipe(name="flat", build=Build(image="Flat"))
HNSW = Recipe(name="hnsw", build=Build(image="HNSW32"), query=Query(image="efSearch=128"))
IVF = Recipe(name="ivf", build=Build(image="IVF4,Flat"), query=Query(image="nprobe=4"))
RECIPES = [FLAT, HNSW, IVF]

COUNT = 201


def structured(n: int, *, seed: int) -> FloatArray:
    """Clusters far from the origin, of very different spread: where a matrix product rounds, and neighbours are close."""
    rng = np.random.default_rng(seed)
    centres = 20 + 5 * np.random.default_rng(99).standard_normal((6, DIM))
    spread = np.array([1.0, 0.5, 0.1, 1.0, 0.03, 2.0])
    cluster = rng.integers(0, 6, n)
    points = centres[cluster] + spread[cluster, None] * rng.standard_normal((n, DIM))
    return points.astype(np.float32)


def fill(bank: Bank, embedding: FloatArray, sizes: Sequence[int]) -> Bank:
    """Append rows in shards of the given sizes."""
    start = 0
    for size in sizes:
        ids = [str(len(bank) + row) for row in range(size)]
        bank.append(FeatureBatch(ids, embedding[start : start + size], {"x": np.zeros((size, 1, 1, 1), np.float32)}))
        start += size
    assert start == len(embedding)
    return bank


def make_bank(path: Path, embedding: FloatArray, sizes: Sequence[int]) -> Bank:
    return fill(Bank.create(path, levels=[LEVEL], embedding_dim=DIM, input_size=(1, 1)), embedding, sizes)


def brute_force(xq: FloatArray, xb: FloatArray) -> npt.NDArray[np.float64]:
    """(nq, nb) squared distances in float64."""
    difference = xq[:, None].astype(np.float64) - xb[None].astype(np.float64)
    squares: npt.NDArray[np.float64] = np.einsum("qbd,qbd->qb", difference, difference)
    return squares


def assert_nearest(D: FloatArray, I: npt.NDArray[np.int64], xq: FloatArray, xb: FloatArray, k: int) -> None:
    """The k nearest: right distances to distinct rows; which of two equally near ones is left open."""
    exact = brute_force(xq, xb)
    assert D.shape == I.shape == (len(xq), k)
    assert D.dtype == np.float32
    np.testing.assert_allclose(D, np.sort(exact, axis=1)[:, :k], rtol=1e-5, atol=1e-10)
    np.testing.assert_allclose(D, np.take_along_axis(exact, I, axis=1), rtol=1e-5, atol=1e-10)
    assert all(len(set(line)) == k for line in I.tolist())
    assert (np.diff(D, axis=1) >= 0).all()


@pytest.fixture(scope="module")
def xb() -> FloatArray:
    return structured(COUNT, seed=1)


@pytest.fixture(scope="module")
def xq() -> FloatArray:
    return structured(17, seed=2)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, xb: FloatArray) -> Path:
    """A bank of several shards with every index built. Copy it before changing it."""
    bank = make_bank(tmp_path_factory.mktemp("indexed") / "bank", xb, [64, 1, 100, 36])
    for recipe in RECIPES[1:]:
        build_image_index(bank, recipe)
    return bank.path


@pytest.fixture
def bank(indexed: Path, tmp_path: Path) -> Bank:
    return Bank.open(shutil.copytree(indexed, tmp_path / "bank"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_nearest_by_brute_force(indexed: Path, xb: FloatArray, xq: FloatArray, recipe: Recipe, k: int) -> None:
    index = ImageIndex.open(Bank.open(indexed), recipe)
    assert index.covered == (COUNT if recipe.needs_image_index else 0)
    D, I = index.search(xq, k)
    assert_nearest(D, I, xq, xb, k)
    # One more neighbour changes nothing of the first k, one query alone nothing of its line.
    more, _ = index.search(xq, k + 1)
    np.testing.assert_array_equal(more[:, :k], D)
    alone, _ = index.search(xq[3:4], k)
    np.testing.assert_array_equal(alone[0], D[3])


@pytest.mark.parametrize("recipe", [FLAT, IVF], ids=lambda recipe: recipe.name)
def test_all_of_the_bank_can_be_asked_for(indexed: Path, xb: FloatArray, xq: FloatArray, recipe: Recipe) -> None:
    D, I = ImageIndex.open(Bank.open(indexed), recipe).search(xq, COUNT)
    assert_nearest(D, I, xq, xb, COUNT)


def test_more_than_the_bank_holds_is_refused(indexed: Path, xq: FloatArray) -> None:
    with pytest.raises(InputError, match="fewer than k=202 neighbours"):
        ImageIndex.open(Bank.open(indexed), FLAT).search(xq, COUNT + 1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_rows_of_the_bank_find_themselves_at_distance_zero(indexed: Path, xb: FloatArray, recipe: Recipe) -> None:
    D, I = ImageIndex.open(Bank.open(indexed), recipe).search(xb, 1)
    np.testing.assert_array_equal(D[:, 0], 0)
    np.testing.assert_array_equal(I[:, 0], np.arange(COUNT))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_images_added_since_are_searched_beside_the_index(bank: Bank, xb: FloatArray, xq: FloatArray, recipe: Recipe) -> None:
    added = structured(43, seed=3)
    fill(bank, added, [40, 3])
    index = ImageIndex.open(Bank.open(bank.path), recipe)
    assert index.covered == (COUNT if recipe.needs_image_index else 0)
    D, I = index.search(xq, 9)
    assert_nearest(D, I, xq, np.concatenate([xb, added]), 9)
    assert (I >= COUNT).any()
    assert (I < COUNT).any()


def test_an_index_built_again_covers_what_was_added(bank: Bank, xb: FloatArray, xq: FloatArray) -> None:
    added = structured(9, seed=3)
    fill(bank, added, [9])
    description = build_image_index(bank, IVF)
    assert (description.count, description.generation, len(description.shards)) == (COUNT + 9, 5, 5)
    index = ImageIndex.open(Bank.open(bank.path), IVF)
    assert index.covered == COUNT + 9
    assert_nearest(*index.search(xq, 5), xq, np.concatenate([xb, added]), 5)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_ties_are_broken_by_the_smaller_row(tmp_path: Path, recipe: Recipe) -> None:
    """Three copies of each point, in different shards: all at the same distance, in ascending order."""
    points = structured(50, seed=4)
    bank = make_bank(tmp_path / "bank", np.concatenate([points, points, points]), [50, 70, 30])
    if recipe.needs_image_index:
        build_image_index(bank, recipe)
    D, I = ImageIndex.open(bank, recipe).search(points[:20], 3)
    np.testing.assert_array_equal(D, np.zeros((20, 3)))
    np.testing.assert_array_equal(I, np.arange(20)[:, None] + [0, 50, 100])


def test_neighbours_beyond_the_rounding_of_a_matrix_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More near-ties than spare candidates, far from the origin: |q|^2 - 2qx + |x|^2 cannot order them in float32."""
    # FAISS takes the matrix product for many queries only; here it must take it for a few.
    monkeypatch.setattr(import_faiss().cvar, "distance_compute_blas_threshold", 1)
    rng = np.random.default_rng(5)
    near = 1000 + 0.01 * rng.standard_normal((120, DIM))
    far = rng.standard_normal((40, DIM)) * 300
    xb = np.concatenate([far, near]).astype(np.float32)
    bank = make_bank(tmp_path / "bank", xb, [160])
    xq = (1000 + 0.01 * rng.standard_normal((11, DIM))).astype(np.float32)
    assert_nearest(*ImageIndex.open(bank, FLAT).search(xq, 5), xq, xb, 5)


def test_too_few_candidates_are_an_error_that_says_what_to_do(indexed: Path, xq: FloatArray) -> None:
    narrow = ImageIndex.open(Bank.open(indexed), replace(IVF, query=Query(image="nprobe=1")))
    with pytest.raises(InputError, match=r"returned fewer than k=150 neighbours; raise its query parameters"):
        narrow.search(xq, 150)


def test_query_parameters_reach_the_index_without_a_rebuild(indexed: Path, xb: FloatArray) -> None:
    """A narrow search may miss neighbours, but what it returns are true distances; a wide one misses none."""
    xq = (20 + 5 * np.random.default_rng(8).standard_normal((100, DIM))).astype(np.float32)
    exact = brute_force(xq, xb)
    recalls = []
    for nprobe in (1, 4):
        index = ImageIndex.open(Bank.open(indexed), replace(IVF, query=Query(image=f"nprobe={nprobe}")))
        D, I = index.search(xq, 3)
        np.testing.assert_allclose(D, np.take_along_axis(exact, I, axis=1), rtol=1e-5)
        third = np.sort(exact, axis=1)[:, 2:3]
        recalls.append(float(np.less_equal(D, third * (1 + 1e-5)).mean()))
    assert 0.3 < recalls[0] < recalls[1] == 1.0


def test_the_same_build_gives_the_same_index(tmp_path: Path, xb: FloatArray) -> None:
    one, two = (build_image_index(make_bank(tmp_path / name, xb, [COUNT]), IVF) for name in ("a", "b"))
    assert one.sha256 == two.sha256


# ---- what cannot be built


@pytest.mark.parametrize("factory", ["IVF4,Nonsense", "", "Flatt", "PQ5"])
def test_a_factory_string_that_faiss_does_not_know(tmp_path: Path, xb: FloatArray, factory: str) -> None:
    bank = make_bank(tmp_path / "bank", xb, [COUNT])
    with pytest.raises(InputError, match=f"FAISS could not make {factory!r} for 201 embeddings of d=12"):
        build_image_index(bank, Recipe(name="r", build=Build(image=factory)))
    assert not (bank.path / "indexes").exists()


def test_too_few_images_to_train(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", structured(30, seed=1), [30])
    with pytest.raises(InputError, match=r"FAISS could not make 'IVF31,Flat' for 30 embeddings of d=12: .*training points"):
        build_image_index(bank, Recipe(name="r", build=Build(image="IVF31,Flat")))
    assert not (bank.path / "indexes").exists()


def test_an_empty_bank_has_no_index(tmp_path: Path) -> None:
    bank = Bank.create(tmp_path / "bank", levels=[LEVEL], embedding_dim=DIM, input_size=(1, 1))
    with pytest.raises(InputError, match="is empty; extract images first"):
        build_image_index(bank, HNSW)


def test_an_interrupted_build_leaves_the_old_index(bank: Bank, xb: FloatArray, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (index_folder(bank, IVF) / "image.faiss").read_bytes()

    def interrupt(_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_index, "hash_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_image_index(bank, IVF)
    assert (index_folder(bank, IVF) / "image.faiss").read_bytes() == before
    assert sorted(path.name for path in index_folder(bank, IVF).iterdir()) == ["image.faiss", "index.json"]
    ImageIndex.open(bank, IVF)


# ---- what cannot be opened


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("query", ["nprobe", "nprobe=x", "nonsense=3", "nonsense"])
def test_bad_query_parameters_are_named(indexed: Path, recipe: Recipe, query: str) -> None:
    changed = replace(recipe, query=Query(image=query))
    with pytest.raises(InputError, match=f"FAISS does not take the query parameters '{query}' for this index"):
        ImageIndex.open(Bank.open(indexed), changed)


def test_an_index_that_was_not_built_names_the_command(tmp_path: Path, xb: FloatArray) -> None:
    bank = make_bank(tmp_path / "bank", xb, [COUNT])
    with pytest.raises(BankError, match=r"has no index 'hnsw'; build it with: spade-faiss index .*bank --recipe hnsw$"):
        ImageIndex.open(bank, HNSW)


def test_an_index_of_another_recipe_is_refused_with_both(bank: Bank) -> None:
    changed = replace(IVF, build=Build(image="IVF8,Flat"))
    with pytest.raises(BankError, match="was built as 'IVF4,Flat', the recipe says 'IVF8,Flat'"):
        ImageIndex.open(bank, changed)


def test_an_index_of_another_bank_is_refused(bank: Bank, tmp_path: Path) -> None:
    other = make_bank(tmp_path / "other", structured(COUNT, seed=9), [64, 1, 100, 36])
    shutil.copytree(bank.path / "indexes", other.path / "indexes")
    with pytest.raises(BankError, match="was built from other shards than the bank now holds; run: spade-faiss index"):
        ImageIndex.open(other, IVF)


def test_a_damaged_index_file_is_never_given_to_faiss(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("FAISS read it")

    monkeypatch.setattr(import_faiss(), "read_index", refuse)
    file = index_folder(bank, IVF) / "image.faiss"
    data = file.read_bytes()
    rng = random.Random(1)
    for number in range(8):
        place = rng.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        file.write_bytes(data[:place] if number % 2 else flipped)
        with pytest.raises(BankError, match=r"image\.faiss has sha256 .*, expected .*; rebuild it with: spade-faiss index"):
            ImageIndex.open(bank, IVF)
    file.unlink()
    with pytest.raises(BankError, match=r"image\.faiss is missing; rebuild it with"):
        ImageIndex.open(bank, IVF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema=3), "has schema 3, this version reads 2"),
        (lambda content: content.update(format="x"), "rebuild it with"),
        (lambda content: content.update(extra=2), "unknown key 'extra'"),
        (lambda content: content.pop("sha256"), "missing key 'sha256'"),
        (lambda content: content.update(count="201"), "count='201' is of type str"),
        (lambda content: content.update(count=200), "says count=200, its shards hold 201"),
        (lambda content: content.update(count=0), "says count=0, its shards hold 201"),
        (lambda content: content["shards"].pop(), "says count=201, its shards hold 165"),
        (lambda content: content["shards"].reverse(), "was built from other shards"),
        (lambda content: content.update(shards=["0" * 64]), "was built from other shards"),
        (lambda content: content.update(sha256="0" * 64), "has sha256"),
        (lambda content: content.update(factory="Flat"), "was built as"),
    ],
)
def test_a_description_that_was_edited_is_refused(bank: Bank, change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = index_folder(bank, IVF) / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BankError, match=message):
        ImageIndex.open(bank, IVF)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_description_of_something_else_is_refused(bank: Bank, content: bytes) -> None:
    (index_folder(bank, IVF) / "index.json").write_bytes(content)
    for read in (lambda: ImageIndex.open(bank, IVF), lambda: built_indexes(bank)):
        with pytest.raises(BankError, match=r"index\.json is damaged .*; rebuild the index with: spade-faiss index .* ivf$"):
            read()


def test_no_changed_character_of_a_description_changes_an_answer(bank: Bank, xb: FloatArray, xq: FloatArray) -> None:
    path = index_folder(bank, IVF) / "index.json"
    text = path.read_text()
    rng = random.Random(7)
    refused = 0
    for place in rng.sample(range(len(text)), 50):
        path.write_text(text[:place] + rng.choice('0123456789abcdefx"{}[]:, \n') + text[place + 1 :])
        try:
            index = ImageIndex.open(bank, IVF)
        except BankError:
            refused += 1
            continue
        assert_nearest(*index.search(xq, 5), xq, xb, 5)
    assert refused > 20


def test_what_an_index_says_of_itself(bank: Bank) -> None:
    descriptions = built_indexes(bank)
    assert [item.recipe for item in descriptions] == ["hnsw", "ivf"]
    for item, recipe in zip(descriptions, RECIPES[1:], strict=True):
        assert isinstance(item, Description)
        assert item.factory == recipe.build.image
        assert (item.count, item.generation) == (COUNT, bank.generation)
        assert item.shards == tuple(shard.sha256 for shard in bank.manifest.shards)
        assert item.bytes == (index_folder(bank, recipe) / "image.faiss").stat().st_size
