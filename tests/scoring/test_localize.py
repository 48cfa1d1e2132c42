"""Maps for all images, for those flagged, for none: what is left out is NaN everywhere, and nothing else changes."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spade_faiss import Backbone, Detector, FeatureBatch, Scores, evaluate, score_folder
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method, ReportOptions, Run
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.search.engines.faiss import FaissSearch
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.protocol import Hits
from tests.support.detectors import open_detector
from tests.support.oracle import bank_of, batch_of, product

# What `exact` searches with on this machine.
SEARCH = NativeSearch if usable_simd_level() else FaissSearch
Floats = npt.NDArray[np.float32]

SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
INPUT = (40, 43)
# Of what is written of an image, what its map has a part in.
OF_MAP = ("map_score", "top_score", "structure_score", "p_map", "p_top", "p_structure", "p_value", "alarm", "regions")
DIM = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of 12 normals. Do not change it."""
    path = tmp_path_factory.mktemp("localize") / "bank"
    bank_of(path, product(1, 12, SHAPES, DIM), input_size=INPUT, shards=[5, 3])
    return path


def queries(n: int = 9, **more: Any) -> FeatureBatch:
    return batch_of(product(2, n, SHAPES, DIM, defect=True), **more)


def middle(scores: Floats) -> float:
    """A score that is no image's, with images on both sides."""
    low, high = map(float, np.sort(scores)[len(scores) // 2 - 1 :][:2])
    assert low < high
    return (low + high) / 2


def check_flagged(found: Scores, full: Scores, flagged: npt.NDArray[np.bool_]) -> None:
    """Image scores and neighbors as of all images; maps and all that is under them for the flagged ones alone."""
    assert list(found.ids) == list(full.ids)
    assert found.distance == full.distance
    for name in ("image_score", "neighbor_ids", "neighbor_dist"):
        np.testing.assert_array_equal(getattr(found, name), getattr(full, name), err_msg=name)
    for name in ("maps", "map_score"):
        np.testing.assert_array_equal(getattr(found, name)[flagged], getattr(full, name)[flagged], err_msg=name)
        assert np.isnan(getattr(found, name)[~flagged]).all()
        assert getattr(found, name).dtype == np.float32
    np.testing.assert_array_equal(found.peak[flagged], full.peak[flagged])
    assert found.level_dist.keys() == full.level_dist.keys() == found.nearest.keys()
    for level, dist in full.level_dist.items():
        np.testing.assert_array_equal(found.level_dist[level][flagged], dist[flagged], err_msg=level)
        assert np.isnan(found.level_dist[level][~flagged]).all()
        np.testing.assert_array_equal(found.nearest[level][flagged], full.nearest[level][flagged], err_msg=level)
        assert (found.nearest[level]["neighbor"][~flagged] == -1).all()
        assert found.nearest[level].dtype == full.nearest[level].dtype


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[Floats]:
    """What the pixel search is asked for: (n, HW, C) of each call."""
    calls: list[Floats] = []
    call = SEARCH.__call__

    def counted(self: Any, xq: Floats, neighbors: npt.NDArray[np.int64], kappa: int) -> Hits:
        calls.append(xq)
        assert len(neighbors) == len(xq)
        return call(self, xq, neighbors, kappa)

    monkeypatch.setattr(SEARCH, "__call__", counted)
    return calls


@pytest.mark.parametrize(
    "setting",
    [{}, {"fusion": "concat", "kappa": 3}, {"distance": "squared_l2", "sigma": 0}, {"k_image": 2, "k_gallery": 7}],
)
def test_flagged_images_have_the_maps_that_all_would_have(folder: Path, setting: dict[str, Any]) -> None:
    full = open_detector(folder, **setting).score_features(queries())
    above = middle(full.image_score)
    flagged = full.image_score > above
    assert 0 < flagged.sum() < len(flagged)
    order = np.random.default_rng(0).permutation(len(flagged))
    levels = {level: maps[order] for level, maps in queries().levels.items()}
    mixed = FeatureBatch([queries().ids[i] for i in order], queries().embedding[order], levels)
    full = open_detector(folder, **setting).score_features(mixed)
    flagged = full.image_score > above
    assert len(np.unique(np.diff(np.flatnonzero(flagged)))) > 1  # no slice of the batch
    detector = open_detector(folder, localize="flagged", flag_above=above, **setting)
    check_flagged(detector.score_features(mixed), full, flagged)
    for i in range(len(mixed)):  # alone, a batch is all flagged or not at all
        one = detector.score_features(mixed[i : i + 1])
        np.testing.assert_array_equal(one.maps[0], full.maps[i] if flagged[i] else np.full(INPUT, np.nan, np.float32))


def test_the_threshold_itself_is_not_above(folder: Path) -> None:
    full = Detector.open(folder).score_features(queries())
    highest = int(full.image_score.argmax())
    for above, found in ((float(full.image_score[highest]), []), (float(np.sort(full.image_score)[-2]), [highest])):
        scores = Detector.open(folder, method=Method(localize="flagged", flag_above=above)).score_features(queries())
        assert np.flatnonzero(np.isfinite(scores.map_score)).tolist() == found


def test_the_threshold_is_of_the_distance_that_is_scored(folder: Path) -> None:
    full = Detector.open(folder, method=Method(distance="squared_l2")).score_features(queries())
    above = middle(full.image_score)
    found = Detector.open(folder, method=Method(distance="squared_l2", localize="flagged", flag_above=above)).score_features(
        queries()
    )
    check_flagged(found, full, full.image_score > above)


def test_no_pixel_is_searched_of_images_that_are_not_flagged(folder: Path, searched: list[Floats]) -> None:
    query = queries()
    scores = Detector.open(folder).score_features(query)
    assert [len(xq) for xq in searched] == [9, 9]
    searched.clear()
    above = middle(scores.image_score)
    flagged = np.flatnonzero(scores.image_score > above)
    Detector.open(folder, method=Method(localize="flagged", flag_above=above)).score_features(query)
    assert [len(xq) for xq in searched] == [len(flagged)] * 2
    for xq, (level, maps) in zip(searched, query.levels.items(), strict=True):
        np.testing.assert_array_equal(xq, maps[flagged].reshape(xq.shape), err_msg=level)
    searched.clear()
    Detector.open(folder, method=Method(localize="flagged", flag_above=1e9)).score_features(query)
    Detector.open(folder, method=Method(localize="none")).score_features(query)
    assert searched == []


def test_every_image_flagged_is_all(folder: Path) -> None:
    full = Detector.open(folder).score_features(queries())
    found = Detector.open(folder, method=Method(localize="flagged", flag_above=-1)).score_features(queries())
    check_flagged(found, full, np.ones(9, np.bool_))


@pytest.mark.parametrize("setting", [{"localize": "none"}, {"localize": "flagged", "flag_above": 1e9}])
@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_no_image_with_a_map(folder: Path, setting: dict[str, Any], fusion: str) -> None:
    full = Detector.open(folder, method=Method(fusion=fusion)).score_features(queries())
    found = open_detector(folder, fusion=fusion, **setting).score_features(queries())
    check_flagged(found, full, np.zeros(9, np.bool_))


def test_batches_of_which_some_have_no_flagged_image_are_joined(folder: Path) -> None:
    query = queries(40)
    full = Detector.open(folder).score_features(query)
    above = float(np.sort(full.image_score)[-3])
    usual = Detector.open(folder, method=Method(localize="flagged", flag_above=above))
    small = Detector.open(folder, method=Method(localize="flagged", flag_above=above), run=Run(memory=usual._working_bytes(3)))
    assert small.plan.batch == 3
    for detector in (usual, small):
        check_flagged(detector.score_features(query), full, full.image_score > above)


def test_margins_are_zero_where_there_is_a_map_and_nan_where_there_is_none(folder: Path) -> None:
    """As of letterboxed images."""
    valid = np.ones((9, *INPUT), np.bool_)
    valid[::2, :7] = False
    valid[1::2, :, 30:] = False
    query = queries(valid=valid)
    full = Detector.open(folder).score_features(query)
    above = middle(full.image_score)
    flagged = full.image_score > above
    found = Detector.open(folder, method=Method(localize="flagged", flag_above=above)).score_features(query)
    check_flagged(found, full, flagged)
    assert not found.maps[flagged][~valid[flagged]].any()
    assert found.maps[flagged][valid[flagged]].all()
    assert np.isnan(found.maps[~flagged]).all()


# From the command to the files


@dataclass(frozen=True, eq=False)
class Written:
    """What `score_folder` wrote: the page, the numbers, the lines, the score file's content."""

    out: Path
    page: str
    numbers: dict[str, Any]
    lines: list[dict[str, str]]
    maps: Floats
    map_score: Floats
    top_score: Floats
    image_score: Floats
    match: dict[str, npt.NDArray[np.int32]]
    ids: tuple[str, ...]

    def cards(self) -> list[str]:
        """Ids of the images shown in full."""
        return [unescape(name) for name in re.findall(r'<article class="card".*?<h3>(.*?)</h3>', self.page, re.DOTALL)]

    def row(self, image: str) -> list[str]:
        """The cells of an image's line in the table."""
        (row,) = [row for row in re.findall(r"<tr>(.*?)</tr>", self.page, re.DOTALL) if f">{image}<" in row]
        return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]

    def notices(self) -> list[str]:
        return [unescape(text) for text in re.findall(r'<p class="notice">(.*?)</p>', self.page)]


Runner = Callable[..., Written]


@pytest.fixture
def run(dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path) -> Runner:
    def run(name: str, **settings: Any) -> Written:
        out = tmp_path / name
        detector = open_detector(fitted_bank, backbone=backbone, **settings)
        score_folder(dataset_folder / "test", bank=detector, out=out, report=ReportOptions(overlays=True))
        with ScoreFile.open(out / "scores.h5") as scores, (out / "scores.csv").open(newline="") as file:
            return Written(
                out=out,
                page=(out / "report.html").read_text(),
                numbers=json.loads((out / "report.json").read_bytes()),
                lines=list(csv.DictReader(file)),
                maps=np.stack(list(scores.maps())),
                map_score=scores.map_score,
                top_score=scores.top_score,
                image_score=scores.image_score,
                match=scores.match,
                ids=scores.ids,
            )

    return run


def check_written(found: Written, full: Written, flagged: npt.NDArray[np.bool_]) -> None:
    names = [name for name, has_map in zip(full.ids, flagged, strict=True) if has_map]
    others = [name for name in full.ids if name not in names]
    assert found.ids == full.ids
    np.testing.assert_array_equal(found.image_score, full.image_score)
    for array in ("maps", "map_score", "top_score"):
        np.testing.assert_array_equal(getattr(found, array)[flagged], getattr(full, array)[flagged])
        assert np.isnan(getattr(found, array)[~flagged]).all()
    for level, match in full.match.items():
        np.testing.assert_array_equal(found.match[level][flagged], match[flagged])
        assert (found.match[level][~flagged, 0] == -1).all()
    # Spreadsheets and programs.
    for line, item, of_all, has_map in zip(found.lines, found.numbers["scores"], full.lines, flagged, strict=True):
        if has_map:
            assert line == of_all
            assert item["map_score"] == pytest.approx(float(of_all["map_score"]))
        else:
            assert math.isnan(float(line["map_score"]))
            of_map = dict.fromkeys(OF_MAP, "")
            assert {**line, **of_map} == {**of_all, **of_map}
            assert item["map_score"] is None
    apart = dict.fromkeys(OF_MAP)
    assert [{**item, **apart} for item in found.numbers["scores"]] == [{**item, **apart} for item in full.numbers["scores"]]
    # The page.
    assert sorted(found.cards()) == sorted(names)
    for name in full.ids:
        place = 3  # rank, image, image score, map maximum, top mean, structure
        expected = full.row(name)
        assert [cell.strip() for cell in found.row(name)][:place] == expected[:place]
        assert [cell == "–" for cell in found.row(name)[place : place + 3]] == [name in others] * 3
        assert name in others or found.row(name)[place : place + 3] == expected[place : place + 3]
        assert found.row(name)[place + 5 :] == expected[place + 5 :]  # after p-value and verdict
    notices = [notice for notice in found.notices() if "no map" in notice]
    assert [notice.split(" images")[0] for notice in notices] == ([f"{len(others)} of {len(full.ids)}"] if others else [])
    # What a browser shows of NaN or an infinity would be garbage.
    shown = re.sub(r"<script>.*?</script>|<style>.*?</style>|data-v=\"nan\"", "", found.page, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf)\b", shown, re.IGNORECASE)
    # Pictures.
    overlays = sorted(path.relative_to(found.out / "overlays").as_posix() for path in (found.out / "overlays").rglob("*.png"))
    assert overlays == sorted(f"{name}.png" for name in names)
    for overlay in (found.out / "overlays").rglob("*.png"):
        with Image.open(overlay) as picture:
            assert picture.size == (64, 64)


def test_what_is_written_of_a_run_over_flagged_images(run: Runner) -> None:
    full = run("all")
    check_written(full, full, np.ones(11, np.bool_))
    assert full.numbers["method"]["localize"] == "all"
    assert full.numbers["method"]["flag_above"] is None
    above = middle(full.image_score)
    flagged = full.image_score > above
    found = run("flagged", localize="flagged", flag_above=above)
    check_written(found, full, flagged)
    assert (found.numbers["method"]["localize"], found.numbers["method"]["flag_above"]) == ("flagged", above)
    assert "Map maxima" in found.page


def test_what_is_written_where_one_image_is_flagged(run: Runner) -> None:
    """One map has a range of colors and a histogram, too."""
    full = run("all")
    above = float(np.sort(full.image_score)[-2])
    check_written(run("one", localize="flagged", flag_above=above), full, full.image_score > above)


@pytest.mark.parametrize("setting", [{"localize": "none"}, {"localize": "flagged", "flag_above": 1e9}])
def test_what_is_written_where_no_image_has_a_map(run: Runner, setting: dict[str, Any]) -> None:
    full = run("all")
    found = run("none", **setting)
    check_written(found, full, np.zeros(11, np.bool_))
    assert not (found.out / "overlays").exists()
    assert "Map maxima" not in found.page


def test_a_threshold_may_come_from_numpy(run: Runner, fitted_bank: Path, backbone: Backbone, dataset_folder: Path) -> None:
    """It is computed from scores, which are float32."""
    scores = Detector.open(fitted_bank, backbone=backbone).score(dataset_folder / "test").image_score
    above = np.quantile(scores, 0.5)
    assert isinstance(above, np.float32)
    found = run("numpy", localize="flagged", flag_above=above)
    np.testing.assert_array_equal(np.isfinite(found.map_score), scores > above)
    assert found.numbers["method"]["flag_above"] == pytest.approx(float(above))


@pytest.mark.parametrize("setting", [{"localize": "none"}, {"localize": "flagged", "flag_above": 10.0}])
def test_an_evaluation_needs_every_map(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, setting: dict[str, Any]
) -> None:
    detector = open_detector(fitted_bank, backbone=backbone, **setting)
    with pytest.raises(InputError, match=f"localize='{setting['localize']}' leaves images without a map.*localize='all'"):
        evaluate(dataset_folder, bank=detector, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
