"""A bank with indexes, to be verified and damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.damage import bank_with_indexes


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of three shards with two indexes, nothing of which is wrong. Do not change it."""
    return bank_with_indexes(tmp_path_factory.mktemp("verification") / "bank")


@pytest.fixture
def path(built: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "bank"))
