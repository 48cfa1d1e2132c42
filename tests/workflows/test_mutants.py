"""Mutants: random damage to any file of a bank is an error of ours, or changes nothing."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss import Detector
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import BankError, SpadeError
from spade_faiss.core.settings import Method
from spade_faiss.index.built_index import read_built
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.image_index import ImageIndex, ImageIndexManifest
from spade_faiss.index.opened_gallery import open_gallery
from tests.support.banks import FINE, batch, forget_mappings
from tests.support.damage import (
    HNSW,
    IVF,
    encoded_file,
    first_shard,
    index_file,
    put,
    trained_file,
    use,
)
from tests.support.manifests import edit_manifest

pytestmark = pytest.mark.slow


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

            edit_manifest(path / name, change)
            try:
                use_all()
            except SpadeError:
                pass
            except Exception as error:
                raise AssertionError(f"{name}: {place} = {value!r}: {type(error).__name__}: {error}") from error
            (path / name).write_text(text)
    forget_mappings()
    use_all()
