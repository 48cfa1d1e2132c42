"""A region of interest from a mask to a report: fit, add, calibrate, score, evaluate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from spade_faiss import Backbone, Bank, Detector, Extraction, Preprocess, evaluate, fit, load_backbone
from spade_faiss.bank.manifest import read_manifest, write_manifest
from spade_faiss.cli import main
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Method, ReportOptions, Run
from spade_faiss.core.types import Bools
from spade_faiss.features.roi import mask_of
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.workflows.extract import add, extract
from tests.support.pictures import HEIGHT, WIDTH, save_png, weave

SMALL = ("--backbone", "efficientnet_lite0", "--size", "64", "--resize-mode", "letterbox", "--preset", "spade", "--quiet")


def inside() -> Bools:
    """Of pictures of 96 x 80 pixels: a disc left of the center, where some of the defects are."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    mask: Bools = (x - 36) ** 2 + (y - 40) ** 2 < 24**2
    return mask


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roi") / "mask.png"
    save_png(inside().astype(np.uint8) * np.uint8(255), path)
    return path


@pytest.fixture(scope="module")
def made(mask: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of letterboxed pictures, calibrated. Do not change it."""
    path = tmp_path_factory.mktemp("roi") / "bank"
    assert main(["fit", str(dataset_folder / "train/good"), "--bank", str(path), "--roi", str(mask), *SMALL]) == 0
    return path


@pytest.fixture(scope="module")
def letterbox() -> Backbone:
    return load_backbone("efficientnet_lite0", preprocess=Preprocess(resize_mode="letterbox", size=64))


def placed() -> Bools:
    """What the letterbox of 64 x 64 shows of the region: 96 x 80 pixels become 64 x 53, below 5 rows of margin."""
    found = np.zeros((64, 64), np.bool_)
    for y, x in np.ndindex(53, 64):
        found[5 + y, x] = inside()[int((y + 0.5) * HEIGHT / 53), int((x + 0.5) * WIDTH / 64)]
    return found


def test_pixels_outside_change_no_score(
    made: Path, mask: Path, letterbox: Backbone, dataset_folder: Path, tmp_path: Path
) -> None:
    """To the bit, embeddings and their distances included: neither those of test images nor those of normal ones."""
    rng = np.random.default_rng(0)

    def change(source: Path, target: Path) -> None:
        for path in sorted(source.iterdir()):
            picture = np.asarray(Image.open(path).convert("RGB"))
            noise = rng.integers(0, 256, picture.shape).astype(np.uint8)
            save_png(np.where(inside()[..., None], picture, noise), target / path.name)

    change(dataset_folder / "test/spot", tmp_path / "test")
    change(dataset_folder / "train/good", tmp_path / "train")
    extract(tmp_path / "train", bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=letterbox, roi=mask))
    expected = Detector.open(made).score(dataset_folder / "test/spot")
    for detector in (Detector.open(made), Detector.open(tmp_path / "bank", run=Run(engine=engine_of(made)))):
        found = detector.score(tmp_path / "test")
        for name in ("image_score", "neighbor_dist", "maps", "statistics"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    found = Detector.open(made).score(tmp_path / "test")
    for name in ("image_score", "neighbor_dist", "maps", "statistics"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    from_memory = Detector.open(made).score(np.asarray(Image.open(tmp_path / "test/000.png")))
    np.testing.assert_array_equal(from_memory.maps[0], expected.maps[0])


def engine_of(bank: Path) -> str:
    source = Bank.open(bank).manifest.source
    assert source is not None
    return source.engine


def test_pixels_inside_change_scores(made: Path, dataset_folder: Path, tmp_path: Path) -> None:
    picture = np.asarray(Image.open(dataset_folder / "test/good/000.png").convert("RGB")).copy()
    before = Detector.open(made).score(picture)
    picture[36:44, 32:40] = 70, 75, 90
    after = Detector.open(made).score(picture)
    assert after.map_score[0] > 1.5 * before.map_score[0]
    y, x = after.peak[0]
    assert (x - 24) ** 2 + (y - 31.5) ** 2 < 6**2, "the spot is at 36, 40 of 96 x 80 pixels"


def test_a_bank_records_its_region(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = Bank.open(made)
    assert bank.layout.roi is not None
    np.testing.assert_array_equal(mask_of(bank.layout.roi), placed())
    source = bank.manifest.source
    assert source is not None
    assert source.preprocess.roi is not None
    np.testing.assert_array_equal(mask_of(source.preprocess.roi), inside())
    assert all(0 < level.locations < level.height * level.width for level in bank.layout.levels)
    capsys.readouterr()
    assert main(["info", str(made)]) == 0
    text = capsys.readouterr().out
    assert f"inspected  {100 * placed().mean():.1f} % of the input" in text
    fine = bank.layout.levels[0]
    assert f"{fine.name}: {fine.locations} of {fine.height} x {fine.width} locations" in text
    assert main(["info", str(made), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["roi"]["share"] == pytest.approx(placed().mean())
    assert numbers["source"]["preprocess"]["roi"]["share"] == pytest.approx(inside().mean())
    assert "runs" not in json.dumps(numbers)


def test_metrics_count_what_is_inspected(made: Path, dataset_folder: Path, tmp_path: Path) -> None:
    """A defect that lies wholly outside is none for pixels; its image counts as defective still, and is named."""
    dataset = shutil.copytree(dataset_folder, tmp_path / "dataset")
    outside = np.zeros((HEIGHT, WIDTH), np.uint8)
    outside[2:20, 80:94] = 255
    save_png(outside, dataset / "ground_truth/spot/000_mask.png")
    metrics = evaluate(dataset, bank=made, out=tmp_path / "out", report=ReportOptions(overlays=True)).metrics
    assert metrics is not None
    assert metrics.pixel is not None
    truth, values, visible = [], [], []
    with ScoreFile.open(tmp_path / "out/scores.h5") as scores:
        for name, found in zip(scores.ids, scores.maps(), strict=True):
            path = dataset / "ground_truth/spot" / f"{Path(name).stem}_mask.png"
            defect = np.zeros((64, 64), np.bool_)
            if "spot" in name:
                with Image.open(path) as image:
                    defect[5:58] = np.asarray(image.resize((64, 53), Image.Resampling.NEAREST)) > 0
            assert (found[~placed()] == 0).all()
            truth.append(defect[placed()])
            values.append(found[placed()])
            visible += [bool((defect & placed()).any())] * ("spot" in name)
    assert metrics.pixel.auroc == pytest.approx(roc_auc_score(np.concatenate(truth), np.concatenate(values)))
    assert metrics.images == 5
    assert metrics.not_visible == visible.count(False) >= 1
    page = (tmp_path / "out/report.html").read_text()
    assert "in the region of interest), yet count as defective" in page
    report = json.loads((tmp_path / "out/report.json").read_bytes())
    # Overlays show what the network saw: outside there is nothing but the mean color.
    picture = np.asarray(Image.open(tmp_path / "out" / next(iter(report["overlays"].values()))))
    source = Bank.open(made).manifest.source
    assert source is not None
    assert picture[40, 60].tolist() == [round(255 * mean) for mean in source.preprocess.mean]


def test_calibrations_and_verdicts(
    made: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(dataset_folder / "test/good"), "--bank", str(made), "--out", str(tmp_path), "--json"]) == 0
    regions = [region for item in json.loads((tmp_path / "report.json").read_bytes())["scores"] for region in item["regions"]]
    for region in regions:
        y, x = region["input"]["peak"]
        assert placed()[y, x]


def test_images_are_added_to_a_bank_by_its_own_region(made: Path, tmp_path: Path) -> None:
    bank = shutil.copytree(made, tmp_path / "bank")
    pictures = [weave(np.random.default_rng(seed)) for seed in (100, 101)]
    save_png(pictures[0], tmp_path / "new/a.png")
    save_png(pictures[1].repeat(2, axis=0).repeat(2, axis=1), tmp_path / "new/larger.png")
    assert add(tmp_path / "new", bank=bank).added == 2
    found = Detector.open(bank).score(pictures[0])
    assert found.map_score[0] == 0, "it finds itself"


def test_pictures_of_another_aspect_ratio_are_skipped_with_the_reason(
    made: Path, mask: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    tall = tmp_path / "new/tall.png"
    save_png(np.rot90(weave(np.random.default_rng(100))), tall)
    bank = shutil.copytree(made, tmp_path / "bank")
    with pytest.raises(InputError, match=rf"{tall}': it is 80 x 96 pixels, the region of interest .* 96 x 80"):
        Detector.open(bank).score(tall)
    with pytest.raises(InputError, match="another aspect ratio"):
        add(tall, bank=bank)
    # Stretched, every picture shows the same part.
    stretched = load_backbone("efficientnet_lite0", preprocess=Preprocess(resize_mode="stretch", size=64))
    extraction = Extraction(backbone=stretched, roi=mask)
    done = extract(
        [tall, *sorted((dataset_folder / "train/good").iterdir())[:2]],
        bank=tmp_path / "s",
        preset="spade",
        extraction=extraction,
    )
    assert done.added == 3


def test_a_bank_of_another_region_is_another_bank(
    made: Path, mask: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, bank = str(dataset_folder / "train/good"), str(shutil.copytree(made, tmp_path / "bank"))
    assert main(["extract", images, "--bank", bank, "--roi", str(mask), *SMALL]) == 0
    save_png(np.roll(inside(), 1, axis=0).astype(np.uint8) * np.uint8(255), tmp_path / "other.png")
    capsys.readouterr()
    assert main(["extract", images, "--bank", bank, "--roi", str(tmp_path / "other.png"), *SMALL]) == 1
    error = capsys.readouterr().err
    assert "was extracted with preprocess.roi" in error
    assert len(error) < 1000
    assert main(["extract", images, "--bank", str(tmp_path / "new"), "--roi", str(tmp_path / "gone.png"), *SMALL]) == 1
    assert "there is no mask of a region of interest at" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_backbone_of_your_own_takes_the_region_of_the_bank(
    letterbox: Backbone, mask: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    made = fit(
        dataset_folder / "train/good", bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=letterbox, roi=mask)
    )
    assert made.calibration is not None
    detector = Detector.open(tmp_path / "b", backbone=letterbox, method=Method(k_image=3))
    assert detector.backbone.source.preprocess.roi == made.bank.manifest.source.preprocess.roi  # type: ignore[union-attr]
    found = detector.score(dataset_folder / "test/good")
    assert (found.maps[:, ~placed()] == 0).all()


def test_regions_that_contradict_each_other_are_damage(made: Path, tmp_path: Path) -> None:
    bank = Path(shutil.copytree(made, tmp_path / "bank"))
    manifest: Any = read_manifest(bank)
    source = manifest.source
    changed = replace(source, preprocess=replace(source.preprocess, roi=None))
    write_manifest(bank, replace(manifest, source=changed))
    with pytest.raises(BankError, match="its maps and its pictures have different regions of interest"):
        _ = Detector.open(bank).backbone
