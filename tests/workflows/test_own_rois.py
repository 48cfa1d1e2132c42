"""A folder with a mask for each picture: fit, add, calibrate, score, evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from spade_faiss import Bank, Detector, evaluate
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Run
from spade_faiss.core.types import Bools
from spade_faiss.features.backbone import Backbone
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.extract import add
from spade_faiss.workflows.fit import fit
from tests.support.pictures import HEIGHT, WIDTH, save_png, weave

SMALL = ("--backbone", "efficientnet_lite0", "--size", "64", "--resize-mode", "stretch", "--quiet")


def region_of(name: str) -> Bools:
    """A disc that is another one for each picture."""
    rng = np.random.default_rng([*name.encode()])
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside: Bools = (x - rng.uniform(40, 56)) ** 2 + (y - rng.uniform(34, 46)) ** 2 < 26**2
    return inside


def write_masks(images: Path, folder: Path, ending: str) -> Path:
    """A mask for each picture below `images`."""
    for path in sorted(images.rglob("*.png")):
        name = path.relative_to(images)
        save_png(region_of(name.name).astype(np.uint8) * np.uint8(255), folder / name.parent / f"{name.stem}{ending}.png")
    return folder


@pytest.fixture(scope="module")
def masks(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the normal pictures, and of the test pictures by their ids in the labeled set."""
    folder = tmp_path_factory.mktemp("own") / "masks"
    write_masks(dataset_folder / "train/good", folder / "normals", "")
    return write_masks(dataset_folder / "test", folder / "set/test", "_mask").parents[1]


