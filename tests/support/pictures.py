"""Generated pictures: a woven texture, and defects in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

import spade_faiss  # noqa: F401  # before torch: idle OpenMP threads sleep only if the first import says so

if TYPE_CHECKING:
    pass


NORMALS = 24


TEST_NORMALS = 6


TEST_DEFECTS = 5


WIDTH, HEIGHT = 96, 80


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
