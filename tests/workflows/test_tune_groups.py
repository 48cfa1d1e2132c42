"""Tuning by pictures that belong together: no twin and no sibling makes a normal picture look nearer than a new one is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from spade_faiss import Bank, Extraction, Tuning, fit, tune
from spade_faiss.features.backbone import Backbone
from spade_faiss.tuning import search
from spade_faiss.tuning.statistics import Trials, choose
from spade_faiss.workflows import tune as workflow
from tests.support.backbones import tiny_backbone
from tests.support.pictures import write_shots

PARTS, SHOTS = 11, 2
PATTERN = r"regex=part_(\d+)"


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change them."""
    return write_shots(tmp_path_factory.mktemp("groups") / "good", "part_{part:02}_{shot}.png", PARTS, SHOTS)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Trials]:
    """What choices are made by."""
    found: list[Trials] = []
    real = choose

    def listed(table: Trials, *others: Any, **named: Any) -> Any:
        found.append(table)
        return real(table, *others, **named)

    monkeypatch.setattr(search, "choose", listed)
    monkeypatch.setattr(search, "map_options", lambda *_: [])
    monkeypatch.setattr(search, "MOST_SPOILT", 16)
    monkeypatch.setattr(search, "_COPIES", 16)
    monkeypatch.setattr(search, "_LEAST_EACH", 1)
    return found


def test_siblings_are_left_out_and_drawn_together(good: Path, tiny: Backbone, tmp_path: Path, tables: list[Trials]) -> None:
    for name, group_by in (("alone", None), ("grouped", PATTERN)):
        bank, extraction = tmp_path / name, Extraction(backbone=tiny, group_by=group_by, network=False)
        fit(good, bank=bank, extraction=extraction, calibrate=False)
        tune(good, bank=bank, extraction=extraction)
    alone, grouped = tables
    assert (grouped.normal > alone.normal).all(), "the nearest was a sibling"
    assert len(set(alone.normal_group.tolist())) == 16
    groups = set(grouped.normal_group.tolist())
    assert 8 <= len(groups) <= PARTS
    assert set(grouped.spoilt_group.tolist()) <= groups


def test_groups_of_a_new_bank_are_given_and_one_that_is_there_knows_its_own(
    good: Path, tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what pictures show: their ids depend on which folder was named."""
    asked: list[search.Question] = []

    def interrupted(*arguments: Any, **named: Any) -> None:
        asked.append(arguments[2])
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "search", interrupted)
    path, extraction = tmp_path / "bank", Extraction(backbone=tiny, group_by=PATTERN, network=False)
    with pytest.raises(KeyboardInterrupt):
        tune(good, bank=path, extraction=extraction)
    fit(good, bank=path, extraction=extraction, calibrate=False)
    with pytest.raises(KeyboardInterrupt):
        tune(good.parent, bank=path, extraction=Extraction(backbone=tiny))
    new, there = (question.group_of for question in asked)
    assert new == {file.name: file.name[5:7] for file in good.iterdir()}
    assert there == {f"good/{name}": group for name, group in new.items()}


def test_a_twin_counts_once(good: Path, tiny: Backbone, tmp_path: Path, tables: list[Trials]) -> None:
    twins = shutil.copytree(good, tmp_path / "twins")
    for file in sorted(good.iterdir()):
        shutil.copy(file, twins / f"again_{file.name}")
    tune(twins, bank=tmp_path / "twins.bank", extraction=Extraction(backbone=tiny))
    (table,) = tables
    assert table.normal.min() > 0


def test_few_groups_get_the_default_and_a_sentence(good: Path, tiny: Backbone, tmp_path: Path, tables: list[Trials]) -> None:
    files = sorted(good.iterdir())[: 9 * SHOTS]
    extraction = Extraction(backbone=tiny, group_by=PATTERN)
    done = tune(files, bank=tmp_path / "few.bank", extraction=extraction, tuning=Tuning(seed=1))
    assert "9 groups of normal pictures are too few" in done.notice
    assert len(done.bank.pictures) == 9 * SHOTS
    assert tables == []
    path = tmp_path / "one.bank"
    fit(good, bank=path, extraction=Extraction(backbone=tiny, group_by="regex=(part)"), calibrate=False)
    assert "1 groups" in tune(good, bank=path, extraction=Extraction(backbone=tiny)).notice
    assert Bank.open(path).usual.preset == "default"
