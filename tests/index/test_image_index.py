"""The index over embeddings, against brute force in float64; damaged, missing and unfit indexes are refused."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout
from spade_faiss.index import image_encode, image_index
from spade_faiss.index.built_index import IndexFolder, index_folder, read_built
from spade_faiss.index.encoding import Encoding, Job, encode_here
from spade_faiss.index.image_index import ImageIndex, ImageIndexManifest, build_image_index
from spade_faiss.index.staleness import IndexedShard
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.recipe import Build, Query, Recipe
from tests.support.manifests import edit_manifest

DIM = 12
LEVEL = Level("x", channels=1, stride=1, height=1, width=1)

FLAT = Recipe(name="flat", build=Build(image="Flat"))
HNSW = Recipe(name="hnsw", build=Build(image="HNSW32"), query=Query(image="efSearch=128"))
IVF = Recipe(name="ivf", build=Build(image="IVF4,Flat"), query=Query(image="nprobe=4"))
RECIPES = [FLAT, HNSW, IVF]

COUNT = 201


def structured(n: int, *, seed: int) -> FloatArray:
    """Clusters far from the origin, of very different spread: where a matrix product rounds, and neighbors are close."""
    rng = np.random.default_rng(seed)
    centers = 20 + 5 * np.random.default_rng(99).standard_normal((6, DIM))
    spread = np.array([1.0, 0.5, 0.1, 1.0, 0.03, 2.0])
    cluster = rng.integers(0, 6, n)
    points = centers[cluster] + spread[cluster, None] * rng.standard_normal((n, DIM))
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
    return fill(Bank.create(path, Layout(levels=(LEVEL,), embedding_dim=DIM, input_size=(1, 1))), embedding, sizes)


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


def file_of(bank: Bank, recipe: Recipe) -> Path:
    """The one index file of a recipe."""
    (file,) = index_folder(bank, recipe).glob("*.faiss")
    return file


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
    assert index.indexed == (COUNT if recipe.needs_image_index else 0)
    D, I = index.search(xq, k)
    assert_nearest(D, I, xq, xb, k)
    # One more neighbor changes nothing of the first k, one query alone nothing of its line.
    more, _ = index.search(xq, k + 1)
    np.testing.assert_array_equal(more[:, :k], D)
    alone, _ = index.search(xq[3:4], k)
    np.testing.assert_array_equal(alone[0], D[3])


@pytest.mark.parametrize("recipe", [FLAT, IVF], ids=lambda recipe: recipe.name)
def test_all_of_the_bank_can_be_asked_for(indexed: Path, xb: FloatArray, xq: FloatArray, recipe: Recipe) -> None:
    D, I = ImageIndex.open(Bank.open(indexed), recipe).search(xq, COUNT)
    assert_nearest(D, I, xq, xb, COUNT)


def test_more_than_the_bank_holds_is_refused(indexed: Path, xq: FloatArray) -> None:
    with pytest.raises(InputError, match="fewer than k=202 neighbors"):
        ImageIndex.open(Bank.open(indexed), FLAT).search(xq, COUNT + 1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_rows_of_the_bank_find_themselves_at_distance_zero(indexed: Path, xb: FloatArray, recipe: Recipe) -> None:
    D, I = ImageIndex.open(Bank.open(indexed), recipe).search(xb, 1)
    np.testing.assert_array_equal(D[:, 0], 0)
    np.testing.assert_array_equal(I[:, 0], np.arange(COUNT))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_images_added_since_are_searched_without_the_index(bank: Bank, xb: FloatArray, xq: FloatArray, recipe: Recipe) -> None:
    added = structured(43, seed=3)
    fill(bank, added, [40, 3])
    index = ImageIndex.open(Bank.open(bank.path), recipe)
    assert index.indexed == (COUNT if recipe.needs_image_index else 0)
    D, I = index.search(xq, 9)
    assert_nearest(D, I, xq, np.concatenate([xb, added]), 9)
    assert (I >= COUNT).any()
    assert (I < COUNT).any()


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda recipe: recipe.name)
def test_an_index_built_again_holds_what_was_added(
    bank: Bank, xb: FloatArray, xq: FloatArray, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is added to, not made anew: FAISS is not asked for another one."""
    (before,) = [item for item in read_built(ImageIndexManifest, bank) if item.recipe == recipe.name]
    added = structured(9, seed=3)
    fill(bank, added, [5, 4])
    with monkeypatch.context() as patch:
        patch.setattr(import_faiss(), "index_factory", None)
        manifest, done = build_image_index(bank, recipe)
    assert done == "added 9 images to it"
    assert (manifest.count, manifest.generation, len(manifest.shards)) == (COUNT + 9, 6, 6)
    assert manifest.shards[:4] == before.shards
    assert (manifest.trained, manifest.build) == (before.trained, before.build + 1)
    assert sorted(path.name for path in index_folder(bank, recipe).iterdir()) == [manifest.file.file, "index.json"]
    index = ImageIndex.open(Bank.open(bank.path), recipe)
    assert index.indexed == COUNT + 9
    assert_nearest(*index.search(xq, 5), xq, np.concatenate([xb, added]), 5)


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda recipe: recipe.name)
def test_building_again_changes_nothing(bank: Bank, recipe: Recipe) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in index_folder(bank, recipe).iterdir()}

    before = state()
    manifest, done = build_image_index(bank, recipe)
    assert done == "is up to date"
    assert manifest in read_built(ImageIndexManifest, bank)
    assert state() == before
    again, done = build_image_index(bank, recipe, rebuild=True)
    assert done == "built anew: asked for"
    assert again.file.sha256 == manifest.file.sha256
    assert state().keys() == {"image-000001.faiss", "index.json"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_removed_images_are_found_no_more_until_they_are_restored(
    bank: Bank, xb: FloatArray, xq: FloatArray, recipe: Recipe
) -> None:
    """More of them than the spare candidates, and those nearest to the queries: what is left is found all the same."""
    nearest = np.unique(brute_force(xq, xb).argsort(axis=1)[:, :3])
    gone = [bank.ids[row] for row in nearest]
    added = structured(30, seed=3)
    fill(bank, added, [30])
    bank.remove([*gone, bank.ids[COUNT + 3]])
    left = np.delete(np.concatenate([xb, added]), [*nearest, COUNT + 3], axis=0)
    index = ImageIndex.open(bank, recipe)
    assert index.indexed == (COUNT - len(gone) if recipe.needs_image_index else 0)
    for k in (1, 9):
        assert_nearest(*index.search(xq, k), xq, left, k)
    bank.restore([*gone, *bank.removed])
    D, I = ImageIndex.open(bank, recipe).search(xq, 9)
    assert_nearest(D, I, xq, np.concatenate([xb, added]), 9)


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda recipe: recipe.name)
def test_an_index_of_many_images_that_are_gone_is_made_anew(bank: Bank, xb: FloatArray, xq: FloatArray, recipe: Recipe) -> None:
    """Not of removed ones, which may come back, but of those that were compacted away."""
    bank.remove(bank.ids[:51])
    assert build_image_index(bank, recipe)[1] == "is up to date"
    assert_nearest(*ImageIndex.open(bank, recipe).search(xq, 9), xq, xb[51:], 9)
    bank.compact(target_bytes=1)
    assert re.match(r"built anew: \d+ of its 201 entries are of images that are gone", build_image_index(bank, recipe)[1])
    assert_nearest(*ImageIndex.open(bank, recipe).search(xq, 9), xq, xb[51:], 9)


