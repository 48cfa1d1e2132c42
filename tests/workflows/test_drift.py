"""Drift of recent results: which calibration they are compared with, and what is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from spade_faiss import Bank, Detector, FeatureBatch
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.settings import Method
from spade_faiss.report.scorefile import ScoreWriter
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.drift import drift, write_drift
from tests.support.oracle import bank_of, batch_of, product

SHAPES = {"fine": (5, 6, 4), "coarse": (3, 3, 6)}
INPUT = (20, 24)
N = 40


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A calibrated bank. Do not change it."""
    made = bank_of(tmp_path_factory.mktemp("drift") / "bank", product(1, N, SHAPES, 16), input_size=INPUT)
    calibrate(Detector.open(made.path))
    return made


def results(out: Path, detector: Detector, seed: int, n: int, *, shift: float = 0.0, generation: int = 1) -> Path:
    """A run over n images, as `score_folder` leaves it."""
    features = product(seed, n, SHAPES, 16)
    for maps in features.levels.values():
        maps += shift
    features.embedding[:] += shift
    out.mkdir()
    settings = json.dumps({"scoring_config": detector.scoring_config.key, "generation": generation})
    with ScoreWriter(out / "scores.h5", settings) as writer:
        writer.append(detector.score_features(batch_of(features, [f"recent {row}" for row in range(n)])))
    return out


def test_no_drift(bank: Bank, tmp_path: Path) -> None:
    parts = [results(tmp_path / name, Detector.open(bank.path), seed, 30) for name, seed in (("a", 2), ("b", 3))]
    found = drift([parts[0], parts[1] / "scores.h5"], bank=bank.path)
    assert not found.moved
    assert found.verdict.startswith("No drift found: 60 recent images")
    assert (found.images, set(found.tests), found.outdated) == (60, {"image", "map"}, "")
    assert found.p_value == min(1, 2 * min(test.p_value for test in found.tests.values()))
    calibration = found.calibration.scores["knn"]
    recent = np.concatenate([Detector.open(bank.path).score_features(_queries(seed)).image_score for seed in (2, 3)])
    assert found.tests["image"].distance == pytest.approx(stats.ks_2samp(recent, calibration).statistic)


def test_drift(bank: Bank, tmp_path: Path) -> None:
    found = drift([results(tmp_path / "moved", Detector.open(bank.path), 2, 30, shift=1.0)], bank=bank.path)
    assert found.moved
    assert found.p_value <= found.level == 0.01
    assert "is higher than the calibration's" in found.verdict
    assert "even if 5 % of them are defects" in found.verdict
    assert found.tests["image"].median_p < 0.1
    assert not drift([tmp_path / "moved"], bank=bank.path, level=1e-30).moved


def test_what_is_written(bank: Bank, tmp_path: Path) -> None:
    moved = results(tmp_path / "moved", Detector.open(bank.path), 2, 30, shift=1.0)
    found = drift([moved], bank=bank.path)
    write_drift(tmp_path / "out", found, results=[moved], bank=bank.path)
    numbers = json.loads((tmp_path / "out" / "drift.json").read_bytes())
    assert (numbers["moved"], numbers["p_value"], numbers["images"]) == (True, found.p_value, 30)
    assert numbers["tests"]["map"]["distance"] == found.tests["map"].distance
    page = (tmp_path / "out" / "drift.html").read_text()
    assert "<svg" in page
    assert "Scores have drifted" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page.replace("xlink:href", "href")), "it opens offline"


def test_drift_stands_beside_the_results_that_it_is_about_and_nowhere_else(bank: Bank, tmp_path: Path) -> None:
    compared = results(tmp_path / "compared", Detector.open(bank.path), 2, 30)
    other = results(tmp_path / "other", Detector.open(bank.path), 3, 30)
    found = drift([compared], bank=bank.path)
    before = (compared / "scores.h5").read_bytes()
    runs = set()
    for item in (compared, compared / "scores.h5"):
        write_drift(compared, found, results=[item], bank=bank.path)
        runs.add(json.loads((compared / "drift.json").read_bytes())["run"]["id"])
        assert sorted(path.name for path in compared.iterdir()) == ["drift.html", "drift.json", "scores.h5"]
        assert (compared / "scores.h5").read_bytes() == before
    assert len(runs) == 2
    assert json.loads((compared / "drift.json").read_bytes())["results"] == [str(compared / "scores.h5")]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for out, message in (
        (other, "holds results that were not compared"),
        (bank.path, "lies inside of the bank"),
        (bank.path / "drift", "lies inside of the bank"),
        (tmp_path / "photos", "holds other files"),
    ):
        with pytest.raises(InputError, match=message):
            write_drift(out, found, results=[compared], bank=bank.path)
    assert sorted(path.name for path in other.iterdir()) == ["scores.h5"]


def test_images_without_maps_are_compared_by_their_image_scores(bank: Bank, tmp_path: Path) -> None:
    found = drift([results(tmp_path / "r", Detector.open(bank.path, method=Method(localize="none")), 2, 30)], bank=bank.path)
    assert set(found.tests) == {"image"}
    assert found.p_value == found.tests["image"].p_value


def test_results_of_several_states_or_scoring_configs(bank: Bank, tmp_path: Path) -> None:
    old = results(tmp_path / "old", Detector.open(bank.path), 2, 5, generation=0)
    new = results(tmp_path / "new", Detector.open(bank.path), 2, 5)
    with pytest.raises(InputError, match=r"scored at generation 0 .*has one of generation 1; calibrate"):
        drift([old], bank=bank.path)
    with pytest.raises(InputError, match="scored with 2 scoring configs, or against as many states"):
        drift([new, old], bank=bank.path)
    bare = shutil.copytree(bank.path, tmp_path / "bare")
    shutil.rmtree(bare / "calibration")
    with pytest.raises(InputError, match="has none for it; calibrate"):
        drift([new], bank=bare)


def test_an_added_image_puts_the_calibration_out_of_date(bank: Bank, tmp_path: Path) -> None:
    scored = results(tmp_path / "r", Detector.open(bank.path), 2, 5)
    grown = shutil.copytree(bank.path, tmp_path / "grown")
    Bank.open(grown).append(batch_of(product(9, 1, SHAPES, 16), ["one more"]))
    assert "out of date" in drift([scored], bank=grown).outdated


def test_input_that_is_no_result(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no scores.h5"):
        drift([tmp_path], bank=bank.path)
    with pytest.raises(InputError, match="needs results"):
        drift([], bank=bank.path)
    with ScoreWriter(tmp_path / "scores.h5", "{}") as writer:
        writer.append(Detector.open(bank.path).score_features(_queries(2)))
    with pytest.raises(InputError, match="does not say how it was scored"):
        drift([tmp_path], bank=bank.path)
    (tmp_path / "scores.h5").write_bytes(b"none")
    with pytest.raises(InputError, match="damaged"):
        drift([tmp_path], bank=bank.path)
    with pytest.raises(InputError, match="level"):
        drift([tmp_path], bank=bank.path, level=0.0)
    with pytest.raises(InputError, match="defects"):
        drift([tmp_path], bank=bank.path, defects=1.0)


def _queries(seed: int) -> FeatureBatch:
    return batch_of(product(seed, 30, SHAPES, 16), [f"recent {row}" for row in range(30)])
