"""Gallery indexes of a bank that changes: images are added and removed, settings are others, and what was built is extended."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.core.errors import BankError
from spade_faiss.index.gallery_build import build_gallery
from spade_faiss.index.opened_gallery import open_gallery
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe
from tests.support.gallery_indexes import (
    COUNT,
    DIM,
    INPUT,
    IVF,
    SHAPES,
    SHARDS,
    STARTS,
    add,
    by_name,
    command,
    contents,
    encoded_level,
    equal,
    file_names,
    folder_of,
    late,
    manifest_path,
    names_in,
    normals,
    queries,
    same,
    scores_of,
    shard_name,
    state_of,
    trained_name,
    watch,
)
from tests.support.oracle import Features, bank_of, batch_of, product

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
