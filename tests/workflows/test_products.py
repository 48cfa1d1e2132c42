"""One bank of several products, from folders of pictures to verdicts: each product is calibrated and judged by itself."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import (
    Bank,
    BankError,
    Decision,
    Detector,
    Extraction,
    InputError,
    Method,
    Preprocess,
    Run,
    add,
    calibrate,
    drift,
    evaluate,
    fit,
    load_recipe,
    score_folder,
    suspects,
    tune,
    verify,
)
from spade_faiss.cli import main
from spade_faiss.decisions.calibration import find_calibration, flag_below_p
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features.backbone import Backbone
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.workflows.calibrate import calibrate_products
from spade_faiss.workflows.drift import drift_of_products
from spade_faiss.workflows.info import info
from tests.support.backbones import tiny_backbone
from tests.support.pictures import save_png

COUNTS = {"cap": 60, "pen": 45, "tiny": 3}
COLORS = {"cap": (200, 60, 60), "pen": (60, 60, 200), "tiny": (60, 200, 60), "new one": (220, 220, 40)}


def picture(product: str, seed: int, *, spot: bool = False) -> Any:
    rng = np.random.default_rng([seed, *product.encode()])
    pixels = np.array(COLORS[product]) + rng.integers(-12, 13, (32, 32, 3)) + rng.integers(-6, 7, 3)
    if spot:
        pixels[8:20, 8:20] = np.array(COLORS[product]) // 3
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good`: normal pictures; `set`: labeled ones. Do not change them."""
    root = tmp_path_factory.mktemp("products")
    for product, count in COUNTS.items():
        for i in range(count):
            save_png(picture(product, i), root / "good" / product / f"{i:03d}.png")
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255
        for i in range(4):
            save_png(picture(product, 1000 + i), root / "set" / product / "test" / "good" / f"{i}.png")
            save_png(picture(product, 2000 + i, spot=True), root / "set" / product / "test" / "spot" / f"{i}.png")
            save_png(mask, root / "set" / product / "ground_truth" / "spot" / f"{i}_mask.png")
    return root


@pytest.fixture(scope="module")
def fitted(images: Path, tiny: Backbone) -> Path:
    """Do not change it."""
    done = fit(images / "good", bank=images / "bank", extraction=Extraction(backbone=tiny, products="folder"))
    assert done.calibration is None
    assert {name: len(made) for name, made in done.products.items() if not isinstance(made, str)} == COUNTS
    return images / "bank"


@pytest.fixture
def bank(fitted: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(fitted, tmp_path / "bank"))


def labeled(images: Path) -> list[str | Path]:
    """The pictures of the labeled sets, without their masks."""
    return [images / "set" / product / "test" for product in COUNTS]


def scores_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {item["id"]: item for item in json.loads((folder / "report.json").read_text())["scores"]}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_picture_gets_its_product_and_the_verdict_of_that(fitted: Path, images: Path, tmp_path: Path, tiny: Backbone) -> None:
    detector = Detector.open(fitted, backbone=tiny)
    results = score_folder(labeled(images), bank=detector, out=tmp_path / "out")
    assert {item.name: (item.images, item.normals) for item in results.products} == {name: (8, n) for name, n in COUNTS.items()}
    found = scores_of(tmp_path / "out")
    for name, item in found.items():
        product = name.partition("/")[0]
        assert item["product"] == product
        assert item["confidence"] > 0.9
        assert 0 < item["p_none"] <= 1
        assert item["neighbors"][0]["id"].startswith(f"{product}/")
    # A verdict is that of the product's own calibration, to the bit.
    named = score_folder(images / "set" / "pen" / "test", bank=detector.of_product("pen"), out=tmp_path / "pen")
    for name, item in scores_of(tmp_path / "pen").items():
        assert item["confidence"] is None
        assert {**found[f"pen/test/{name}"], **dict.fromkeys(("id", "rank", "confidence", "p_none"))} == {
            **item,
            **dict.fromkeys(("id", "rank", "confidence", "p_none")),
        }
    assert named.products[0].name == "pen"
    with ScoreFile.open(tmp_path / "out" / "scores.h5") as scores:
        assert scores.routes is not None
        assert scores.routes.product.tolist() == [found[name]["product"] for name in scores.ids]
        np.testing.assert_array_equal(scores.routes.confidence, [found[name]["confidence"] for name in scores.ids])
    with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["id"]: row["product"] for row in rows} == {name: item["product"] for name, item in found.items()}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "By product" in page
    assert "Thresholds of each product" in page


