"""A small labeled set of generated images, the packaged backbone at a small input, and a bank fitted on the set's normals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from PIL import Image

import spade_faiss  # noqa: F401  # before torch: idle OpenMP threads sleep only if the first import says so
from spade_faiss.core.settings import Extraction

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone

# Time limits per example fail at random on a machine that others use too.
settings.register_profile("spade_faiss", deadline=None)
settings.load_profile("spade_faiss")

NORMALS = 24
TEST_NORMALS = 6
TEST_DEFECTS = 5
WIDTH, HEIGHT = 96, 80


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


def save_png(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _weave(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A woven texture: two crossing waves of the same pitch in every image; phase, brightness and grain differ."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    phase = rng.uniform(0, 2 * np.pi, 2)
    weave = np.sin(x / 2.5 + phase[0]) * np.sin(y / 3.5 + phase[1])
    tint = np.array([1.0, 0.8, 0.55])
    values = 120 + rng.normal(0, 4) + 60 * weave[..., None] * tint + rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    pixels: npt.NDArray[np.uint8] = values.clip(0, 255).astype(np.uint8)
    return pixels


def _with_spot(picture: npt.NDArray[np.uint8], rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A dull disc somewhere in the part of the image that the crop keeps, and its mask."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    center_x, center_y, radius = rng.uniform(32, 64), rng.uniform(28, 52), rng.uniform(7, 11)
    inside = (x - center_x) ** 2 + (y - center_y) ** 2 <= radius**2
    spoiled = np.where(inside[..., None], np.array([70, 75, 90], np.uint8), picture)
    return spoiled, (inside * 255).astype(np.uint8)
