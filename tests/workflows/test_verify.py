"""What is damaged, foreign or from the future is named and refused; a disk that fills up takes nothing away."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss import Detector, verify
from spade_faiss.bank import shards
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.shards import write_shard
from spade_faiss.cli import main
from spade_faiss.core import arrays
from spade_faiss.core.errors import BankError, InputError, SpadeError
from spade_faiss.core.files import TEMPORARY_PATTERN, FileEntry, hash_file
from spade_faiss.core.settings import Method
from spade_faiss.core.signed_json import hash_json
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.index.build import build_index, update_indexes
from spade_faiss.index.built_index import index_folder, read_built
from spade_faiss.index.gallery_index import GalleryIndexManifest, open_gallery
from spade_faiss.index.image_index import ImageIndex, ImageIndexManifest
from spade_faiss.search.recipe import Build, Recipe
from tests.support.banks import COARSE, DIM, FINE, assert_holds, batch, files, make_bank

HNSW = Recipe(name="hnsw", build=Build(image="HNSW4"))
IVF = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2}))
INPUT = (20, 28)  # of `make_bank`

PARTS = [
    batch("a", "b", "../c", paths=["a", "b", "../c"], sha256=["1", "2", "3"], root="/r"),
    replace(batch("d", 'ü "\n'), valid=np.random.default_rng(4).random((2, *INPUT)) < 0.5),
    batch("e"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of three shards with two indexes, nothing of which is wrong. Do not change it."""
    bank = make_bank(tmp_path_factory.mktemp("verification") / "bank")
    for part in PARTS:
        bank.append(part)
    bank.remove(["b"])
    for recipe in (HNSW, IVF):
        build_index(bank, recipe)
    return bank.path


@pytest.fixture
def path(built: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "bank"))


def forget_mappings() -> None:
    arrays.map_arrays.cache_clear()
    shards.map_shard.cache_clear()


def put(path: Path, data: bytes) -> None:
    """Another file in its place, of the same modification time; the old one may be mapped."""
    status = path.stat()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    forget_mappings()


