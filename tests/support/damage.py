"""A bank with two indexes, and ways to damage its files: with and without a checksum that fits the damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.core.files import FileEntry, hash_file
from spade_faiss.index.build import build_index
from spade_faiss.search.recipe import Build, Recipe
from tests.support.banks import INPUT, batch, forget_mappings, make_bank
from tests.support.manifests import edit_manifest

HNSW = Recipe(name="hnsw", build=Build(image="HNSW4"))
IVF = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2}))

PARTS = [
    batch("a", "b", "../c", paths=["a", "b", "../c"], sha256=["1", "2", "3"], root="/r"),
    replace(batch("d", 'ü "\n'), valid=np.random.default_rng(4).random((2, *INPUT)) < 0.5),
    batch("e"),
]


def bank_with_indexes(path: Path) -> Path:
    """A bank of three shards with two indexes, nothing of which is wrong."""
    bank = make_bank(path)
    for part in PARTS:
        bank.append(part)
    bank.remove(["b"])
    for recipe in (HNSW, IVF):
        build_index(bank, recipe)
    return bank.path


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
    edit_manifest(path / "manifest.json", lambda content: content["shards"][index].update(new))


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


def first_shard(path: Path) -> Path:
    return path / "features" / "000001.h5"


def index_file(path: Path) -> Path:
    return path / "indexes" / "hnsw" / "image-000000.faiss"


def trained_file(path: Path) -> Path:
    return path / "indexes" / "ivf" / "gallery" / "trained-000.h5"


def encoded_file(path: Path) -> Path:
    return sorted((path / "indexes" / "ivf" / "gallery").glob("000-*.h5"))[1]
