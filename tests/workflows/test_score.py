"""Scoring a folder: what is scored, with which weights, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss import Backbone, Detector, Preprocess, fit, load_backbone, score_folder
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Extraction, ReportOptions, Run
from spade_faiss.report.scorefile import ScoreFile
from tests.support.scores import leftovers


def test_letterbox_scores_the_whole_image_and_nothing_else(dataset_folder: Path, tmp_path: Path) -> None:
    preprocess = Preprocess(resize_mode="letterbox", crop=64)
    fit(
        dataset_folder / "train/good",
        bank=tmp_path / "b",
        extraction=Extraction(backbone="efficientnet_lite0", preprocess=preprocess),
    )
    wide = tmp_path / "wide.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(wide)
    (scored,) = Detector.open(tmp_path / "b").score([wide]).maps
    assert (scored[24:40] > 0).all()  # a 64 x 16 band is the image
    assert (scored[:24] == 0).all()
    assert (scored[40:] == 0).all()


def test_weights_are_loaded_from_where_they_were(dataset_folder: Path, tmp_path: Path) -> None:
    import torch
    import torchvision

    torch.manual_seed(0)
    weights = tmp_path / "resnet18.pt"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    small = Preprocess(resize=72, crop=64)
    fit(
        dataset_folder / "train/good",
        bank=tmp_path / "b",
        extraction=Extraction(backbone="resnet18", preprocess=small),
        run=Run(weights=weights),
    )
    image = sorted((dataset_folder / "test/good").iterdir())[:1]
    expected = Detector.open(tmp_path / "b").score(image).image_score
    moved = weights.rename(tmp_path / "moved.pt")
    with pytest.raises(FileNotFoundError, match="--weights"):
        Detector.open(tmp_path / "b").score(image)
    np.testing.assert_array_equal(Detector.open(tmp_path / "b", run=Run(weights=moved)).score(image).image_score, expected)
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    ours = Detector.open(tmp_path / "b").bank.manifest.source
    theirs = load_backbone("resnet18", weights=weights, preprocess=small).source
    assert ours is not None
    with pytest.raises(InputError) as error:
        Detector.open(tmp_path / "b").score(image)
    assert ours.weights_sha256 in str(error.value)
    assert theirs.weights_sha256 in str(error.value)


def test_a_report_that_fails_does_not_cost_the_scores(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("no page")

    monkeypatch.setattr("spade_faiss.workflows.score.write_html", fail)
    detector, out = Detector.open(fitted_bank, backbone=backbone), tmp_path / "out"
    with pytest.raises(InputError, match="no page"):
        score_folder(dataset_folder / "test", bank=detector, out=out, report=ReportOptions(overlays=True))
    kept = tmp_path / "out.unfinished"
    with ScoreFile.open(kept / "scores.h5") as scores:
        assert len(scores) == 11
    assert leftovers(kept) == ["regions.csv", "scores.csv", "scores.h5"]
    assert leftovers(tmp_path) == ["out.unfinished"]
    monkeypatch.undo()
    score_folder(dataset_folder / "test", bank=detector, out=out)
    assert leftovers(tmp_path) == ["out"]
