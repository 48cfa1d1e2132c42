"""Several shots of one part: they are left out together where normal pictures are compared with the others."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector, Extraction, InputError, Method, Run, add, calibrate, fit, suspects
from spade_faiss.cli import main
from spade_faiss.features.backbone import Backbone
from tests.support.backbones import tiny_backbone
from tests.support.pictures import save_png, write_shots

PARTS, SHOTS = 5, 3
PATTERN = r"regex=part_(\d+)"


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change them."""
    return write_shots(tmp_path_factory.mktemp("groups") / "good", "part_{part}/{shot}.png", PARTS, SHOTS)


def bank_of(
    folder: Path, images: Path | list[Path], tiny: Backbone, group_by: str | None = PATTERN, **settings: object
) -> Bank:
    extraction = Extraction(backbone=tiny, group_by=group_by, store="float32", **settings)  # type: ignore[arg-type]
    return fit(images, bank=folder, preset="spade", extraction=extraction, calibrate=False).bank


@pytest.mark.parametrize("recipe", ["exact", "clusters"])
@pytest.mark.parametrize("augment", [None, "flip"])
def test_a_picture_is_scored_as_against_a_bank_without_its_part(
    good: Path, tmp_path: Path, tiny: Backbone, recipe: str, augment: str | None
) -> None:
    """Bit for bit; by the bank's nearest, and by all of it."""
    bank = bank_of(tmp_path / "bank", good, tiny, augment=augment)
    method = Method(k_image=3, k_gallery="all" if recipe == "clusters" else 4)
    if recipe == "clusters":
        assert main(["index", str(bank.path), "--recipe", recipe, "--quiet"]) == 0
    detector = Detector.open(bank.path, recipe=recipe, method=method, backbone=tiny)
    rows = bank.pictures.originals[[0, 4, 14]]
    found, query = detector.score_rows(rows.tolist()), bank.read(rows)
    for place, row in enumerate(rows.tolist()):
        without = Bank.create(tmp_path / f"without {row}", bank.layout)
        others = np.flatnonzero(bank.siblings.of(np.arange(len(bank))) != bank.siblings.of(np.array([row])))
        assert len(others) == (PARTS - 1) * SHOTS * (2 if augment else 1)
        without.append(replace(bank.read(others), source=None))
        one = replace(query[place : place + 1], source=None, pictures=())
        expected = Detector.open(without.path, method=method).score_features(one)
        np.testing.assert_array_equal(found.image_score[place], expected.image_score[0])
        np.testing.assert_array_equal(found.maps[place], expected.maps[0])


def test_siblings_hide_how_far_a_new_part_is(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    """What groups are for: without them, each picture has shots of its own part as neighbors, which a new part has not."""
    method = Method(k_image=1, k_gallery=1)
    known, alone = (
        calibrate(Detector.open(bank_of(tmp_path / name, good, tiny, group_by), method=method, backbone=tiny))
        for name, group_by in (("known", PATTERN), ("alone", None))
    )
    assert min(known.image_score) > max(alone.image_score)


def test_a_second_run_and_add_need_to_be_told(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    bank = bank_of(tmp_path / "bank", [good / "part_0", good / "part_1"], tiny)
    assert bank.manifest.grouping is not None
    assert str(bank.manifest.grouping) == PATTERN
    before = (len(bank), bank.generation)
    with pytest.raises(InputError, match=r"groups its pictures by regex=.*; say how these belong together"):
        add([good / "part_2"], bank=bank.path, backbone=tiny)
    assert (len(bank), bank.generation) == before == (2 * SHOTS, Bank.open(bank.path).generation)
    with pytest.raises(InputError, match=r"has group_by=regex=.*, asked for folder"):
        bank_of(tmp_path / "bank", [good / "part_2"], tiny, "folder")


def test_add_takes_groups_and_the_folder_rule_asks_nothing(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    bank = bank_of(tmp_path / "bank", good, tiny, "folder")
    assert bank.group_of["part_3/1.png"] == "part_3"
    more = tmp_path / "more"
    for name in ("part_9/0.png", "part_3/7.png"):
        save_png(np.random.default_rng([*name.encode()]).integers(0, 256, (26, 30, 3)).astype(np.uint8), more / name)
    save_png(np.zeros((26, 30, 3), np.uint8), more / "single.png")
    grown = add(more, bank=bank.path, backbone=tiny).bank
    assert grown.group_of["part_3/7.png"] == "part_3"
    assert "single.png" not in grown.group_of
    assert len(grown.siblings) == PARTS + 2


def test_whole_groups_are_held_out(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    bank = bank_of(tmp_path / "bank", [good / f"part_{part}" for part in range(4)], tiny)
    method = Method(k_image=2, k_gallery=2)
    held = tmp_path / "held"
    for name in ("part_2/9.png", "part_8/0.png"):
        save_png(np.random.default_rng([*name.encode()]).integers(0, 256, (26, 30, 3)).astype(np.uint8), held / name)
    told = Detector.open(bank.path, method=method, run=Run(group_by=PATTERN), backbone=tiny)
    with pytest.raises(InputError, match=r"1 held-out images belong to groups .*part_2/9.png \(like "):
        calibrate(told, holdout=held)
    assert len(calibrate(told, holdout=held / "part_8", alpha=0.5)) == 1


def test_the_command_line_names_groups(good: Path, tmp_path: Path, tiny: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    bank = bank_of(tmp_path / "bank", good, tiny)
    assert main(["info", str(bank.path)]) == 0
    assert f"groups     {PATTERN}: {PARTS} groups; the largest has {SHOTS} entries" in capsys.readouterr().out
    found = suspects(Detector.open(bank.path, backbone=tiny), out=tmp_path / "out")
    with (found.out / "suspects.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["id"]: row["group"] for row in rows} == {name: name.split("/")[-2][5:] for name in bank.ids}
    report = json.loads((found.out / "report.json").read_text())
    assert report["bank"]["groups"] == PARTS
    assert "group <b>" in (found.out / "report.html").read_text()
