"""Calibrations: which images are scored, what is written, when it holds, and what damaged or foreign files do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Bank, Detector, fit
from spade_faiss.core.errors import InputError
from spade_faiss.core.presets import Usual
from spade_faiss.core.settings import Extraction, Method, Run
from spade_faiss.decisions.calibration import (
    find_calibration,
    stored_calibrations,
)
from spade_faiss.decisions.conformal import p_values
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe
from spade_faiss.workflows.calibrate import calibrate, calibrate_if_needed
from tests.support.calibrations import DIM, INPUT, SHAPES, N, file_of, make_bank, others
from tests.support.detectors import open_detector
from tests.support.oracle import bank_of, batch_of, product


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank")


class TestModes:
    def test_leave_one_out_stores_the_scores_of_score_rows(self, bank: Bank) -> None:
        detector = Detector.open(bank.path, method=Method(k_image=3))
        made = calibrate(detector)
        expected = detector.score_rows(range(N))
        assert (made.mode, made.images, made.available, made.seed) == ("leave_one_out", tuple(bank.ids), N, 0)
        assert list(made.image_score) == expected.image_score.tolist()
        assert list(made.map_score) == expected.map_score.tolist()
        np.testing.assert_array_equal(made.statistics, expected.statistics)
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

    def test_split_stores_the_scores_of_score_features(self, bank: Bank) -> None:
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
            calibrate(Detector.open(small.path, method=Method()))
        assert len(calibrate(Detector.open(small.path))) == 5
        small = bank_of(tmp_path / "one", product(1, 1, SHAPES, DIM), input_size=INPUT)
        with pytest.raises(InputError, match="holds 1 normal image and no others to compare one with"):
            calibrate(Detector.open(small.path))
        assert calibrate(Detector.open(small.path), holdout=others(9)).mode == "split"


class TestScoringConfigs:
    def test_each_scoring_config_has_a_calibration_of_its_own(self, bank: Bank) -> None:
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

    def test_what_does_not_change_scores_does_not_change_the_config(self, bank: Bank) -> None:
        usual = Detector.open(bank.path).scoring_config
        for setting in ({"localize": "none"}, {"localize": "flagged", "flag_above": 3.0}, {"memory": "100MiB"}, {"sigma": 4}):
            assert open_detector(bank.path, **setting).scoring_config == usual
        written_out = Recipe(
            name="ivf", build=Build(gallery="ivf", settings={"lists": 64}), query=Query(settings={"nprobe": 4})
        )
        plain = Recipe(name="ivf", build=Build(gallery="ivf"))
        of_both = [ScoringConfig.of(resolve_recipe(recipe), Method()) for recipe in (written_out, plain)]
        assert of_both[0] == of_both[1]

    def test_how_many_are_asked_for_is_nothing_to_a_recipe_that_searches_all(self) -> None:
        recipe = resolve_recipe(load_recipe("global"))
        five, every = (ScoringConfig.of(recipe, Method(k_gallery=k)) for k in (5, "all"))
        assert five == every
        assert five.key == every.key

    def test_options_that_ask_for_a_config(self) -> None:
        recipe = load_recipe("location").with_query({"radius": "1"})
        assert ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method()).options(Usual()) == ""
        assert (
            ScoringConfig.of(resolve_recipe(recipe), Method(k_image=3, sigma=2)).options(Usual())
            == "--recipe location --set radius=1 --k-image 3 --sigma 2.0"
        )


class TestState:
    def test_added_images_put_it_out_of_date(self, bank: Bank) -> None:
        made = calibrate(Detector.open(bank.path))
        assert made.outdated(bank) == ""
        bank.append(others(2))
        for opened in (bank, Bank.open(bank.path)):
            notice = made.outdated(opened)
            assert f"generation {made.generation}, the bank is at {bank.generation}" in notice
            assert f"spade-faiss calibrate {bank.path}" in notice
        assert calibrate(Detector.open(bank.path)).outdated(bank) == ""

    def test_another_bank_of_the_same_generation(self, bank: Bank, tmp_path: Path) -> None:
        made = calibrate(Detector.open(bank.path))
        features = product(5, N, SHAPES, DIM)
        other = bank_of(tmp_path / "other", features, input_size=INPUT, shards=[5, 3])
        assert other.generation == bank.generation
        assert "out of date" in made.outdated(other)

    def test_only_where_it_is_needed(self, bank: Bank) -> None:
        made, notice = calibrate_if_needed(bank, Run())
        assert made is not None
        assert notice == ""
        before = file_of(bank.path).stat().st_mtime_ns
        assert calibrate_if_needed(bank, Run()) == (made, "")
        assert file_of(bank.path).stat().st_mtime_ns == before
        bank.append(others(1))
        renewed, _ = calibrate_if_needed(bank, Run())
        assert renewed is not None
        assert renewed.generation == bank.generation

    def test_fit_calibrates_unless_told_not_to(
        self, dataset_folder: Path, fitted_bank: Path, backbone: Any, tmp_path: Path
    ) -> None:
        assert len(stored_calibrations(Bank.open(fitted_bank))) == 1
        good = dataset_folder / "train" / "good"
        done = fit(good, bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=backbone), calibrate=False)
        assert (done.calibration, done.notice) == (None, "")
        assert not (tmp_path / "b" / "calibration").exists()
        done = fit(good, bank=tmp_path / "b", preset="spade", extraction=Extraction(backbone=backbone))
        assert done.calibration is not None
        assert len(done.calibration) == 24

    def test_fit_says_why_it_did_not(self, dataset_folder: Path, backbone: Any, tmp_path: Path) -> None:
        images = sorted((dataset_folder / "train" / "good").iterdir())
        done = fit(images[:1], bank=tmp_path / "few", preset="spade", extraction=Extraction(backbone=backbone))
        assert done.calibration is None
        assert done.notice.startswith(f"not calibrated: {tmp_path / 'few'} holds 1 normal image and no others")
