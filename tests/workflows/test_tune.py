"""Tuning: what is chosen, what a bank remembers of it, and that nothing is lost by an interruption or a wrong wish."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss import Bank, Detector, Extraction, Tuning, evaluate, tune
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.core.presets import Usual
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.tuning import inputs, search, trials
from spade_faiss.tuning.options import Stored
from spade_faiss.tuning.record import read_record
from spade_faiss.tuning.statistics import LEAST_TELLING, Chosen
from spade_faiss.workflows import tune as workflow
from spade_faiss.workflows.tune import undo_tuning
from spade_faiss.workflows.verify import verify
from tests.support.pictures import save_png
from tests.support.videos import numbered, write_video


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil few pictures: what is tested here is not how good a choice is."""
    monkeypatch.setattr(search, "MOST_SPOILT", 12)
    monkeypatch.setattr(search, "_COPIES", 72)
    monkeypatch.setattr(search, "MOST_REFERENCES", 16)


@pytest.fixture
def good(dataset_folder: Path) -> Path:
    return dataset_folder / "train" / "good"


@pytest.fixture(scope="module")
def tuned_from(fitted_bank: Path, dataset_folder: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank by the preset of the paper, which ranks by the embedding, tuned; with its page. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("tuned")
    bank = shutil.copytree(fitted_bank, folder / "weave.bank")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MOST_SPOILT", 16)
        patch.setattr(search, "_COPIES", 160)
        extraction = Extraction(backbone=backbone)
        done = tune(dataset_folder / "train" / "good", bank=bank, extraction=extraction, out=folder / "page")
    assert done.record is not None
    return bank


@pytest.mark.slow
def test_a_bank_that_ranks_by_the_embedding_gets_a_score_of_its_maps(tuned_from: Path, fitted_bank: Path) -> None:
    """Small defects do not show in a pooled vector: that a map finds more of them is sure, and known beforehand."""
    bank = Bank.open(tuned_from)
    before, record = Bank.open(fitted_bank), read_record(bank)
    assert record is not None
    assert before.usual.method.score == "knn"
    assert bank.usual.method.score in ("top", "max")
    assert (record.before, record.usual) == (before.manifest.usual, bank.manifest.usual)
    assert record.usual.preset == "tuned"
    chosen = next(tried for tried in record.options if tried.name == record.chosen)
    assert chosen.image.sure or chosen.maps.sure
    assert record.reason.startswith(record.chosen)
    assert LEAST_TELLING <= record.found <= record.defects


@pytest.mark.slow
def test_features_stay_and_old_versions_read_the_manifest(tuned_from: Path, fitted_bank: Path) -> None:
    before, after = (json.loads((path / "manifest.json").read_bytes()) for path in (fitted_bank, tuned_from))
    assert set(before) == set(after)
    assert before["schema"] == after["schema"]
    # Weights of levels are what older versions cannot search by, and are there only where they were chosen.
    weighted = {"level_weights"} if Bank.open(tuned_from).usual.method.level_weights else set()
    assert set(before["usual"]["method"]) | weighted == set(after["usual"]["method"])
    assert before["layout"] == after["layout"]
    assert before["shards"] == after["shards"]
    assert after["generation"] == before["generation"] + 1
    assert after["history"][-1]["action"] == "tune"
    assert not verify(tuned_from, deep=True).problems


@pytest.mark.slow
def test_whoever_opens_it_searches_by_the_choice(tuned_from: Path, dataset_folder: Path, tmp_path: Path) -> None:
    detector, record = Detector.open(tuned_from), read_record(Bank.open(tuned_from))
    assert record is not None
    assert (detector.recipe.name, detector.method.score) == (record.usual.recipe, record.usual.method.score)
    results = evaluate(dataset_folder, bank=tuned_from, out=tmp_path / "out")
    assert results.decisions is not None
    assert not results.notice


@pytest.mark.slow
def test_it_can_be_undone(tuned_from: Path, fitted_bank: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tuned_from, tmp_path / "copy.bank")
    undone = undo_tuning(path)
    assert undone.usual == Bank.open(fitted_bank).usual == Bank.open(path).usual
    with pytest.raises(InputError, match="was not tuned"):
        undo_tuning(fitted_bank)


@pytest.mark.slow
def test_the_page_shows_spoilt_pictures_and_their_maps_by_each_setting(tuned_from: Path) -> None:
    page = (tuned_from.parent / "page" / "tuning.html").read_text(encoding="utf-8")
    numbers = json.loads((tuned_from.parent / "page" / "tuning.json").read_bytes())
    assert "Maps by the default" in page
    assert "Maps by what was chosen" in page
    assert page.count("data:image/jpeg") >= 2 * 2 * 4  # a picture and its map, by both, of several defects
    for tried in numbers["options"]:
        assert tried["name"] in page
    record = read_record(Bank.open(tuned_from))
    assert record is not None
    assert json.loads(json.dumps(asdict(record))) == {key: value for key, value in numbers.items() if key != "run"}
    assert not (tuned_from.parent / "weave.bank.tuning").exists()


@pytest.mark.slow
def test_a_record_is_what_was_written_and_damage_is_noticed(tuned_from: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tuned_from, tmp_path / "copy.bank")
    file = path / "tuning.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'), encoding="utf-8")
    with pytest.raises(Exception, match="damaged"):
        read_record(Bank.open(path))


@pytest.mark.slow
def test_a_new_bank_is_made_by_the_choice(good: Path, backbone: Backbone, tmp_path: Path) -> None:
    done = tune(good, bank=tmp_path / "new.bank", extraction=Extraction(backbone=backbone), tuning=Tuning(budget=0.001))
    assert done.record is not None
    assert done.record.before is None
    assert done.record.left_out > 5
    assert len(done.record.options) == 5  # the default, and with weighted levels, each by two scores; and the nearest
    assert len(done.bank.pictures) == 24
    assert done.bank.usual.recipe == "location"
    with pytest.raises(InputError, match="was made by what was chosen"):
        undo_tuning(tmp_path / "new.bank")


def test_fewer_than_ten_pictures_get_the_default_and_a_sentence(good: Path, backbone: Backbone, tmp_path: Path) -> None:
    files = sorted(good.iterdir())[:9]
    done = tune(files, bank=tmp_path / "few.bank", extraction=Extraction(backbone=backbone))
    assert done.record is None
    assert "9 normal pictures are too few" in done.notice
    assert done.bank.usual.preset == "default"
    assert len(done.bank.pictures) == 9


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(
    fitted_bank: Path, good: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction, real = Extraction(backbone=backbone), trials._try
    tried: list[Any] = []
    limit = 2
    monkeypatch.setattr(search, "map_options", _some_options)

    def counted(*arguments: Any) -> tuple[trials.Trial, trials.Trial | None]:
        if len(tried) == limit:
            raise KeyboardInterrupt
        tried.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr(trials, "_try", counted)
    path = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    with pytest.raises(KeyboardInterrupt):
        tune(good, bank=path, extraction=extraction)
    assert Bank.open(path).usual == Bank.open(fitted_bank).usual
    assert read_record(Bank.open(path)) is None
    (kept,) = (tmp_path / "copy.bank.tuning").iterdir()
    done = (kept / "samples" / "done").stat().st_mtime_ns
    limit = 99
    again = tune(good, bank=path, extraction=extraction)
    assert again.record is not None
    assert done > 0
    assert len(tried) == len(set(tried)) == 3
    other = shutil.copytree(fitted_bank, tmp_path / "other.bank")
    whole = tune(good, bank=other, extraction=extraction)
    assert whole.record is not None
    assert _without_costs(whole.record) == _without_costs(again.record)


def _some_options(levels: list[str], method: Method) -> list[Any]:
    from spade_faiss.tuning.options import MapOption, Stored

    return [
        MapOption(stored=Stored(), recipe="exact", method=replace(method, levels=chosen, k_gallery=5))
        for chosen in ((levels[0],), (levels[1],))
    ]


def _without_costs(record: Any) -> Any:
    return replace(record, options=tuple(replace(tried, ms=0.0, forward_ms=0.0) for tried in record.options))


def test_what_undoing_goes_back_to_survives_a_kill_and_a_second_choice(
    fitted_bank: Path, good: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    extraction, bank = Extraction(backbone=backbone), Bank.open(path := shutil.copytree(fitted_bank, tmp_path / "copy.bank"))
    before = replace(bank.usual, method=replace(bank.usual.method, k_gallery=50))
    bank.choose(before)
    assert before != bank.usual, "it asks for more neighbors than there are, which has to stay so"
    monkeypatch.setattr(search, "MOST_SPOILT", 3)
    monkeypatch.setattr(search, "map_options", _some_options)
    monkeypatch.setattr(search, "choose", lambda *_, **__: Chosen(option=1, reason="", by_image=1, by_map=1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workflow, "build_index", killed)
        tune(good, bank=path, extraction=extraction)
    chosen = Bank.open(path).manifest.usual
    assert chosen != before
    monkeypatch.setattr(search, "choose", lambda *_, **__: Chosen(option=0, reason="", by_image=0, by_map=0))
    built: list[Any] = []
    monkeypatch.setattr(workflow, "build_index", lambda *arguments, **_: built.append(arguments))
    for _ in range(2):
        done = tune(good, bank=path, extraction=extraction)
        assert done.bank.manifest.usual == chosen
        assert done.record is not None
        assert done.record.before == before
    assert len(built) == 2, "a kill may have come before the index"
    assert undo_tuning(path).manifest.usual == before


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"normalize": "l2"}, Stored(pool=3, pool_border="zero", normalize="l2")),
        ({"pool": 5}, Stored(pool=5, pool_border="zero")),
        ({"pool": 3}, Stored(pool=3, pool_border="zero")),
        ({"pool_border": "zero"}, Stored(pool=3, pool_border="zero")),
        ({}, None),
    ],
)
def test_how_features_are_stored_is_not_chosen_where_it_is_given(
    good: Path,
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    stored: Stored | None,
) -> None:
    """All that is tried is stored as `fit` would store it, the default as well; and no map is tried twice."""
    tried: list[Any] = []

    def interrupted(*arguments: Any) -> None:
        tried.extend(arguments[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "make_samples", lambda folder, backbone, records, *_: (SimpleNamespace(shown={}), records))
    monkeypatch.setattr(search, "forward_ms", lambda *_: 1.0)
    monkeypatch.setattr(search, "run_trials", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(good, bank=tmp_path / "new.bank", extraction=Extraction(backbone=backbone, network=False, **given))
    assert len(tried) == len({trials.comparable(option) for option in tried}) > 4
    found = {option.stored for option in tried}
    assert len(found) == 4 if stored is None else found == {stored}


def test_what_is_kept_lies_beside_the_bank_however_its_folder_is_written(
    fitted_bank: Path, good: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, *others: Any) -> Any:
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "search", interrupted)
    path = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    with pytest.raises(KeyboardInterrupt):
        tune(good, bank=f"{path}/", extraction=Extraction(backbone=backbone))
    assert (tmp_path / "copy.bank.tuning").is_dir()
    assert {each.name for each in path.iterdir()} == {each.name for each in fitted_bank.iterdir()}


def test_limits_keep_what_is_too_slow_or_too_large_from_being_chosen(
    fitted_bank: Path, good: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "map_options", _some_options)
    for number, tuning in enumerate((Tuning(max_ms=1e-6), Tuning(max_bytes=1.0))):
        path = shutil.copytree(fitted_bank, tmp_path / f"{number}.bank")
        done = tune(good, bank=path, extraction=Extraction(backbone=backbone), tuning=tuning)
        assert done.record is not None
        assert not any(tried.allowed for tried in done.record.options)
        assert done.record.chosen == done.record.default
        assert done.bank.usual == Bank.open(fitted_bank).usual
        assert ("max_ms=1e-06" if number == 0 else "max_bytes=1") in done.record.reason


@pytest.mark.slow
def test_labels_take_the_place_of_spoils_and_evaluate_warns_of_the_same_pictures(
    fitted_bank: Path,
    dataset_folder: Path,
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(search, "map_options", _some_options)
    path = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    good, extraction = dataset_folder / "train" / "good", Extraction(backbone=backbone)
    done = tune(good, bank=path, extraction=extraction, tuning=Tuning(labels=dataset_folder))
    assert done.record is not None
    assert (done.record.pictures, done.record.defects, done.record.found) == (6, 5, 5)
    with caplog.at_level(logging.WARNING):
        evaluate(dataset_folder, bank=path, out=tmp_path / "same")
    assert "11 of 11 test images are among those that the settings of the bank were chosen by" in caplog.text
    caplog.clear()
    other = tmp_path / "other"
    for kind in ("good", "spot"):
        for number, file in enumerate(sorted((dataset_folder / "test" / kind).iterdir())):
            save_png(np.asarray(Image.open(file))[::-1], other / "test" / kind / f"{number}.png")
    with caplog.at_level(logging.WARNING):
        evaluate(other, bank=path, out=tmp_path / "others")
    assert "chosen by" not in caplog.text


def test_what_copies_cannot_be_made_of_is_refused(good: Path, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not yet for tiles, regions of interest or views"):
        tune(good, bank=tmp_path / "b", extraction=Extraction(backbone=backbone, augment="flip"))
    write_video(tmp_path / "videos" / "clip.mp4", numbered(24))
    with pytest.raises(InputError, match="not yet by frames of videos"):
        tune(tmp_path / "videos", bank=tmp_path / "b", extraction=Extraction(backbone=backbone), run=Run(every=2))
    with pytest.raises(InputError, match="budget="):
        Tuning(budget=0)
    with pytest.raises(InputError, match="max_ms="):
        Tuning(max_ms=float("nan"))


def test_the_command_prints_a_table_and_undoes(
    fitted_bank: Path, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "map_options", _some_options)
    path = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    assert main(["tune", str(good), "--bank", str(path), "--quiet"]) == 0
    table = capsys.readouterr().out
    assert "pool 1; blocks.1; K=5; by top" in table
    assert "differences to the default (d)" in table
    before = Usual(**vars(Bank.open(fitted_bank).usual))
    assert main(["tune", "--bank", str(path), "--undo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usual"]["recipe"] == before.recipe
    assert main(["tune", str(good), "--bank", str(path), "--undo"]) == 1
    assert main(["tune", "--bank", str(path)]) == 1
    assert main(["fit", str(good), "--bank", str(path), "--tune", "--preset", "spade"]) == 1


@pytest.mark.slow
def test_fit_tune_makes_a_bank_by_the_choice(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "map_options", _some_options)
    monkeypatch.setattr(inputs, "MOST_SPOILT", 6)
    small = ["--backbone", "efficientnet_lite0", "--size", "64", "--quiet", "--json"]
    assert main(["fit", str(good), "--bank", str(tmp_path / "b"), "--tune", *small]) == 0
    numbers = json.loads(capsys.readouterr().out)
    bank = Bank.open(tmp_path / "b")
    assert numbers["tuning"]["usual"]["recipe"] == bank.usual.recipe
    record, source = read_record(bank), bank.manifest.source
    assert record is not None
    assert record.input is not None
    assert [tried.name for tried in record.input.tried] == [
        "efficientnet_lite0; crop 64",
        "efficientnet_lite0; letterbox 64",
    ]
    assert source is not None
    assert record.input.chosen == f"efficientnet_lite0; {source.preprocess.resize_mode} 64"
    assert source.engine != "torch", "the engine that is timed is the one that will be used"
