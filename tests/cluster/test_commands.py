"""Commands on a cluster do what they do in one process: the same bank, the same scores, the same pictures left out."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import ReportOptions, Run
from spade_faiss.decisions.calibration import Calibration
from spade_faiss.features.backbone import Backbone
from spade_faiss.index.build import build_index
from spade_faiss.report.exchange import PARTS
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.detector import Detector
from spade_faiss.search.recipe import load_recipe
from spade_faiss.workflows import extract as workflow
from spade_faiss.workflows import extract_pieces, score_pieces
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.drift import drift
from spade_faiss.workflows.extract import Added, extract
from spade_faiss.workflows.index_pieces import encode_by
from spade_faiss.workflows.pictures_on_workers import PieceOfPictures
from spade_faiss.workflows.score import score_folder
from spade_faiss.workflows.stored_parts import SharedParts
from tests.cluster.conftest import SMALL
from tests.support.banks import assert_same

# Enough for a few images at a time.
LITTLE = "83MB"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4, pieces of 8 images with a shard for each batch, and parts of 4 images."""
    monkeypatch.setattr(workflow, "BATCH_SIZE", 4)
    monkeypatch.setattr(score_pieces, "_MOST_IMAGES", 4)


@pytest.fixture
def good(weave: Path, tmp_path: Path) -> Path:
    """The normals, of which one cannot be read, and three have the content of another one: in its piece, and in another one."""
    folder = Path(shutil.copytree(weave / "train" / "good", tmp_path / "good"))
    (folder / "005.png").write_bytes(b"no picture")
    for copy, original in (("003a", "003"), ("013a", "002"), ("020a", "001")):
        shutil.copy(folder / f"{original}.png", folder / f"{copy}.png")
    return folder


def same(one: Added, other: Added) -> None:
    for name in ("added", "present", "removed", "duplicates", "skipped", "visible"):
        assert getattr(one, name) == getattr(other, name), name
    assert_same(one.bank, other.bank)


def test_a_bank_is_that_of_one_process(
    cluster: str, good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "SHARD_BYTES", 1)
    alone = extract(good, bank=tmp_path / "one", extraction=SMALL, preset="spade")
    caplog.clear()
    done = extract(good, bank=tmp_path / "many", extraction=SMALL, preset="spade", run=Run(cluster=cluster))
    same(alone, done)
    assert [item.of for item in done.duplicates] == ["003.png", "002.png", "001.png"]
    assert len(done.skipped) == 1
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert len(done.bank.manifest.shards) == 7
    assert sorted(path.name for path in (tmp_path / "many" / "features").iterdir()) == [
        f"{number:06d}.h5" for number in range(1, 8)
    ]


@pytest.mark.slow
def test_a_bank_of_products_and_of_groups_is_that_of_one_process(cluster: str, good: Path, tmp_path: Path) -> None:
    """Pieces end where they end; shards end where products do."""
    for number, path in enumerate(sorted(good.iterdir())):
        folder = good / ("cap" if number % 3 else "pen")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    extraction = replace(SMALL, products="folder", group_by=r"regex=(\d\d)\d")
    alone = extract(good, bank=tmp_path / "one", extraction=extraction, preset="spade")
    done = extract(good, bank=tmp_path / "many", extraction=extraction, preset="spade", run=Run(cluster=cluster))
    same(alone, done)
    assert done.bank.products == ("cap", "pen")
    assert [list(done.bank.rows_of(name)) for name in ("cap", "pen")] == [
        list(alone.bank.rows_of(name)) for name in ("cap", "pen")
    ]


def test_scores_are_those_of_one_process(cluster: str, weave: Path, whole_bank: Path, tmp_path: Path) -> None:
    new = Path(shutil.copytree(weave / "test", tmp_path / "new"))
    (new / "good" / "002.png").write_bytes(b"no picture")
    options = ReportOptions(overlays=True)
    few = Detector.open(whole_bank, run=Run(memory=LITTLE))
    assert few.images_at_a_time < 6
    alone = score_folder(new, bank=few, out=tmp_path / "one", report=options)
    many = Detector.open(whole_bank, run=Run(cluster=cluster, memory=LITTLE))
    done = score_folder(new, bank=many, out=tmp_path / "many", report=options)
    assert (done.images, done.skipped, done.visible) == (alone.images, alone.skipped, alone.visible)
    files = sorted((tmp_path / "many" / PARTS).glob("*/scores.h5"))
    assert len(files) > 2
    with ScoreFile.open(tmp_path / "one" / "scores.h5") as one, ScoreParts.open(files) as parts:
        assert one.ids == parts.ids
        for name in ("image_score", "map_score", "top_score", "peak", "neighbor_ids", "neighbor_dist"):
            np.testing.assert_array_equal(getattr(one, name), getattr(parts, name))
        assert all(np.array_equal(*maps) for maps in zip(one.maps(), parts.maps(), strict=True))
        for group in ("verdict", "regions", "image_scores"):
            alone_table, table = one.table(group), parts.table(group)
            assert alone_table.keys() == table.keys()
            for name, column in alone_table.items():
                np.testing.assert_array_equal(column, table[name])
        with pytest.raises(InputError, match="there is no map 10"):
            parts.map(10)
    for name in ("scores.csv", "regions.csv"):
        lines = [line for file in files for line in _lines(file.with_name(name))]
        assert lines == _lines(tmp_path / "one" / name)
    reports = [json.loads((tmp_path / name / "report.json").read_bytes()) for name in ("one", "many")]
    for report in reports:
        for other in ("time", "peak_memory_bytes", "run"):
            del report[other]
    assert reports[0] == reports[1]
    assert drift([tmp_path / "one"], bank=whole_bank).tests == drift([tmp_path / "many"], bank=whole_bank).tests
    # The next run of one process replaces all of it.
    score_folder(new, bank=whole_bank, out=tmp_path / "many")
    assert not (tmp_path / "many" / PARTS).exists()


