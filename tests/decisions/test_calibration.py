"""Calibrations: their verdicts and thresholds, and what damaged or foreign files do."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss import Bank, Detector
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.presets import Usual
from spade_faiss.core.settings import Decision, Method
from spade_faiss.decisions.calibration import (
    Calibration,
    find_calibration,
    flag_below_p,
    stored_calibrations,
    write_calibration,
)
from spade_faiss.decisions.conformal import PixelCounts, combined_p_values, p_values
from spade_faiss.decisions.rule import DecisionRule
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import load_recipe
from spade_faiss.workflows.calibrate import calibrate
from tests.support.calibrations import N, file_of, make_bank, others

ALONE = ("knn",)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with a calibration of all its images. Do not change it."""
    made = make_bank(tmp_path_factory.mktemp("calibrate") / "bank")
    calibrate(Detector.open(made.path))
    return made.path


class TestVerdicts:
    def test_p_values_are_those_of_the_stored_scores(self, calibrated: Path) -> None:
        found = find_calibration(bank := Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        scores = Detector.open(calibrated).score_features(others(6, defect=True))
        verdicts = found.decide(scores.image_scores, alpha=0.1)
        np.testing.assert_array_equal(verdicts.p_image, p_values(np.array(found.image_score), scores.image_score))
        np.testing.assert_array_equal(verdicts.p_map, p_values(np.array(found.map_score), scores.map_score))
        assert verdicts.alarm.tolist() == (verdicts.p_value <= 0.1).tolist()
        assert verdicts.alarm.any()
        assert (verdicts.rule, verdicts.level) == ("alpha", 0.1)
        assert found.decide(scores.image_scores).level == found.alpha == 2 / 25
        batch = found.decide(scores.image_scores, fdr=0.2)
        assert (batch.rule, batch.level) == ("fdr", 0.2)
        limits = found.thresholds(0.1)
        assert ((scores.map_score > limits.pixel) == (verdicts.p_map <= 0.1)).all()
        assert verdicts.alarm[(scores.image_score > limits.image) | (scores.map_score > limits.map)].all()
        assert bank.generation == found.generation

    def test_chosen_scores_decide_together(self, calibrated: Path) -> None:
        found = find_calibration(Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        scores = Detector.open(calibrated).score_features(others(6, defect=True))
        named, columns = scores.image_scores, {"knn": found.image_score, "max": found.map_score, "top": found.top_score}
        for tests in (("top",), ("knn", "top"), ("knn", "max", "top")):
            verdicts = found.decide(named, tests=tests, alpha=0.2)
            np.testing.assert_array_equal(verdicts.p_top, p_values(np.array(found.top_score), scores.top_score))
            calibration = np.array([columns[name] for name in tests]).T
            together = combined_p_values(calibration, np.array([named[name] for name in tests]).T)
            np.testing.assert_array_equal(verdicts.p_value, together)
            limits = found.thresholds(0.2, tests=tests)
            assert np.isinf([limits.image, limits.map, limits.top]).tolist() == [
                name not in tests for name in ("knn", "max", "top")
            ]
            assert verdicts.alarm[scores.top_score > limits.top].all()
        assert found.decide(named, tests=("top",)).p_value.tolist() == verdicts.p_top.tolist()

    def test_the_default_alpha_lets_each_test_raise_an_alarm_alone(self, bank: Bank) -> None:
        for tests in (("knn",), ("knn", "max"), ("knn", "max", "top")):
            made = calibrate(Detector.open(bank.path, method=Method(image_scores=tests)))
            assert made.alpha == pytest.approx(len(tests) / 25)
            limits = made.thresholds(made.alpha, tests=tests)
            assert np.isfinite([limits.image, limits.map, limits.top]).sum() == len(tests)

    def test_without_maps_the_image_score_decides_alone(self, calibrated: Path) -> None:
        found = find_calibration(Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        values, none = np.array([0.0, np.median(found.image_score), 1e6]), np.full(3, np.nan)
        scores = {"knn": values, "max": none, "top": none}
        verdicts = found.decide(scores, tests=ALONE, alpha=0.04)
        assert verdicts.p_value.tolist() == verdicts.p_image.tolist()
        assert np.isnan(verdicts.p_map).all()
        assert verdicts.alarm.tolist() == [False, False, True]
        for alpha in (0.04, 0.2, 0.5):
            limit = found.thresholds(alpha, tests=ALONE).image
            assert [score > limit for score in values] == found.decide(scores, tests=ALONE, alpha=alpha).alarm.tolist()
        assert found.thresholds(0.2, tests=ALONE).image < found.thresholds(0.2).image, "two tests share alpha"

    def test_too_small_an_alpha(self, calibrated: Path) -> None:
        found = find_calibration(Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        for ask in (lambda: found.decide({"knn": np.ones(1), "max": np.ones(1)}, alpha=0.03), lambda: found.thresholds(0.03)):
            with pytest.raises(InputError, match="takes 33 of them"):
                ask()

    def test_flagged_by_p_value(self, calibrated: Path) -> None:
        batch = others(20)
        every = Detector.open(calibrated).score_features(batch)
        found = find_calibration(Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        for limit in (0.04, 0.3, 0.8):
            p = found.decide(every.image_scores, tests=ALONE).p_image
            flagged = Detector.open(calibrated, method=flagging(calibrated, limit)).score_features(batch)
            assert np.isfinite(flagged.map_score).tolist() == (p <= limit).tolist()
            # Images without a map count as normal in its test: their p-values are never lower than with a map.
            full = found.decide(every.image_scores)
            assert (found.decide(flagged.image_scores).p_value >= full.p_value).all()
        assert 0 < (p <= 0.8).sum() < 20
        with pytest.raises(InputError, match=r"takes 33 of them"):
            flagging(calibrated, 0.0301)

    def test_flagged_needs_a_calibration_that_holds(self, bank: Bank) -> None:
        with pytest.raises(BankError, match=rf"has none; make it with: spade-faiss calibrate {bank.path} --k-image 3"):
            flagging(bank.path, 0.1, k_image=3)
        calibrate(Detector.open(bank.path))
        bank.append(others(1))
        with pytest.raises(BankError, match="out of date"):
            flagging(bank.path, 0.1)

    def test_p_values_to_flag_by_are_between_0_and_1(self, calibrated: Path) -> None:
        for value in (0.0, 1.0, -1.0, float("nan")):
            with pytest.raises(InputError, match=r"flag_below_p=.* between 0 and 1"):
                flagging(calibrated, value)


def flagging(bank: Path, p: float, **settings: Any) -> Method:
    return flag_below_p(Bank.open(bank), load_recipe("exact"), Method(**settings), p)


def rewritten(path: Path, **changes: Any) -> None:
    """Change the content of a calibration, its checksum included."""
    content = json.loads(path.read_bytes())
    content.pop("sha256")
    content.update(changes)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")


class TestFiles:
    def test_round_trip(self, calibrated: Path, tmp_path: Path) -> None:
        bank = Bank.open(shutil.copytree(calibrated, tmp_path / "copy"))
        found = find_calibration(bank, Detector.open(bank.path).scoring_config)
        assert found is not None
        assert write_calibration(bank, found) == file_of(bank.path)
        assert find_calibration(bank, found.scoring_config) == found
        assert asdict(found)["versions"].keys() == {"spade-faiss", "numpy", "scipy", "python"}
        assert file_of(bank.path).name == f"{found.scoring_config.key}.json"
        assert find_calibration(bank, replace(found.scoring_config, sigma=1.0)) is None

    def test_golden(self) -> None:
        """A file that was written before stays readable."""
        folder = Path(__file__).parents[1] / "golden" / "calibration"
        (path,) = folder.glob("*.json")
        from spade_faiss.decisions.calibration import _read

        found = _read(path, "")
        assert (found.mode, found.images, found.image_score) == ("split", ("a", "b", "c"), (1.0, 2.5, 2.0))
        assert found.decide({"knn": np.array([2.2]), "max": np.array([9.0])}, alpha=0.5).p_image.tolist() == [0.5]
        assert found.scoring_config.key == path.stem
        assert ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method()) == found.scoring_config
        with pytest.raises(InputError, match="did not record top; calibrate again"):
            found.decide({name: np.ones(1) for name in ("knn", "max", "top")}, tests=("knn", "top"), alpha=0.5)
        with pytest.raises(InputError, match="need the statistics of maps"):
            found.decide({name: np.ones(1) for name in ("knn", "max")}, np.ones((1, 3)), tests=("structure",), alpha=0.5)

    def test_what_changes_no_score_shares_a_calibration(self) -> None:
        def key(**settings: Any) -> str:
            return ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method(**settings)).key

        assert key() == key(score="top", image_scores=("top",)) == "ba157434204eddcc"
        assert len({key(), key(top_share=0.02), key(top_share=0.5)}) == 3
        config = ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method(top_share=0.02))
        assert config.options(Usual()) == "--top-share 0.02"

    def test_statistics_that_an_older_version_did_not_record(self, bank: Bank) -> None:
        """Its calibration holds where it always did; where it does not, the message says how to make another."""
        made = calibrate(Detector.open(bank.path))
        old = replace(made, top_score=(), map_std=(), map_variation=())
        content = {name: value for name, value in asdict(old).items() if name not in ("top_score", "map_std", "map_variation")}
        content["scoring_config"].pop("top_share")
        path = file_of(bank.path)
        signed = {"format": "spade_faiss calibration", "schema": 3, **json.loads(json.dumps(content))}
        signed["sha256"] = hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(signed))
        rule, notice = DecisionRule.of(Detector.open(bank.path), Decision(alpha=0.1))
        assert (rule is not None, notice) == (True, "")
        by_top = Detector.open(bank.path, method=Method(image_scores=("knn", "top")))
        rule, notice = DecisionRule.of(by_top, Decision())
        assert rule is None
        assert "did not record top; renew it with: spade-faiss calibrate" in notice
        by_structure = Detector.open(bank.path, method=Method(score="structure"))
        with pytest.raises(BankError, match="did not record structure; renew it with"):
            DecisionRule.of(by_structure, Decision())
        assert old.structure(np.ones((2, 3))) is None
        assert np.isnan(old.decide({"knn": np.ones(1), "max": np.ones(1)}, np.ones((1, 3)), alpha=0.1).p_structure).all()
        with pytest.raises(BankError, match="did not record top"):
            DecisionRule.of(by_top, Decision(alpha=0.1))
        calibrate(by_top)
        assert DecisionRule.of(by_top, Decision(alpha=0.2))[0] is not None

    @given(data=st.data())
    def test_damaged_files_are_refused(
        self, calibrated: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        whole = file_of(calibrated).read_bytes()
        bank = Bank.open(calibrated)
        broken = bytearray(whole)
        if data.draw(st.booleans(), label="truncate"):
            broken = broken[: data.draw(st.integers(0, len(whole) - 2))]
        else:
            place = data.draw(st.integers(0, len(whole) - 2))
            broken[place] ^= 1 << data.draw(st.integers(0, 7))
        path = tmp_path_factory.mktemp("damaged") / "c.json"
        path.write_bytes(bytes(broken))
        from spade_faiss.decisions.calibration import _read

        try:
            found = _read(path, "spade-faiss calibrate BANK")
        except BankError:
            return
        # A blank for a blank, as in JSON outside of strings.
        assert found == find_calibration(bank, Detector.open(calibrated).scoring_config)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
    def test_what_is_no_calibration(self, bank: Bank, content: bytes) -> None:
        calibrate(Detector.open(bank.path))
        path = file_of(bank.path)
        path.write_bytes(content)
        with pytest.raises(BankError, match=r"is damaged.*spade-faiss calibrate"):
            find_calibration(bank, Detector.open(bank.path).scoring_config)
        with pytest.raises(BankError, match="is damaged"):
            stored_calibrations(bank)
        calibrate(Detector.open(bank.path))
        assert len(stored_calibrations(bank)) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"schema": 4}, "has schema 4, this version reads 3"),
            ({"image_score": [1.0]}, "24 images, 1 image scores, 24 map scores"),
            ({"images": []}, "0 images"),
            ({"map_score": [float("inf")] * N}, "not finite"),
            ({"image_score": [float("nan")] * N}, "not finite"),
            ({"image_score": ["1"] * N}, "expected float"),
            ({"top_score": [1.0]}, "24 images has 1, 24, 24 statistics"),
            ({"map_std": []}, "24 images has 24, 0, 24 statistics"),
            ({"map_variation": [1e39] * N}, "beyond 1e"),
            ({"top_score": [float("inf")] * N}, "not finite"),
            ({"mode": "guess"}, "mode='guess'"),
            ({"alpha": 0.001}, "takes 999 of them"),
            ({"alpha": 2}, "alpha=2"),
            ({"available": 3}, "of 3 images"),
            ({"pixels": {"keys": [], "counts": []}}, "counts 0 pixel scores"),
            ({"pixels": {"keys": [3, 2], "counts": [1, 1]}}, "do not ascend"),
            ({"pixels": {"keys": [3], "counts": [1, 1]}}, "counts 1 pixel scores 2 times"),
            ({"pixels": {"keys": [1 << 19], "counts": [1]}}, "counts 1 pixel"),
            ({"pixels": {"keys": [-1], "counts": [1]}}, "counts 1 pixel"),
            ({"pixels": {"keys": [3], "counts": [0]}}, "counts 1 pixel"),
            ({"more": 1}, "unknown key 'more'"),
        ],
    )
    def test_contradictions_are_refused(self, bank: Bank, changes: dict[str, Any], message: str) -> None:
        calibrate(Detector.open(bank.path))
        rewritten(file_of(bank.path), **changes)
        with pytest.raises(BankError, match=message) as caught:
            find_calibration(bank, Detector.open(bank.path).scoring_config)
        assert "spade-faiss calibrate" in str(caught.value)

    def test_a_file_under_the_name_of_another_config(self, bank: Bank) -> None:
        calibrate(Detector.open(bank.path))
        other = Detector.open(bank.path, method=Method(k_image=2)).scoring_config
        file_of(bank.path).rename(bank.path / "calibration" / f"{other.key}.json")
        with pytest.raises(BankError, match="of another scoring config"):
            find_calibration(bank, other)

    def test_a_full_disk_or_a_kill_leaves_the_old_one(self, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
        calibrate(Detector.open(bank.path))
        before = file_of(bank.path).read_bytes()

        def fail(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("spade_faiss.core.files._sync", fail)
        with pytest.raises(OSError, match="no space"):
            calibrate(Detector.open(bank.path), sample=9)
        assert file_of(bank.path).read_bytes() == before

    def test_a_calibration_checks_itself(self) -> None:
        assert len(Calibration(**GOLDEN)) == 3
        with pytest.raises(InputError, match="1 images, 3 image scores"):
            Calibration(**{**GOLDEN, "images": ("a",)})


GOLDEN: dict[str, Any] = {
    "pixels": PixelCounts(keys=(100, 260096), counts=(3, 2)),
    "mode": "split",
    "scoring_config": ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method()),
    "alpha": 0.5,
    "available": 3,
    "seed": None,
    "images": ("a", "b", "c"),
    "image_score": (1.0, 2.5, 2.0),
    "map_score": (1.0, 2.0, 3.0),
    "generation": 1,
    "shards_sha256": "0",
    "versions": {"spade-faiss": "0.1.0"},
}


def test_the_options_in_a_message_are_words_for_a_shell() -> None:
    """A calibration may come from anybody, and its options are shown as a command to copy."""
    config = replace(ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method()), recipe="x; rm -r y", image_query="a b")
    assert config.options(Usual()) == "--recipe 'x; rm -r y' --set 'image=a b'"