def test_an_index_whose_training_does_not_fit_any_more_is_made_anew(bank: Bank, xb: FloatArray, xq: FloatArray) -> None:
    """A graph is not trained, and is added to; lists are trained again on images that have drifted, or are many more."""
    drifted = structured(40, seed=3) + np.float32(60)
    fill(bank, drifted, [40])
    assert build_image_index(bank, HNSW)[1] == "added 40 images to it"
    manifest, done = build_image_index(bank, IVF)
    assert re.fullmatch(
        r"built anew: images added since lie \d+\.\d times as far from the mean as those it was trained on", done
    )
    assert (manifest.trained, manifest.build) == (5, 1)
    more = structured(800, seed=4)
    fill(bank, more, [800])
    assert build_image_index(bank, HNSW)[1] == "added 800 images to it"
    assert build_image_index(bank, IVF)[1] == "built anew: it was trained on 241 images, the bank holds 1041"
    for recipe in (HNSW, IVF):
        assert_nearest(*ImageIndex.open(bank, recipe).search(xq, 5), xq, np.concatenate([xb, drifted, more]), 5)


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda recipe: recipe.name)
def test_a_compacted_bank_keeps_its_index_where_shards_stay(
    bank: Bank, xb: FloatArray, xq: FloatArray, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    """Shards that were written anew are searched flat; those that are as they were are found in it, wherever they stand."""
    smallest = min(shard.bytes for shard in bank.manifest.shards)
    bank.remove([bank.ids[3]])
    bank.compact(target_bytes=smallest)  # joins nothing
    left = np.delete(xb, 3, axis=0)
    index = ImageIndex.open(bank, recipe)
    assert index.indexed == COUNT - 64
    assert_nearest(*index.search(xq, 5), xq, left, 5)
    assert not caplog.records
    # All of it in one shard: nothing of what the index holds is there any more.
    bank.compact()
    index = ImageIndex.open(bank, recipe)
    assert index.indexed == 0
    assert "holds no image of the bank, so all are searched without it" in caplog.text
    assert_nearest(*index.search(xq, 5), xq, left, 5)
    assert build_image_index(bank, recipe)[1].startswith("built anew: 201 of its 201 entries are of images that are gone")
    index = ImageIndex.open(bank, recipe)
    assert index.indexed == COUNT - 1
    assert_nearest(*index.search(xq, 5), xq, left, 5)


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


def test_neighbors_beyond_the_rounding_of_a_matrix_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(InputError, match=r"returned fewer than k=150 neighbors; raise its query parameters"):
        narrow.search(xq, 150)


def test_query_parameters_reach_the_index_without_a_rebuild(indexed: Path, xb: FloatArray) -> None:
    """A narrow search may miss neighbors, but what it returns are true distances; a wide one misses none."""
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
    one, two = (build_image_index(make_bank(tmp_path / name, xb, [COUNT]), IVF)[0] for name in ("a", "b"))
    assert one.file.sha256 == two.file.sha256


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
    bank = Bank.create(tmp_path / "bank", Layout(levels=(LEVEL,), embedding_dim=DIM, input_size=(1, 1)))
    with pytest.raises(InputError, match="is empty; extract images first"):
        build_image_index(bank, HNSW)


@pytest.mark.parametrize(
    ("recipe", "rebuild"),
    [(IVF, False), (IVF, True), (replace(IVF, build=Build(image="IVF8,Flat")), False)],
    ids=["added to", "anew", "other settings"],
)
def test_an_interrupted_build_leaves_the_old_index(
    bank: Bank, xb: FloatArray, xq: FloatArray, recipe: Recipe, rebuild: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = structured(9, seed=3)
    fill(bank, added, [9])
    before = {path.name: path.read_bytes() for path in index_folder(bank, IVF).iterdir()}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_index, "write_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_image_index(bank, recipe, rebuild=rebuild)
    with monkeypatch.context() as patch:
        patch.setattr(IndexFolder, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_image_index(bank, recipe, rebuild=rebuild)
    # The new file was there before its manifest: nothing names it, and the old one is as it was.
    after = {path.name: path.read_bytes() for path in index_folder(bank, IVF).iterdir()}
    assert after.keys() - before.keys() == {"image-000001.faiss"}
    assert {name: after[name] for name in before} == before
    index = ImageIndex.open(bank, IVF)
    assert index.indexed == COUNT
    assert_nearest(*index.search(xq, 5), xq, np.concatenate([xb, added]), 5)
    build_image_index(bank, recipe, rebuild=rebuild)
    assert ImageIndex.open(bank, recipe).indexed == COUNT + 9
    assert sorted(path.name for path in index_folder(bank, IVF).iterdir()) == ["image-000001.faiss", "index.json"]


# ---- what cannot be opened


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(
    "query",
    [
        "nprobe",
        "nprobe=x",
        "nonsense=3",
        "nonsense",
        "efSearch=1000000000",
        "nprobe=2,efSearch=1e30",
        "nprobe=-1",
        "efSearch=inf",
    ],
)
def test_bad_query_parameters_are_named(indexed: Path, recipe: Recipe, query: str) -> None:
    changed = replace(recipe, query=Query(image=query))
    with pytest.raises(InputError, match=f"FAISS does not take the query parameters '{query}' for this index"):
        ImageIndex.open(Bank.open(indexed), changed)


def test_query_parameters_beyond_sense_are_refused_before_faiss_allocates_them(indexed: Path) -> None:
    """Fault: efSearch=1000000000 took 16 GiB, whatever --memory said."""
    changed = replace(HNSW, query=Query(image="efSearch=1000000000"))
    with pytest.raises(InputError, match="efSearch must be a number from 0 to 65536"):
        ImageIndex.open(Bank.open(indexed), changed)
    ImageIndex.open(Bank.open(indexed), replace(HNSW, query=Query(image="efSearch=65536")))


def test_an_index_that_was_not_built_names_the_command(tmp_path: Path, xb: FloatArray) -> None:
    bank = make_bank(tmp_path / "bank", xb, [COUNT])
    with pytest.raises(
        BankError, match=r"has no index 'hnsw' of its embeddings; build it with: spade-faiss index .*bank --recipe hnsw$"
    ):
        ImageIndex.open(bank, HNSW)


def test_an_index_of_another_recipe_is_refused_with_both(bank: Bank) -> None:
    changed = replace(IVF, build=Build(image="IVF8,Flat"))
    with pytest.raises(BankError, match="was built with factory 'IVF4,Flat', the recipe says 'IVF8,Flat'"):
        ImageIndex.open(bank, changed)


def test_an_index_of_another_recipe_is_replaced(bank: Bank, xb: FloatArray, xq: FloatArray) -> None:
    changed = replace(IVF, build=Build(image="IVF8,Flat"), query=Query(image="nprobe=8"))
    assert (
        build_image_index(bank, changed)[1] == "built anew: it was built with factory 'IVF4,Flat', the recipe says 'IVF8,Flat'"
    )
    assert_nearest(*ImageIndex.open(bank, changed).search(xq, 5), xq, xb, 5)
    with pytest.raises(BankError, match="was built with factory 'IVF8,Flat', the recipe says 'IVF4,Flat'"):
        ImageIndex.open(bank, IVF)


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda recipe: recipe.name)
def test_an_index_of_another_bank_holds_none_of_its_images(
    bank: Bank, xq: FloatArray, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None of its entries is taken for an image of this one, although there are as many, in shards of the same sizes."""
    others = structured(COUNT, seed=9)
    other = make_bank(tmp_path / "other", others, [64, 1, 100, 36])
    shutil.copytree(bank.path / "indexes", other.path / "indexes")
    index = ImageIndex.open(other, recipe)
    command = f"spade-faiss index {other.path} --recipe {recipe.name}"
    assert f"holds no image of the bank, so all are searched without it; bring it up to date: {command}" in caplog.text
    assert index.indexed == 0
    assert_nearest(*index.search(xq, 5), xq, others, 5)
    assert build_image_index(other, recipe)[1] == "built anew: 201 of its 201 entries are of images that are gone"
    assert ImageIndex.open(other, recipe).indexed == COUNT


def test_a_damaged_index_file_is_never_given_to_faiss(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("FAISS read it")

    monkeypatch.setattr(import_faiss(), "read_index", refuse)
    file = file_of(bank, IVF)
    data = file.read_bytes()
    rng = random.Random(1)
    for number in range(8):
        place = rng.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        file.write_bytes(data[:place] if number % 2 else flipped)
        with pytest.raises(BankError, match=rf"{file.name} has sha256 .*, expected .*; rebuild it with: spade-faiss index"):
            ImageIndex.open(bank, IVF)
    file.unlink()
    with pytest.raises(BankError, match=rf"{file.name} is missing; rebuild it with"):
        ImageIndex.open(bank, IVF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema=4), "has schema 4, this version reads 3; it was written by a newer spade_faiss"),
        (lambda content: content.update(schema=2), "has schema 2, this version reads 3; rebuild the index with"),
        (lambda content: content.update(schema=True), "has schema True, this version reads 3"),
        (lambda content: content.pop("schema"), "is damaged .*rebuild the index with"),
        (lambda content: content.update(format="x"), "is damaged: it is of format 'x', expected 'spade_faiss image index'"),
        (lambda content: content.update(extra=2), "unknown key 'extra'"),
        (lambda content: content.pop("file"), "missing key 'file'"),
        (lambda content: content["file"].pop("sha256"), "missing key 'sha256'"),
        (lambda content: content.update(build="1"), "build='1' is of type str"),
        (lambda content: content["shards"][0].update(count="64"), "count='64' is of type str"),
        (lambda content: content["shards"][0].update(count=63), "holds 201 entries, its manifest says 200"),
        (lambda content: content.update(shards=[]), "holds 201 entries, its manifest says 0"),
        (lambda content: content["shards"].pop(), "holds 201 entries, its manifest says 165"),
        (lambda content: content["shards"].append(content["shards"][0]), "it lists a shard twice"),
        (
            lambda content: (content["shards"][0].update(count=60), content["shards"][1].update(count=5)),
            "says that a shard has 60 images, it has 64",
        ),
        (lambda content: content.update(shards=["0" * 64]), "expected a mapping, got str"),
        (lambda content: content["file"].update(sha256="0" * 64), "has sha256 .*, expected 0000"),
        (
            lambda content: content["file"].update(file="image-000007.faiss"),
            r"build 0 names the files \['image-000007.faiss'\], expected \['image-000000.faiss'\]",
        ),
        (
            lambda content: content["file"].update(file="../../manifest.json"),
            "file='../../manifest.json' with mtime_ns",
        ),
        (lambda content: content.update(factory="Flat"), "was built with factory 'Flat', the recipe says 'IVF4,Flat'"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(bank: Bank, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """By its checksum; and, where somebody gave it a right one, by what it says."""
    path = index_folder(bank, IVF) / "index.json"
    text = path.read_text()
    edit_manifest(path, change, sign=False)
    before, after = json.loads(text), json.loads(path.read_text())
    # What is of another kind has another checksum, or none.
    other_kind = any(before[key] != after.get(key) for key in ("format", "schema"))
    unsigned = (
        message
        if other_kind
        else "is damaged: its content has sha256 .*, it records .*; rebuild the index with: spade-faiss index"
    )
    with pytest.raises(BankError, match=unsigned):
        ImageIndex.open(bank, IVF)
    path.write_text(text)
    edit_manifest(path, change)
    with pytest.raises(BankError, match=message):
        ImageIndex.open(bank, IVF)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["shards"].reverse(),
        lambda content: content.update(trained=0),
        lambda content: content.update(build=5),
        lambda content: content.update(faiss="9"),
        lambda content: content.pop("sha256"),
        lambda content: content.update(sha256=None),
        lambda content: content.update(sha256="0" * 64),
    ],
)
def test_the_checksum_of_a_manifest_is_of_all_of_it(bank: Bank, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(index_folder(bank, IVF) / "index.json", change, sign=False)
    for read in (lambda: ImageIndex.open(bank, IVF), lambda: read_built(ImageIndexManifest, bank)):
        with pytest.raises(
            BankError, match=r"is damaged: its content has sha256 .*, it records .*; rebuild the index with: spade-faiss index"
        ):
            read()
    # The command that it names is enough.
    build_image_index(bank, IVF)
    assert ImageIndex.open(bank, IVF).indexed == COUNT


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_of_something_else_is_refused(bank: Bank, content: bytes) -> None:
    (index_folder(bank, IVF) / "index.json").write_bytes(content)
    for read in (lambda: ImageIndex.open(bank, IVF), lambda: read_built(ImageIndexManifest, bank)):
        with pytest.raises(BankError, match=r"index\.json is damaged.*; rebuild the index with: spade-faiss index .* ivf$"):
            read()


def test_no_changed_character_of_a_manifest_changes_an_answer(bank: Bank, xb: FloatArray, xq: FloatArray) -> None:
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
    manifests = read_built(ImageIndexManifest, bank)
    assert [item.recipe for item in manifests] == ["hnsw", "ivf"]
    for item, recipe in zip(manifests, RECIPES[1:], strict=True):
        assert isinstance(item, ImageIndexManifest)
        assert item.factory == recipe.build.image
        assert (item.count, item.generation) == (COUNT, bank.generation)
        assert item.shards == tuple(IndexedShard(sha256=shard.sha256, count=shard.count) for shard in bank.manifest.shards)
        # A graph is not trained.
        assert (item.build, item.trained) == (0, 4 if recipe is IVF else 0)
        assert item.file.file == file_of(bank, recipe).name == "image-000000.faiss"
        assert item.bytes == item.file.bytes == file_of(bank, recipe).stat().st_size


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IVF4,PQ4x4", "IVF4,SQ8"])
def test_an_inverted_file_that_is_filled_in_parts_is_the_same(
    factory: str, tmp_path: Path, xb: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts may come in any order; the file is that of one process to the bit, and nothing else is left."""
    recipe = Recipe(name="r", build=Build(image=factory))
    banks = [make_bank(tmp_path / name, xb, [50, 60, 1, 90]) for name in ("one", "many")]
    monkeypatch.setattr(image_encode, "_PART_ROWS", 60)
    done: list[int] = []

    def elsewhere(encoding: Encoding[Job], jobs: Sequence[Job]) -> Iterator[tuple[int, FileEntry]]:
        for number, job in reversed([*enumerate(jobs)]):
            done.append(number)
            there: Encoding[Job] = pickle.loads(pickle.dumps(encoding))
            yield number, there.open().encode(job)

    build_image_index(banks[0], recipe)
    build_image_index(banks[1], recipe, encode=elsewhere)
    assert done == [1, 0]
    files = [[path for path in index_folder(bank, recipe).iterdir() if path.suffix == ".faiss"] for bank in banks]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] == ["image-000000.faiss"]
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    # A graph is of all vectors, and images that are added to an index are few.
    for bank in banks:
        fill(bank, structured(5, seed=9), [5])
    assert build_image_index(banks[1], recipe, encode=elsewhere)[1] == "added 5 images to it"
    build_image_index(banks[1], HNSW, encode=elsewhere)
    assert done == [1, 0]


def test_a_part_that_is_not_the_one_that_was_written_is_refused(
    tmp_path: Path, xb: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(tmp_path / "bank", xb, [100, 101])
    monkeypatch.setattr(image_encode, "_PART_ROWS", 60)

    def damaged(encoding: Encoding[Job], jobs: Sequence[Job]) -> Iterator[tuple[int, FileEntry]]:
        for number, entry in encode_here(encoding, jobs):
            path = index_folder(bank, IVF) / entry.file
            path.write_bytes(path.read_bytes()[:-1])
            yield number, entry

    with pytest.raises(BankError, match="not the file that was written; run the command again"):
        build_image_index(bank, IVF, encode=damaged)
    assert not list(index_folder(bank, IVF).glob("*.faiss"))