def _lines(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.slow
def test_the_command_line(
    cluster: str, weave: Path, whole_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With metrics, and what a run of one process says."""
    numbers = []
    for name, words in (("one", []), ("many", ["--cluster", cluster])):
        out = str(tmp_path / name)
        assert main(["evaluate", str(weave), "--bank", str(whole_bank), "--out", out, "--json", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        numbers.append({name: found[name] for name in ("metrics", "calibration", "images", "skipped")})
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_indexes_and_calibrations_are_those_of_one_process(cluster: str, weave: Path, whole_bank: Path, tmp_path: Path) -> None:
    recipe, banks, made = load_recipe("clusters"), list[Bank](), list[tuple[Calibration, Calibration]]()
    for name, run in (("one", Run()), ("many", Run(cluster=cluster))):
        bank = Bank.open(shutil.copytree(whole_bank, tmp_path / name))
        banks.append(bank)
        built = build_index(bank, recipe, encode=encode_by(run, bank))
        assert built is not None
        assert built.done == {"gallery": "built"}
        detector = Detector.open(bank, recipe=recipe, run=run)
        made.append((calibrate(detector), calibrate(detector, holdout=weave / "test" / "good")))
    (one, many), (calibrated, calibrated_by_many) = banks, made
    assert calibrated == calibrated_by_many
    files = [sorted((bank.path / "indexes").rglob("*.h5")) for bank in (one, many)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] != []
    assert all(here.read_bytes() == there.read_bytes() for here, there in zip(*files, strict=True))


def test_errors_name_the_node_and_the_piece(cluster: str, good: Path, whole_bank: Path, tmp_path: Path) -> None:
    images = [good / f"{number:03d}.png" for number in range(6, 14)]
    for path in images[4:]:
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"4 images were skipped.*\[node .+ \([0-9.:a-f]+\), piece 1 \(number 5 to 8\)\]"):
        extract(images, bank=tmp_path / "b", extraction=SMALL, run=Run(cluster=cluster, max_skipped=3))
    assert Bank.open(tmp_path / "b").ids == [path.name for path in images[:4]]  # what came before is kept
    detector = Detector.open(whole_bank, run=Run(cluster=cluster))
    with pytest.raises(InputError, match=r"none of the 4 images could be read"):
        score_folder(images[4:], bank=detector, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_skipped_pictures_count_together(cluster: str, good: Path, whole_bank: Path, tmp_path: Path) -> None:
    """Each piece has fewer than are allowed, and all pieces more."""
    for number in range(0, 24, 5):
        (good / f"{number:03d}.png").write_bytes(b"no picture")
    detector = Detector.open(whole_bank, run=Run(cluster=cluster, memory=LITTLE, max_skipped=2))
    with pytest.raises(InputError, match=r"3 images were skipped, at most 2 may be"):
        score_folder(good, bank=detector, out=tmp_path / "out")


@pytest.mark.slow
def test_a_module_of_this_process_is_refused(
    cluster: str, good: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_pieces, "is_known", lambda name: False)
    with pytest.raises(InputError, match="workers have none of it"):
        extract(good, bank=tmp_path / "bank", extraction=Extraction(backbone=backbone), run=Run(cluster=cluster))
    assert len(Bank.open(tmp_path / "bank")) == 0


def test_storage_that_workers_do_not_have(cluster: str, whole_bank: Path, tmp_path: Path) -> None:
    worker = score_pieces._Worker.__new__(score_pieces._Worker)
    worker._plan = score_pieces.PartPlan(root=tmp_path, place=SharedParts(tmp_path / "missing"), settings="{}", run="")
    worker._job = (Detector.open(whole_bank), None)
    with pytest.raises(NotFoundError, match="storage that all nodes have at the same path"):
        worker.score(score_pieces._Part("000000", PieceOfPictures((), ())))
