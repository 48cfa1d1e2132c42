"""Evaluation: metrics over the region that was scored, and a report of the images that were scored."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from spade_faiss import Backbone, Detector, Preprocess, evaluate, fit
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Method, ReportOptions
from spade_faiss.features.datasets import load_dataset
from spade_faiss.features.pictures import load_image, to_mask
from spade_faiss.report.model import Report
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.evaluation import Metrics, measure
from tests.support.runs import run_shown


def test_metrics_are_those_of_the_scores_written(dataset_folder: Path, fitted_bank: Path, tmp_path: Path) -> None:
    metrics = evaluate(dataset_folder, bank=fitted_bank, out=tmp_path).metrics
    assert metrics is not None
    assert metrics.pixel is not None
    with ScoreFile.open(tmp_path / "scores.h5") as scores:
        defective = np.array(["good" not in name for name in scores.ids])
        assert metrics.by_knn.auroc == pytest.approx(roc_auc_score(defective, scores.image_score))
        assert metrics.by_map.ap == pytest.approx(average_precision_score(defective, scores.map_score))
        assert metrics.by_top.auroc == pytest.approx(roc_auc_score(defective, scores.top_score))
        masks = []
        for name in scores.ids:
            path = dataset_folder / "ground_truth" / Path(name).parent.name / f"{Path(name).stem}_mask.png"
            with Image.open(dataset_folder / name) as image:
                width, height = image.size
            # The resize mode crop, written out: shorter side to 72, central 64 x 64.
            shorter = min(width, height)
            size = int(72 * width / shorter), int(72 * height / shorter)
            left, top = round((size[0] - 64) / 2), round((size[1] - 64) / 2)
            mask = Image.open(path) if path.exists() else Image.new("L", (width, height))
            masks.append(np.asarray(mask.convert("L").resize(size, Image.Resampling.NEAREST))[top : top + 64, left : left + 64])
        truth = np.stack(masks) > 127
        assert truth.any()
        assert metrics.pixel.auroc == pytest.approx(roc_auc_score(truth.ravel(), np.stack(list(scores.maps())).ravel()))
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["metrics"]["by_knn"]["auroc"] == metrics.by_knn.auroc
    assert report["metrics"]["by_top"]["auroc"] == metrics.by_top.auroc
    assert "roc" not in report["metrics"]["kinds"]["spot"]["by_top"], "curves only of all defects together"
    assert report["metrics"]["pixel"]["aupro"] == metrics.pixel.aupro
    assert list(metrics.kinds) == ["spot"]
    page = (tmp_path / "report.html").read_text()
    for number in (metrics.by_knn.auroc, metrics.by_map.auroc, metrics.pixel.auroc, metrics.pixel.aupro):
        assert f"{number:.3f}" in page


def test_defects_outside_of_the_scored_region_are_counted(dataset_folder: Path, fitted_bank: Path, tmp_path: Path) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    mask = sorted((dataset / "ground_truth/spot").iterdir())[0]
    corner = np.zeros(np.asarray(Image.open(mask).convert("L")).shape, np.uint8)
    corner[:2, :2] = 255  # outside of the central square
    Image.fromarray(corner).save(mask)
    metrics = evaluate(dataset, bank=fitted_bank, out=tmp_path / "out").metrics
    assert metrics is not None
    assert (metrics.not_visible, metrics.kinds["spot"].not_visible) == (1, 1)
    assert f"1 of {metrics.images} defective images show no defect" in (tmp_path / "out/report.html").read_text()


def test_a_set_without_masks_has_no_pixel_metrics(dataset_folder: Path, fitted_bank: Path, tmp_path: Path) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    shutil.rmtree(dataset / "ground_truth")
    metrics = evaluate(dataset, bank=fitted_bank, out=tmp_path / "out").metrics
    assert metrics is not None
    assert metrics.pixel is None
    assert metrics.not_visible == 0


@pytest.mark.parametrize("kind", ["good", "spot"])
def test_both_classes_are_needed_before_anything_is_scored(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, kind: str
) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    shutil.rmtree(dataset / "test" / kind)
    with pytest.raises(InputError, match="spade-faiss score"):
        evaluate(dataset, bank=fitted_bank, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_mask_is_an_error(dataset_folder: Path, fitted_bank: Path, tmp_path: Path) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    lost = sorted((dataset / "ground_truth/spot").iterdir())[0]
    lost.unlink()
    with pytest.raises(InputError, match="no mask"):
        evaluate(dataset, bank=fitted_bank, out=tmp_path / "out")


def test_the_report_survives_moved_images(dataset_folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    fit(dataset / "train/good", bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=backbone))
    shutil.rmtree(dataset / "train")
    detector = Detector.open(tmp_path / "b", backbone=backbone)
    evaluate(dataset, bank=detector, out=tmp_path / "out")
    assert "train/good" in (tmp_path / "out/report.html").read_text()  # the placeholder names the file that is gone


def test_letterbox_metrics_count_only_what_shows_the_image(dataset_folder: Path, tmp_path: Path) -> None:
    preprocess = Preprocess(resize_mode="letterbox", size=64)
    fit(
        dataset_folder / "train/good",
        bank=tmp_path / "b",
        preset="spade",
        extraction=Extraction(backbone="efficientnet_lite0", preprocess=preprocess),
    )
    metrics = evaluate(dataset_folder, bank=tmp_path / "b", out=tmp_path / "out").metrics
    assert metrics is not None
    assert metrics.pixel is not None
    truth, values = [], []
    with ScoreFile.open(tmp_path / "out/scores.h5") as scores:
        for name, scored in zip(scores.ids, scores.maps(), strict=True):
            path = dataset_folder / "ground_truth" / Path(name).parent.name / f"{Path(name).stem}_mask.png"
            mask = Image.open(path) if path.exists() else Image.new("L", (96, 80))
            band = slice(5, 58)  # 96 x 80 becomes 64 x 53, at row 5
            truth.append(np.asarray(mask.convert("L").resize((64, 53), Image.Resampling.NEAREST)) > 127)
            values.append(scored[band])
    expected = roc_auc_score(np.stack(truth).ravel(), np.stack(values).ravel())
    assert metrics.pixel.auroc == pytest.approx(expected, abs=1e-9)


def test_a_normal_image_that_has_changed_is_not_shown(dataset_folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    fit(dataset / "train/good", bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=backbone))
    for path in (dataset / "train/good").iterdir():
        Image.new("RGB", (96, 80), (255, 0, 0)).save(path)
    evaluate(dataset, bank=Detector.open(tmp_path / "b", backbone=backbone), out=tmp_path / "out")
    assert "has changed since the bank took it" in (tmp_path / "out/report.html").read_text()


def test_cards_show_what_the_detector_found(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[Report] = []
    monkeypatch.setattr("spade_faiss.workflows.score.write_html", lambda path, page: pages.append(page))
    detector = Detector.open(fitted_bank, method=Method(k_gallery=9), backbone=backbone)
    evaluate(dataset_folder, bank=detector, out=tmp_path, report=ReportOptions(shown=12))
    (report,) = pages
    dataset = load_dataset(dataset_folder)
    direct = detector.score([record.path for record in dataset.test])
    cards = {card.image.id: card for group in report.groups for card in group.cards}
    assert len(cards) == 4 + 1 + 4, "the highest scores, then the rest of the five defects, then normal ones"
    places = {record.id: number for number, record in enumerate(dataset.test)}
    for name, card in cards.items():
        i = places[name]
        loaded = load_image(dataset.test[i], backbone.source.preprocess)
        np.testing.assert_array_equal(card.picture, loaded.picture)
        mask = dataset.test[i].mask
        if mask is None:
            assert card.mask is None
        else:
            np.testing.assert_array_equal(card.mask, to_mask(mask, loaded.placement))
        assert card.image.scores == {name: values[i] for name, values in direct.image_scores.items()}
        y, x = card.peak
        assert direct.maps[i, y, x] == direct.maps[i].max()
        shown = {normal.place: normal for normal in card.normals if normal.place is not None}
        assert set(range(1, 6)) <= set(shown)
        for rank, normal in shown.items():
            assert normal.id == direct.neighbor_ids[i, rank - 1]
            assert normal.distance == direct.neighbor_dist[i, rank - 1]
        for level, nearest in direct.nearest.items():
            cell = 64 // nearest.shape[1]
            match = nearest[i, y // cell, x // cell]
            corners = (match["y"] * cell, match["x"] * cell, (match["y"] + 1) * cell, (match["x"] + 1) * cell)
            found = [(item.level, item.corners) for item in shown[match["neighbor"] + 1].matches]
            assert (level, corners) in found
    hardest = [card.image.scores["knn"] for card in report.groups[1].cards]
    assert hardest == sorted(hardest)


def test_no_image_and_no_mask_is_read_twice(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[Path] = Counter()
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        read[path] += 1
        return read_bytes(path)

    detector = Detector.open(fitted_bank, backbone=backbone)
    dataset = load_dataset(dataset_folder)
    monkeypatch.setattr(Path, "read_bytes", counted)
    evaluate(dataset_folder, bank=detector, out=tmp_path / "out", report=ReportOptions(shown=12, overlays=True))
    for record in dataset.test:
        assert read[record.path] == 1
        assert record.mask is None or read[record.mask] == 1
    normals = [count for path, count in read.items() if path.parent == dataset_folder / "train" / "good"]
    assert normals == [1] * len(normals) != []


def test_the_report_shows_what_was_scored_though_the_files_are_gone(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    detector = Detector.open(fitted_bank, backbone=backbone)
    options = ReportOptions(shown=6)
    evaluate(dataset, bank=detector, out=tmp_path / "whole", report=options)

    def measured(*arguments: Any) -> Metrics:
        shutil.rmtree(dataset / "test")
        return measure(*arguments)

    monkeypatch.setattr("spade_faiss.workflows.evaluate.measure", measured)
    evaluate(dataset, bank=detector, out=tmp_path / "gone", report=options)
    cards = [
        re.findall(r'<article class="card".*?</article>', (tmp_path / name / "report.html").read_text(), re.DOTALL)
        for name in ("whole", "gone")
    ]
    assert cards[0] == cards[1] != []


def test_results_of_an_evaluation_stay_out_of_its_data_set(dataset_folder: Path, fitted_bank: Path, tmp_path: Path) -> None:
    """Fault: `evaluate ds --out ds/test/results` took its own overlays for defects the next time."""
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    before = sorted(dataset.rglob("*"))
    for out in (dataset, dataset / "test" / "results", dataset / "results", dataset / "test" / "good", fitted_bank / "x"):
        with pytest.raises(InputError, match="lies inside of"):
            evaluate(dataset, bank=fitted_bank, out=out)
    assert sorted(dataset.rglob("*")) == before


def test_an_evaluation_shows_its_own_run(dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path) -> None:
    detector, out = Detector.open(fitted_bank, backbone=backbone), tmp_path / "out"
    runs = set()
    for options in (ReportOptions(overlays=True), ReportOptions()):
        evaluate(dataset_folder, bank=detector, out=out, report=options)
        runs.add(run_shown(out))
        assert (out / "overlays").exists() == options.overlays
    assert len(runs) == 2
