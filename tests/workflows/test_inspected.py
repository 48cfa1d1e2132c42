"""What is not inspected is said: in the text, in --json, in the report, and in what Python gets back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spade_faiss import Backbone, Detector, Extraction, Preprocess, evaluate, fit, load_backbone, score_folder
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.features.datasets import Duplicate
from spade_faiss.features.folders import LeftOut
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.extract import add, extract
from tests.support.image_files import touch

SMALL = ("--backbone", "efficientnet_lite0", "--resize", "72", "--size", "64", "--quiet")
# 96 x 80 pixels become 86 x 72, of which 64 x 64 are shown.
SHARE = 64 * 64 / (86 * 72)
HIDES = "the resize mode crop shows 66 % of the pictures on average; a bank made with --resize-mode letterbox shows all"
LEFT_OUT = "left out 3 files: 2 .txt, 1 .raw; save pictures as PNG or TIFF to have them read"


@pytest.fixture
def new(dataset_folder: Path, tmp_path: Path) -> Path:
    """Images to score, one of them behind a link, beside files that are no images."""
    folder = Path(shutil.copytree(dataset_folder / "test" / "good", tmp_path / "new"))
    touch(folder / "a.txt", folder / "b.txt", folder / "c.raw", folder / ".hidden.png")
    with Image.open(folder / "000.png") as image:
        image.convert("L").save(folder / "gray.pgm")
        image.save(folder / "photo.jfif", "JPEG")
    shutil.copytree(dataset_folder / "test" / "spot", tmp_path / "elsewhere")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, *words, "--json"))
    return found


def test_score_says_what_it_left_out_and_hides(
    fitted_bank: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("score", new, "--bank", fitted_bank, "--out", tmp_path / "out")
    lines = run(capsys, *words).splitlines()
    assert lines[0] == "13 images scored, 0 skipped"
    assert lines[1:4] == [f"  {LEFT_OUT}", "  left out 1 hidden image: .hidden.png", f"  {HIDES}"]
    numbers = run_json(capsys, *words)
    report = json.loads((tmp_path / "out/report.json").read_bytes())
    for found in (numbers, report):
        assert found["images"] == 13
        assert found["left_out"] == {"files": {".txt": 2, ".raw": 1}, "hidden": [".hidden.png"], "links": []}
        assert found["visible"] == {"resize_mode": "crop", "share": pytest.approx(SHARE)}
        assert found["in_bank"] == []
    assert {"gray.pgm", "photo.jfif", "linked/000.png"} <= {item["id"] for item in report["scores"]}
    page = (tmp_path / "out/report.html").read_text()
    assert LEFT_OUT[1:] in page
    assert HIDES[1:] in page


def test_python_gets_the_same_as_fields(fitted_bank: Path, backbone: Backbone, new: Path, tmp_path: Path) -> None:
    found = score_folder(new, bank=Detector.open(fitted_bank, backbone=backbone), out=tmp_path / "out")
    assert found.left_out == LeftOut({".txt": 2, ".raw": 1}, hidden=(".hidden.png",))
    assert found.visible.resize_mode == "crop"
    assert found.visible.share == pytest.approx(SHARE)
    made = extract(new, bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=backbone))
    assert (made.left_out, made.visible) == (found.left_out, found.visible)
    again = extract(new, bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=backbone))
    assert again.visible.share is None
    assert again.visible.notices() == []


@pytest.mark.parametrize("command", ["fit", "extract", "add"])
def test_making_a_bank_says_what_it_left_out_and_hides(
    command: str, fitted_bank: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "b") if command == "add" else tmp_path / "b"
    options = () if command == "add" else SMALL
    (new / "000.png").rename(new / "new name.png")
    shutil.copy(new / "gray.pgm", new / "other.pgm")
    shutil.move(new / "001.png", tmp_path / "elsewhere/another.png")
    for name in ("002", "003", "004", "005"):  # the bank has others of these names
        (new / f"{name}.png").rename(new / f"n{name}.png")
    lines = run(capsys, command, new, "--bank", bank, *options).splitlines()
    for notice in (LEFT_OUT, "left out 1 hidden image: .hidden.png", HIDES):
        assert lines.count(f"  {notice}") == 1
    numbers = run_json(capsys, command, new, "--bank", bank, *options)
    assert numbers["left_out"] == {"files": {".txt": 2, ".raw": 1}, "hidden": [".hidden.png"], "links": []}
    assert numbers["visible"] == {"resize_mode": "crop", "share": None}  # nothing was added this time


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
def test_nothing_is_said_where_all_is_shown(mode: str, dataset_folder: Path, new: Path, tmp_path: Path) -> None:
    backbone = load_backbone("efficientnet_lite0", preprocess=Preprocess(resize_mode=mode, size=64))
    made = fit(
        dataset_folder / "train/good",
        bank=tmp_path / "b",
        preset="spade",
        extraction=Extraction(backbone=backbone),
        calibrate=False,
    )
    found = score_folder(new, bank=Detector.open(tmp_path / "b", backbone=backbone), out=tmp_path / "out")
    assert made.visible.share == found.visible.share == 1
    assert [*made.visible.notices(), *found.visible.notices()] == []
    assert "of the pictures on average" not in (tmp_path / "out/report.html").read_text()


def test_evaluate_says_what_it_left_out_and_hides(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    touch(dataset / "test/good/a.txt", dataset / "test/spot/b.txt", dataset / "test/c.raw")
    words = ("evaluate", dataset, "--bank", fitted_bank, "--out", tmp_path / "out")
    text = run(capsys, *words)
    numbers = run_json(capsys, *words)
    assert f"  {LEFT_OUT}\n  {HIDES}\n" in text
    assert numbers["left_out"]["files"] == {".txt": 2, ".raw": 1}
    page = (tmp_path / "out/report.html").read_text()
    assert LEFT_OUT[1:] in page
    assert HIDES[1:] in page


def test_images_that_are_in_the_bank_are_said(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    shutil.copy(dataset / "train/good/003.png", dataset / "test/good/copy.png")
    shutil.copy(dataset / "train/good/004.png", dataset / "test/spot/100.png")
    shutil.copy(dataset / "ground_truth/spot/000_mask.png", dataset / "ground_truth/spot/100_mask.png")
    expected = [{"id": "test/good/copy.png", "of": "003.png"}, {"id": "test/spot/100.png", "of": "004.png"}]
    said = (
        "2 of 13 images are in the bank by content: they find themselves there, and score lower than new images do, "
        "down to 0: test/good/copy.png (there 003.png), test/spot/100.png (there 004.png)"
    )
    words = ("evaluate", dataset, "--bank", fitted_bank, "--out", tmp_path / "out")
    assert f"  {said}\n" in run(capsys, *words)
    assert run_json(capsys, *words)["in_bank"] == expected
    assert json.loads((tmp_path / "out/report.json").read_bytes())["in_bank"] == expected
    assert said in (tmp_path / "out/report.html").read_text()
    images = (dataset / "train/good/003.png", dataset / "test/good")
    assert run_json(capsys, "score", *images, "--bank", fitted_bank, "--out", tmp_path / "s")["in_bank"] == [
        {"id": "train/good/003.png", "of": "003.png"},
        {"id": "test/good/copy.png", "of": "003.png"},
    ]


def test_python_gets_the_images_that_are_in_the_bank(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path
) -> None:
    detector = Detector.open(fitted_bank, backbone=backbone)
    found = score_folder(dataset_folder / "train/good/000.png", bank=detector, out=tmp_path)
    assert found.in_bank == (Duplicate("000.png", "000.png"),)
    known, new = (detector.score(dataset_folder / name).map_score[0] for name in ("train/good/000.png", "test/good/000.png"))
    assert known < new / 100


def test_normal_kind_says_which_images_are_normal(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = Detector.open(fitted_bank, backbone=backbone)
    expected = evaluate(dataset_folder, bank=detector, out=tmp_path / "good").metrics
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    (dataset / "test/good").rename(dataset / "test/ok")
    with pytest.raises(InputError, match="--normal-kind ok"):
        evaluate(dataset, bank=detector, out=tmp_path / "out")
    found = evaluate(dataset, bank=detector, out=tmp_path / "out", normal_kind="ok").metrics
    assert found is not None
    assert expected is not None
    assert (found.by_knn.auroc, found.by_map.auroc) == (expected.by_knn.auroc, expected.by_map.auroc)
    words = ("evaluate", dataset, "--bank", fitted_bank, "--out", tmp_path / "out", "--normal-kind", "ok")
    assert run_json(capsys, *words)["metrics"]
    assert main([*map(str, words[:-2])]) == 1
    assert "the normal kind is called 'good'; rename test/ok to test/good" in capsys.readouterr().err


def test_a_set_without_its_normal_kind_names_the_kinds_it_has(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path
) -> None:
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    shutil.rmtree(dataset / "ground_truth")
    (dataset / "test/good").rename(dataset / "test/0")
    detector = Detector.open(fitted_bank, backbone=backbone)
    with pytest.raises(InputError, match=r"has no normal \(test/good\) .* holds the kinds 0, spot \(.*--normal-kind KIND\)"):
        evaluate(dataset, bank=detector, out=tmp_path / "out")


@pytest.mark.parametrize("command", ["fit", "extract", "add"])
def test_the_root_of_a_labeled_set_is_no_folder_of_normal_images(
    command: str, dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "b") if command == "add" else tmp_path / "b"
    words = [command, str(dataset_folder), "--bank", str(bank), *(() if command == "add" else SMALL)]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "is the root of a labeled set, it holds ground_truth/, test/, train/" in error
    assert f"give the folder of its normal images alone: {dataset_folder.resolve() / 'train/good'}" in error
    assert bank.exists() == (command == "add")


def test_held_out_normal_images_are_no_labeled_set(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path
) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "b")
    with pytest.raises(InputError, match="defects would become normal images"):
        calibrate(Detector.open(bank, backbone=backbone), holdout=dataset_folder / "test")
    with pytest.raises(InputError, match="defects and masks would become normal images"):
        add(dataset_folder, bank=bank, backbone=backbone)


def test_results_do_not_go_into_a_linked_folder(fitted_bank: Path, backbone: Backbone, new: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lies inside of .*elsewhere"):
        score_folder(new, bank=Detector.open(fitted_bank, backbone=backbone), out=tmp_path / "elsewhere/results")