def test_products_with_few_pictures_are_told_in_words(fitted: Path, images: Path, tmp_path: Path, tiny: Backbone) -> None:
    results = score_folder(labeled(images), bank=Detector.open(fitted, backbone=tiny), out=tmp_path / "out")
    said = [notice for notice in results.notices() if "product tiny" in notice]
    assert said == ["product tiny: its 3 images promise a false-alarm rate of 0.25; for 0.01 it takes 99: add images of it"]
    strict = score_folder(
        labeled(images), bank=Detector.open(fitted, backbone=tiny), out=tmp_path / "strict", decision=Decision(alpha=0.05)
    )
    assert strict.decisions is not None
    assert {name for name, rule in strict.decisions.rules.by_product.items() if rule is None} == {"tiny"}
    assert any("product tiny: alpha=0.05 is below 0.25" in notice for notice in strict.notices())
    for item in scores_of(tmp_path / "strict").values():
        assert (item["alarm"] is None) == (item["product"] == "tiny"), "no verdict is not the same as no alarm"
    with pytest.raises(BankError, match=r"alpha=0\.001 is below"):
        DecisionRules.of(Detector.open(fitted, backbone=tiny), Decision(alpha=0.001))


def test_a_labeled_set_of_products_is_measured_by_product(fitted: Path, images: Path, tmp_path: Path, tiny: Backbone) -> None:
    results = evaluate(images / "set", bank=Detector.open(fitted, backbone=tiny), out=tmp_path / "all")
    assert [(item.name, item.images, item.other) for item in results.products] == [(name, 8, 0) for name in COUNTS]
    for item in results.products:
        alone = evaluate(
            images / "set" / item.name,
            bank=Detector.open(fitted, backbone=tiny, product=item.name),
            out=tmp_path / item.name,
        )
        assert item.metrics is not None
        assert alone.metrics is not None
        assert item.metrics.by_top.auroc == alone.metrics.by_top.auroc
        assert item.metrics.pixel is not None
        assert alone.metrics.pixel is not None
        assert item.metrics.pixel.auroc == alone.metrics.pixel.auroc
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    mean = np.mean([item["metrics"]["image, by top mean"]["auroc"] for item in report["products"]["by_product"]])
    assert report["products"]["mean"]["image, by top mean"]["auroc"] == pytest.approx(mean)


