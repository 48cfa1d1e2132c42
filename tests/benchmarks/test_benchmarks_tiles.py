"""The benchmark of tiles, on small pictures: rows are complete, and pictures are enlarged without a seam."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import tiles
from spade_faiss.core.extraction import Preprocess
from tests.support.pictures import save_png


def test_quality_compares_tiles_with_shrunk_pictures(
    dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"shrunk": Preprocess(resize_mode="stretch", size=64), "tiles": Preprocess(tile=64, overlap=16)}
    monkeypatch.setattr(tiles, "WAYS", small)
    monkeypatch.setattr(tiles, "REPEATS", 1)
    monkeypatch.setattr(tiles, "TIMED", 2)
    rows = list(tiles.quality(dataset_folder, tmp_path, ("efficientnet_lite0",)))
    assert [(row["way"], row["neighbors"], row["entries"]) for row in rows] == [
        ("shrunk", "anywhere", 24),
        ("tiles", "anywhere", 96),
        ("tiles", "same-place", 96),
    ]
    for row in rows:
        assert 0 <= row["image_auroc_top"] <= 1
        assert row["pixel_auroc"] > 0.5
        assert row["ms"]["median"] > 0


def test_pictures_are_enlarged_by_mirrors(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    save_png(pixels, tmp_path / "a.png")
    large = tiles.enlarged(tmp_path / "a.png", 12, 7)
    assert large.shape == (7, 12, 3)
    np.testing.assert_array_equal(large[:4, :5], pixels)
    np.testing.assert_array_equal(large[4:], large[3:0:-1])
    np.testing.assert_array_equal(large[:4, 5:10], pixels[:, ::-1])
    assert tiles.enlarged(tmp_path / "a.png", 3, 2).shape == (2, 3, 3)
