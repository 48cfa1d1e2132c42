"""Verdicts end to end: from the command line to the files, the report and the terminal."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from spade_faiss import Bank, Detector, FeatureBatch, score_folder
from spade_faiss.cli import main
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Decision, Method
from spade_faiss.decisions.calibration import find_calibration, stored_calibrations
from spade_faiss.decisions.run_lengths import decode, from_text
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.workflows.suspects import suspects


@pytest.fixture
def bank(fitted_bank: Path, tmp_path: Path) -> Path:
    """A copy of the bank, calibrated by `fit` with its 24 images."""
    return Path(shutil.copytree(fitted_bank, tmp_path / "copy.bank"))


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def run_error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) == 1
    return capsys.readouterr().err


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return found


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def grow(bank: Path) -> None:
    """Add an image to a bank."""
    opened = Bank.open(bank)
    row = opened.read(np.array([0]))
    opened.append(FeatureBatch(["one more"], row.embedding + 1, row.levels, row.source))


class TestScoring:
    def test_every_file_says_the_same(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        done = run_json(capsys, "score", dataset_folder / "test", "--bank", bank, "--out", out, "--alpha", "0.08")
        found = find_calibration(Bank.open(bank), Detector.open(bank).scoring_config)
        assert found is not None
        with ScoreFile.open(out / "scores.h5") as scores:
            expected = found.decide(scores.image_scores, alpha=0.08)
            verdict, regions = scores.table("verdict"), scores.table("regions")
            maps, ids = list(scores.maps()), list(scores.ids)
            settings = json.loads(scores.settings)
        assert (settings["scoring_config"], settings["generation"]) == (found.scoring_config.key, found.generation)
        assert expected.alarm.any()
        assert not expected.alarm.all()
        for name in ("p_image", "p_map", "p_value", "alarm"):
            np.testing.assert_array_equal(verdict[name], getattr(expected, name))
            assert [float(line[name]) for line in lines(out / "scores.csv")] == getattr(expected, name).tolist()
            assert [item[name] for item in report(out)["scores"]] == getattr(expected, name).tolist()
        assert all(line["image_score"] and line["map_score"] for line in lines(out / "scores.csv")), "raw scores stay"
        numbers = report(out)["calibration"]
        assert (numbers["mode"], numbers["images"], numbers["rule"]) == ("leave_one_out", 24, {"alpha": 0.08})
        assert numbers["alarms"] == done["calibration"]["alarms"] == int(expected.alarm.sum())
        assert report(out)["calibration_notice"] is None
        # Regions: those of the maps above the threshold, everywhere alike.
        limit = numbers["thresholds"]["pixel"]
        assert limit == pytest.approx(np.sort(found.map_score)[-2]), "two of 25 may be above"
        listed = lines(out / "regions.csv")
        position = 0
        for i, (scored, item) in enumerate(zip(maps, report(out)["scores"], strict=True)):
            union = np.zeros(scored.shape, bool)
            for region in item["regions"]:
                mask = decode(from_text(region["input"]["segmentation"]["counts"]), scored.shape)
                assert not (union & mask).any()
                union |= mask
                line = listed[position]
                assert (line["id"], float(line["score"])) == (ids[i], region["score"])
                x, y, width, height = region["input"]["box"]
                assert [int(line[f"input_{name}"]) for name in ("x", "y", "width", "height")] == [x, y, width, height]
                assert mask[y : y + height, x : x + width].sum() == mask.sum() == region["input"]["area"]
                assert scored[tuple(region["input"]["peak"])] == pytest.approx(region["score"])
                assert line["original_mask"] == region["original"]["segmentation"]["counts"]
                assert line["original_size"] == "80x96"
                assert regions["image"][position] == i
                assert regions["original_box"][position].tolist() == region["original"]["box"]
                assert regions["p_value"][position] == region["p_value"] <= 0.08
                position += 1
            np.testing.assert_array_equal(union, scored > np.float32(limit))
        assert position == len(listed) == len(regions["image"]) > 0
        assert regions["input_counts"].sum() == 64 * 64 * position
        assert len(regions["input_counts"]) == regions["input_runs"].sum()

    def test_regions_lie_on_the_defects_of_the_original(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        spots = dataset_folder / "test" / "spot"
        run_json(capsys, "score", spots, "--bank", bank, "--out", tmp_path / "out", "--alpha", "0.08")
        for item in report(tmp_path / "out")["scores"]:
            assert item["alarm"]
            region = item["regions"][0]["original"]
            with Image.open(dataset_folder / "ground_truth" / "spot" / f"{Path(item['id']).stem}_mask.png") as mask:
                defect = np.asarray(mask.convert("L")) > 0
            found = decode(from_text(region["segmentation"]["counts"]), defect.shape)
            assert (found & defect).sum() > 0.7 * defect.sum()
            assert defect[tuple(region["peak"])]

    def test_the_promised_rate(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("score", dataset_folder / "test", "--bank", bank, "--out", tmp_path / "out")
        assert run_json(capsys, *words)["calibration"]["rule"] == {"alpha": 0.08}, "the calibration's own"
        batch = run_json(capsys, *words, "--fdr", "0.3")["calibration"]
        assert batch["rule"] == {"fdr": 0.3}
        p = np.array([float(line["p_value"]) for line in lines(tmp_path / "out" / "scores.csv")])
        alarm = np.array([line["alarm"] == "1" for line in lines(tmp_path / "out" / "scores.csv")])
        assert alarm.tolist() == (stats.false_discovery_control(p) <= 0.3).tolist()
        assert 0 < alarm.sum() < len(p)
        run_json(capsys, *words, "--fdr", "0.01")
        page = unescape((tmp_path / "out" / "report.html").read_text())
        assert "keeps fdr=0.01 with a p-value of at most 0.000909" in page
        assert "it takes 1099 of them" in page
        before = (tmp_path / "out" / "scores.h5").read_bytes()
        assert "takes 99 of them" in run_error(capsys, *words, "--alpha", "0.01")
        for bad in (("--alpha", "0"), ("--alpha", "1.5"), ("--fdr", "0"), ("--fdr", "1")):
            assert "between 0 and 1" in run_error(capsys, *words, *bad)
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, words), "--alpha", "0.1", "--fdr", "0.1"])
        with pytest.raises(InputError, match="two rules"):
            score_folder(dataset_folder / "test", bank=bank, out=tmp_path / "out", decision=Decision(alpha=0.1, fdr=0.1))
        assert (tmp_path / "out" / "scores.h5").read_bytes() == before

    def test_without_a_calibration_scoring_is_as_before(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("score", dataset_folder / "test" / "good", "--bank", bank, "--k-image", "3", "--out")
        shutil.rmtree(bank / "calibration")
        out = tmp_path / "out"
        out.mkdir()
        (out / "regions.csv").write_text("of a run before")
        assert main([*map(str, (*words, out))]) == 0
        captured = capsys.readouterr()
        assert f"make one with: spade-faiss calibrate {bank.resolve()} --k-image 3" in captured.out
        assert captured.err == ""
        assert report(out)["calibration"] is None
        assert "no calibration for these settings" in report(out)["calibration_notice"]
        assert "p_value" not in report(out)["scores"][0]
        assert "p_value" not in lines(out / "scores.csv")[0]
        assert not (out / "regions.csv").exists()
        page = (out / "report.html").read_text()
        assert "p-value</button>" not in page
        assert "spade-faiss calibrate" in page
        with ScoreFile.open(out / "scores.h5") as scores:
            assert scores.table("verdict") == {}
        assert "spade-faiss calibrate" in run_error(capsys, *words, tmp_path / "more", "--alpha", "0.1")
        assert not (tmp_path / "more").exists()

    def test_a_calibration_that_is_out_of_date_is_reported_and_not_used(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        grow(bank)
        words = ("score", dataset_folder / "test" / "good", "--bank", bank, "--out", tmp_path / "out")
        assert main([*map(str, words)]) == 0
        captured = capsys.readouterr()
        assert "out of date" in captured.err
        assert "out of date" in captured.out
        assert report(tmp_path / "out")["calibration"] is None
        assert "out of date" in report(tmp_path / "out")["calibration_notice"]
        assert "out of date" in (tmp_path / "out" / "report.html").read_text()
        assert "p_value" not in lines(tmp_path / "out" / "scores.csv")[0]
        assert "out of date" in run_error(capsys, *words, "--alpha", "0.1")
        with pytest.raises(BankError, match="out of date"):
            score_folder(dataset_folder / "test" / "good", bank=bank, out=tmp_path / "out", decision=Decision(fdr=0.1))
        run_json(capsys, "calibrate", bank)
        assert run_json(capsys, *words, "--alpha", "0.1")["calibration"]["images"] == 25

    @pytest.mark.parametrize(
        ("words", "mapped"),
        [(("--localize", "none"), False), (("--localize", "flagged", "--flag-below-p", "0.3"), True)],
    )
    def test_images_without_a_map(
        self,
        words: tuple[str, ...],
        mapped: bool,
        bank: Path,
        dataset_folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "out"
        run_json(capsys, "score", dataset_folder / "test", "--bank", bank, "--out", out, "--alpha", "0.08", *words)
        listed = lines(out / "scores.csv")
        localized = [line for line in listed if line["p_map"]]
        if not mapped:
            assert not localized
            assert [line["p_value"] for line in listed] == [line["p_image"] for line in listed]
        else:
            assert 0 < len(localized) < len(listed)
            assert [bool(line["p_map"]) for line in listed] == [float(line["p_image"]) <= 0.3 for line in listed]
            assert re.search(r"\(an image score of at most [\d.]+\)", (out / "report.html").read_text())
        assert {line["id"] for line in lines(out / "regions.csv")} <= {line["id"] for line in localized}
        assert any(line["alarm"] == "1" for line in listed)


class TestImageScores:
    @pytest.mark.parametrize("tests", [("top",), ("knn", "max", "top")])
    def test_chosen_scores_rank_and_decide_in_every_file(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tests: tuple[str, ...]
    ) -> None:
        out = tmp_path / "out"
        words = ("--alpha", "0.2", "--score", "top", "--image-scores", ",".join(tests))
        done = run_json(capsys, "evaluate", dataset_folder, "--bank", bank, "--out", out, *words)
        found = find_calibration(Bank.open(bank), Detector.open(bank).scoring_config)
        assert found is not None
        with ScoreFile.open(out / "scores.h5") as scores:
            expected = found.decide(scores.image_scores, tests=tests, alpha=0.2)
            tops, verdict = scores.top_score, scores.table("verdict")
        listed, numbers = lines(out / "scores.csv"), report(out)
        np.testing.assert_array_equal(np.array([line["top_score"] for line in listed], np.float32), tops)
        np.testing.assert_array_equal(np.array([item["top_score"] for item in numbers["scores"]], np.float32), tops)
        by_top = stats.rankdata(-tops, method="min").tolist()
        assert [float(line["rank"]) for line in listed] == [item["rank"] for item in numbers["scores"]] == by_top
        for name in ("p_top", "p_value", "alarm"):
            np.testing.assert_array_equal(verdict[name], getattr(expected, name))
            assert [float(line[name]) for line in listed] == getattr(expected, name).tolist()
            assert [item[name] for item in numbers["scores"]] == getattr(expected, name).tolist()
        assert numbers["calibration"]["image_scores"] == list(tests)
        assert numbers["calibration"]["thresholds"]["top"] == found.thresholds(0.2, tests=tests).top
        assert done["metrics"]["image, by top mean"]["auroc"] == numbers["metrics"]["by_top"]["auroc"]
        page = (out / "report.html").read_text()
        assert re.search(r'<th scope="col" class="n bar"><button type="button">top mean</button>', page)
        assert page.count('class="n bar" style="--share:100.0%"') == 1
        rows = re.findall(r'<tr><td class="n">(\d+)</td><td>(?:<a[^>]*>)?([^<]+)<', page)
        assert next(name for _, name in rows) == listed[by_top.index(1)]["id"]
        assert "Top means" in page
        assert ("approximate for the map's maximum and the mean of its top pixels" in unescape(page)) == (len(tests) == 3)

    def test_structure_in_every_file(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, tests = tmp_path / "out", ("knn", "max", "top", "structure")
        words = ("--alpha", "0.2", "--score", "structure", "--image-scores", ",".join(tests))
        done = run_json(capsys, "evaluate", dataset_folder, "--bank", bank, "--out", out, *words)
        found = find_calibration(Bank.open(bank), Detector.open(bank).scoring_config)
        assert found is not None
        with ScoreFile.open(out / "scores.h5") as scores:
            maps = map_statistics(np.stack(list(scores.maps())), None, 0.01)
            expected = found.decide(scores.image_scores, maps, tests=tests, alpha=0.2)
            structure, verdict = scores.structure_score, scores.table("verdict")
        assert structure is not None
        np.testing.assert_array_equal(structure, found.structure(maps))
        listed, numbers = lines(out / "scores.csv"), report(out)
        np.testing.assert_array_equal(np.array([line["structure_score"] for line in listed], np.float32), structure)
        np.testing.assert_array_equal(np.array([item["structure_score"] for item in numbers["scores"]], np.float32), structure)
        by_structure = stats.rankdata(-structure, method="min").tolist()
        assert [float(line["rank"]) for line in listed] == [item["rank"] for item in numbers["scores"]] == by_structure
        for name in ("p_structure", "p_value", "alarm"):
            np.testing.assert_array_equal(verdict[name], getattr(expected, name))
            assert [float(line[name]) for line in listed] == getattr(expected, name).tolist()
            assert [item[name] for item in numbers["scores"]] == getattr(expected, name).tolist()
        defective = np.array([line["kind"] != "good" for line in listed])
        auroc = numbers["metrics"]["by_structure"]["auroc"]
        assert auroc == pytest.approx(stats.mannwhitneyu(structure[defective], structure[~defective]).statistic / (5 * 6))
        assert done["metrics"]["image, by structure"]["auroc"] == auroc
        page = unescape((out / "report.html").read_text())
        for text in (
            "AUROC by structure",
            "what it is compared with depends on the image",
            'bar"><button type="button">structure<',
        ):
            assert text in page
        assert re.search(r"approximate for the map's maximum, the mean of its top pixels and its structure", page)

    def test_structure_needs_a_calibration(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.rmtree(bank / "calibration")
        words = ("score", dataset_folder / "test", "--bank", bank, "--out", tmp_path / "out")
        for more in (("--score", "structure"), ("--image-scores", "knn,structure")):
            error = run_error(capsys, *words, *more)
            assert re.search(
                r"structure compares maps with those of a calibration: .*make one with: spade-faiss calibrate", error
            )
        run_json(capsys, *words)
        assert "structure_score" not in lines(tmp_path / "out" / "scores.csv")[0]
        assert "structure_score" not in report(tmp_path / "out")["scores"][0]

    def test_images_without_a_map_rank_below_all_others(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        words = ("--localize", "flagged", "--flag-below-p", "0.3", "--score", "max", "--image-scores", "knn,top,structure")
        run_json(capsys, "score", dataset_folder / "test", "--bank", bank, "--out", out, "--alpha", "0.2", *words)
        listed = lines(out / "scores.csv")
        mapped = [int(line["rank"]) for line in listed if line["p_map"]]
        assert sorted(mapped) == list(range(1, len(mapped) + 1))
        assert {int(line["rank"]) for line in listed if not line["p_map"]} == {len(mapped) + 1}
        assert 0 < len(mapped) < len(listed)
        for line in listed:
            assert bool(line["p_top"]) == bool(line["p_structure"]) == bool(line["p_map"])
            assert math.isnan(float(line["structure_score"])) == (not line["p_map"])
            assert line["p_map"] or line["alarm"] == "0"

    def test_suspects_rank_by_the_distance_to_normals(self, bank: Path, tmp_path: Path) -> None:
        found = suspects(Detector.open(bank, method=Method(score="top")), out=tmp_path / "out")
        assert found.ids == suspects(Detector.open(bank, method=Method()), out=tmp_path / "knn").ids
        assert (np.diff(found.image_score) <= 0).all()


class TestEvaluating:
    def test_promised_and_observed_rates(
        self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_json(capsys, "evaluate", dataset_folder, "--bank", bank, "--out", tmp_path / "out", "--alpha", "0.2")
        listed, achieved = lines(tmp_path / "out" / "scores.csv"), report(tmp_path / "out")["calibration"]["achieved"]
        assert [row["alpha"] for row in achieved] == [0.05, 0.1, 0.2], "24 images cannot promise less than 0.04"
        for row in achieved:
            for name, good in (("normal", True), ("defective", False)):
                passed = [float(line["p_value"]) <= row["alpha"] for line in listed if (line["kind"] == "good") == good]
                assert (row[name]["count"], row[name]["of"]) == (sum(passed), len(passed))
                assert row[name]["interval"][0] <= row[name]["rate"] <= row[name]["interval"][1]
        page = unescape((tmp_path / "out" / "report.html").read_text())
        for text in (
            "Promised and observed rates",
            "False alarms",
            "Detected",
            "Thresholds",
            "observed = promised",
            "Verdicts promise",
            "region",
        ):
            assert text in page
        assert page.count('class="alarm"') >= 5
        assert re.search(r"approximate for the map's maximum", page)


class TestCommands:
    def test_calibrate_then_info(self, bank: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made = run_json(
            capsys, "calibrate", bank, "--holdout", dataset_folder / "test" / "good", "--alpha", "0.2", "--k-image", "3"
        )
        assert (made["mode"], made["images"], made["alpha"], made["seed"]) == ("split", 6, 0.2, None)
        assert made["scoring_config"]["k_image"] == 3
        assert made["thresholds"]["pixel"] > 0
        sampled = run_json(capsys, "calibrate", bank, "--sample", "9", "--seed", "5", "--sigma", "2")
        assert (sampled["images"], sampled["available"], sampled["seed"]) == (9, 24, 5)
        info = run_json(capsys, "info", bank)["calibrations"]
        assert sorted(item["images"] for item in info) == [6, 9, 24]
        assert all(item["current"] for item in info)
        assert main(["calibrate", str(bank)]) == 0
        assert "24 of 24 images, leave one out, alpha=0.08" in capsys.readouterr().out
        grow(bank)
        assert not any(item["current"] for item in run_json(capsys, "info", bank)["calibrations"])
        assert main(["info", str(bank)]) == 0
        assert capsys.readouterr().out.count("OUT OF DATE") == 3

    def test_errors_say_what_to_do(self, bank: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "takes 99 of them" in run_error(capsys, "calibrate", bank, "--alpha", "0.01")
        good = dataset_folder / "train" / "good"
        assert "24 held-out images are in the bank" in run_error(capsys, "calibrate", bank, "--holdout", good)
        assert "has 23 others" in run_error(capsys, "calibrate", bank, "--recipe", "exact", "--k-image", "24")
        (path,) = (bank / "calibration").iterdir()
        path.write_bytes(path.read_bytes()[:-20])
        words = ("score", dataset_folder / "test", "--bank", bank, "--out", bank.parent / "out")
        assert "is damaged" in run_error(capsys, *words)
        assert "is damaged" in run_error(capsys, "info", bank)

    def test_fit_may_leave_it_out(self, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = (
            "fit",
            dataset_folder / "train/good",
            "--bank",
            tmp_path / "b",
            "--preset",
            "spade",
            "--backbone",
            "efficientnet_lite0",
        )
        small = ("--resize", "72", "--size", "64")
        assert run_json(capsys, *words, *small, "--no-calibrate")["calibration"] is None
        assert stored_calibrations(Bank.open(tmp_path / "b")) == []
        assert run_json(capsys, *words, *small)["calibration"]["images"] == 24
        assert main([*map(str, (*words, *small))]) == 0
        assert "24 of 24 images, leave one out" in capsys.readouterr().out

    def test_drift(self, bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("good", "spot"):
            run_json(capsys, "score", dataset_folder / "test" / name, "--bank", bank, "--out", tmp_path / name)
        same = run_json(capsys, "drift", tmp_path / "good", "--bank", bank)
        assert (same["moved"], same["images"]) == (False, 6)
        assert (tmp_path / "good" / "drift.html").exists()
        moved = run_json(capsys, "drift", tmp_path / "spot", "--bank", bank, "--out", tmp_path / "drift", "--defects", "0")
        assert moved["moved"]
        assert json.loads((tmp_path / "drift" / "drift.json").read_bytes())["verdict"] == moved["verdict"]
        assert main(["drift", str(tmp_path / "good" / "scores.h5"), "--bank", str(bank)]) == 0
        assert "No drift found" in capsys.readouterr().out
        assert "no scores.h5" in run_error(capsys, "drift", tmp_path, "--bank", bank)
