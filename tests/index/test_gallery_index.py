"""Gallery indexes: built once, resumed, extended; damaged, missing and unfit files are refused."""

from __future__ import annotations

import gc
import json
import logging
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector, Scores
from spade_faiss.core import arrays
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import hash_file
from spade_faiss.core.signed_json import hash_json
from spade_faiss.core.types import FloatArray
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index, check_recipe, update_indexes
from spade_faiss.index.built_index import index_folder, read_built
from spade_faiss.index.gallery_build import build_gallery
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.opened_gallery import EncodedLevel, open_gallery
from spade_faiss.search import compact, history, ivf
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe
from tests.support.oracle import Features, bank_of, batch_of, levels_of, product

SHAPES = {"fine": (5, 6, 16), "coarse": (3, 4, 8)}
INPUT = (20, 24)
DIM = 8
COUNT = 11
SHARDS = [4, 1, 3]
STARTS = [0, 4, 5, 8, 11]

IVF = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 4}), query=Query(settings={"nprobe": 2}))
COMPACT = Recipe(name="codes", build=Build(gallery="compact", settings={"dims": 4}), query=Query(settings={"rerank": 3}))
HISTORY = Recipe(name="history", build=Build(gallery="history", settings={"lists": 2}), query=Query(settings={"nprobe": 1}))
RECIPES = [COMPACT, HISTORY, IVF]  # as their folders are sorted
MODULES: dict[str, Any] = {"compact": compact, "history": history, "ivf": ivf}

by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def normals(count: int = COUNT) -> Features:
    return product(1, count, SHAPES, DIM)


def queries() -> Features:
    return product(2, 3, SHAPES, DIM, defect=True)


def late() -> Features:
    """Normals that came later, and look like the others."""
    return product(2, 3, SHAPES, DIM)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of four shards with everything built. Do not change it."""
    bank = bank_of(tmp_path_factory.mktemp("store") / "bank", normals(), input_size=INPUT, shards=SHARDS)
    for recipe in RECIPES:
        build_gallery(bank, recipe)
    return bank.path


@pytest.fixture
def bank(built: Path, tmp_path: Path) -> Bank:
    """The same, to be changed."""
    return Bank.open(shutil.copytree(built, tmp_path / "bank"))


@pytest.fixture
def bare(tmp_path: Path) -> Bank:
    """A bank of the same images with nothing built."""
    return bank_of(tmp_path / "bare", normals(), input_size=INPUT, shards=SHARDS)


def folder_of(bank: Bank, recipe: Recipe) -> Path:
    return index_folder(bank, recipe) / "gallery"


def manifest_path(bank: Bank, recipe: Recipe) -> Path:
    return index_folder(bank, recipe) / "gallery.json"


def trained_name(build: int = 0) -> str:
    """The file of what a build has trained."""
    return f"trained-{build:03d}.h5"


def shard_name(bank: Bank, number: int, build: int = 0) -> str:
    """The file of a shard's encodings."""
    return f"{build:03d}-{bank.manifest.shards[number].sha256[:16]}.h5"


def file_names(bank: Bank, build: int = 0) -> list[str]:
    """All files, sorted."""
    return sorted([trained_name(build), *(shard_name(bank, number, build) for number in range(len(bank.manifest.shards)))])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Edit a manifest; `sign`: give it the checksum of what it now says."""
    content = json.loads(path.read_text())
    change(content)
    if sign:
        content.pop("sha256", None)
        content["sha256"] = hash_json(content)
    path.write_text(json.dumps(content))


def command(bank: Bank, recipe: Recipe) -> str:
    return f"spade-faiss index {bank.path} --recipe {recipe.name}"


def swap(path: Path, data: bytes) -> None:
    """Put another file in its place; the old one may be mapped, and must not change under the mapping."""
    path.unlink()
    path.write_bytes(data)


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything about the files of a folder that writing to it would change."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.glob("*"))}


def scores_of(bank: Bank, recipe: Recipe, features: Features | None = None) -> Scores:
    return Detector.open(bank.path, recipe=recipe).score_features(batch_of(queries() if features is None else features))


def equal(a: Scores, b: Scores) -> None:
    np.testing.assert_array_equal(a.neighbor_ids, b.neighbor_ids)
    np.testing.assert_array_equal(a.maps, b.maps)
    for level, dist in a.level_dist.items():
        np.testing.assert_array_equal(dist, b.level_dist[level])
        np.testing.assert_array_equal(a.nearest[level], b.nearest[level])


def add(bank: Bank, features: Features, prefix: str = "late") -> None:
    bank.append(batch_of(features, [f"{prefix} {number}" for number in range(len(features))]))


def encoded_level(bank: Bank, recipe: Recipe, name: str) -> tuple[EncodedLevel, Blocks]:
    level = next(level for level in bank.layout.levels if level.name == name)

    def read(row: int) -> FloatArray:
        found: FloatArray = bank.level_map(name, row).reshape(-1, level.channels).astype(np.float32)
        return found

    blocks = Blocks(level, ArraySource(np.stack([read(row) for row in range(len(bank))])))
    return EncodedLevel(open_gallery(bank, recipe), level, blocks), blocks


def contents(bank: Bank, recipe: Recipe) -> list[npt.NDArray[Any]]:
    """All that was trained and encoded, of all levels and rows, copied."""
    found = []
    for name in SHAPES:
        encoded, _ = encoded_level(bank, recipe, name)
        of_level = [encoded.trained, *(encoded(row) for row in range(len(bank)))]
        found += [array.copy() for item in of_level for _, array in sorted(item.items())]
    return found


def same(a: list[npt.NDArray[Any]], b: list[npt.NDArray[Any]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Calls(NamedTuple):
    """Of a method's functions, one a level."""

    train: list[str]
    encode: list[FloatArray]