@pytest.fixture(scope="module")
def made(masks: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank, calibrated. Do not change it."""
    path = tmp_path_factory.mktemp("own") / "bank"
    words = ["--bank", str(path), "--roi", str(masks / "normals"), *SMALL]
    assert main(["fit", str(dataset_folder / "train/good"), *words]) == 0
    return path


def open_detector(bank: Path, masks: Path) -> Detector:
    return Detector.open(bank, run=Run(roi=masks))


def placed(name: str) -> Bools:
    rows = (2 * np.arange(64) + 1) * HEIGHT // 128
    columns = (2 * np.arange(64) + 1) * WIDTH // 128
    return region_of(name)[rows[:, None], columns]


def test_a_new_bank_is_made_by_the_preset_of_all_new_banks(
    made: Path, masks: Path, dataset_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """By the command and from Python, and by the method as its paper has it, if that is asked for."""
    assert (Bank.open(made).usual.preset, Bank.open(made).usual.recipe) == ("default", "location")
    for preset, recipe in ((None, "location"), ("spade", "exact")):
        done = fit(
            sorted((dataset_folder / "train/good").iterdir())[:3],
            bank=tmp_path / recipe,
            preset=preset,
            extraction=Extraction(backbone=backbone, roi=masks / "normals"),
            calibrate=False,
        )
        assert (done.bank.usual.preset, done.bank.usual.recipe) == (preset or "default", recipe)


def test_a_bank_records_what_is_inspected_of_each_picture(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = Bank.open(made)
    assert bank.layout.own_rois
    for row, name in enumerate(bank.ids):
        np.testing.assert_array_equal(bank.inspected(row), placed(name))
    capsys.readouterr()
    assert main(["info", str(made)]) == 0
    assert "inspected  a region of interest of each picture's own" in capsys.readouterr().out


def test_pixels_outside_change_no_score(made: Path, masks: Path, dataset_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted((dataset_folder / "test/spot").iterdir()):
        picture = np.asarray(Image.open(path).convert("RGB"))
        noise = rng.integers(0, 256, picture.shape).astype(np.uint8)
        save_png(np.where(region_of(path.name)[..., None], picture, noise), tmp_path / path.name)
    detector = open_detector(made, masks / "set/test/spot")
    found, expected = detector.score(tmp_path), detector.score(dataset_folder / "test/spot")
    for name in ("image_score", "maps", "statistics"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name, scores in zip(found.ids, found.maps, strict=True):
        assert (scores[~placed(name)] == 0).all()
        assert (scores[placed(name)] > 0).all()


def test_metrics_count_what_is_inspected_of_each_picture(made: Path, masks: Path, dataset_folder: Path, tmp_path: Path) -> None:
    metrics = evaluate(dataset_folder, bank=open_detector(made, masks / "set"), out=tmp_path).metrics
    assert metrics is not None
    assert metrics.pixel is not None
    truth, values = [], []
    with ScoreFile.open(tmp_path / "scores.h5") as scores:
        for name, found in zip(scores.ids, scores.maps(), strict=True):
            defect = np.zeros((64, 64), np.bool_)
            if "spot" in name:
                path = dataset_folder / "ground_truth/spot" / f"{Path(name).stem}_mask.png"
                defect = np.asarray(Image.open(path).resize((64, 64), Image.Resampling.NEAREST)) > 0
            inside = placed(Path(name).name)
            truth.append(defect[inside])
            values.append(found[inside])
    assert metrics.pixel.auroc == pytest.approx(roc_auc_score(np.concatenate(truth), np.concatenate(values)))
    assert metrics.not_visible == sum(not part.any() for part in truth[-5:])


def test_pictures_without_masks_are_named(made: Path, masks: Path, dataset_folder: Path, tmp_path: Path) -> None:
    some = Path(shutil.copytree(masks / "set/test/spot", tmp_path / "masks"))
    (some / "003_mask.png").unlink()
    with pytest.raises(
        InputError, match=r"1 of 5 pictures have no mask in .*masks: 003.png; give each of them one, <stem>_mask"
    ):
        open_detector(made, some).score(dataset_folder / "test/spot")
    with pytest.raises(InputError, match="frame-0 are pictures from memory, which have no masks"):
        open_detector(made, some).score(weave(np.random.default_rng(0)))
    with pytest.raises(NotFoundError, match="there is no folder of masks at"):
        open_detector(made, tmp_path / "gone").score(dataset_folder / "test/spot")
    with pytest.raises(InputError, match=r"each picture of this bank has a region of interest of its own; .*--roi MASKS/"):
        Detector.open(made).score(dataset_folder / "test/spot")


def test_masks_are_for_banks_that_were_made_with_masks(
    fitted_bank: Path, masks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "score",
        dataset_folder / "test/spot",
        "--bank",
        fitted_bank,
        "--out",
        tmp_path / "out",
        "--roi",
        masks / "set/test/spot",
    ]
    assert main([*map(str, words)]) == 1
    assert "is for banks that were made with a folder of masks; this one has no region of interest" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bank_grows_and_is_calibrated_with_masks(
    made: Path, masks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = Path(shutil.copytree(made, tmp_path / "bank"))
    new = tmp_path / "new"
    for number in range(100, 104):
        save_png(weave(np.random.default_rng(number)), new / f"{number}.png")
    write_masks(new, tmp_path / "masks", "_mask")
    with pytest.raises(InputError, match="--roi MASKS/"):
        add(new, bank=bank)
    assert main(["add", str(new), "--bank", str(bank), "--roi", str(tmp_path / "masks"), "--quiet"]) == 0
    grown = Bank.open(bank)
    np.testing.assert_array_equal(grown.inspected(len(grown) - 1), placed("103.png"))
    detector = open_detector(bank, masks / "set/test/good")
    calibration = calibrate(detector, holdout=dataset_folder / "test/good")
    held_out = sorted((dataset_folder / "test/good").iterdir())
    assert sum(calibration.pixels.counts) == sum(int(placed(path.name).sum()) for path in held_out)
    words = ["score", dataset_folder / "test/spot", "--bank", bank, "--out", tmp_path / "out", "--roi", masks / "set/test/spot"]
    assert main([*map(str, words), "--json"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_bytes())
    for item in report["scores"]:
        for region in item["regions"]:
            y, x = region["input"]["peak"]
            assert placed(item["id"])[y, x]


def test_suspects_are_scored_without_themselves(made: Path, tmp_path: Path) -> None:
    """By windows of the other pictures' regions, in which the picture itself would be at distance 0."""
    assert main(["suspects", str(made), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    with ScoreFile.open(tmp_path / "out" / "scores.h5") as scores:
        for name, found in zip(scores.ids, scores.maps(), strict=True):
            assert (found[~placed(name)] == 0).all()
            assert (found[placed(name)] > 0).all()
