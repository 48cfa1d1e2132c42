"""Inputs of any size: a whole fit, score and evaluation, and regions where the defects are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from spade_faiss import Bank, Detector, Preprocess, evaluate
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Method
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.regions import find_regions
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.loading import load_backbone
from spade_faiss.features.pictures import load_image, to_input
from spade_faiss.features.placement import place
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.workflows.extract import extract
from tests.support.pictures import HEIGHT, WIDTH, save_png, weave


def test_a_transformer_at_448(dataset_folder: Path, tmp_path: Path) -> None:
    """By the command line, with `--size` alone: `resize` follows from it. Scores are distances of timm's own embeddings."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    words = ["--backbone", "timm:test_vit", "--weights", str(tmp_path / "vit.pt"), "--size", "448", "--blocks", "0,2"]
    assert (
        main(
            [
                "fit",
                str(dataset_folder / "train/good"),
                "--bank",
                str(tmp_path / "bank"),
                "--preset",
                "spade",
                *words,
                "--quiet",
            ]
        )
        == 0
    )
    bank = Bank.open(tmp_path / "bank")
    preprocess = Preprocess(resize=512, size=448, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert bank.manifest.source is not None
    assert bank.manifest.source.preprocess == preprocess
    assert bank.layout.input_size == (448, 448)
    assert [level.shape for level in bank.layout.levels] == [(28, 28, 64)] * 2
    metrics = evaluate(dataset_folder, bank=bank.path, out=tmp_path / "out").metrics
    assert metrics is not None
    assert metrics.pixel is not None

    def embed(paths: Sequence[Path]) -> FloatArray:
        found = [to_input(load_image(ImageRecord(path.name, path), preprocess).picture, preprocess) for path in paths]
        with torch.inference_mode():
            embedding: FloatArray = model.forward_features(torch.from_numpy(np.stack(found)))[:, 0].numpy()
        return embedding

    with ScoreFile.open(tmp_path / "out/scores.h5") as scores:
        queries = embed([dataset_folder / name for name in scores.ids])
        normals = embed(sorted((dataset_folder / "train/good").iterdir()))
        dist = np.sort(np.linalg.norm(queries[:, None].astype(np.float64) - normals, axis=2), axis=1)
        np.testing.assert_allclose(scores.image_score, dist[:, :5].mean(axis=1), rtol=1e-4)
        assert next(iter(scores.maps())).shape == (448, 448)


@pytest.fixture(scope="module")
def wide(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of efficientnet_lite0 at 64 x 96 pixels, of stretched pictures."""
    path = tmp_path_factory.mktemp("wide") / "bank"
    words = ["--backbone", "efficientnet_lite0", "--size", "64x96", "--resize-mode", "stretch", "--quiet"]
    assert main(["fit", str(dataset_folder / "train/good"), "--bank", str(path), "--preset", "spade", *words]) == 0
    return path


def test_an_input_that_is_no_square(wide: Path, dataset_folder: Path, tmp_path: Path) -> None:
    bank = Bank.open(wide)
    assert bank.layout.input_size == (64, 96)
    assert [(level.stride, level.height, level.width) for level in bank.layout.levels] == [(4, 16, 24), (8, 8, 12), (16, 4, 6)]
    assert bank.manifest.network is not None
    assert json.loads((wide / "manifest.json").read_bytes())["source"]["preprocess"]["size"] == [64, 96]
    metrics = evaluate(dataset_folder, bank=wide, out=tmp_path / "out").metrics
    assert metrics is not None
    assert metrics.pixel is not None
    assert metrics.pixel.auroc > 0.9
    assert metrics.not_visible == 0
    assert Detector.open(wide).score(dataset_folder / "test/good").maps[0].shape == (64, 96)


@pytest.mark.parametrize("resize_mode", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("size", [(64, 128), (128, 64)])
def test_the_strongest_region_is_where_the_defect_is(
    resize_mode: str, size: tuple[int, int], dataset_folder: Path, tmp_path: Path
) -> None:
    """In pixels of the picture, whatever part of it the input shows at whatever scale."""
    preprocess = Preprocess(resize_mode=resize_mode, size=size, resize=min(size))
    backbone = load_backbone("efficientnet_lite0", preprocess=preprocess)
    made = extract(
        dataset_folder / "train/good", bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone)
    )
    picture = weave(np.random.default_rng(1))
    top, left = HEIGHT // 2 - 6, WIDTH // 2 + 2
    picture[top : top + 12, left : left + 12] = (70, 75, 90)
    save_png(picture, tmp_path / "defect.png")
    detector = Detector.open(made.bank.path, method=Method(sigma=1.0), backbone=backbone)
    scores = detector.score(tmp_path / "defect.png")
    assert scores.maps[0].shape == size
    found = scores.maps[0]
    regions = find_regions(found, float(found.max()) * 0.6, lambda values: values, place(WIDTH, HEIGHT, preprocess))
    y, x = regions[0].original.peak
    assert regions[0].original.size == (HEIGHT, WIDTH)
    assert top - 4 <= y < top + 16
    assert left - 4 <= x < left + 16


def test_a_bank_of_another_size_is_refused_with_both(wide: Path, dataset_folder: Path) -> None:
    backbone = load_backbone("efficientnet_lite0", preprocess=Preprocess(resize_mode="stretch", size=(96, 64)))
    with pytest.raises(InputError, match=r"preprocess\.size=\(64, 96\), these features with \(96, 64\)"):
        extract(dataset_folder / "train/good", bank=wide, preset="spade", extraction=Extraction(backbone=backbone))


@pytest.mark.parametrize("size", ["0", "64x0", "64x", "x64", "axb", "64x64x64"])
def test_sizes_that_are_none_are_refused(
    size: str, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["extract", str(dataset_folder / "train"), "--bank", str(tmp_path / "b"), "--backbone", "efficientnet_lite0"]
    try:
        code = main([*words, "--size", size])
    except SystemExit as error:  # what argparse raises
        code = int(str(error.code))
    assert code
    assert "size" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
