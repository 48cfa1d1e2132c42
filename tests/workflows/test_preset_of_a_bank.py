"""The preset of a bank: what it is made by, and how it is searched where nothing else is asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.presets import Usual, load_preset
from spade_faiss.core.settings import Method
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.extract import add
from spade_faiss.workflows.fit import fit

SMALL = ("--backbone", "efficientnet_lite0", "--resize", "72", "--size", "64")


@pytest.fixture(scope="module")
def default_bank(dataset_folder: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank by the preset that is taken unasked."""
    path = tmp_path_factory.mktemp("bank") / "weave.bank"
    fit(dataset_folder / "train" / "good", bank=path, extraction=Extraction(backbone=backbone))
    return path


def test_a_new_bank_is_made_by_default(default_bank: Path) -> None:
    bank = Bank.open(default_bank)
    assert (bank.layout.pool, bank.layout.pool_border) == (3, "zero")
    preset = load_preset("default")
    assert bank.usual == Usual(preset="default", recipe=preset.recipe, method=replace(preset.method, k_gallery=ALL))
    assert bank.manifest.usual.method.k_gallery == 100  # once there are as many


def test_it_is_searched_as_it_remembers(default_bank: Path, dataset_folder: Path) -> None:
    detector = Detector.open(default_bank)
    assert (detector.recipe.name, detector.method.levels, detector.method.k_gallery) == ("location", (), ALL)
    asked = Detector.open(default_bank, recipe="location", method=Method(k_gallery=ALL, score="top", image_scores=("top",)))
    scores, expected = (each.score(dataset_folder / "test") for each in (detector, asked))
    np.testing.assert_array_equal(scores.maps, expected.maps)


def test_it_is_calibrated_for_that_search(default_bank: Path) -> None:
    (calibration,) = stored_calibrations(Bank.open(default_bank))
    assert calibration.scoring_config == Detector.open(default_bank).scoring_config
    assert calibration.scoring_config.options(Bank.open(default_bank).usual) == ""
    assert calibration.scoring_config.options(Usual()) == "--recipe location --k-gallery all"


def test_another_search_may_be_asked_for(default_bank: Path) -> None:
    detector = Detector.open(default_bank, recipe="exact", method=Method())
    assert (detector.recipe.name, detector.method) == ("exact", Method())


def test_more_images_are_taken_by_the_settings_of_the_bank(
    fitted_bank: Path, dataset_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    images = sorted((dataset_folder / "train" / "good").iterdir())
    bank = fit(images[:12], bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=backbone)).bank
    fit(images, bank=bank.path, extraction=Extraction(backbone=backbone))  # the preset default would store other features
    assert Bank.open(bank.path).usual == bank.usual
    assert len(Bank.open(bank.path)) == 24
    add(images, bank=bank.path, backbone=backbone)


def test_another_preset_is_refused(default_bank: Path, dataset_folder: Path, backbone: Backbone) -> None:
    before = Bank.open(default_bank).manifest
    good = dataset_folder / "train" / "good"
    with pytest.raises(InputError, match=r"has pool=3, asked for 1"):
        fit(good, bank=default_bank, preset="spade", extraction=Extraction(backbone=backbone))
    other = replace(load_preset("default"), method=replace(load_preset("default").method, k_gallery=7))
    with pytest.raises(InputError, match=r"is searched with k_gallery=100, asked for 7; leave the preset out"):
        fit(good, bank=default_bank, preset=other, extraction=Extraction(backbone=backbone))
    assert Bank.open(default_bank).manifest == before


def test_a_bank_may_have_indexes_of_other_recipes(
    default_bank: Path, dataset_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    path = tmp_path / "b"
    shutil.copytree(default_bank, path)
    other = replace(load_preset("default"), recipe="clusters")
    done = fit(dataset_folder / "train" / "good", bank=path, preset=other, extraction=Extraction(backbone=backbone))
    assert done.index is not None
    assert (done.index.recipe, done.bank.usual.recipe) == ("clusters", "location")
    asked = Detector.open(path, recipe="clusters", method=done.bank.usual.method)
    assert asked.recipe.name == "clusters"


def test_what_a_bank_could_not_be_searched_by_is_refused_before_the_work(
    dataset_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    preset = load_preset("default")
    for wrong, message in (
        (replace(preset, method=replace(preset.method, levels=("layer1",))), "there is no level 'layer1'"),
        (replace(preset, method=replace(preset.method, k_gallery=(5, 6))), "has 2 values for 3 levels"),
    ):
        with pytest.raises(InputError, match=message):
            fit(dataset_folder / "train/good", bank=tmp_path / "b", preset=wrong, extraction=Extraction(backbone=backbone))
        assert not (tmp_path / "b").exists()


def test_a_second_fit_needs_no_settings_of_the_first(dataset_folder: Path, tmp_path: Path) -> None:
    images = sorted((dataset_folder / "train" / "good").iterdir())
    words = ["--bank", str(tmp_path / "b"), "--no-calibrate", "--quiet"]
    assert main(["fit", *map(str, images[:6]), *words, *SMALL]) == 0
    assert main(["fit", *map(str, images[:8]), *words]) == 0
    assert len(Bank.open(tmp_path / "b")) == 8


def test_what_cannot_search_masks_by_picture_is_refused_before_the_work(
    tmp_path: Path, backbone: Backbone, dataset_folder: Path
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    with pytest.raises(InputError, match=r"recipe 'history' takes one region of interest for all .*--preset default or"):
        fit(
            dataset_folder / "train/good",
            bank=tmp_path / "b",
            preset=replace(load_preset("default"), recipe="history"),
            extraction=Extraction(backbone=backbone, roi=masks),
        )
    assert not (tmp_path / "b").exists()


def test_a_bank_without_a_preset_is_searched_as_the_paper_has_it(tmp_path: Path) -> None:
    layout = Layout(levels=(Level("l", 4, stride=1, height=2, width=2),), embedding_dim=3, input_size=(2, 2))
    bank = Bank.create(tmp_path / "b", layout)
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(6)]
    bank.append(FeatureBatch(names, rng.random((6, 3), np.float32), {"l": rng.random((6, 2, 2, 4), np.float32)}))
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_bytes())
    assert Bank.open(tmp_path / "b").usual == Usual()
    assert "usual" in json.dumps(manifest)
    detector = Detector.open(tmp_path / "b", method=Method(sigma=0))
    assert (detector.recipe.name, detector.method.k_gallery) == ("exact", 5)


def test_the_command_line(dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = tmp_path / "b"
    assert main(["fit", str(dataset_folder / "train/good"), "--bank", str(bank), *SMALL, "--pool", "1", "--quiet"]) == 0
    opened = Bank.open(bank)
    assert (opened.layout.pool, opened.layout.pool_border, opened.usual.recipe) == (1, "zero", "location")
    out = tmp_path / "out"
    assert (
        main(["score", str(dataset_folder / "test"), "--bank", str(bank), "--out", str(out), "--k-image", "3", "--quiet"]) == 0
    )
    report = json.loads((out / "report.json").read_bytes())
    method = report["method"]
    assert (method["recipe"]["name"], method["k_image"], method["k_gallery"]) == ("location", 3, "all")
    assert main(["suspects", str(bank), "--out", str(tmp_path / "suspects"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["info", str(bank)]) == 0
    assert "searched   preset default: recipe location, k_gallery all; score top" in capsys.readouterr().out
