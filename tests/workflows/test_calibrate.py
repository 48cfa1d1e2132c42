"""Calibrations: which images are scored, what is written, when it holds, and what damaged or foreign files do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Bank, Detector, fit
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.presets import Usual
from spade_faiss.core.settings import Decision, Method, Run
from spade_faiss.decisions.calibration import (
    current_calibrations,
    find_calibration,
    stored_calibrations,
    write_calibration,
)
from spade_faiss.decisions.conformal import p_values
from spade_faiss.decisions.rule import DecisionRule
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

    @pytest.mark.parametrize(
        ("before", "after", "asked", "was", "became"),
        [
            (9, 10, {"k_gallery": 9}, ("5", "all"), ("5", "9")),
            (3, 4, {}, ("2", "all"), ("3", "all")),
            (4, 24, {"k_gallery": (3, 20)}, ("3", "(3, 'all')"), ("5", "(3, 20)")),
            (10, 9, {"k_gallery": 9}, ("5", "9"), ("5", "all")),
        ],
    )
    def test_a_bank_that_asks_for_more_as_it_grows_says_that_it_is_out_of_date(
        self, tmp_path: Path, before: int, after: int, asked: dict[str, Any], was: tuple[str, str], became: tuple[str, str]
    ) -> None:
        """What is asked for stays the same, and so does the calibration of it, whatever it amounts to for so many images."""
        features = product(1, max(before, after), SHAPES, DIM)
        bank = bank_of(tmp_path / "bank", features[:before], input_size=INPUT)
        bank.choose(Usual(method=Method(**asked)))
        made = calibrate(Detector.open(bank.path))
        assert (str(made.scoring_config.k_image), str(made.scoring_config.k_gallery)) == was
        if after < before:
            bank.remove(bank.ids[after:])
        else:
            bank.append(batch_of(features[before:], [f"more {row}" for row in range(after - before)]))
        detector = Detector.open(bank.path)
        config = detector.scoring_config
        assert (str(config.k_image), str(config.k_gallery)) == became
        assert find_calibration(bank, config) == made
        rule, notice = DecisionRule.of(detector, Decision())
        assert rule is None
        assert f"is out of date: it was made for {before} normal images with k_image={was[0]}, k_gallery={was[1]}" in notice
        assert f"there are {after} now, which are searched with k_image={became[0]}, k_gallery={became[1]}" in notice
        assert notice.endswith(f"renew it with: spade-faiss calibrate {bank.path}")
        assert made.outdated(bank).endswith(f"renew it with: spade-faiss calibrate {bank.path}")
        # Of other settings there never was one.
        other = Detector.open(bank.path, method=replace(detector.method, sigma=1.0))
        assert "has no calibration for these settings" in DecisionRule.of(other, Decision())[1]
        made_anew, _ = calibrate_if_needed(bank, Run())
        assert made_anew == find_calibration(bank, config) != made
        assert DecisionRule.of(detector, Decision())[0] is not None
        assert (current_calibrations(bank), len(stored_calibrations(bank))) == ([made_anew], 2)

    def test_one_that_did_not_record_the_size_of_its_bank(self, tmp_path: Path) -> None:
        bank = bank_of(tmp_path / "bank", product(1, 9, SHAPES, DIM), input_size=INPUT)
        bank.choose(Usual(method=Method(k_gallery=9)))
        old = replace(calibrate(Detector.open(bank.path)), entries=0)
        held = replace(old, mode="split", generation=old.generation - 1)
        bank.append(others(1))
        config = Detector.open(bank.path).scoring_config
        for stored, found in ((held, None), (old, old)):  # the one does not tell how many images the bank had
            write_calibration(bank, stored)
            assert find_calibration(bank, config) == found
        broken = bank.path / "calibration" / "0123456789abcdef.json"
        broken.write_text("{")
        assert find_calibration(bank, config) == old, "one of other settings is damaged"

    def test_the_calibration_of_other_settings_is_no_older_one(self, bank: Bank) -> None:
        """All images are asked for now, and five were before: that is no matter of the size of the bank."""
        calibrate(Detector.open(bank.path, method=Method(k_gallery="all")))
        bank.append(others(2))
        assert find_calibration(bank, Detector.open(bank.path).scoring_config) is None
        calibrate(Detector.open(bank.path, method=Method(k_image=4)))
        bank.remove(bank.ids[:1])
        assert find_calibration(bank, Detector.open(bank.path).scoring_config) is None

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
