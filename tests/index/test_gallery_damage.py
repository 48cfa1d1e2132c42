"""Gallery indexes that cannot be opened: missing, damaged, edited and foreign files are refused, and made again."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.core.errors import BankError
from spade_faiss.index.built_index import read_built
from spade_faiss.index.gallery_build import build_gallery
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.opened_gallery import open_gallery
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe
from tests.support.gallery_indexes import (
    COUNT,
    DIM,
    INPUT,
    IVF,
    RECIPES,
    SHAPES,
    SHARDS,
    by_name,
    command,
    contents,
    encoded_level,
    folder_of,
    manifest_path,
    same,
    shard_name,
    swap,
    trained_name,
    watch,
)
from tests.support.manifests import edit_manifest
from tests.support.oracle import bank_of, product

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
