"""Tuning a new bank chooses the network and what it sees of a picture, too; and a bank is made by that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Bank, Detector, Extraction, Tuning, fit, tune
from spade_faiss.cli import main
from spade_faiss.core.errors import AccessError, InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.files import hash_file
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.tuning import inputs, search
from spade_faiss.tuning.picture_stream import input_name
from spade_faiss.tuning.record import read_record
from spade_faiss.tuning.statistics import Chosen
from spade_faiss.workflows import extract, tune_inputs
from spade_faiss.workflows import tune as workflow
from spade_faiss.workflows.tune_inputs import candidates
from tests.support.backbones import tiny_backbone
from tests.support.pictures import write_shots

RUN = Run(engine="torch")
ASKED = Extraction(backbone="tiny", network=False, preprocess=Preprocess(size=24))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change them."""
    return write_shots(tmp_path_factory.mktemp("inputs") / "good", "{part:02}_{shot}.png", 12, 1)


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Networks that take no time, by their names; which of them were loaded, and for which sizes."""
    found: list[str] = []

    def load(extraction: Extraction, run: Run) -> Backbone:
        name, preprocess = str(extraction.backbone), extraction.preprocess
        found.append(f"{name} {preprocess.size}")
        return tiny_backbone(len(name), name, preprocess)

    for module in (tune_inputs, extract):
        monkeypatch.setattr(module, "load_named", load)
    monkeypatch.setattr(search, "map_options", lambda *_: [])
    for module in (search, inputs):
        monkeypatch.setattr(module, "MOST_SPOILT", 4)
        monkeypatch.setattr(module, "_COPIES", 16)
    return found


def choosing(monkeypatch: pytest.MonkeyPatch, *places: int) -> None:
    """Have the first choice be that of the first place, and so on; then always the default."""
    left: Iterator[int] = iter(places)

    def choose(*_: Any, **__: Any) -> Chosen:
        place = next(left, 0)
        return Chosen(option=place, reason=f"number {place}", by_image=place, by_map=place)

    monkeypatch.setattr(search, "choose", choose)


def test_what_is_tried_by_default_and_what_is_given_is_not_chosen(good: Path, tmp_path: Path, loaded: list[str]) -> None:
    def names(tuning: Tuning | None = None, **preprocess: Any) -> list[str]:
        asked = Extraction(backbone="tiny", network=False, preprocess=Preprocess(**{"size": 24, **preprocess}))
        return [input_name(each.backbone) for each in candidates(tmp_path / "b", asked, tuning or Tuning(), [], RUN)]

    assert names() == ["tiny; crop 24", "tiny; letterbox 24"]
    assert loaded == ["tiny 24"], "one network for both"
    assert names(resize_mode="stretch") == ["tiny; stretch 24"]
    assert names(resize=30) == ["tiny; crop 24 of 30"]
    assert names(Tuning(resize_modes=("crop",))) == ["tiny; crop 24"]
    assert names(Tuning(resize_modes=("stretch", "letterbox"))) == ["tiny; crop 24", "tiny; stretch 24", "tiny; letterbox 24"]
    loaded.clear()
    assert names(Tuning(sizes=(24, (16, 32)), backbones=("other",))) == [
        *("tiny; crop 24", "tiny; letterbox 24", "tiny; crop 16x32", "tiny; letterbox 16x32"),
        *("other; crop 24", "other; letterbox 24", "other; crop 16x32", "other; letterbox 16x32"),
    ]
    assert loaded == ["tiny 24", "tiny (16, 32)", "other 24", "other (16, 32)"]


def test_a_bank_is_made_by_the_input_that_is_chosen(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, mode, size = 7, "other", "letterbox", 32
    choosing(monkeypatch, place)
    tuning = Tuning(sizes=(32,), backbones=("other",))
    done = tune(good, bank=tmp_path / "b", extraction=ASKED, tuning=tuning, out=tmp_path / "page", run=RUN)
    source, record = done.bank.manifest.source, read_record(done.bank)
    assert source is not None
    assert (source.backbone, source.preprocess.resize_mode, source.preprocess.size) == (name, mode, size)
    assert record == done.record
    assert record is not None
    assert record.input is not None
    assert record.input.chosen == f"{name}; {mode} {size}"
    assert record.input.default == "tiny; crop 24"
    assert len(record.input.tried) == 8
    assert record.input.reason == f"number {place}"
    assert all(tried.forward_ms and tried.memory for tried in (*record.input.tried, *record.options))
    assert not (tmp_path / "b.tuning").exists()
    page = (tmp_path / "page" / "tuning.html").read_text(encoding="utf-8")
    for tried in record.input.tried:
        assert tried.name in page
    assert "MiB of memory" in page
    numbers = json.loads((tmp_path / "page" / "tuning.json").read_bytes())
    assert numbers["input"]["chosen"] == record.input.chosen
    scored = Detector.open(done.bank, backbone=tiny_backbone(len(name), name, source.preprocess)).score(good)
    assert len(scored) == 12


def test_an_interrupted_run_goes_on_with_the_same_choice_even_while_the_bank_is_made(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing(monkeypatch, 1, 0, 1, 0, 1, 0)
    tuning, real, stop = Tuning(resize_modes=("stretch",)), fit, True

    def interrupted(*arguments: Any, **named: Any) -> Any:
        made = real(*arguments, **named)
        if stop:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(workflow, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(good, bank=tmp_path / "b", extraction=ASKED, tuning=tuning, run=RUN)
    assert read_record(Bank.open(tmp_path / "b")) is None
    stop = False
    for module in ("picture_stream.FeatureStream", "trials._try"):
        monkeypatch.setattr(f"spade_faiss.tuning.{module}", None)  # nothing is computed or tried again
    done = tune(good, bank=tmp_path / "b", extraction=ASKED, tuning=tuning, run=RUN)
    assert done.record is not None
    assert done.record.input is not None
    assert done.record.input.chosen == "tiny; stretch 24"
    assert done.record.before is None
    assert not (tmp_path / "b.tuning").exists()


def test_pictures_that_cannot_be_read_are_skipped_as_fit_skips_them(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "good")
    for name in ("x.png", "y.png"):
        (folder / name).write_bytes(name.encode())
    with pytest.raises(InputError, match="2 images were skipped, at most 1 may be") as by_fit:
        fit(folder, bank=tmp_path / "none", extraction=ASKED, run=Run(engine="torch", max_skipped=1))
    with pytest.raises(InputError, match="2 images were skipped, at most 1 may be") as by_tune:
        tune(folder, bank=tmp_path / "none", extraction=ASKED, run=Run(engine="torch", max_skipped=1))
    assert str(by_tune.value) == str(by_fit.value)
    done = tune(folder, bank=tmp_path / "b", extraction=ASKED, run=RUN)
    assert done.record is not None
    assert len(done.bank.pictures) == 12
    again = tune(folder, bank=tmp_path / "b", extraction=Extraction(backbone=_of(done.bank)), run=Run(max_skipped=2))
    assert again.record is not None
    for number in range(3):
        (folder / f"{number:02}_0.png").write_bytes(str(number).encode())
    few = tune(folder, bank=tmp_path / "few", extraction=ASKED, run=RUN)
    assert few.record is None
    assert few.notice == "9 normal pictures are too few to choose by (10 are enough): the default stays"
    assert len(few.bank.pictures) == 9


def test_a_picture_that_cannot_be_opened_is_skipped_like_one_that_cannot_be_read(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(good, tmp_path / "good")
    (folder / "x.png").write_bytes(b"")

    def closed(path: Path) -> str:
        if path.name == "x.png":
            raise AccessError(f"{path} cannot be opened")
        return hash_file(path)

    monkeypatch.setattr("spade_faiss.features.pages.hash_file", closed)
    done = tune(folder, bank=tmp_path / "b", extraction=ASKED, run=RUN)
    assert done.record is not None
    assert len(done.bank.pictures) == 12


def _of(bank: Bank) -> Backbone:
    source = bank.manifest.source
    assert source is not None
    return tiny_backbone(len(source.backbone), source.backbone, source.preprocess)


def test_what_is_given_twice_or_stays_is_refused(good: Path, tmp_path: Path) -> None:
    def refused(match: str, extraction: Extraction = ASKED, run: Run = RUN, **tuning: Any) -> None:
        with pytest.raises(InputError, match=match):
            tune(good, bank=tmp_path / "b", extraction=extraction, tuning=Tuning(**tuning), run=run)

    refused(r"sizes=\(32,\) is for a backbone that is given by name", Extraction(backbone=tiny_backbone()), sizes=(32,))
    tiles = Extraction(backbone="tiny", preprocess=Preprocess(tile=24))
    refused("is of whole images, and tile cuts them up", tiles, resize_modes=("crop",))
    refused("exclude each other: a file of weights is of one network", run=Run(weights="w.pt"), backbones=("other",))
    refused("resize_modes='tiles' is not one of", resize_modes=("tiles",))
    refused("size=0 must be", sizes=(0,))
    refused("must be a tuple that names each of them once", sizes=(32, 32))
    fit(good, bank=tmp_path / "b", extraction=ASKED, run=RUN, calibrate=False)
    refused(r"backbones=\('other',\) is for a new bank: the features of one that is there stay", backbones=("other",))


def test_the_command_shows_inputs_and_what_they_cost(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing(monkeypatch, 2)
    asked = ["--backbone", "tiny", "--size", "24", "--no-network", "--engine", "torch", "--quiet"]
    given = ["--sizes", "32,16x24", "--resize-modes", "crop"]
    assert main(["tune", str(good), "--bank", str(tmp_path / "b"), *given, *asked]) == 0
    table = capsys.readouterr().out
    assert "* tiny; crop 16x24" in table
    assert "d tiny; crop 24" in table
    assert "MiB of memory" in table
    assert "by tiny; crop 16x24:" in table
    source = Bank.open(tmp_path / "b").manifest.source
    assert source is not None
    assert source.preprocess.input_size == (16, 24)
    assert np.isclose(source.preprocess.shorter_side, 16 * 256 / 224, atol=1)