def flip(path: Path, place: int = -1) -> None:
    """Turn a bit of a file over, by default in its middle."""
    data = bytearray(path.read_bytes())
    data[place if place >= 0 else len(data) // 2] ^= 4
    put(path, bytes(data))


def sign(manifest: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it the checksum that it then must have."""
    content = json.loads(manifest.read_text())
    del content["sha256"]
    change(content)
    manifest.write_text(json.dumps({**content, "sha256": hash_json(content)}))
    forget_mappings()


def sign_shard(path: Path, change: Callable[[h5py.File], object], index: int = 0) -> None:
    """Change a shard and give the manifest its new checksum, size and time."""
    entry = Bank.open(path, check=False).manifest.shards[index]
    file = path / "features" / entry.file
    forget_mappings()
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    with h5py.File(file, "r+") as opened:
        change(opened)
    new = vars(FileEntry.of(file, hash_file(file)))
    sign(path / "manifest.json", lambda content: content["shards"][index].update(new))


def use(path: Path) -> None:
    """Look at everything that a bank holds."""
    bank = Bank.open(path)
    bank.read(np.arange(len(bank)))
    for name in bank.ids:
        bank.image_path(name)
    _ = bank.sha256_of
    bank.with_removed().read(np.arange(len(bank.with_removed())))
    for index in range(len(bank.manifest.shards)):
        bank.embeddings_of_shard(index)


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


def first_shard(path: Path) -> Path:
    return path / "features" / "000001.h5"


def index_file(path: Path) -> Path:
    return path / "indexes" / "hnsw" / "image-000000.faiss"


def trained_file(path: Path) -> Path:
    return path / "indexes" / "ivf" / "gallery" / "trained-000.h5"


def encoded_file(path: Path) -> Path:
    return sorted((path / "indexes" / "ivf" / "gallery").glob("000-*.h5"))[1]


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
    sign(file, lambda content: content["shards"][0].update(count=4))
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
    sign(
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
    sign(path / "manifest.json", lambda content: content["shards"][0].update(removed=removed))
    with pytest.raises(BankError, match=r"manifest\.json is damaged: 000001\.h5 has 3 images, removed are"):
        Bank.open(path)


@pytest.mark.parametrize("count", [0, -1, 2, 4, 1 << 40])
def test_a_count_that_is_not_the_shards_is_refused(path: Path, count: int) -> None:
    sign(path / "manifest.json", lambda content: content["shards"][2].update(count=count))
    for look in (lambda: use(path), lambda: Bank.open(path).compact()):
        with pytest.raises(BankError):
            look()


@pytest.mark.parametrize("name", ["manifest.json", "indexes/hnsw/index.json", "indexes/ivf/gallery.json"])
def test_what_a_newer_version_wrote_asks_for_that_version(path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def newer(content: dict[str, Any]) -> None:
        content.update(schema=99, dreams=["of the future"])
        content.pop("shards")

    sign(path / name, newer)
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
        sign(path / "indexes" / name, lambda content: content.update(schema=schema))
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


# ---- mutants


def mutate(data: bytes, rng: random.Random, places: list[int] | None = None) -> bytes:
    """One of several kinds of damage; only flips where places are given, and only there."""
    kind = "flip" if places else rng.choice(["flip", "flip", "cut", "zeros", "move", "grow"])
    place = rng.choice(places) if places else rng.randrange(len(data))
    length = rng.randint(1, 40)
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "zeros":
        return data[:place] + bytes(min(length, len(data) - place)) + data[place + length :]
    other = rng.randrange(len(data))
    chunk = data[other : other + length]
    return data[:place] + chunk + data[place if kind == "grow" else place + len(chunk) :]


def contents(path: Path) -> list[Any]:
    """All that a bank holds, copied."""
    bank = Bank.open(path)
    whole = bank.with_removed()
    found = [whole.read(np.array([row])) for row in range(len(whole))]
    return [
        bank.manifest,
        bank.ids,
        whole.ids,
        [whole.image_path(name) for name in whole.ids],
        whole.sha256_of,
        *(array for part in found for array in (part.embedding, *part.levels.values())),
        *(None if part.valid is None else part.valid for part in found),
        *(whole.embeddings_of_shard(index).copy() for index in range(3)),
    ]


def same(one: list[Any], other: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return a is not None and b is not None and np.array_equal(a, b)
        return bool(a == b)

    return len(one) == len(other) and all(map(equal, one, other))


def metadata_of(file: Path) -> list[int]:
    """The places of an HDF5 file that are not the values of an array."""
    used = np.zeros(file.stat().st_size, np.bool_)

    def note(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            start = item.id.get_offset()
            used[start : start + item.id.get_storage_size()] = True

    with h5py.File(file) as opened:
        opened.visititems(note)
    return [int(place) for place in np.flatnonzero(~used)]


def test_flipped_metadata_of_shards_is_an_error_of_ours_or_does_nothing(path: Path) -> None:
    """Size and time kept, so that the checksum is not looked at: HDF5 must not take us with it."""
    rng, expected, refused = random.Random(21), contents(path), 0
    for file in sorted((path / "features").iterdir()):
        data, places = file.read_bytes(), metadata_of(file)
        for _ in range(50):
            put(file, mutate(data, rng, places))
            try:
                found = contents(path)
            except SpadeError:
                refused += 1
            else:
                assert same(found, expected), [place for place, value in enumerate(file.read_bytes()) if value != data[place]]
        put(file, data)
    assert 5 < refused < 145
    assert same(contents(path), expected)


@pytest.mark.parametrize("name", ["id", "path", "sha256", "embedding", "valid", FINE.name, "image", "level"])
def test_an_array_that_has_lost_its_name_is_missed(path: Path, name: str) -> None:
    """What is optional must not vanish without a word either."""
    expected, index = contents(path), 2 if name == "valid" else 1
    file = path / "features" / f"00000{index}.h5"
    data = file.read_bytes()
    places = [match.start() + 1 for match in re.finditer(rb"\0" + re.escape(name.encode()) + rb"\0", data)]
    assert places
    for place in places:
        put(file, data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        try:
            found = contents(path)
        except SpadeError:
            continue
        assert same(found, expected)


@pytest.mark.parametrize("file", [trained_file, encoded_file])
def test_what_was_trained_under_another_name_is_missed(path: Path, file: Callable[[Path], Path]) -> None:
    damaged = file(path)
    data = damaged.read_bytes()
    with h5py.File(damaged) as opened:
        names = [*opened[FINE.name], FINE.name]
    for name in names:
        place = data.index(b"\0" + name.encode() + b"\0") + 1
        put(damaged, data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        with pytest.raises(SpadeError):
            Detector.open(path, recipe=IVF, method=Method(k_image=2, k_gallery=5)).score_features(batch("q"))  # of every image


HEAP = """
import os, sys
from pathlib import Path
from spade_faiss.core import arrays
from spade_faiss.bank import shards
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import SpadeError
path = Path(sys.argv[1])
file = path / "features" / "000001.h5"
data, status = file.read_bytes(), file.stat()
start = data.find(b"GCOL")
for place in range(start, start + 48) if start >= 0 else ():
    for bit in range(8):
        file.unlink()
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        arrays.map_arrays.cache_clear()
        shards.map_shard.cache_clear()
        print(place, bit, flush=True)
        try:
            bank = Bank.open(path)
            bank.image_path(bank.ids[0])
        except SpadeError:
            pass
print("end")
"""


def test_no_flipped_bit_of_a_heap_keeps_hdf5_busy_for_ever(path: Path) -> None:
    """HDF5 keeps text of variable length in a heap, and walks along the sizes of its objects."""
    try:
        done = subprocess.run([sys.executable, "-c", HEAP, str(path)], capture_output=True, text=True, check=False, timeout=15)
    except subprocess.TimeoutExpired as error:
        last = (error.stdout or b"").split(b"\n")[-2]
        raise AssertionError(f"it hangs with place and bit {last!r} turned over") from error
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("end\n")


def test_flipped_metadata_of_what_was_trained_is_an_error_of_ours_or_does_nothing(path: Path) -> None:
    rng, refused = random.Random(22), 0

    def look() -> list[Any]:
        found = Detector.open(path, recipe=IVF, method=Method(k_image=2, k_gallery=2)).score_features(batch("q"))
        return [found.maps, found.image_score, found.neighbor_ids.tolist()]

    expected = look()
    for file in sorted((path / "indexes" / "ivf" / "gallery").iterdir()):
        data, places = file.read_bytes(), metadata_of(file)
        for _ in range(15):
            put(file, mutate(data, rng, places))
            try:
                found = look()
            except SpadeError:
                refused += 1
            else:
                assert same(found, expected)
        put(file, data)
    assert refused


def test_a_mutant_of_a_shard_that_is_read_in_full_is_always_refused(path: Path) -> None:
    rng = random.Random(23)
    file = first_shard(path)
    data = file.read_bytes()
    for _ in range(40):
        mutant = mutate(data, rng)
        put(file, mutant)
        os.utime(file)
        if mutant == data:
            Bank.open(path)
        else:
            with pytest.raises(BankError, match=r"000001\.h5 has changed since it was written"):
                Bank.open(path)


def test_a_mutant_of_an_index_file_is_never_opened(path: Path) -> None:
    """FAISS trusts what it reads: the checksum is compared each time, whatever size and time say."""
    rng = random.Random(24)
    file = index_file(path)
    data = file.read_bytes()
    for _ in range(30):
        mutant = mutate(data, rng)
        put(file, mutant)
        if mutant != data:
            with pytest.raises(BankError, match=r"image-000000\.faiss has sha256 .*, expected .*; rebuild it with"):
                ImageIndex.open(Bank.open(path), HNSW)


@pytest.mark.parametrize(
    ("name", "seed"), [("manifest.json", 31), ("indexes/hnsw/index.json", 32), ("indexes/ivf/gallery.json", 33)]
)
def test_a_mutant_of_a_manifest_is_an_error_of_ours_or_says_the_same(path: Path, name: str, seed: int) -> None:
    rng, file = random.Random(seed), path / name
    look: Callable[[], object] = {
        "manifest.json": lambda: Bank.open(path).manifest,
        "indexes/hnsw/index.json": lambda: read_built(ImageIndexManifest, Bank.open(path)),
        "indexes/ivf/gallery.json": lambda: read_built(GalleryIndexManifest, Bank.open(path)),
    }[name]
    data, expected, refused = file.read_bytes(), look(), 0
    for _ in range(200):
        file.write_bytes(mutate(data, rng))
        try:
            found = look()
        except SpadeError as error:
            refused += 1
            assert file.name in str(error)  # noqa: PT017  # some mutants are refused, some say the same
        else:
            assert found == expected
    assert refused > 150


def test_a_signed_manifest_may_say_anything_and_is_refused_in_words(path: Path) -> None:
    """Each value of each manifest replaced by something else, and signed: our errors only, when it is opened and used."""
    rng = random.Random(35)
    values: list[Any] = [None, -1, 0, 1 << 70, 1.5, float("nan"), "", "../x", "\ud800", [], [[]], {}, {"x": 1}, True]

    def leaves(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
        return [at, *(leaf for key, item in items for leaf in leaves(item, (*at, key)))]

    def use_all() -> None:
        use(path)
        bank = Bank.open(path)
        ImageIndex.open(bank, HNSW).search(batch("q").embedding, 2)
        open_gallery(bank, IVF)

    for name in ("manifest.json", "indexes/hnsw/index.json", "indexes/ivf/gallery.json"):
        text = (path / name).read_text()
        places = [place for place in leaves(json.loads(text)) if place and place[0] not in ("sha256", "format", "schema")]
        for place in rng.sample(places, min(40, len(places))):
            value = rng.choice(values)

            def change(content: dict[str, Any], place: tuple[Any, ...] = place, value: Any = value) -> None:
                inner: Any = content
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = value

            sign(path / name, change)
            try:
                use_all()
            except SpadeError:
                pass
            except Exception as error:
                raise AssertionError(f"{name}: {place} = {value!r}: {type(error).__name__}: {error}") from error
            (path / name).write_text(text)
    forget_mappings()
    use_all()


# ---- a disk that fills up


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such reservation here")
@pytest.mark.parametrize(
    "write",
    [
        lambda bank: bank.append(batch("x")),
        lambda bank: bank.compact(),
        lambda bank: build_index(bank, IVF, rebuild=True),
    ],
    ids=["append", "compact", "index"],
)
def test_a_disk_that_has_no_room_for_an_array_takes_nothing_away(
    path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Bank], object]
) -> None:
    bank, before = Bank.open(path), files(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(
            InputError, match=r"there is no room for .*make room and run the command again: what was there before"
        ):
            write(bank)
    assert files(path) == before
    assert verify(path, deep=True).problems == ()
    write(bank)
    assert verify(path, deep=True).problems == ()


LIMITED = """
import json, os, resource, signal, sys
from pathlib import Path
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.index.build import build_index
from spade_faiss.search.recipe import Build, Recipe
from tests.support.banks import batch, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
hnsw = Recipe(name="hnsw", build=Build(image="HNSW4"))
ivf = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2}))
steps = {
    "append": lambda bank: bank.append(batch("x")),
    "remove": lambda bank: bank.remove(["a"]),
    "compact": lambda bank: bank.compact(),
    "hnsw": lambda bank: build_index(bank, hnsw, rebuild=True),
    "ivf": lambda bank: build_index(bank, ivf, rebuild=True),
}
import faiss, spade_faiss.search.ivf, spade_faiss.search.exact  # compiled files are not written under a limit
found = []
before = files(path)
for limit in (0, 60, 700, 4000, 200_000):
    for name, step in steps.items():
        bank = Bank.open(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            step(bank)
            said = "done"
        except SpadeError as error:
            said = str(error)
            if "there is no room for" in said or ("cannot write to" in said and "File too large" in said):
                said = "no room"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        left = [str(leftover) for leftover in path.rglob(TEMPORARY_PATTERN)]
        now = files(path)
        changed = sorted(key for key in before if now.get(key) != before[key])
        found.append([limit, name, said, left, changed if said != "done" else []])
        before = now
large = Path(sys.argv[2])
bank = Bank.open(large)
size = build_index(bank, hnsw).image.bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
try:
    build_index(bank, hnsw, rebuild=True)
    said = "done"
except SpadeError as error:
    said = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([found, said]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_a_limit_on_file_sizes_is_a_full_disk(path: Path, tmp_path: Path) -> None:
    """Writes that begin and do not end: in HDF5's own files, in JSON, in those that FAISS writes."""
    large = make_bank(tmp_path / "large")
    large.append(batch(*map(str, range(60))))
    done = subprocess.run(
        [sys.executable, "-B", "-c", LIMITED, str(path), str(large.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found, last_byte = json.loads(done.stdout)
    assert verify(path, deep=True).problems == ()
    assert not list(path.rglob(TEMPORARY_PATTERN))
    assert [item for item in found if item[2] not in ("no room", "done") or item[3] or item[4]] == []
    assert [item[2] for item in found[:5]] == ["no room"] * 5
    # Of an index that lacks its end, FAISS says nothing: what it wrote last is lost when it closes the file.
    assert verify(large.path).problems == ()
    Detector.open(large.path, recipe=HNSW)
    assert "there is no room for" in last_byte


def test_what_is_there_after_a_full_disk_is_what_was_there_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank.open(path)
    for name in ("fsync", "posix_fallocate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_room)
            with pytest.raises(InputError, match="there is no room for"):
                bank.append(batch("x"))
            if name == "fsync":
                with pytest.raises(InputError, match="there is no room for"):
                    bank.remove(["a"])
        for state in (bank, Bank.open(path)):
            assert state.generation == 4
            assert state.ids == ["a", "../c", "d", 'ü "\n', "e"]
    bank.restore(["b"])
    assert_holds(Bank.open(path), *PARTS)
    assert index_folder(bank, HNSW).is_dir()
