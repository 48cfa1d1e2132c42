"""The pictures that options are compared on: real defects have their masks, whatever the size of their pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.settings import Run
from spade_faiss.features.datasets import load_dataset, survey
from spade_faiss.tuning import picture_stream, samples
from tests.support.backbones import tiny_backbone
from tests.support.pictures import save_png


def test_masks_of_pictures_of_which_a_smaller_copy_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask has the size of its picture, not that of the copy."""
    monkeypatch.setattr(picture_stream, "_LONGEST_SIDE", 48)
    rng = np.random.default_rng(0)
    for name in ("train/good/a", "train/good/b", "test/good/a", "test/spot/a", "test/spot/b"):
        save_png(rng.integers(0, 255, (96, 96, 3), np.uint8), tmp_path / f"{name}.png")
    mask = np.zeros((96, 96), np.uint8)
    mask[:48, 48:] = 255
    for name in ("a", "b"):
        save_png(mask, tmp_path / "ground_truth" / "spot" / f"{name}_mask.png")
    found, _ = samples.read_samples(
        tmp_path / "kept", tiny_backbone(), survey(tmp_path / "train").records, load_dataset(tmp_path).test, Run()
    )
    expected = np.zeros((24, 24), np.bool_)
    expected[:12, 12:] = True
    assert found.masks is not None
    np.testing.assert_array_equal(found.masks, [expected] * 2)
