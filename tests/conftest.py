"""Fixtures of the whole suite: a small labeled set, the packaged backbone at a small input, and a bank of the set's normals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import spade_faiss  # noqa: F401  # before torch: idle OpenMP threads sleep only if the first import says so
from tests.support.pictures import write_dataset

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone

# Time limits per example fail at random on a machine that others use, too.
settings.register_profile("spade_faiss", deadline=None)
settings.load_profile("spade_faiss")


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MVTec-style folder, see `write_dataset`. Do not change it."""
    root = tmp_path_factory.mktemp("dataset") / "weave"
    write_dataset(root)
    return root


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """efficientnet_lite0 at an input of 64 x 64: its levels are 16 x 16, 8 x 8 and 4 x 4."""
    from spade_faiss import Preprocess, load_backbone

    return load_backbone("efficientnet_lite0", preprocess=Preprocess(resize=72, size=64))


@pytest.fixture(scope="session")
def fitted_bank(dataset_folder: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the set's 24 normals, with every other setting at its default. Copy it before you change it."""
    from spade_faiss import Extraction, fit

    path = tmp_path_factory.mktemp("bank") / "weave.bank"
    fit(dataset_folder / "train" / "good", bank=path, preset="spade", extraction=Extraction(backbone=backbone))
    return path
