"""Gallery indexes: what is built, once, with all that a recipe needs; an interrupted build goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Bank, Detector
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
from spade_faiss.index.opened_gallery import open_gallery
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Recipe
from tests.support.gallery_indexes import (
    COMPACT,
    COUNT,
    DIM,
    INPUT,
    IVF,
    RECIPES,
    SHAPES,
    STARTS,
    add,
    by_name,
    command,
    encoded_level,
    equal,
    file_names,
    folder_of,
    late,
    manifest_path,
    names_in,
    normals,
    queries,
    scores_of,
    shard_name,
    state_of,
    trained_name,
    watch,
)
from tests.support.oracle import Features, bank_of, batch_of, levels_of

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
