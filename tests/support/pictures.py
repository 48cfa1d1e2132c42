"""Generated pictures: a woven texture, defects in it, and a labeled set of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

NORMALS, TEST_NORMALS, TEST_DEFECTS = 24, 6, 5
WIDTH, HEIGHT = 96, 80


def write_dataset(root: Path) -> None:
    """Write an MVTec-style folder: `train/good`, `test/good`, `test/spot` and `ground_truth/spot`."""
    rng = np.random.default_rng(7)
    for kind, count in (("train/good", NORMALS), ("test/good", TEST_NORMALS)):
        for number in range(count):
            save_png(weave(rng), root / kind / f"{number:03d}.png")
    for number in range(TEST_DEFECTS):
        picture, mask = with_spot(weave(rng), rng)
        save_png(picture, root / "test" / "spot" / f"{number:03d}.png")
        save_png(mask, root / "ground_truth" / "spot" / f"{number:03d}_mask.png")


def save_png(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def weave(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A woven texture: two crossing waves of the same pitch in every image; phase, brightness and grain differ."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    phase = rng.uniform(0, 2 * np.pi, 2)
    waves = np.sin(x / 2.5 + phase[0]) * np.sin(y / 3.5 + phase[1])
    tint = np.array([1.0, 0.8, 0.55])
    values = 120 + rng.normal(0, 4) + 60 * waves[..., None] * tint + rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    pixels: npt.NDArray[np.uint8] = values.clip(0, 255).astype(np.uint8)
    return pixels


def with_spot(picture: npt.NDArray[np.uint8], rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The picture with a dull disc somewhere in the part that the crop keeps, and the mask of the disc."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    center_x, center_y, radius = rng.uniform(32, 64), rng.uniform(28, 52), rng.uniform(7, 11)
    inside = (x - center_x) ** 2 + (y - center_y) ** 2 <= radius**2
    spoiled = np.where(inside[..., None], np.array([70, 75, 90], np.uint8), picture)
    return spoiled, (inside * 255).astype(np.uint8)


def write_shots(folder: Path, name: str, parts: int, shots: int) -> Path:
    """Write shots of parts as `name`, such as `part_{part}/{shot}.png`: those of a part differ by noise, parts by much more."""
    for part in range(parts):
        rng = np.random.default_rng(part)
        whole = rng.integers(0, 200, (26, 30, 3))
        for shot in range(shots):
            save_png((whole + rng.integers(0, 20, whole.shape)).astype(np.uint8), folder / name.format(part=part, shot=shot))
    return folder
