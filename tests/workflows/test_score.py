"""Scoring a folder: what is scored, with which weights, and what a failure leaves."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss import Backbone, Detector, Preprocess, fit, load_backbone, score_folder
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import ReportOptions, Run
from spade_faiss.core.text import is_hidden
from spade_faiss.report.cells import read_text
from spade_faiss.report.csvfile import write_csv
from spade_faiss.report.scorefile import ScoreFile
from tests.support.runs import run_shown
from tests.support.scores import leftovers


def test_letterbox_scores_the_whole_image_and_nothing_else(dataset_folder: Path, tmp_path: Path) -> None:
    preprocess = Preprocess(resize_mode="letterbox", size=64)
    fit(
        dataset_folder / "train/good",
        bank=tmp_path / "b",
        preset="spade",
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
    small = Preprocess(resize=72, size=64)
    fit(
        dataset_folder / "train/good",
        bank=tmp_path / "b",
        preset="spade",
        extraction=Extraction(backbone="resnet18", preprocess=small, network=False),
        run=Run(weights=weights, engine="torch"),
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


def test_a_run_replaces_the_run_before_as_a_whole(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """Fault: yesterday's overlays beside today's scores."""
    detector, out = Detector.open(fitted_bank, backbone=backbone), tmp_path / "out"
    test = dataset_folder / "test"
    score_folder(test, bank=detector, out=out, report=ReportOptions(overlays=True))
    first = run_shown(out)
    assert len(list((out / "overlays").rglob("*.png"))) == 11
    (out / "notes.txt").write_text("mine")
    score_folder(test / "good", bank=detector, out=out)
    (out / "notes.txt").rename(tmp_path / "notes.txt")  # it has stayed
    assert run_shown(out) != first
    assert leftovers(out) == ["regions.csv", "report.html", "report.json", "scores.csv", "scores.h5"]
    assert leftovers(tmp_path) == ["notes.txt", "out"]


def test_images_that_are_replaced_while_they_are_scored(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the report showed the new picture under the old score."""
    new = shutil.copytree(dataset_folder / "test" / "spot", tmp_path / "new")
    detector = Detector.open(fitted_bank, backbone=backbone)
    options = ReportOptions(overlays=True)
    score_folder(new, bank=detector, out=tmp_path / "calm", report=options)

    def written(*arguments: Any) -> None:
        for path in new.iterdir():
            Image.new("RGB", (96, 80), (255, 0, 0)).save(path)
        write_csv(*arguments)

    monkeypatch.setattr("spade_faiss.workflows.score.write_csv", written)
    score_folder(new, bank=detector, out=tmp_path / "busy", report=options)
    calm, busy = (json.loads((tmp_path / name / "report.json").read_bytes())["run"]["sha256"] for name in ("calm", "busy"))
    for name in calm:
        assert name == "report.html" or calm[name] == busy[name], name
    cards = [
        re.findall(r'<article class="card".*?</article>', (tmp_path / name / "report.html").read_text(), re.DOTALL)
        for name in ("calm", "busy")
    ]
    assert cards[0] == cards[1] != []


def test_long_names_have_their_overlays(fitted_bank: Path, backbone: Backbone, dataset_folder: Path, tmp_path: Path) -> None:
    """Fault: `[Errno 36]`, and the remaining overlays were missing."""
    new = tmp_path / "new"
    new.mkdir()
    (source, *_) = sorted((dataset_folder / "test" / "spot").iterdir())
    for name in (f"{'x' * 250}1.png", f"{'x' * 250}2.png", "short.png"):
        shutil.copy(source, new / name)
    out = tmp_path / "out"
    score_folder(new, bank=Detector.open(fitted_bank, backbone=backbone), out=out, report=ReportOptions(overlays=True))
    run_shown(out)
    where = json.loads((out / "report.json").read_bytes())["overlays"]
    assert where["short.png"] == "overlays/short.png.png"
    assert len({*where.values()}) == 3
    assert all((out / name).is_file() for name in where.values())


def test_odd_names_are_no_orders(fitted_bank: Path, backbone: Backbone, dataset_folder: Path, tmp_path: Path) -> None:
    """Fault: names from files reached spreadsheets and terminals raw."""
    new, out = tmp_path / "new", tmp_path / "out"
    new.mkdir()
    (source, *_) = sorted((dataset_folder / "test" / "spot").iterdir())
    names = [
        "=1+1.png",
        "+1.png",
        "-1.png",
        "@x.png",
        "a\nb.png",
        "\x1b[2J.png",
        "pay\u202egnp.png",
        "\tx.png",
        "'q.png",
        "a;=1.png",
    ]
    for name in names:
        shutil.copy(source, new / name)
    score_folder(new, bank=Detector.open(fitted_bank, backbone=backbone), out=out, report=ReportOptions(overlays=True))
    run_shown(out)
    lines = (out / "scores.csv").read_bytes().decode().splitlines()
    assert len(lines) == len(names) + 1
    rows = list(csv.DictReader(lines))
    assert sorted(read_text(row["id"]) for row in rows) == sorted(names)
    assert not any(row["id"].startswith(("=", "+", "-", "@")) for row in rows)
    assert sorted(item["id"] for item in json.loads((out / "report.json").read_bytes())["scores"]) == sorted(names)
    with ScoreFile.open(out / "scores.h5") as scores:
        assert sorted(scores.ids) == sorted(names)
    for name in ("scores.csv", "report.json", "report.html"):
        assert not any(is_hidden(character) for character in (out / name).read_text().replace("\n", "")), name


def test_a_place_where_results_would_be_taken_for_images_is_refused(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path
) -> None:
    new = shutil.copytree(dataset_folder / "test" / "spot", tmp_path / "new")
    for out in (new, new / "results", fitted_bank, fitted_bank / "results", dataset_folder / "test" / "results"):
        with pytest.raises(InputError, match="choose"):
            score_folder(new, bank=fitted_bank, out=out)
    assert len(list(new.iterdir())) == len(list((dataset_folder / "test" / "spot").iterdir()))