def watch(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, *, interrupt_at: int | None = None) -> Calls:
    """Count the calls; the `interrupt_at`-th encoding is interrupted."""
    module = MODULES[recipe.build.gallery]
    method, calls = module.METHOD, Calls([], [])
    assert method.train is not None
    assert method.encode is not None
    train_before, encode_before = method.train, method.encode

    def train(blocks: Blocks, build: Any) -> Any:
        calls.train.append(blocks.level.name)
        return train_before(blocks, build)

    def encode(block: FloatArray, trained: Any, build: Any) -> Any:
        if len(calls.encode) == interrupt_at:
            raise KeyboardInterrupt
        calls.encode.append(block)
        return encode_before(block, trained, build)

    monkeypatch.setattr(module, "METHOD", replace(method, train=train, encode=encode))
    return calls


# What is built


@by_name
def test_what_is_built_says_what_it_is(bank: Bank, recipe: Recipe) -> None:
    manifest = json.loads(manifest_path(bank, recipe).read_text())
    method = resolve_recipe(recipe)
    assert manifest["format"] == "spade_faiss gallery index"
    assert manifest["schema"] == GalleryIndexManifest.SCHEMA == 2
    assert (manifest["recipe"], manifest["gallery"]) == (recipe.name, recipe.build.gallery)
    # Settings that the recipe leaves out are spelled out: a default may change one day.
    assert manifest["settings"] == {**vars(method.build)}
    assert set(recipe.build.settings) < set(manifest["settings"])
    # Trained once, on all of the shards.
    assert (manifest["generation"], manifest["build"], manifest["trained"]) == (4, 0, 4)
    expected = [(shard.sha256, shard.count) for shard in bank.manifest.shards]
    assert [(shard["sha256"], shard["count"]) for shard in manifest["shards"]] == expected
    assert manifest["build_s"] > 0
    assert manifest["faiss"]
    entries = [manifest["trained_file"], *(shard["file"] for shard in manifest["shards"])]
    assert [entry["file"] for entry in entries] == [trained_name(), *(shard_name(bank, number) for number in range(4))]
    assert names_in(folder_of(bank, recipe)) == file_names(bank)
    for entry in entries:
        path = folder_of(bank, recipe) / entry["file"]
        assert entry["bytes"] == path.stat().st_size
        assert entry["mtime_ns"] == path.stat().st_mtime_ns
        assert entry["sha256"] == hash_file(path)
    assert manifest.pop("sha256") == hash_json(manifest)


@by_name
def test_what_is_read_is_what_was_encoded(bank: Bank, recipe: Recipe) -> None:
    """Read back to the bit, each image its own, without a second look at the bank."""
    chosen = resolve_recipe(recipe)
    assert chosen.method.encode is not None
    for name in SHAPES:
        encoded, blocks = encoded_level(bank, recipe, name)
        for row in range(COUNT):
            expected = chosen.method.encode(blocks(row), encoded.trained, chosen.build)
            found = encoded(row)
            assert found.keys() == expected.keys()
            for key, array in expected.items():
                np.testing.assert_array_equal(found[key], array)
                assert found[key].dtype == array.dtype
        with pytest.raises(IndexError):
            encoded(COUNT)


