"""A small labeled set of generated images, the packaged backbone at a small input, and a bank fitted on the set's normals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

import spade_faiss  # noqa: F401  # before torch: idle OpenMP threads sleep only if the first import says so
from spade_faiss.core.settings import Extraction
from tests.support.pictures import NORMALS, TEST_DEFECTS, TEST_NORMALS, _weave, _with_spot, save_png

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone

# Time limits per example fail at random on a machine that others use too.
settings.register_profile("spade_faiss", deadline=None)
settings.load_profile("spade_faiss")


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MVTec-style folder: `train/good`, `test/good`, `test/spot` and `ground_truth/spot`. Do not change it."""
    root = tmp_path_factory.mktemp("dataset") / "weave"
    rng = np.random.default_rng(7)
    for kind, count in (("train/good", NORMALS), ("test/good", TEST_NORMALS)):
        for number in range(count):
            save_png(_weave(rng), root / kind / f"{number:03d}.png")
    for number in range(TEST_DEFECTS):
        picture, mask = _with_spot(_weave(rng), rng)
        save_png(picture, root / "test" / "spot" / f"{number:03d}.png")
        save_png(mask, root / "ground_truth" / "spot" / f"{number:03d}_mask.png")
    return root


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """efficientnet_lite0 at an input of 64 x 64: levels of 16 x 16, 8 x 8 and 4 x 4."""
    from spade_faiss import Preprocess, load_backbone

    return load_backbone("efficientnet_lite0", preprocess=Preprocess(resize=72, crop=64))


@pytest.fixture(scope="session")
def fitted_bank(dataset_folder: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the set's 24 normals, everything else at its default. Copy it before you change it."""
    from spade_faiss import fit

    path = tmp_path_factory.mktemp("bank") / "weave.bank"
    fit(dataset_folder / "train" / "good", bank=path, extraction=Extraction(backbone=backbone))
    return path
