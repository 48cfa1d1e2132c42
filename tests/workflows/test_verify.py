"""What is damaged, foreign or from the future is named and refused; a disk that fills up takes nothing away."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss import Detector, verify
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.shards import write_shard
from spade_faiss.cli import main
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Method
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.index.build import build_index, update_indexes
from spade_faiss.search.recipe import load_recipe
from tests.support.banks import COARSE, DIM, FINE, batch, files, forget_mappings, make_bank
from tests.support.damage import (
    HNSW,
    IVF,
    PARTS,
    encoded_file,
    first_shard,
    flip,
    index_file,
    put,
    sign_shard,
    trained_file,
    use,
)
from tests.support.manifests import edit_manifest


def only_problem(path: Path, *, deep: bool = False) -> str:
    (problem,) = verify(path, deep=deep).problems
    return problem


# ---- verify


@pytest.mark.parametrize("deep", [False, True])
def test_of_a_bank_that_is_whole_nothing_is_wrong(built: Path, deep: bool) -> None:
    before = files(built)
    found = verify(built, deep=deep)
    assert found.problems == ()
    assert (found.images, found.shards, found.indexes) == (5, 3, 2)
    assert found.bytes == sum(len(data) for name, data in before.items() if name.startswith("features/"))
    assert files(built) == before


@pytest.mark.parametrize("recipe", ["clusters", "global"])
def test_an_index_of_some_levels_is_whole_with_these(path: Path, recipe: str) -> None:
    build_index(Bank.open(path), load_recipe(recipe).with_levels(("blocks.1+blocks.2",)))
    assert verify(path, deep=True).problems == ()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        (first_shard, "restore it from a backup or extract its images again"),
        (index_file, "rebuild it with: spade-faiss index {path} --recipe hnsw --rebuild"),
        (trained_file, "rebuild it with: spade-faiss index {path} --recipe ivf --rebuild"),
        (encoded_file, "rebuild it with: spade-faiss index {path} --recipe ivf --rebuild"),
    ],
)
def test_a_file_that_is_missing_or_has_changed_is_named(
    path: Path, file: Callable[[Path], Path], remedy: str, deep: bool
) -> None:
    damaged = file(path)
    data = damaged.read_bytes()
    changes: list[Callable[[], None]] = [
        lambda: flip(damaged),
        lambda: flip(damaged, 0),
        lambda: put(damaged, data[:-1]),
        damaged.unlink,
    ]
    for change in changes:
        change()
        problem = only_problem(path, deep=deep)
        assert str(damaged) in problem
        assert problem.endswith(remedy.format(path=path))
        damaged.unlink(missing_ok=True)
        damaged.write_bytes(data)
    assert verify(path, deep=deep).problems == ()


@pytest.mark.parametrize("name", ["hnsw/index.json", "ivf/gallery.json"])
def test_a_manifest_that_was_edited_is_named(path: Path, name: str) -> None:
    file = path / "indexes" / name
    text = file.read_text()
    for changed in (text.replace('"count": 3', '"count": 4'), text[:-20], "[]", ""):
        assert changed != text
        file.write_text(changed)
        problem = only_problem(path)
        assert f"{file} is damaged" in problem
        assert "spade-faiss index" in problem
    file.write_text(text)
    edit_manifest(file, lambda content: content["shards"][0].update(count=4))
    assert "says that a shard has 4 images, it has 3" in only_problem(path)


def test_all_that_is_wrong_is_named_at_once(path: Path) -> None:
    flip(first_shard(path))
    (path / "features" / "000003.h5").unlink()
    flip(index_file(path))
    flip(trained_file(path))
    found = verify(path)
    assert len(found.problems) == 4
    for name, problem in zip(["000001.h5", "000003.h5", "image-000000.faiss", "trained-000.h5"], found.problems, strict=True):
        assert name in problem
    # The same bank cannot be opened, or what is damaged would be believed; nothing was made worse by looking.
    with pytest.raises(BankError, match=r"000003\.h5, which the manifest names, is missing"):
        Bank.open(path)
    assert len(verify(path, deep=True).problems) == 4


def test_a_damaged_index_is_put_right_by_the_command_that_is_named(path: Path) -> None:
    flip(index_file(path))
    flip(trained_file(path))
    flip(encoded_file(path))
    assert len(verify(path).problems) == 2
    update_indexes(Bank.open(path), rebuild=True)
    assert verify(path, deep=True).problems == ()


def test_a_damaged_manifest_is_an_error_at_once(path: Path) -> None:
    flip(path / "manifest.json")
    with pytest.raises(BankError, match=r"manifest\.json is damaged.*restore it from a backup"):
        verify(path)


def damaged_batch(**changes: Any) -> FeatureBatch:
    return replace(batch("x", "y"), **changes)


def nan_in(values: Any) -> Any:
    changed = values.copy()
    changed.reshape(-1)[-1] = np.nan
    return changed


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (damaged_batch(embedding=nan_in(batch("x", "y").embedding)), "holds embeddings that are not finite"),
        (
            damaged_batch(levels={**batch("x", "y").levels, COARSE.name: nan_in(batch("x", "y").levels[COARSE.name])}),
            f"holds maps of level {COARSE.name!r} that are not finite",
        ),
        (damaged_batch(ids=["x", "x"]), "1 ids occur more than once"),
        (damaged_batch(ids=["x", "d"]), "1 ids occur more than once"),
        (damaged_batch(ids=["x", "b"]), "1 ids occur more than once"),  # a removed one
    ],
)
def test_a_deep_look_finds_what_a_checksum_cannot(path: Path, part: FeatureBatch, said: str) -> None:
    """Written by something else than this package, or by one of its faults: the checksum is that of what was written."""
    entry = write_shard(path / "features" / "000009.h5", part)
    edit_manifest(
        path / "manifest.json",
        lambda content: content["shards"].append({**vars(entry), "count": 2, "removed": []}),
    )
    assert verify(path).problems == ()
    problem = only_problem(path, deep=True)
    assert said in problem


# ---- damage that a checksum does not show: whoever changes a shard can sign it again


def delete(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]

    return change


def become(name: str, values: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return change


def compressed(file: h5py.File) -> None:
    values = file["image/embedding"][...]
    del file["image/embedding"]
    file.create_dataset("image/embedding", data=values, chunks=values.shape, compression="gzip")


@pytest.mark.parametrize(
    "change",
    [
        delete("image/embedding"),
        delete(f"level/{FINE.name}"),
        delete("level"),
        delete("image/id"),
        become("image/embedding", np.zeros((3, DIM + 1), np.float32)),
        become("image/embedding", np.zeros((2, DIM), np.float32)),
        become("image/embedding", np.zeros((3, DIM), np.float64)),
        become("image/embedding", np.zeros(3 * DIM, np.float32)),
        become(f"level/{FINE.name}", np.zeros((3, *COARSE.shape), np.float32)),
        become(f"level/{FINE.name}", np.zeros((3, *FINE.shape), np.float16)),
        become("image/id", np.array([b"a", b"b"])),
        become("image/id", np.array([b"a", b"b", b"\xff\xfe"])),
        become("image/id", np.array([1, 2, 3])),
        become("image/id", np.array([[b"a"], [b"b"], [b"c"]])),
        become("image/path", np.array([b"a"])),
        become("image/sha256", np.array([b"a"] * 4)),
        compressed,
    ],
)
def test_a_shard_that_was_signed_again_must_hold_what_the_layout_says(path: Path, change: Callable[[h5py.File], None]) -> None:
    sign_shard(path, change)
    with pytest.raises(BankError, match=r"000001\.h5"):
        use(path)
    # It is looked at, not died of.
    assert "000001.h5" in " ".join(verify(path, deep=True).problems)


@pytest.mark.parametrize(
    "change",
    [
        become("image/valid", np.zeros((2, 3), np.uint8)),
        become("image/valid", np.zeros((3, 70), np.uint8)),
        become("image/valid", np.zeros(70, np.uint8)),
        become("image/valid", np.zeros((2, 70), np.float32)),
    ],
)
def test_masks_that_were_signed_again_must_fit(path: Path, change: Callable[[h5py.File], None]) -> None:
    sign_shard(path, change, index=1)
    with pytest.raises(BankError, match=r"000002\.h5"):
        Bank.open(path).read(np.array([2, 3]))


@pytest.mark.parametrize("removed", [[-1], [3], [0, 0], [1, 0], [0, 1, 2, 3], [1 << 70]], ids=lambda removed: str(removed)[:12])
def test_removed_positions_that_are_none_are_refused(path: Path, removed: list[int]) -> None:
    edit_manifest(path / "manifest.json", lambda content: content["shards"][0].update(removed=removed))
    with pytest.raises(BankError, match=r"manifest\.json is damaged: 000001\.h5 has 3 images, removed are"):
        Bank.open(path)


@pytest.mark.parametrize("count", [0, -1, 2, 4, 1 << 40])
def test_a_count_that_is_not_the_shards_is_refused(path: Path, count: int) -> None:
    edit_manifest(path / "manifest.json", lambda content: content["shards"][2].update(count=count))
    for look in (lambda: use(path), lambda: Bank.open(path).compact()):
        with pytest.raises(BankError):
            look()


@pytest.mark.parametrize("name", ["manifest.json", "indexes/hnsw/index.json", "indexes/ivf/gallery.json"])
def test_what_a_newer_version_wrote_asks_for_that_version(path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def newer(content: dict[str, Any]) -> None:
        content.update(schema=99, dreams=["of the future"])
        content.pop("shards")

    edit_manifest(path / name, newer)
    look: dict[str, Callable[[], object]] = {
        "manifest.json": lambda: Bank.open(path),
        "indexes/hnsw/index.json": lambda: Detector.open(path, recipe=HNSW, method=Method(k_image=2, k_gallery=2)),
        "indexes/ivf/gallery.json": lambda: Detector.open(path, recipe=IVF, method=Method(k_image=2, k_gallery=2)),
    }
    with pytest.raises(BankError, match=r"has schema 99, .* it was written by a newer spade_faiss: install that"):
        look[name]()
    assert main(["info", str(path)]) == 1
    assert "install that" in capsys.readouterr().err


@pytest.mark.parametrize("schema", [1, 0, -1, True, None, "2", 2.5, [2]])
def test_an_index_of_an_older_or_no_version_is_built_again(path: Path, schema: object) -> None:
    for name in ("hnsw/index.json", "ivf/gallery.json"):
        edit_manifest(path / "indexes" / name, lambda content: content.update(schema=schema))
    for recipe in (HNSW, IVF):
        with pytest.raises(BankError, match=rf"has schema {re.escape(repr(schema))}, .*spade-faiss index .* --recipe"):
            Detector.open(path, recipe=recipe, method=Method(k_image=2, k_gallery=2))
        build_index(Bank.open(path), recipe)
        Detector.open(path, recipe=recipe, method=Method(k_image=2, k_gallery=2))
    assert verify(path).problems == ()


# ---- things of another bank


def test_shards_that_were_swapped_are_noticed(path: Path, tmp_path: Path) -> None:
    """Inside a bank and between banks; of the same size, under the time that the manifest says."""
    twins = make_bank(tmp_path / "twins")
    for seed in range(2):
        twins.append(batch(f"t{seed}", seed=seed))
    one, two = (twins.path / "features" / f"00000{number}.h5" for number in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    put(one, second)
    put(two, first)
    found = verify(twins.path)
    assert ["000001.h5" in found.problems[0], "000002.h5" in found.problems[1]] == [True, True]
    os.utime(one)
    with pytest.raises(BankError, match=r"000001\.h5 has changed since it was written: sha256"):
        Bank.open(twins.path)
    other = make_bank(tmp_path / "other")
    other.append(batch("e", seed=7))
    shutil.copy(other.path / "features" / "000001.h5", path / "features" / "000003.h5")
    forget_mappings()
    with pytest.raises(BankError, match=r"000003\.h5 has changed since it was written"):
        Bank.open(path)
    assert "000003.h5" in only_problem(path)


def test_a_manifest_of_another_bank_is_noticed(path: Path, tmp_path: Path) -> None:
    other = make_bank(tmp_path / "other")
    for part in PARTS:
        other.append(replace(part, embedding=part.embedding + 1))
    shutil.copy(other.path / "manifest.json", path / "manifest.json")
    with pytest.raises(BankError, match=r"000001\.h5 has changed since it was written"):
        Bank.open(path)


# ---- bad input


NASTY = [
    "../../etc/passwd",
    "/abs/olute.png",
    "..",
    ".",
    "a\nb\r\n",
    "'\"`$(x)",
    "日本\u202e.png",
    "C:\\x",
    "%s{}",
    "-x",
    " ",
    "a" * 3000,
]


def test_names_are_never_used_as_paths_of_the_bank(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    bank = make_bank(home / "bank")
    bank.append(batch(*NASTY))
    bank.remove(NASTY[::2])
    bank.restore(NASTY[:1])
    bank.compact()
    bank.append(batch(*NASTY[2::2], seed=1))
    assert set(Bank.open(bank.path).ids) == set(NASTY)
    build_index(bank, HNSW)
    build_index(bank, IVF)
    assert verify(bank.path, deep=True).problems == ()
    scores = Detector.open(bank.path, method=Method(k_image=12, k_gallery=2)).score_features(batch("../q"))
    assert set(scores.neighbor_ids[0]) == set(NASTY)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert [path.name for path in home.iterdir()] == ["bank"]
    inside = {path.name for path in bank.path.iterdir()}
    assert inside == {"manifest.json", "features", "indexes", ".lock", ".readers"}
    assert all(path.name[0].isdigit() for path in (bank.path / "features").iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embedding": np.full((2, DIM), np.nan, np.float32)}, "embedding holds NaN or infinite values"),
        ({"embedding": np.full((2, DIM), -np.inf, np.float32)}, "embedding holds NaN or infinite values"),
        ({"embedding": np.zeros((2, DIM + 1), np.float32)}, r"embedding has shape \(2, 7\), expected \(2, 6\)"),
        ({"embedding": np.zeros((1, DIM), np.float32)}, r"embedding has shape \(1, 6\), expected \(2, 6\)"),
        ({"levels": {FINE.name: np.zeros((2, *FINE.shape), np.float32)}}, "the batch has levels .*, the bank has"),
        ({"ids": ["x", "x"]}, "image id 'x' appears more than once"),
        ({"ids": ["x", ""]}, "an image id is empty"),
        ({"ids": ["x", "a\0b"]}, "must be a string without NUL"),
        ({"ids": ["x", "\ud800"]}, "is not valid Unicode"),
        ({"valid": np.ones((2, 3, 3), np.bool_)}, r"valid is bool of shape \(2, 3, 3\)"),
        ({"paths": ["one"]}, "a batch of 2 images has 1 paths"),
    ],
)
def test_features_that_cannot_be_kept_are_refused_and_nothing_is_written(path: Path, change: dict[str, Any], said: str) -> None:
    before, bank = files(path), Bank.open(path)
    refused = replace(batch("x", "y"), **change)
    with pytest.raises(InputError, match=said):
        bank.append(refused)
    if "paths" not in change:
        with pytest.raises(InputError, match=said):
            Detector.open(path, method=Method(k_image=2, k_gallery=2)).score_features(refused)
    assert files(path) == before
