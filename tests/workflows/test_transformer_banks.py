"""A bank of a transformer's features: which blocks made them is recorded, and queries use the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from spade_faiss import Bank, Detector, Extraction, Preprocess, Run, add, extract
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.features.backbone import Backbone

NAME = "timm:test_vit"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def bank(weights: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "vit.bank"
    words = [
        "--backbone",
        NAME,
        "--preset",
        "spade",
        "--weights",
        str(weights),
        "--blocks",
        "1,4",
        "--resize",
        "72",
        "--size",
        "64",
    ]
    assert main(["extract", str(dataset_folder / "train/good"), "--bank", str(path), *words]) == 0
    return path


def test_the_blocks_are_recorded_and_used_by_queries(bank: Path, dataset_folder: Path) -> None:
    opened = Bank.open(bank)
    assert opened.manifest.source is not None
    assert opened.manifest.source.blocks == (1, 4)
    assert [(level.name, level.stride) for level in opened.layout.levels] == [("blocks.1", 16), ("blocks.4", 16)]
    assert opened.manifest.network is not None
    scores = {
        engine: Detector.open(bank, run=Run(engine=engine)).score(dataset_folder / "test/spot") for engine in ("auto", "torch")
    }
    np.testing.assert_allclose(scores["auto"].image_score, scores["torch"].image_score, rtol=1e-3)
    assert add(dataset_folder / "train/good", bank=bank).added == 0


def test_other_blocks_are_another_source(bank: Path, weights: Path, dataset_folder: Path) -> None:
    other = Extraction(backbone=NAME, preprocess=Preprocess(resize=72, size=64))
    with pytest.raises(InputError, match=r"was extracted with blocks=\(1, 4\), these features with \(1, 3, 4, 5\)"):
        extract(dataset_folder / "train/good", bank=bank, preset="spade", extraction=other, run=Run(weights=weights))


def test_blocks_belong_to_a_backbone_that_is_given_by_name(backbone: Backbone, dataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="blocks, device and engine belong to a backbone given by name"):
        extract(
            dataset_folder / "train/good",
            bank=tmp_path / "b",
            preset="spade",
            extraction=Extraction(backbone=backbone, blocks=(1,)),
        )
