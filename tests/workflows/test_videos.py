"""Videos through whole commands: a minute of people who walk, and what does not belong among them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Detector, Extraction, add, calibrate, fit
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Run
from spade_faiss.report.normals import NormalPictures
from spade_faiss.scoring.metrics import detection_metrics
from spade_faiss.workflows.score import score_folder
from tests.support.backbones import tiny_backbone
from tests.support.videos import numbered, walkway, write_video


@pytest.mark.slow
def test_odd_frames_of_a_minute_rank_first(tmp_path: Path) -> None:
    odd = range(320, 380)
    write_video(tmp_path / "normal.mp4", walkway(120, seed=1), codec="mpeg4")
    write_video(tmp_path / "new.mp4", walkway(600, seed=2, odd=odd), codec="mpeg4")
    bank, backbone, out = tmp_path / "walk.bank", tiny_backbone(), tmp_path / "out"
    made = fit(tmp_path / "normal.mp4", bank=bank, extraction=Extraction(backbone=backbone), preset="spade", run=Run(every=3))
    assert made.added == 40
    done = score_folder(tmp_path / "new.mp4", bank=bank, out=out)
    assert done.images == 600
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert [item["id"] for item in scores] == [f"new.mp4#t={k / 10:.3f}" for k in range(600)]
    assert [item["time_s"] for item in scores] == pytest.approx([k / 10 for k in range(600)])
    is_odd = np.array([number in odd for number in range(600)])
    values = np.array([item["top_score"] for item in scores])
    assert detection_metrics(is_odd, values).auroc > 0.99
    first = np.argsort(-values)[:30]
    assert is_odd[first].all()
    with (out / "scores.csv").open() as file:
        assert [float(row["time_s"]) for row in csv.DictReader(file)] == pytest.approx([k / 10 for k in range(600)])


def test_frames_are_normals_that_the_report_finds_again(tmp_path: Path, fitted_bank: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(fitted_bank, bank)
    clip = write_video(tmp_path / "clip.mp4", numbered(9, (80, 96)))
    assert add(clip, bank=bank, run=Run(every=3)).added == 3
    assert add(clip, bank=bank, run=Run(every=3)).present == 3
    detector = Detector.open(bank)
    shown = NormalPictures(detector.bank)("clip.mp4#t=0.300")
    assert shown.picture is not None, shown.missing
    assert abs(float(shown.picture.mean()) - 38) < 3
    scores = detector.score(clip)
    assert [str(scores.neighbor_ids[k, 0]) for k in (0, 3, 6)] == [scores.ids[k] for k in (0, 3, 6)], "they find themselves"
    with pytest.raises(InputError, match="held-out images are in the bank"):
        calibrate(detector, holdout=clip)
    write_video(clip, numbered(12, (80, 96))[3:])
    with pytest.raises(InputError, match="has changed since the bank"):
        add(clip, bank=bank, run=Run(every=3))


def test_score_takes_every_nth_frame(tmp_path: Path, fitted_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_video(tmp_path / "clip.webm", numbered(9, (80, 96)))
    words = ["score", str(clip), "--bank", str(fitted_bank), "--out", str(tmp_path / "out"), "--every", "4", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3
    clip.write_bytes(clip.read_bytes()[:-200])
    assert main(words) == 0
    assert 1 <= json.loads(capsys.readouterr().out)["images"] <= 3
    assert main([*words[:-2], "0"]) == 1
    assert "every=0 must be an integer of at least 1" in capsys.readouterr().err
