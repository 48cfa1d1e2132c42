"""Drift is looked for between results and banks at URLs, and settings are chosen for banks there, as in folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.settings import Tuning
from spade_faiss.scoring.detector import Detector
from spade_faiss.tuning import search
from spade_faiss.tuning.record import read_record
from spade_faiss.workflows.drift import drift, write_drift
from spade_faiss.workflows.score import score_folder
from spade_faiss.workflows.tune import tune, undo_tuning
from tests.storage.test_commands import upload
from tests.support.object_storage import Server

SMALL = Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=72, size=64))


def test_drift_of_results_at_urls(
    bucket: str,
    server: Server,
    fitted_bank: Path,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upload(fitted_bank, f"{bucket}/weave.bank", server)
    new, here = dataset_folder / "test", tmp_path / "here"
    score_folder(new, bank=fitted_bank, out=here)
    upload(here, f"{bucket}/there", server)
    expected = drift([here], bank=fitted_bank)
    for results in (f"{bucket}/there", f"{bucket}/there/scores.h5"):
        found = drift([results], bank=f"{bucket}/weave.bank")
        assert (found.tests, found.moved, found.images) == (expected.tests, expected.moved, expected.images)
    # Of what lies there, the scores alone are fetched.
    assert not [path for path in (tmp_path / "cache" / "copies").rglob("report.html") if path.stat().st_size]

    assert main(["drift", f"{bucket}/there", here.as_posix(), "--bank", f"{bucket}/weave.bank", "--quiet"]) == 0
    assert f"look at {bucket}/there/drift.html" in capsys.readouterr().out
    objects = server.objects(f"{bucket}/there")
    assert {"drift.html", "drift.json", "report.json", "scores.h5"} <= {*objects.names()}
    assert json.loads(objects["drift.json"])["results"] == [f"{bucket}/there", here.as_posix()]
    # A day later, other scores lie there.
    score_folder(dataset_folder / "train" / "good", bank=fitted_bank, out=f"{bucket}/there")
    assert drift([f"{bucket}/there"], bank=fitted_bank).images == 24

    upload(here, f"{bucket}/other", server)
    with pytest.raises(InputError, match=f"out={bucket}/other holds results that were not compared"):
        write_drift(f"{bucket}/other", found, results=[f"{bucket}/there"], bank=f"{bucket}/weave.bank")
    with pytest.raises(NotFoundError, match=f"there is nothing at {bucket}/none; give results, or their scores.h5, there"):
        drift([f"{bucket}/none"], bank=fitted_bank)


@pytest.mark.slow
def test_settings_are_chosen_for_banks_at_urls(
    bucket: str,
    server: Server,
    dataset_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    another_machine: Callable[[], None],
) -> None:
    """For a new one, and again for that one; by pictures and labels that are at URLs as well."""
    monkeypatch.setattr(search, "MOST_SPOILT", 12)
    monkeypatch.setattr(search, "_COPIES", 72)
    monkeypatch.setattr(search, "MOST_REFERENCES", 16)
    upload(dataset_folder, f"{bucket}/weave", server)
    url, good, budget = f"{bucket}/weave.bank", f"{bucket}/weave/train/good", Tuning(budget=0.001)
    done = tune(good, bank=url, extraction=SMALL, tuning=budget, out=f"{bucket}/page")
    assert done.record is not None
    assert {"tuning.html", "tuning.json"} <= {*server.objects(f"{bucket}/page").names()}
    another_machine()
    there = Bank.open(url)
    assert asdict(read_record(there) or done.record) == asdict(done.record)
    assert read_record(there) is not None
    assert len(there) == 24
    here = tune(dataset_folder / "train" / "good", bank=tmp_path / "here.bank", extraction=SMALL, tuning=budget)
    assert here.record is not None
    assert here.record.chosen == done.record.chosen

    again = tune(good, bank=url, tuning=Tuning(budget=0.001, labels=f"{bucket}/weave"))
    assert again.record is not None
    assert len(again.record.labels_sha256) == len(Detector.open(url).score(f"{bucket}/weave/test").ids)
    another_machine()
    assert undo_tuning(url).usual == there.usual
