"""On a cluster, a bank may be at a URL: each node has its own cache, and workers store what they make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cluster import plan
from spade_faiss.cluster.session import connect
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.settings import Run
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.detector import Detector
from spade_faiss.storage.cache import FOLDER_VARIABLE
from spade_faiss.workflows.fit import fit
from spade_faiss.workflows.score import score_folder

SMALL = Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=72, size=64))


@pytest.mark.slow
def test_a_bank_at_a_url_is_made_and_searched_by_workers(
    bucket: str, dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_LEAST_BYTES", 0)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "workers"))  # this process has another one
    good, test = dataset_folder / "train" / "good", dataset_folder / "test"
    url, local = f"{bucket}/weave.bank", tmp_path / "weave.bank"
    fit(good, bank=local, extraction=SMALL)
    score_folder(test, bank=local, out=tmp_path / "here")
    there = Run(cluster="local:2")
    with connect("local:2"):
        fit(good, bank=url, extraction=SMALL, run=there)
        score_folder(test, bank=Detector.open(url, run=there), out=tmp_path / "there")
    ours, theirs = Bank.open(local), Bank.open(url)
    assert theirs.ids == ours.ids
    rows = np.arange(len(ours))
    np.testing.assert_array_equal(theirs.embedding(rows), ours.embedding(rows))
    for level in ours.layout.levels:
        for row in rows.tolist():
            np.testing.assert_array_equal(theirs.level_map(level.name, row), ours.level_map(level.name, row))
    parts = sorted((tmp_path / "there").rglob("scores.h5"))
    with ScoreFile.open(tmp_path / "here" / "scores.h5") as one, ScoreParts.open(parts) as joined:
        assert list(joined.ids) == list(one.ids)
        for i in range(len(one)):
            np.testing.assert_array_equal(joined.map(i), one.map(i))
    assert list((tmp_path / "workers").rglob("*.h5"))