def test_adding_a_product_leaves_the_others_as_they_were(
    bank: Path, images: Path, tmp_path: Path, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Bank.open(bank)
    folders = [bank.joinpath(*opened.part(name).place) for name in COUNTS]
    before = [files_of(folder) for folder in folders]
    shards = {shard.file: shard.sha256 for shard in opened.manifest.shards}
    score_folder(labeled(images), bank=Detector.open(bank, backbone=tiny), out=tmp_path / "before")
    for i in range(30):
        save_png(picture("new one", i), tmp_path / "more" / f"{i:02d}.png")
    done = add(tmp_path / "more", bank=bank, backbone=tiny, run=Run(product="new one"))
    assert done.added == 30
    assert done.bank.part("new one").ids[0] == "new one/00.png"
    assert main(["index", str(bank), "--update", "--quiet"]) == 0
    calibrate(Detector.open(bank, backbone=tiny, product="new one"))
    assert [files_of(folder) for folder in folders] == before
    again = Bank.open(bank)
    assert shards.items() <= {shard.file: shard.sha256 for shard in again.manifest.shards}.items()
    detector = Detector.open(bank, backbone=tiny)
    for name, config in detector.product_configs.items():
        found = find_calibration(again.part(name), config)
        assert found is not None
        assert not found.outdated(again.part(name))
    score_folder(labeled(images), bank=detector, out=tmp_path / "after")
    changed = {"p_none", "confidence"}  # what is said about all products together
    kept = [
        {name: {key: value for key, value in item.items() if key not in changed} for name, item in scores_of(out).items()}
        for out in (tmp_path / "before", tmp_path / "after")
    ]
    assert kept[0] == kept[1]
    assert not verify(bank, deep=True).problems

    assert main(["remove", "--product", "new one", "--bank", str(bank)]) == 0
    assert Bank.open(bank).products == tuple(COUNTS)
    assert main(["restore", "--product", "new one", "--bank", str(bank)]) == 0
    assert "new one" in Bank.open(bank).products
    capsys.readouterr()
    assert main(["info", str(bank), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["products"]
    assert {name: item["images"] for name, item in told.items()} == {**COUNTS, "new one": 30}
    assert all(item["calibrations"][0]["current"] for item in told.values()), "what was restored is as it was"


def test_who_adds_says_which_products_these_are(bank: Path, images: Path, tmp_path: Path, tiny: Backbone) -> None:
    save_png(picture("cap", 777), tmp_path / "more" / "cap" / "x.png")
    save_png(picture("pen", 778), tmp_path / "more" / "stray.png")
    with pytest.raises(InputError, match=r"--product NAME, or --products 'folder'"):
        add(tmp_path / "more", bank=bank, backbone=tiny)
    with pytest.raises(InputError, match=r"no product for 1 of 2 pictures: .*stray\.png"):
        add(tmp_path / "more", bank=bank, backbone=tiny, run=Run(products="folder"))
    with pytest.raises(InputError, match="exclude each other"):
        add(tmp_path / "more", bank=bank, backbone=tiny, run=Run(products="folder", product="cap"))
    (tmp_path / "more" / "stray.png").unlink()
    assert add(tmp_path / "more", bank=bank, backbone=tiny, run=Run(products="folder")).added == 1
    assert Bank.open(bank).part("cap").ids[-1] == "cap/x.png"
    plain = fit(images / "good" / "pen", bank=tmp_path / "plain", extraction=Extraction(backbone=tiny), calibrate=False)
    with pytest.raises(InputError, match="made without products"):
        add(tmp_path / "more", bank=plain.bank.path, backbone=tiny, run=Run(product="cap"))


def test_products_by_a_pattern_and_by_a_table(images: Path, tmp_path: Path, tiny: Backbone) -> None:
    flat = tmp_path / "flat"
    for product in ("cap", "pen"):
        for i in range(6):
            save_png(picture(product, i), flat / f"{i}_{product}.png")
    by_pattern = fit(
        flat, bank=tmp_path / "a", extraction=Extraction(backbone=tiny, products=r"regex=_(\w+)\."), preset="spade"
    )
    table = tmp_path / "table.csv"
    table.write_text("id,group\n" + "\n".join(f"{path.name},{path.stem[2:]}" for path in flat.iterdir()))
    by_table = fit(flat, bank=tmp_path / "b", extraction=Extraction(backbone=tiny, products=str(table)), preset="spade")
    for made in (by_pattern.bank, by_table.bank):
        assert {name: made.part(name).ids for name in made.products} == {
            name: [f"{i}_{name}.png" for i in range(6)] for name in ("cap", "pen")
        }


def test_drift_and_suspects_by_product(fitted: Path, images: Path, tmp_path: Path, tiny: Backbone) -> None:
    for product in ("cap", "pen"):
        for i in range(40):
            moved = picture(product, 500 + i).astype(int) + (40 if product == "pen" else 0)
            save_png(moved.clip(0, 255).astype(np.uint8), tmp_path / "recent" / product / f"{i}.png")
    detector = Detector.open(fitted, backbone=tiny)
    score_folder(tmp_path / "recent", bank=detector, out=tmp_path / "out")
    found = drift_of_products([tmp_path / "out"], bank=fitted)
    moved = {name: item.moved for name, item in found.items() if not isinstance(item, str)}
    assert moved == {"cap": False, "pen": True}
    alone = drift([tmp_path / "out"], bank=fitted, product="pen")
    assert alone.tests == found["pen"].tests  # type: ignore[union-attr]
    with pytest.raises(InputError, match="use drift_of_products"):
        drift([tmp_path / "out"], bank=fitted)
    assert main(["drift", str(tmp_path / "out"), "--bank", str(fitted), "--out", str(tmp_path / "drift")]) == 0
    assert json.loads((tmp_path / "drift" / "drift.json").read_text())["products"]["pen"]["moved"]

    listed = suspects(detector, out=tmp_path / "suspects")
    assert sorted(listed.ids) == sorted(Bank.open(fitted).pictures.ids)
    assert set(listed.products) == set(COUNTS)
    ratios = [
        score / np.median([s for s, of in zip(listed.image_score, listed.products, strict=True) if of == product])
        for score, product in zip(listed.image_score, listed.products, strict=True)
    ]
    assert ratios == sorted(ratios, reverse=True)


def test_calibrations_are_of_products(bank: Path, tiny: Backbone) -> None:
    detector = Detector.open(bank, backbone=tiny)
    with pytest.raises(InputError, match="use calibrate_products"):
        calibrate(detector)
    made = calibrate_products(detector, alpha=0.05)
    assert isinstance(made["tiny"], str)
    assert "alpha=0.05 is below 0.25" in made["tiny"]
    assert made["pen"].alpha == 0.05  # type: ignore[union-attr]
    opened = Bank.open(bank)
    opened.remove(["pen/003.png"])
    after = {item.bank.product: [c.outdated(item.bank) for c in item.calibrations] for item in info(bank).products}
    assert not any(after["cap"])
    assert all("its images have changed" in text for text in after["pen"])


def test_settings_are_not_chosen_for_several_products(bank: Path, images: Path, tiny: Backbone) -> None:
    with pytest.raises(InputError, match="settings are chosen for one product"):
        tune(images / "good", bank=bank, extraction=Extraction(backbone=tiny))
    with pytest.raises(InputError, match="flag_below_p is by one calibration"):
        flag_below_p(Bank.open(bank), load_recipe("exact"), Method(), 0.1)


def test_tiles_of_products_are_scored_where_the_product_is_named(tmp_path: Path) -> None:
    tiled = tiny_backbone(preprocess=Preprocess(tile=32))
    for product in ("cap", "pen"):
        for i in range(7):
            save_png(picture(product, i), tmp_path / "good" / product / f"{i}.png")
    made = fit(tmp_path / "good", bank=tmp_path / "bank", extraction=Extraction(backbone=tiled, products="folder"))
    with pytest.raises(InputError, match="name it: --product NAME"):
        Detector.open(made.bank, backbone=tiled)
    scores = Detector.open(made.bank, backbone=tiled, product="pen").score(tmp_path / "good" / "pen")
    assert scores.routes is not None
    assert scores.routes.product.tolist() == ["pen"] * 7
