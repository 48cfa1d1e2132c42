"""A node or the driver is lost in the middle of a command: the bank and the scores are those of one process."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.small_cluster import run_with_loss, small_cluster
from spade_faiss.bank.bank import Bank
from spade_faiss.report.exchange import PARTS
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.workflows.extract import extract
from spade_faiss.workflows.score import score_folder
from tests.cluster.conftest import SMALL
from tests.support.banks import assert_same
from tests.support.pictures import save_png, weave

SETTINGS = ("--backbone", "efficientnet_lite0", "--resize", "72", "--size", "64", "--preset", "spade")


def _has_part(folder: Path) -> bool:
    return any(folder.glob(".spade-*/parts/*/*/part.json"))


@pytest.mark.slow
def test_what_is_lost_changes_nothing(tmp_path: Path) -> None:
    draw, rng, good = random.Random(3), np.random.default_rng(3), tmp_path / "good"
    for number in range(112):
        save_png(weave(rng), good / f"{number:03d}.png")
    alone = extract(good, bank=tmp_path / "one.bank", extraction=SMALL, preset="spade").bank
    path, out = tmp_path / "many.bank", tmp_path / "many"
    out.mkdir()
    with small_cluster(2, "benchmarks.small_pieces") as cluster:
        words = ["extract", str(good), *SETTINGS, "--cluster", "auto", "--quiet", "--bank", str(path)]
        begun = (path / "features" / "000002.h5").exists
        outcomes = [run_with_loss(cluster, words, "driver", begun, draw)]
        assert_same(alone, Bank.open(path))
        files = {shard.file for shard in Bank.open(path).manifest.shards}
        assert {item.name for item in (path / "features").iterdir()} == files
        words = ["score", str(good), "--bank", str(alone.path), "--cluster", "auto", "--quiet", "--out"]
        for loss in ("node", "driver"):
            outcomes.append(run_with_loss(cluster, [*words, str(out / loss)], loss, partial(_has_part, out), draw))
    assert outcomes == ["lost", "lost", "lost"]
    assert "of 112 images had been scored by a run that was lost; their scores were kept" in (out / "driver.log").read_text()
    score_folder(good, bank=alone.path, out=tmp_path / "one")
    for loss in ("node", "driver"):
        parted = sorted((out / loss / PARTS).glob("*/scores.h5"))
        with ScoreFile.open(tmp_path / "one" / "scores.h5") as one, ScoreParts.open(parted) as parts:
            assert one.ids == parts.ids
            np.testing.assert_array_equal(one.image_score, parts.image_score)
            assert all(np.array_equal(*maps) for maps in zip(one.maps(), parts.maps(), strict=True))
    assert sorted(path.name for path in out.iterdir()) == ["driver", "driver.log", "node", "node.log"]
