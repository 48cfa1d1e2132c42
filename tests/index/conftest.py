"""A bank with gallery indexes, to be read and to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spade_faiss import Bank
from spade_faiss.index.gallery_build import build_gallery
from tests.support.gallery_indexes import (
    INPUT,
    RECIPES,
    SHARDS,
    normals,
)
from tests.support.oracle import bank_of


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