@by_name
def test_building_again_changes_nothing(bank: Bank, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before, manifest = state_of(folder_of(bank, recipe)), read_built(GalleryIndexManifest, bank)[RECIPES.index(recipe)]
    calls = watch(monkeypatch, recipe)
    again, done = build_gallery(bank, recipe)
    assert not any(calls)
    assert state_of(folder_of(bank, recipe)) == before
    assert (again, done) == (manifest, "is up to date")


@by_name
def test_the_same_bank_gives_the_same_files(built: Path, bare: Bank, recipe: Recipe) -> None:
    _, done = build_gallery(bare, recipe)
    assert done == "built"
    assert names_in(folder_of(bare, recipe)) == names_in(folder_of(Bank.open(built), recipe))
    for path in folder_of(bare, recipe).iterdir():
        assert path.read_bytes() == (folder_of(Bank.open(built), recipe) / path.name).read_bytes()


def test_recipes_of_one_bank_do_not_meet(bank: Bank) -> None:
    before = state_of(folder_of(bank, COMPACT))
    build_gallery(bank, replace(IVF, build=Build(gallery="ivf", settings={"lists": 3})))
    assert state_of(folder_of(bank, COMPACT)) == before
    other = replace(IVF, name="more-lists", build=Build(gallery="ivf", settings={"lists": 9}))
    build_gallery(bank, other)
    assert [item.recipe for item in read_built(GalleryIndexManifest, bank)] == ["codes", "history", "ivf", "more-lists"]
    for recipe in (COMPACT, other):
        open_gallery(bank, recipe)


def test_levels_of_which_nothing_is_encoded(bare: Bank) -> None:
    """Too narrow for codes: one of them, or all."""
    for dims, narrow in ((5, ["coarse"]), (9, ["fine", "coarse"])):
        recipe = replace(COMPACT, name=f"codes{dims}", build=Build(gallery="compact", settings={"dims": dims}))
        build_gallery(bare, recipe)
        for name in SHAPES:
            encoded, _ = encoded_level(bare, recipe, name)
            assert (encoded.trained == {}) == (encoded(0) == {}) == (name in narrow)
        exact, found = scores_of(bare, Recipe(name="exact")), scores_of(bare, recipe)
        for name in narrow:
            np.testing.assert_array_equal(found.level_dist[name], exact.level_dist[name])


@by_name
def test_levels_are_told_apart_by_any_names(tmp_path: Path, recipe: Recipe) -> None:
    """On disk, and in the cache of decoded blocks, where blocks are that are made from the encodings of a level."""

    def scores(names: tuple[str, str], folder: str) -> list[FloatArray]:
        def renamed(features: Features) -> Features:
            return Features(features.embedding, dict(zip(names, features.levels.values(), strict=True)))

        bank = bank_of(tmp_path / folder, renamed(normals()), input_size=INPUT, dtype="float16")
        build_gallery(bank, recipe)
        found = Detector.open(bank.path, recipe=recipe).score_features(batch_of(renamed(queries())))
        return [found.level_dist[name] for name in names]

    plain = scores(("fine", "coarse"), "plain")
    for number, names in enumerate([("a", "a by list"), ("a", "a codes"), ("a b", "a"), ("trained", "Ebene 2 µ")]):
        for found, expected in zip(scores(names, str(number)), plain, strict=True):
            np.testing.assert_array_equal(found, expected)


# Interruptions


@by_name
@pytest.mark.parametrize("images", [0, 1, 4, 7, 10])
def test_an_interrupted_build_goes_on(bare: Bank, built: Path, recipe: Recipe, images: int, tmp_path: Path) -> None:
    """What was trained and the shards that were finished stay; in the end it is what it would have been."""
    levels = len(SHAPES)
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, recipe, interrupt_at=images * levels + 1)
        with pytest.raises(KeyboardInterrupt):
            build_gallery(bare, recipe)
        assert calls.train == list(SHAPES)
    finished = max(number for number, start in enumerate(STARTS) if start <= images)
    expected = [trained_name(), *(shard_name(bare, number) for number in range(finished))]
    # No half of a file, nor a manifest that names too little.
    assert names_in(folder_of(bare, recipe)) == sorted(expected)
    assert sorted(path.name for path in index_folder(bare, recipe).iterdir()) == ["gallery"]
    with pytest.raises(BankError, match=f"has no index '{recipe.name}' of its maps; build it with: {command(bare, recipe)}$"):
        open_gallery(bare, recipe)
    before = state_of(folder_of(bare, recipe))
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, recipe)
        manifest, done = build_gallery(bare, recipe)
        assert done == "built"
        assert calls.train == []
        assert len(calls.encode) == levels * (COUNT - STARTS[finished])
    after = state_of(folder_of(bare, recipe))
    assert {name: after[name] for name in before} == before
    whole = read_built(GalleryIndexManifest, Bank.open(built))[RECIPES.index(recipe)]
    assert [entry.sha256 for entry in manifest.files] == [entry.sha256 for entry in whole.files]


