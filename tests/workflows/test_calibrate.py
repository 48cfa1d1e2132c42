"""Calibrations: what is scored, what is kept, when it holds, and what damaged or foreign files do."""

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

from spade_faiss import Bank, Detector, FeatureBatch, SpadeError, fit
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Extraction, Method, Run
from spade_faiss.decisions.calibration import (
    Calibration,
    find_calibration,
    flag_below_p,
    stored_calibrations,
    write_calibration,
)
from spade_faiss.decisions.conformal import PixelCounts, p_values
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe
from spade_faiss.workflows.calibrate import calibrate, calibrate_if_needed
from tests.support.detectors import open_detector
from tests.support.oracle import bank_of, batch_of, product

SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
INPUT = (40, 43)
DIM = 16
N = 24


def make_bank(path: Path) -> Bank:
    return bank_of(path, product(1, N, SHAPES, DIM), input_size=INPUT, shards=[5, 3])


def others(n: int, seed: int = 2, **more: Any) -> FeatureBatch:
    return batch_of(product(seed, n, SHAPES, DIM, **more), [f"other {row}" for row in range(n)])


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with a calibration of all its images. Do not change it."""
    made = make_bank(tmp_path_factory.mktemp("calibrate") / "bank")
    calibrate(Detector.open(made.path))
    return made.path


def file_of(bank: Path) -> Path:
    (path,) = (bank / "calibration").iterdir()
    return path


class TestModes:
    def test_leave_one_out_keeps_what_score_rows_says(self, bank: Bank) -> None:
        detector = Detector.open(bank.path, method=Method(k_image=3))
        made = calibrate(detector)
        expected = detector.score_rows(range(N))
        assert (made.mode, made.images, made.available, made.seed) == ("leave_one_out", tuple(bank.ids), N, 0)
        assert list(made.image_score) == expected.image_score.tolist()
        assert list(made.map_score) == expected.map_score.tolist()
        assert sum(made.pixels.counts) == N * INPUT[0] * INPUT[1]
        assert (made.scoring_config.k_image, made.generation) == (3, bank.generation)
        limit = made.pixels.threshold(0.2, N)
        assert (expected.maps > limit).mean() <= (0.2 * (N + 1) - 1) / N < (expected.maps > limit * 0.995).mean()

    def test_whichever_image_is_new_its_image_score_is_an_alarm_as_seldom_as_promised(self, tmp_path: Path) -> None:
        """Leaving one out is valid in finite samples for the image score: no approximation, whatever the images."""
        features, n = product(4, 10, SHAPES, DIM), 10
        features.embedding[:] = np.random.default_rng(0).normal(size=features.embedding.shape)
        p = []
        for new in range(n):
            rest = [row for row in range(n) if row != new]
            made = bank_of(tmp_path / f"without {new}", features[rest], input_size=INPUT)
            detector = Detector.open(made.path, method=Method(k_image=2, k_gallery=2))
            calibration = calibrate(detector)
            score = detector.score_features(batch_of(features[[new]], ["new"])).image_score
            p.append(float(p_values(np.array(calibration.image_score), score)[0]))
        for count in range(1, n + 1):
            assert sum(value <= count / n + 1e-9 for value in p) <= count
        assert len(set(p)) > n / 2

    @pytest.mark.parametrize("memory", ["2GiB", "97MiB"])
    def test_the_sample_is_drawn_once_and_named(self, bank: Bank, memory: str) -> None:
        detector = Detector.open(bank.path, run=Run(memory=memory))
        made = calibrate(detector, sample=7, seed=3)
        assert len(made) == len(set(made.images)) == 7
        assert set(made.images) < set(bank.ids)
        assert (made.available, made.seed) == (N, 3)
        again = calibrate(detector, sample=7, seed=3)
        assert again == made
        assert calibrate(detector, sample=7, seed=4).images != made.images
        rows = [bank.ids.index(image) for image in made.images]
        assert list(made.image_score) == detector.score_rows(rows).image_score.tolist()
        assert len(calibrate(detector, sample=999)) == N

    def test_split_keeps_what_score_features_says(self, bank: Bank) -> None:
        detector = Detector.open(bank.path)
        made = calibrate(detector, holdout=others(30), alpha=0.1)
        expected = detector.score_features(others(30))
        assert (made.mode, made.seed, made.alpha, made.available) == ("split", None, 0.1, 30)
        assert made.images == tuple(f"other {row}" for row in range(30))
        assert list(made.image_score) == expected.image_score.tolist()
        assert list(made.map_score) == expected.map_score.tolist()

    def test_held_out_images_are_not_in_the_bank_and_not_twice(
        self, dataset_folder: Path, fitted_bank: Path, tmp_path: Path
    ) -> None:
        good = tmp_path / "good"
        shutil.copytree(dataset_folder / "test" / "good", good)
        shutil.copy(dataset_folder / "train" / "good" / "003.png", good / "renamed.png")
        copied = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
        before = file_of(copied).read_bytes()
        detector = Detector.open(copied)
        with pytest.raises(InputError, match=r"1 held-out images are in the bank .*: renamed.png \(there 003.png\)"):
            calibrate(detector, holdout=good)
        (good / "renamed.png").unlink()
        shutil.copy(good / "001.png", good / "twin.png")
        with pytest.raises(InputError, match=r"same content: 001.png, twin.png"):
            calibrate(detector, holdout=good)
        assert file_of(copied).read_bytes() == before
        (good / "twin.png").unlink()
        (good / "broken.png").write_bytes(b"no image")
        with pytest.raises(InputError, match=r"broken.png"):
            calibrate(Detector.open(copied, run=Run(max_skipped=0)), holdout=good)
        assert calibrate(detector, holdout=good).images == tuple(sorted(path.name for path in good.iterdir()))[:6]
        with pytest.raises(InputError, match="2 held-out images are in the bank"):
            calibrate(detector, holdout=[dataset_folder / "train" / "good" / f"00{i}.png" for i in (1, 2)])

    def test_features_that_are_in_the_bank_are_known_by_name(self, bank: Bank) -> None:
        with pytest.raises(InputError, match=r"24 held-out images are in the bank .*: image 0 .* and 19 more"):
            calibrate(Detector.open(bank.path), holdout=batch_of(product(1, N, SHAPES, DIM)))

    def test_alpha_that_so_few_images_cannot_promise(self, bank: Bank) -> None:
        detector = Detector.open(bank.path)
        with pytest.raises(InputError, match=r"alpha=0.01 is below 0.04, .* 24 calibration images .* takes 99 of them"):
            calibrate(detector, alpha=0.01)
        assert not (bank.path / "calibration").exists()
        with pytest.raises(InputError, match=r"takes 24 of them"):
            calibrate(detector, alpha=0.04, sample=23)
        assert calibrate(detector, alpha=0.04).alpha == 0.04
        assert calibrate(detector).alpha == 2 / 25, "the smallest at which one test alone makes an alarm"
        assert calibrate(detector, holdout=others(250)).alpha == 0.01

    def test_settings_that_do_nothing_or_cannot_be(self, bank: Bank) -> None:
        detector = Detector.open(bank.path)
        with pytest.raises(InputError, match="sample=5 is of the bank's own images"):
            calibrate(detector, holdout=others(9), sample=5)
        for setting in ({"sample": 0}, {"seed": -1}, {"alpha": 0}, {"alpha": 1.0}):
            with pytest.raises(InputError, match=next(iter(setting))):
                calibrate(detector, **setting)
        for localize in ({"localize": "none"}, {"localize": "flagged", "flag_above": 1.0}):
            with pytest.raises(InputError, match="leaves images without a map; calibrate with localize='all'"):
                calibrate(open_detector(bank.path, **localize))

    def test_a_bank_too_small(self, tmp_path: Path) -> None:
        small = bank_of(tmp_path / "small", product(1, 5, SHAPES, DIM), input_size=INPUT)
        with pytest.raises(InputError, match="each of the 5 normal images"):
            calibrate(Detector.open(small.path))
        assert calibrate(Detector.open(small.path), holdout=others(9)).mode == "split"


class TestWays:
    def test_each_way_of_scoring_has_its_own(self, bank: Bank) -> None:
        settings: list[dict[str, Any]] = [
            {},
            {"k_image": 3},
            {"k_gallery": 3},
            {"kappa": 2},
            {"fusion": "concat"},
            {"distance": "squared_l2"},
            {"sigma": 2.0},
            {"recipe": load_recipe("location")},
            {"recipe": load_recipe("location").with_query({"radius": "1"})},
        ]
        made = [calibrate(open_detector(bank.path, **setting), sample=6) for setting in settings]
        assert len(list((bank.path / "calibration").iterdir())) == len(settings)
        assert len({found.scoring_config.key for found in made}) == len(settings)
        for setting, found in zip(settings, made, strict=True):
            detector = open_detector(bank.path, **setting)
            assert find_calibration(bank, detector.scoring_config) == found
        assert sorted(stored_calibrations(bank), key=lambda item: item.scoring_config.key) == sorted(
            made, key=lambda item: item.scoring_config.key
        )

    def test_what_does_not_change_scores_does_not_change_the_way(self, bank: Bank) -> None:
        usual = Detector.open(bank.path).scoring_config
        for setting in ({"localize": "none"}, {"localize": "flagged", "flag_above": 3.0}, {"memory": "100MiB"}, {"sigma": 4}):
            assert open_detector(bank.path, **setting).scoring_config == usual
        written_out = Recipe(
            name="ivf", build=Build(gallery="ivf", settings={"lists": 64}), query=Query(settings={"nprobe": 4})
        )
        plain = Recipe(name="ivf", build=Build(gallery="ivf"))
        of_both = [ScoringConfig.of(resolve_recipe(recipe), Method()) for recipe in (written_out, plain)]
        assert of_both[0] == of_both[1]

    def test_what_to_type(self) -> None:
        recipe = load_recipe("location").with_query({"radius": "1"})
        assert ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method()).options == ""
        assert (
            ScoringConfig.of(resolve_recipe(recipe), Method(k_image=3, sigma=2)).options
            == "--recipe location --set radius=1 --k-image 3 --sigma 2.0"
        )


class TestState:
    def test_added_images_put_it_out_of_date(self, bank: Bank) -> None:
        made = calibrate(Detector.open(bank.path))
        assert made.outdated(bank) == ""
        bank.append(others(2))
        for opened in (bank, Bank.open(bank.path)):
            said = made.outdated(opened)
            assert f"generation {made.generation}, the bank is at {bank.generation}" in said
            assert f"spade-faiss calibrate {bank.path}" in said
        assert calibrate(Detector.open(bank.path)).outdated(bank) == ""

    def test_another_bank_of_the_same_generation(self, bank: Bank, tmp_path: Path) -> None:
        made = calibrate(Detector.open(bank.path))
        features = product(5, N, SHAPES, DIM)
        other = bank_of(tmp_path / "other", features, input_size=INPUT, shards=[5, 3])
        assert other.generation == bank.generation
        assert "out of date" in made.outdated(other)

    def test_only_where_it_is_needed(self, bank: Bank) -> None:
        recipe = load_recipe("exact")
        made, notice = calibrate_if_needed(bank, recipe, Run())
        assert made is not None
        assert notice == ""
        before = file_of(bank.path).stat().st_mtime_ns
        assert calibrate_if_needed(bank, recipe, Run()) == (made, "")
        assert file_of(bank.path).stat().st_mtime_ns == before
        bank.append(others(1))
        renewed, _ = calibrate_if_needed(bank, recipe, Run())
        assert renewed is not None
        assert renewed.generation == bank.generation

    def test_fit_calibrates_unless_told(self, dataset_folder: Path, fitted_bank: Path, backbone: Any, tmp_path: Path) -> None:
        assert len(stored_calibrations(Bank.open(fitted_bank))) == 1
        good = dataset_folder / "train" / "good"
        done = fit(good, bank=tmp_path / "b", extraction=Extraction(backbone=backbone), calibrate=False)
        assert (done.calibration, done.notice) == (None, "")
        assert not (tmp_path / "b" / "calibration").exists()
        done = fit(good, bank=tmp_path / "b", extraction=Extraction(backbone=backbone))
        assert done.calibration is not None
        assert len(done.calibration) == 24

    def test_fit_says_why_it_did_not(self, dataset_folder: Path, backbone: Any, tmp_path: Path) -> None:
        images = sorted((dataset_folder / "train" / "good").iterdir())
        done = fit(images[:5], bank=tmp_path / "few", extraction=Extraction(backbone=backbone))
        assert done.calibration is None
        assert done.notice.startswith("not calibrated: each of the 5 normal images")
        recipe = Recipe(name="history", build=Build(gallery="history", settings={"lists": 2, "train_images": 9}))
        done = fit(images, bank=tmp_path / "history", extraction=Extraction(backbone=backbone), recipe=recipe)
        assert done.calibration is None
        assert "recipe 'history' searches all normal images" in done.notice


class TestVerdicts:
    def test_p_values_are_of_the_kept_scores(self, calibrated: Path) -> None:
        found = find_calibration(bank := Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        scores = Detector.open(calibrated).score_features(others(6, defect=True))
        verdicts = found.decide(scores.image_score, scores.map_score, alpha=0.1)
        np.testing.assert_array_equal(verdicts.p_image, p_values(np.array(found.image_score), scores.image_score))
        np.testing.assert_array_equal(verdicts.p_map, p_values(np.array(found.map_score), scores.map_score))
        assert verdicts.alarm.tolist() == (verdicts.p_value <= 0.1).tolist()
        assert verdicts.alarm.any()
        assert (verdicts.rule, verdicts.level) == ("alpha", 0.1)
        assert found.decide(scores.image_score, scores.map_score).level == found.alpha == 2 / 25
        batch = found.decide(scores.image_score, scores.map_score, fdr=0.2)
        assert (batch.rule, batch.level) == ("fdr", 0.2)
        limits = found.thresholds(0.1)
        assert ((scores.map_score > limits.pixel) == (verdicts.p_map <= 0.1)).all()
        assert verdicts.alarm[(scores.image_score > limits.image) | (scores.map_score > limits.map)].all()
        assert bank.generation == found.generation

    def test_without_maps_the_image_score_decides_alone(self, calibrated: Path) -> None:
        found = find_calibration(Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        scores = np.array([0.0, np.median(found.image_score), 1e6])
        verdicts = found.decide(scores, None, alpha=0.04)
        assert verdicts.p_value.tolist() == verdicts.p_image.tolist()
        assert np.isnan(verdicts.p_map).all()
        assert verdicts.alarm.tolist() == [False, False, True]
        for alpha in (0.04, 0.2, 0.5):
            limit = found.thresholds(alpha, maps=False).image
            assert [score > limit for score in scores] == found.decide(scores, None, alpha=alpha).alarm.tolist()
        assert found.thresholds(0.2, maps=False).image < found.thresholds(0.2).image, "two tests share alpha"

    def test_too_small_an_alpha(self, calibrated: Path) -> None:
        found = find_calibration(Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        for ask in (lambda: found.decide(np.ones(1), None, alpha=0.03), lambda: found.thresholds(0.03)):
            with pytest.raises(InputError, match="takes 33 of them"):
                ask()

    def test_flagged_by_p_value(self, calibrated: Path) -> None:
        batch = others(20)
        every = Detector.open(calibrated).score_features(batch)
        found = find_calibration(Bank.open(calibrated), Detector.open(calibrated).scoring_config)
        assert found is not None
        for limit in (0.04, 0.3, 0.8):
            p = found.decide(every.image_score, None).p_image
            flagged = Detector.open(calibrated, method=flagging(calibrated, limit)).score_features(batch)
            assert np.isfinite(flagged.map_score).tolist() == (p <= limit).tolist()
            # Those without a map are decisions as normal by it: never more suspicious than with it.
            full = found.decide(every.image_score, every.map_score)
            assert (found.decide(every.image_score, flagged.map_score).p_value >= full.p_value).all()
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
    """Change what a calibration says, its checksum included."""
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
        """A file of schema 1 stays readable."""
        folder = Path(__file__).parents[1] / "golden" / "calibration"
        (path,) = folder.glob("*.json")
        from spade_faiss.decisions.calibration import _read

        found = _read(path, "")
        assert (found.mode, found.images, found.image_score) == ("split", ("a", "b", "c"), (1.0, 2.5, 2.0))
        assert found.decide(np.array([2.2]), np.array([9.0]), alpha=0.5).p_image.tolist() == [0.5]
        assert found.scoring_config.key == path.stem

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
        with pytest.raises(BankError, match=r"is damaged .*spade-faiss calibrate"):
            find_calibration(bank, Detector.open(bank.path).scoring_config)
        with pytest.raises(BankError, match="is damaged"):
            stored_calibrations(bank)
        calibrate(Detector.open(bank.path))
        assert len(stored_calibrations(bank)) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"schema": 3}, "has schema 3, this version reads 2"),
            ({"image_score": [1.0]}, "24 images, 1 image scores, 24 map scores"),
            ({"images": []}, "0 images"),
            ({"map_score": [float("inf")] * N}, "not finite"),
            ({"image_score": [float("nan")] * N}, "not finite"),
            ({"image_score": ["1"] * N}, "expected float"),
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

    def test_a_file_under_another_ways_name(self, bank: Bank) -> None:
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

    def test_errors_are_ours(self) -> None:
        assert issubclass(BankError, SpadeError)
        with pytest.raises(InputError):
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
