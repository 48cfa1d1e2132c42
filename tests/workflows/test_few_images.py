"""Banks of a few pictures: they work by the preset that is taken unasked, with fewer neighbors, and say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.detector import Detector

SMALL = ("--backbone", "efficientnet_lite0", "--resize", "72", "--size", "64")
# How many pictures there are, and how many of them each is compared with: all others, five at most.
COUNTS = ((1, 1), (2, 1), (4, 3), (5, 4), (6, 5))


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    assert main([*map(str, words), "--json", "--quiet"]) == code
    shown = capsys.readouterr()
    found: dict[str, Any] = json.loads(shown.out) if code == 0 else {"error": shown.err}
    return found


def good_pictures(dataset: Path, folder: Path, count: int, skip: int = 0) -> Path:
    folder.mkdir()
    for path in sorted((dataset / "train" / "good").iterdir())[skip : skip + count]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def banks(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of each number of pictures, named by it, made by the preset that is taken unasked. Do not change it."""
    root = tmp_path_factory.mktemp("few")
    for count, _ in COUNTS:
        good = good_pictures(dataset_folder, root / f"good-{count}", count)
        assert main(["fit", str(good), "--bank", str(root / str(count)), *SMALL, "--quiet"]) == 0
    return root


@pytest.mark.parametrize(("count", "k"), COUNTS)
def test_it_is_scored_with_as_many_neighbors_as_there_are(
    banks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, k: int
) -> None:
    bank, out = banks / str(count), tmp_path / "out"
    assert run(capsys, "info", bank)["usual"]["method"]["k_image"] == k
    found = run(capsys, "score", dataset_folder / "test", "--bank", bank, "--out", out)
    said = "the nearest normal image alone" if k == 1 else f"the {k} nearest normal images"
    assert (said in (found["few_images"] or "")) == (k < 5)
    assert (said in (out / "report.html").read_text()) == (k < 5)
    rng = np.random.default_rng(0)
    d = Bank.open(bank).layout.embedding_dim
    queries = rng.random((3, d), np.float32)
    base = Bank.open(bank).embedding(np.arange(count)).astype(np.float64)
    expected = np.sort(np.linalg.norm(queries[:, None].astype(np.float64) - base, axis=2), axis=1)[:, :k].mean(axis=1)
    detector = Detector.open(bank)
    sq_dist, _ = ImageIndex.open(detector.bank, detector.recipe, detector.device).search(queries, k)
    np.testing.assert_allclose(np.sqrt(sq_dist).mean(axis=1), expected, rtol=1e-4)
    with ScoreFile.open(out / "scores.h5") as scores:
        np.testing.assert_allclose(scores.image_score, scores.neighbor_dist[:, :k].mean(axis=1), rtol=1e-6)
        assert scores.neighbor_dist.shape[1] == k


@pytest.mark.parametrize(("count", "k"), COUNTS)
def test_it_is_calibrated_with_the_others(
    banks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, k: int
) -> None:
    bank = banks / str(count)
    if count == 1:
        error = run(capsys, "calibrate", bank, code=1)["error"]
        assert f"{bank} holds 1 normal image and no others to compare one with" in error
        assert f"spade-faiss add IMAGES --bank {bank}" in error
        assert f"spade-faiss calibrate {bank} --holdout IMAGES" in error
        held = good_pictures(dataset_folder, tmp_path / "held", 3, skip=10)
        copy = shutil.copytree(bank, tmp_path / "copy")
        assert run(capsys, "calibrate", copy, "--holdout", held)["images"] == 3
        return
    found = run(capsys, "calibrate", bank)
    assert (found["images"], found["scoring_config"]["k_image"]) == (count, k)
    scored = run(capsys, "score", dataset_folder / "test", "--bank", bank, "--out", tmp_path / "out")
    assert scored["calibration"]["images"] == count


def test_fit_says_so(banks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count, k in COUNTS:
        done = run(capsys, "fit", banks / f"good-{count}", "--bank", banks / str(count), *SMALL)
        assert (done["few_images"] is None) == (k == 5)
        if k < 5:
            assert f"where k_image=5 is usual: the bank holds {count} normal image" in done["few_images"]
        assert (done["calibration"] is None) == (count == 1)
    assert "holds 1 normal image and no others" in run(capsys, "fit", banks / "good-1", "--bank", banks / "1", *SMALL)["notice"]


def test_pictures_that_are_added_are_compared_with_too(
    banks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, before = shutil.copytree(banks / "2", tmp_path / "bank"), 2
    for more, k in ((1, 2), (2, 4), (1, 5)):
        new = good_pictures(dataset_folder, tmp_path / f"new-{before}", more, skip=before)
        assert (run(capsys, "add", new, "--bank", bank)["few_images"] is None) == (k == 5)
        before += more
        assert Detector.open(bank).method.k_image == k


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_it_is_evaluated(
    banks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    found = run(capsys, "evaluate", dataset_folder, "--bank", banks / str(count), "--out", tmp_path / "out")
    assert found["few_images"]
    assert found["metrics"]


def test_what_is_asked_for_is_not_lowered(
    banks: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "score", dataset_folder / "test", "--bank", banks / "4", "--out", tmp_path / "out", "--k-image", "5"
    error = run(capsys, *words, code=1)["error"]
    assert "k_image=5 is larger than the number of normal images, 4" in error
    assert "leave it out to take as many as there are" in error
    with pytest.raises(InputError, match="k_image=5 is larger than the number of normal images, 4"):
        Detector.open(banks / "4", method=Method())
    assert "each of the 5 normal images" in run(capsys, "calibrate", banks / "5", "--k-image", "5", code=1)["error"]