def test_an_interruption_while_training(bare: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "hash_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_gallery(bare, IVF)
    assert list(folder_of(bare, IVF).iterdir()) == []
    build_gallery(bare, IVF)
    open_gallery(bare, IVF)


@by_name
def test_a_full_disk_loses_nothing(bare: Bank, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(bare.path)
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return real._replace(free=1000) if len(asked) > 3 else real

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", usage)
        with pytest.raises(
            InputError, match=rf"has 1000 bytes free, {shard_name(bare, 2)} needs \d+; make room and run the command again"
        ):
            build_gallery(bare, recipe)
    assert names_in(folder_of(bare, recipe)) == sorted([shard_name(bare, 0), shard_name(bare, 1), trained_name()])
    before = state_of(folder_of(bare, recipe))
    build_gallery(bare, recipe)
    after = state_of(folder_of(bare, recipe))
    assert {name: after[name] for name in before} == before
    open_gallery(bare, recipe)


def test_a_full_disk_leaves_what_was_built(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """For more images, the old build stays in use."""
    add(bank, late())
    expected = scores_of(bank, IVF)
    real = shutil.disk_usage(bank.path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: real._replace(free=0))
        with pytest.raises(InputError, match="has 0 bytes free"):
            build_gallery(bank, IVF)
    equal(scores_of(bank, IVF), expected)


def test_settings_that_do_not_fit_leave_what_was_built(bank: Bank) -> None:
    """Nothing is taken away before there is something to put in its place."""
    before, manifest = state_of(folder_of(bank, IVF)), manifest_path(bank, IVF).read_bytes()
    with pytest.raises(InputError, match="lists=5000 is more than the 330 vectors of level 'fine'; lower it or add images"):
        build_gallery(bank, replace(IVF, build=Build(gallery="ivf", settings={"lists": 5000})))
    assert state_of(folder_of(bank, IVF)) == before
    assert manifest_path(bank, IVF).read_bytes() == manifest


def test_an_empty_bank_has_no_gallery_index(tmp_path: Path) -> None:
    bank = Bank.create(tmp_path / "empty", Layout(levels=tuple(levels_of(normals())), embedding_dim=DIM, input_size=INPUT))
    for build in (build_gallery, build_index):
        with pytest.raises(InputError, match=r"the bank .*empty is empty; extract images first"):
            build(bank, IVF)
    assert not (bank.path / "indexes").exists()


# Images that were added


@by_name
def test_images_added_since_are_encoded_when_they_are_met(bank: Bank, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are those that a build of the new state gives; and only those images are encoded, then and there."""
    add(bank, late())
    add(bank, product(3, 2, SHAPES, DIM), "later")
    for level in SHAPES:
        encoded, blocks = encoded_level(bank, recipe, level)
        chosen = resolve_recipe(recipe)
        assert chosen.method.encode is not None
        for row in (COUNT, COUNT + 2, COUNT + 4):
            for key, array in chosen.method.encode(blocks(row), encoded.trained, chosen.build).items():
                np.testing.assert_array_equal(encoded(row)[key], array)
    before = scores_of(bank, recipe, late())
    assert before.neighbor_ids[:, 0].tolist() == ["late 0", "late 1", "late 2"]
    assert all((dist == 0).mean() > 0.9 for dist in before.level_dist.values())
    files = state_of(folder_of(bank, recipe))
    with monkeypatch.context() as patch:
        calls = watch(patch, recipe)
        manifest, done = build_gallery(bank, recipe)
        assert calls.train == []
        assert len(calls.encode) == 5 * len(SHAPES)
    assert done == "added 5 images to it"
    assert (manifest.count, manifest.generation, len(manifest.shards)) == (COUNT + 5, 6, 6)
    assert (manifest.build, manifest.trained) == (0, 4)
    after = state_of(folder_of(bank, recipe))
    assert {name: after[name] for name in files} == files
    assert set(after) - set(files) == {shard_name(bank, 4), shard_name(bank, 5)}
    with monkeypatch.context() as patch:
        calls = watch(patch, recipe)
        equal(scores_of(bank, recipe, late()), before)
        assert calls.encode == []


@by_name
def test_a_whole_bank_added_to_a_small_one(tmp_path: Path, recipe: Recipe) -> None:
    """What was trained on three images serves up to four times as many, then it is trained anew."""
    bank = bank_of(tmp_path / "b", normals()[[0, 3, 5]], input_size=INPUT)
    first, _ = build_gallery(bank, recipe)
    add(bank, normals()[[1, 2, 4, *range(6, COUNT)]])
    before = scores_of(bank, recipe)
    second, done = build_gallery(bank, recipe)
    assert done == "added 8 images to it"
    assert second.trained_file == first.trained_file
    equal(scores_of(bank, recipe), before)
    add(bank, product(3, 2, SHAPES, DIM), "later")
    third, done = build_gallery(bank, recipe)
    assert done == "built anew: it was trained on 3 images, the bank holds 13"
    assert (third.build, third.trained) == (1, 3)
    assert third.trained_file.sha256 != first.trained_file.sha256
    scores_of(bank, recipe)


@by_name
def test_what_was_trained_on_other_looking_images_is_trained_anew(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spade_faiss.index.staleness._LEAST", 3)
    bank = bank_of(tmp_path / "b", normals(), input_size=INPUT)
    build_gallery(bank, recipe)
    other = product(3, 3, SHAPES, DIM)
    add(bank, Features(other.embedding + np.float32(100), other.levels))
    second, done = build_gallery(bank, recipe)
    assert re.fullmatch(
        r"built anew: images added since lie \d+\.\d times as far from the mean as those it was trained on", done
    )
    assert (second.build, second.trained, second.count) == (1, 2, COUNT + 3)
    fresh = bank_of(tmp_path / "fresh", normals(), input_size=INPUT)
    add(fresh, Features(other.embedding + np.float32(100), other.levels))
    build_gallery(fresh, recipe)
    assert same(contents(bank, recipe), contents(fresh, recipe))


# Images that were removed


@by_name
def test_removed_images_are_kept_until_the_bank_is_compacted(bank: Bank, recipe: Recipe) -> None:
    """Each image its own, whatever was removed before it; what comes back need not be encoded again."""

    def check(encodings: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            calls = watch(patch, recipe)
            for name in SHAPES:
                encoded, blocks = encoded_level(bank, recipe, name)
                for row in range(len(bank)):
                    expected = unwatched(blocks(row), encoded.trained, chosen.build)
                    found = encoded(row)
                    assert found.keys() == expected.keys()
                    for key, array in expected.items():
                        np.testing.assert_array_equal(found[key], array)
                with pytest.raises(IndexError):
                    encoded(len(bank))
            assert (calls.train, len(calls.encode)) == ([], encodings * len(SHAPES))

    chosen = resolve_recipe(recipe)
    unwatched: Any = chosen.method.encode
    before, names = state_of(folder_of(bank, recipe)), list(bank.ids)
    whole = contents(bank, recipe)
    bank.remove([names[0], names[2], names[4], names[10]])  # of three shards; one of them is empty now
    assert len(bank) == COUNT - 4
    check(encodings=0)
    assert build_gallery(bank, recipe)[1] == "is up to date"
    bank.restore(names[:1])
    check(encodings=0)
    bank.restore([names[2], names[4], names[10]])
    assert same(contents(bank, recipe), whole)
    assert state_of(folder_of(bank, recipe)) == before
    # Compacted: one shard stays, the others became one. What is of it is encoded when it is met, until it is added.
    bank.remove([names[4], names[10]])
    bank.compact(target_bytes=1)
    assert len(bank.manifest.shards) == 3
    check(encodings=2)
    scores = scores_of(bank, recipe)
    gc.collect()  # the detector: files that it may read would stay
    manifest, done = build_gallery(bank, recipe)
    assert done == "added 2 images to it"
    assert (manifest.count, manifest.build) == (COUNT - 2, 0)
    assert names_in(folder_of(bank, recipe)) == file_names(bank)
    check(encodings=0)
    equal(scores_of(bank, recipe), scores)


@by_name
def test_beginning_anew_trains_and_encodes_everything(bank: Bank, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bank, recipe)
    leftover = folder_of(bank, recipe) / "000-0123456789abcdef.h5"
    leftover.write_bytes(b"of a longer bank")
    calls = watch(monkeypatch, recipe)
    manifest, done = build_gallery(bank, recipe, rebuild=True)
    assert (manifest.build, done) == (1, "built anew: asked for")
    assert calls.train == list(SHAPES)
    assert len(calls.encode) == COUNT * len(SHAPES)
    assert names_in(folder_of(bank, recipe)) == file_names(bank, 1)
    assert same(contents(bank, recipe), before)


@by_name
def test_beginning_anew_is_interrupted_and_goes_on(bank: Bank, recipe: Recipe) -> None:
    """Until it has finished, what was there is in use; what it had done is not done again."""
    before, manifest = contents(bank, recipe), manifest_path(bank, recipe).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, recipe, interrupt_at=11)
        with pytest.raises(KeyboardInterrupt):
            build_gallery(bank, recipe, rebuild=True)
    assert manifest_path(bank, recipe).read_bytes() == manifest
    begun = [trained_name(1), shard_name(bank, 0, 1), shard_name(bank, 1, 1)]
    assert names_in(folder_of(bank, recipe)) == sorted([*file_names(bank), *begun])
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, recipe)
        assert same(contents(bank, recipe), before)
        build_gallery(bank, recipe, rebuild=True)
        assert (calls.train, len(calls.encode)) == ([], (COUNT - STARTS[2]) * len(SHAPES))
    assert names_in(folder_of(bank, recipe)) == file_names(bank, 1)
    assert same(contents(bank, recipe), before)


@by_name
def test_files_that_somebody_may_still_read_stay(bank: Bank, recipe: Recipe) -> None:
    batch = batch_of(queries())
    detector = Detector.open(bank.path, recipe=recipe)
    expected = scores_of(bank, recipe)
    gc.collect()  # that detector
    build_gallery(bank, recipe, rebuild=True)
    assert names_in(folder_of(bank, recipe)) == sorted([*file_names(bank), *file_names(bank, 1)])
    equal(detector.score_features(batch), expected)
    del detector
    gc.collect()
    build_gallery(bank, recipe, rebuild=True)
    assert names_in(folder_of(bank, recipe)) == file_names(bank, 2)
    equal(scores_of(bank, recipe), expected)


# Other settings


@pytest.mark.parametrize(
    ("build", "old", "new"),
    [
        (Build(gallery="ivf", settings={"lists": 5}), r"settings \{'lists': 4, .*\}", r"\{'lists': 5, .*\}"),
        (Build(gallery="ivf", settings={"lists": 4, "train_vectors": 77}), "'train_vectors': 50000", "'train_vectors': 77"),
        (Build(gallery="compact", settings={"dims": 4}), "gallery 'ivf'", "'compact'"),
    ],
)
def test_other_settings_are_another_index(bank: Bank, build: Build, old: str, new: str) -> None:
    changed = replace(IVF, build=build, query=Query())
    message = f"was built with .*{old}.*, the recipe says .*{new}.*; run: {command(bank, IVF)}$"
    with pytest.raises(BankError, match=message):
        open_gallery(bank, changed)
    with pytest.raises(BankError, match=message):
        Detector.open(bank.path, recipe=changed)
    # The command that the message names is enough.
    _, done = build_gallery(bank, changed)
    assert re.fullmatch(
        r"built anew: it was built with (settings \{'lists': 4, .*\}|gallery 'ivf'), the recipe says (\{.*\}|'compact')", done
    )
    open_gallery(bank, changed)
    with pytest.raises(BankError, match="was built with"):
        open_gallery(bank, IVF)
    # And back again, to the same bits.
    build_gallery(bank, IVF)
    open_gallery(bank, IVF)


def test_a_build_with_other_settings_that_is_interrupted(bank: Bank) -> None:
    """Neither the old recipe nor the new one meets a mixture: the old one is in use until the new one is there."""
    before, files = contents(bank, IVF), state_of(folder_of(bank, IVF))
    changed = replace(IVF, build=Build(gallery="ivf", settings={"lists": 5}))
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, changed, interrupt_at=11)
        with pytest.raises(KeyboardInterrupt):
            build_gallery(bank, changed)
    with pytest.raises(BankError, match=f"was built with .*{command(bank, IVF)}"):
        open_gallery(bank, changed)
    assert same(contents(bank, IVF), before)
    assert state_of(folder_of(bank, IVF)).items() > files.items()
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, changed)
        build_gallery(bank, changed)
        assert (calls.train, len(calls.encode)) == ([], (COUNT - STARTS[2]) * len(SHAPES))
    assert not same(contents(bank, changed), before)
    build_gallery(bank, IVF)
    assert same(contents(bank, IVF), before)


def test_a_build_with_other_settings_that_is_given_up(bank: Bank) -> None:
    """A third one takes nothing of the second's files, which stand where its own will."""
    changed, third = (replace(IVF, build=Build(gallery="ivf", settings={"lists": lists})) for lists in (5, 6))
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, changed, interrupt_at=11)
        with pytest.raises(KeyboardInterrupt):
            build_gallery(bank, changed)
    fresh = bank_of(bank.path.parent / "fresh", normals(), input_size=INPUT, shards=SHARDS)
    for at in (bank, fresh):
        build_gallery(at, third)
    assert same(contents(bank, third), contents(fresh, third))
    assert names_in(folder_of(bank, third)) == file_names(bank, 1)


def test_query_settings_are_not_built(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch, IVF)
    turned = replace(IVF, query=Query(settings={"nprobe": 4}))
    open_gallery(bank, turned)
    build_gallery(bank, turned)
    assert not any(calls)


# What cannot be opened


@by_name
def test_nothing_built_names_the_command(bare: Bank, recipe: Recipe) -> None:
    for opened in (lambda: open_gallery(bare, recipe), lambda: Detector.open(bare.path, recipe=recipe)):
        with pytest.raises(
            BankError, match=f"has no index '{recipe.name}' of its maps; build it with: {command(bare, recipe)}$"
        ):
            opened()


@by_name
@pytest.mark.parametrize("number", [None, 0, 3])
def test_damaged_files_are_refused(bank: Bank, recipe: Recipe, number: int | None) -> None:
    file = trained_name() if number is None else shard_name(bank, number)
    path = folder_of(bank, recipe) / file
    data, rng = path.read_bytes(), random.Random(1)
    remedy = f"rebuild it with: {command(bank, recipe)} --rebuild$"
    for attempt in range(8):
        place = rng.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        swap(path, data[:place] if attempt % 2 else flipped)
        what = r"\d+ bytes, .* says \d+ bytes" if attempt % 2 else "sha256 .*, .* says sha256 .*"
        with pytest.raises(BankError, match=rf"{file} has changed since it was written: {what}; {remedy}"):
            open_gallery(bank, recipe)
        with pytest.raises(BankError, match=remedy):
            Detector.open(bank.path, recipe=recipe)
    path.unlink()
    with pytest.raises(BankError, match=rf"{file}, which gallery.json names, is missing; {remedy}"):
        open_gallery(bank, recipe)
    path.write_bytes(data)
    assert same(contents(bank, recipe), contents(bank, recipe))


@by_name
def test_the_command_that_is_named_repairs_it(bank: Bank, recipe: Recipe) -> None:
    expected = contents(bank, recipe)
    for path in sorted(folder_of(bank, recipe).iterdir()):
        data = path.read_bytes()
        swap(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BankError, match=r"--rebuild$"):
        open_gallery(bank, recipe)
    build_gallery(bank, recipe, rebuild=True)
    assert same(contents(bank, recipe), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema=1), "has schema 1, this version reads 2; rebuild the index with"),
        (lambda content: content.update(format="x"), "is damaged: it is of format 'x', expected 'spade_faiss gallery index'"),
        (lambda content: content.update(extra=2), "unknown key 'extra'"),
        (lambda content: content.pop("build_s"), "missing key 'build_s'"),
        (lambda content: content.update(recipe=3), "recipe=3 is of type int"),
        (lambda content: content.update(gallery="compact"), "was built with gallery 'compact', the recipe says 'ivf'"),
        (lambda content: content.update(settings={}), "was built with settings {}, the recipe says {'lists': 4"),
        (lambda content: content["settings"].update(lists=5), "was built with settings {'lists': 5"),
        (lambda content: content.update(generation="4"), "generation='4' is of type str"),
        (lambda content: content["shards"][0].update(count="4"), "count='4' is of type str"),
        (lambda content: content["shards"][0].update(count=3), "says that a shard has 3 images, it has 4"),
        (lambda content: content.update(shards=["0" * 64] * 4), "expected a mapping, got str"),
        (lambda content: content["trained_file"].update(sha256="0" * 64, mtime_ns=1), "trained-000.h5 has changed"),
        (lambda content: content["trained_file"].update(bytes=1), "trained-000.h5 has changed"),
        (lambda content: content["trained_file"].update(file="x.h5"), r"build 0 names the files \['x.h5'"),
        (lambda content: content["trained_file"].pop("file"), "missing key 'file'"),
        (lambda content: content["shards"][2]["file"].update(sha256="0" * 64, mtime_ns=1), r"000-\w{16}.h5 has changed"),
        (
            lambda content: content["shards"][2]["file"].update(file="../../../manifest.json"),
            "file='../../../manifest.json' with mtime_ns",
        ),
        (lambda content: content.update(build_s="fast"), "build_s='fast' is of type str"),
        (lambda content: content.update(faiss=1), "faiss=1 is of type int"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(bank: Bank, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """By its checksum; and, where somebody gave it a right one, by what it says."""
    path = manifest_path(bank, IVF)
    text = path.read_text()
    edit_manifest(path, change, sign=False)
    before, after = json.loads(text), json.loads(path.read_text())
    other_kind = any(before[key] != after[key] for key in ("format", "schema"))
    unsigned = message if other_kind else "is damaged: its content has sha256 .*, it records .*; rebuild the index with"
    with pytest.raises(BankError, match=unsigned) as caught:
        open_gallery(bank, IVF)
    assert command(bank, IVF) in str(caught.value)
    path.write_text(text)
    edit_manifest(path, change)
    with pytest.raises(BankError, match=message) as caught:
        open_gallery(bank, IVF)
    assert command(bank, IVF) in str(caught.value)


def test_a_manifest_path_a_newer_version_says_what_to_install(bank: Bank) -> None:
    edit_manifest(manifest_path(bank, IVF), lambda content: content.update(schema=3))
    for read in (lambda: open_gallery(bank, IVF), lambda: read_built(GalleryIndexManifest, bank)):
        with pytest.raises(
            BankError, match="has schema 3, this version reads 2; it was written by a newer spade_faiss: install"
        ):
            read()


@by_name
@pytest.mark.parametrize(
    "change",
    [
        lambda shards: shards.reverse(),
        lambda shards: shards.pop(),
        lambda shards: shards.clear(),
    ],
)
def test_shards_are_found_by_their_content(bank: Bank, recipe: Recipe, change: Callable[[list[Any]], object]) -> None:
    """A manifest that names them in another order, or less of them, is no contradiction."""
    expected = contents(bank, recipe)
    edit_manifest(manifest_path(bank, recipe), lambda content: change(content["shards"]))
    assert same(contents(bank, recipe), expected)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_path_something_else_is_refused(bank: Bank, content: bytes) -> None:
    manifest_path(bank, IVF).write_bytes(content)
    for read in (lambda: open_gallery(bank, IVF), lambda: read_built(GalleryIndexManifest, bank)):
        with pytest.raises(BankError, match=f"gallery.json is damaged.*; rebuild the index with: {command(bank, IVF)}$"):
            read()
    build_gallery(bank, IVF)
    open_gallery(bank, IVF)


def test_no_changed_character_of_a_manifest_changes_an_answer(bank: Bank) -> None:
    path, expected = manifest_path(bank, IVF), contents(bank, IVF)
    text, rng, refused = path.read_text(), random.Random(7), 0
    for place in rng.sample(range(len(text)), 60):
        path.write_text(text[:place] + rng.choice('0123456789abcdefx"{}[]:, \n') + text[place + 1 :])
        try:
            found = contents(bank, IVF)
        except BankError:
            refused += 1
            continue
        assert same(found, expected)
    assert refused > 20


@by_name
def test_what_was_built_for_another_bank_holds_none_of_its_images(
    bank: Bank, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No encoding is taken for an image of this bank, although there are as many, in shards of the same sizes."""
    other = bank_of(tmp_path / "other", product(9, COUNT, SHAPES, DIM), input_size=INPUT, shards=SHARDS)
    shutil.copytree(bank.path / "indexes", other.path / "indexes")
    chosen = resolve_recipe(recipe)
    assert chosen.method.encode is not None
    for name in SHAPES:
        encoded, blocks = encoded_level(other, recipe, name)
        assert f"holds no image of the bank, so all are searched without it; bring it up to date: {command(other, recipe)}" in (
            caplog.text
        )
        for row in range(COUNT):
            for key, array in chosen.method.encode(blocks(row), encoded.trained, chosen.build).items():
                np.testing.assert_array_equal(encoded(row)[key], array)
    # A build there takes none of the files for its own.
    assert build_gallery(other, recipe)[1] == "built anew: the images it was trained on are gone"
    fresh = bank_of(tmp_path / "fresh", product(9, COUNT, SHAPES, DIM), input_size=INPUT, shards=SHARDS)
    build_gallery(fresh, recipe)
    assert same(contents(other, recipe), contents(fresh, recipe))


def test_a_copied_bank_keeps_what_was_built(bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New modification times make it read once, not built again."""
    copy = Bank.open(shutil.copytree(bank.path, tmp_path / "copy", copy_function=shutil.copyfile))
    assert same(contents(copy, IVF), contents(bank, IVF))
    calls = watch(monkeypatch, IVF)
    build_gallery(copy, IVF)
    assert not any(calls)


# Damage that a build meets


@by_name
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * len(data)])
def test_a_file_that_cannot_be_read_is_made_again(
    bank: Bank, recipe: Recipe, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    expected = contents(bank, recipe)
    path = folder_of(bank, recipe) / shard_name(bank, 1)
    swap(path, damage(path.read_bytes()))
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        calls = watch(patch, recipe)
        build_gallery(bank, recipe)
        assert calls.train == []
        assert len(calls.encode) == len(SHAPES)  # it holds one image
    assert f"{path.name} is damaged" in caplog.text
    assert same(contents(bank, recipe), expected)
    # In what an interrupted build has left, too: there nothing names it yet.
    manifest_path(bank, recipe).unlink()
    swap(path, damage(path.read_bytes()))
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        calls = watch(patch, recipe)
        build_gallery(bank, recipe)
        assert (calls.train, len(calls.encode)) == ([], len(SHAPES))
    assert f"{path.name} is damaged" in caplog.text
    assert same(contents(bank, recipe), expected)


@by_name
@pytest.mark.parametrize("number", [None, 0])
def test_a_flipped_bit_is_not_built_upon(
    bank: Bank, recipe: Recipe, number: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Running the command again must not take a damaged file for a good one, and write its checksum down: it makes it again."""
    expected, manifest = contents(bank, recipe), read_built(GalleryIndexManifest, bank)[RECIPES.index(recipe)]
    path = folder_of(bank, recipe) / (trained_name() if number is None else shard_name(bank, number))
    with h5py.File(path) as opened:
        group = opened["fine"]
        places = [group[name].id.get_offset() for name in group]
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0x01
    swap(path, bytes(data))
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, recipe)
        again, _ = build_gallery(bank, recipe)
        assert (len(calls.train), len(calls.encode)) == ((len(SHAPES), 0) if number is None else (0, SHARDS[0] * len(SHAPES)))
    assert f"{path.name} is damaged (it has changed since it was written)" in caplog.text
    assert [entry.sha256 for entry in again.files] == [entry.sha256 for entry in manifest.files]
    assert same(contents(bank, recipe), expected)


# All that a recipe needs


def test_a_recipe_that_needs_nothing(bare: Bank) -> None:
    for gallery in ("exact", "location"):
        assert build_index(bare, Recipe(name=gallery, build=Build(gallery=gallery))) is None
    assert not (bare.path / "indexes").exists()
    assert update_indexes(bare) == []


def test_what_a_recipe_needs_is_built(bare: Bank) -> None:
    both = replace(IVF, name="both", build=Build(image="HNSW8", gallery="ivf", settings={"lists": 4}))
    graph = Recipe(name="graph", build=Build(image="HNSW8"))
    for recipe, image, gallery in ((IVF, False, True), (graph, True, False), (both, True, True)):
        done = build_index(bare, recipe)
        assert done is not None
        assert (done.image is not None, done.gallery is not None) == (image, gallery)
        assert done.recipe == recipe.name
        assert done.total_s > 0
        files = [path for path in index_folder(bare, recipe).rglob("*") if path.suffix in (".h5", ".faiss")]
        assert done.bytes == sum(path.stat().st_size for path in files) > 0
        assert done.bytes_before == 0
        assert done.done == {name: "built" for name, wanted in (("image", image), ("gallery", gallery)) if wanted}
        again = build_index(bare, recipe)
        assert again is not None
        assert (again.bytes_before, again.bytes) == (done.bytes, done.bytes)
        assert set(again.done.values()) == {"is up to date"}
        scores_of(bare, recipe)
    assert [item.recipe for item in read_built(GalleryIndexManifest, bare)] == ["both", "ivf"]
    # A graph over the embeddings is no obstacle for the one over the maps, nor the other way round.
    missing = index_folder(bare, both) / "index.json"
    missing.unlink()
    with pytest.raises(BankError, match="has no index 'both' of its embeddings; build it with"):
        Detector.open(bare.path, recipe=both)
    build_index(bare, both)
    Detector.open(bare.path, recipe=both)


def test_building_everything_anew(bare: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(bare, IVF)
    calls = watch(monkeypatch, IVF)
    build_index(bare, IVF)
    assert not any(calls)
    build_index(bare, IVF, rebuild=True)
    assert calls.train == list(SHAPES)


def test_all_that_was_built_is_brought_up_to_date(bare: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings it was built with; and a recipe that has both kinds of index has both of them brought along."""
    both = replace(IVF, name="both", build=Build(image="HNSW8", gallery="ivf", settings={"lists": 4}))
    graph = Recipe(name="graph", build=Build(image="HNSW8"))
    for recipe in (both, graph, COMPACT):
        build_index(bare, recipe)
    add(bare, late())
    expected = [scores_of(bare, recipe) for recipe in (both, graph, COMPACT)]
    updated = update_indexes(bare)
    assert [(item.recipe, set(item.done), set(item.done.values())) for item in updated] == [
        ("both", {"image", "gallery"}, {"added 3 images to it"}),
        ("codes", {"gallery"}, {"added 3 images to it"}),
        ("graph", {"image"}, {"added 3 images to it"}),
    ]
    for item in updated:
        assert all(part.count == COUNT + 3 for part in (item.image, item.gallery) if part is not None)
    for recipe, before in zip((both, graph, COMPACT), expected, strict=True):
        equal(scores_of(bare, recipe), before)
    calls = watch(monkeypatch, IVF)
    assert {word for item in update_indexes(bare) for word in item.done.values()} == {"is up to date"}
    assert not any(calls)
    assert {word for item in update_indexes(bare, rebuild=True) for word in item.done.values()} == {"built anew: asked for"}
    assert calls.train == list(SHAPES)


def test_a_recipe_is_checked_before_long_work() -> None:
    check_recipe(IVF, DIM)
    for build in (
        Build(gallery="ivf", settings={"lists": 0}),
        Build(gallery="ivf", settings={"dims": 3}),
        Build(image="Flatt"),
    ):
        with pytest.raises(InputError):
            check_recipe(Recipe(name="r", build=build), DIM)


def test_manifests_are_read_back(bank: Bank) -> None:
    found = read_built(GalleryIndexManifest, bank)
    assert [item.recipe for item in found] == ["codes", "history", "ivf"]
    for item, recipe in zip(found, RECIPES, strict=True):
        assert isinstance(item, GalleryIndexManifest)
        assert (item.count, item.generation, item.gallery) == (COUNT, bank.generation, recipe.build.gallery)
        assert (item.recipe, item.build, item.trained) == (recipe.name, 0, len(bank.manifest.shards))
        assert item.bytes == sum(path.stat().st_size for path in folder_of(bank, recipe).iterdir())
    shutil.rmtree(index_folder(bank, COMPACT))
    assert [item.recipe for item in read_built(GalleryIndexManifest, bank)] == ["history", "ivf"]
