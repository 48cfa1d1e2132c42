"""Suspects: the normal image that looks least normal to the others stands first, and people see it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector, suspects
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Method, ReportOptions
from spade_faiss.index.build import build_index
from spade_faiss.report.cells import read_text
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.search.recipe import Build, Query, Recipe
from spade_faiss.workflows.fit import fit
from tests.support.backbones import tiny_backbone
from tests.support.oracle import Features, bank_of, batch_of, product, sq_distances
from tests.support.pictures import save_png

SHAPES = {"fine": (5, 6, 4), "coarse": (3, 3, 6)}
INPUT = (20, 24)
DIM = 8
N = 12
ODD = 7


def normals() -> Features:
    """Twelve normals, of which one is another product."""
    features = product(1, N, SHAPES, DIM)
    features.embedding[ODD] += 40
    for maps in features.levels.values():
        maps[ODD] += 5
    return features


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of features, of which no image files are known. Do not change it."""
    return bank_of(tmp_path_factory.mktemp("suspects") / "bank", normals(), input_size=INPUT, shards=[5, 4]).path


def others_score(features: Features, row: int, k: int) -> float:
    """The mean distance to the k nearest others."""
    others = np.delete(features.embedding, row, axis=0)
    return float(np.sqrt(np.sort(sq_distances(others, features.embedding[row]))[:k]).mean())


def lines_of(out: Path) -> list[dict[str, str]]:
    with (out / "suspects.csv").open(encoding="utf-8", newline="") as file:
        return [{name: read_text(cell) for name, cell in line.items()} for line in csv.DictReader(file)]


@pytest.mark.parametrize("k", [1, 3])
def test_the_odd_one_out_comes_first_and_each_is_scored_against_the_others(folder: Path, tmp_path: Path, k: int) -> None:
    found = suspects(Detector.open(folder, method=Method(k_image=k, k_gallery=2)), out=tmp_path / "out")
    assert found.ids[0] == f"image {ODD}"
    assert sorted(found.ids) == sorted(f"image {row}" for row in range(N))
    assert (np.diff(found.image_score) <= 0).all()
    expected = [others_score(normals(), int(name.split()[1]), k) for name in found.ids]
    np.testing.assert_allclose(found.image_score, expected, rtol=1e-4, atol=1e-4)


def test_the_table_holds_all_and_the_score_file_those_that_are_shown(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    found = suspects(folder, out=out, report=ReportOptions(shown=3))
    assert found.out == out
    lines = lines_of(out)
    assert list(lines[0]) == ["id", "image_score", "rank", "path"]
    assert [line["id"] for line in lines] == found.ids
    assert [int(line["rank"]) for line in lines] == list(range(1, N + 1))
    np.testing.assert_allclose([float(line["image_score"]) for line in lines], found.image_score, rtol=1e-6)
    assert {line["path"] for line in lines} == {""}
    with ScoreFile.open(out / "scores.h5") as scores:
        assert list(scores.ids) == found.ids[:3]
        expected = Detector.open(folder).score_rows([Bank.open(folder).ids.index(name) for name in found.ids[:3]])
        np.testing.assert_array_equal(scores.map(0), expected.maps[0])
    assert (out / "report.html").stat().st_size > 1000
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "scores.h5", "suspects.csv"]


def test_suspects_replace_the_results_that_were_there(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = set()
    for _ in range(2):
        suspects(folder, out=out, report=ReportOptions(shown=2))
        run = json.loads((out / "report.json").read_bytes())["run"]
        runs.add(run["id"])
        with ScoreFile.open(out / "scores.h5") as scores:
            assert scores.run == run["id"]
        assert (run["command"], sorted(run["sha256"])) == ("suspects", ["report.html", "suspects.csv"])
        (out / "regions.csv").write_text("of another run")
    assert len(runs) == 2
    suspects(folder, out=out)
    assert not (out / "regions.csv").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_bank_without_image_files_is_reported_without_pictures(folder: Path, tmp_path: Path) -> None:
    suspects(folder, out=tmp_path / "out", report=ReportOptions(shown=2))
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "The 2 of 12 normal images in bank that look least like the others" in html
    assert f"image {ODD}" in html


def test_the_report_shows_the_images(tmp_path: Path) -> None:
    good = tmp_path / "good"
    rng = np.random.default_rng(2)
    for number in range(7):
        values = rng.normal(120, 10, (26, 30, 3)) + (100 if number == 4 else 0)
        save_png(values.clip(0, 255).astype(np.uint8), good / f"part {number}.png")
    backbone = tiny_backbone()
    bank = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone)).bank
    detector = Detector.open(bank.path, method=Method(k_image=2, k_gallery=2), backbone=backbone)
    found = suspects(detector, out=tmp_path / "out", report=ReportOptions(shown=2))
    assert found.ids[0] == "part 4.png"
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    suspects(detector, out=tmp_path / "one", report=ReportOptions(shown=1))
    one = (tmp_path / "one" / "report.html").read_text(encoding="utf-8").count("<img")
    assert 0 < one < html.count("<img")
    assert found.ids[0] in html
    assert found.ids[1] in html
    assert lines_of(tmp_path / "out")[0]["path"] == str(good.resolve() / "part 4.png")
    # Without the backbone at hand: maps of what the bank holds need no network.
    again = suspects(bank.path, out=tmp_path / "again", report=ReportOptions(shown=2))
    assert again.ids[0] == "part 4.png"
    # An image that is gone since is no obstacle.
    shutil.rmtree(good)
    gone = suspects(detector, out=tmp_path / "gone", report=ReportOptions(shown=2))
    assert gone.ids == found.ids
    assert (tmp_path / "gone" / "report.html").is_file()


def test_removed_images_are_neither_suspect_nor_among_the_others(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank", normals(), input_size=INPUT, shards=[5, 4])
    bank.remove([f"image {ODD}", "image 3"])
    found = suspects(bank.path, out=tmp_path / "out")
    assert len(found.ids) == N - 2
    assert not {f"image {ODD}", "image 3"} & set(found.ids)
    left = [row for row in range(N) if row not in (ODD, 3)]
    features = normals()[left]
    expected = sorted((others_score(features, row, 5) for row in range(N - 2)), reverse=True)
    np.testing.assert_allclose(found.image_score, expected, rtol=1e-4, atol=1e-4)


def test_the_same_image_under_two_names_is_no_suspect(tmp_path: Path) -> None:
    """Image 4 is image 3: each has the other at distance 0, and equal scores stand in the order of their rows."""
    bank_of(tmp_path / "bank", normals(), input_size=INPUT)
    found = suspects(Detector.open(tmp_path / "bank", method=Method(k_image=1, k_gallery=1)), out=tmp_path / "out")
    assert found.ids[-2:] == ["image 3", "image 4"]
    assert found.image_score[-2:].tolist() == [0, 0]


def test_names_stay_as_they_are_and_are_never_a_place_to_write_to(tmp_path: Path) -> None:
    names = ["../../evil", "a\nb,c", '"quoted"', "<script>alert(1)</script>", "日本\u202e", *map(str, range(7))]
    features = normals()
    made = bank_of(tmp_path / "bank", features[[0]], input_size=INPUT)
    made.append(batch_of(features[list(range(1, N))], names[: N - 1]))
    found = suspects(made.path, out=tmp_path / "out", report=ReportOptions(shown=12))
    assert set(found.ids) == {"image 0", *names[: N - 1]}
    assert [line["id"] for line in lines_of(tmp_path / "out")] == found.ids
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "out"]


def test_an_approximate_recipe_finds_them_too(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank", normals(), input_size=INPUT)
    recipe = Recipe(
        name="both",
        build=Build(image="HNSW8", gallery="ivf", settings={"lists": 2}),
        query=Query(image="efSearch=256", settings={"nprobe": 2}),
    )
    build_index(bank, recipe)
    exact = suspects(bank.path, out=tmp_path / "exact")
    found = suspects(Detector.open(bank.path, recipe=recipe), out=tmp_path / "out")
    assert found.ids == exact.ids
    np.testing.assert_array_equal(found.image_score, exact.image_score)


def test_bad_input_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shown=0 must be an integer of at least 1"):
        suspects(folder, out=tmp_path / "out", report=ReportOptions(shown=0))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"out=.*file is a file; choose a folder"):
        suspects(folder, out=tmp_path / "file")
    for out in (folder, folder / "results"):
        with pytest.raises(InputError, match="lies inside of the bank"):
            suspects(folder, out=out)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(InputError, match="holds other files and no results"):
        suspects(folder, out=tmp_path / "photos")
    with pytest.raises(InputError, match=r"each of the 12 normal images .* has 11 others, k=12"):
        suspects(Detector.open(folder, method=Method(k_image=12)), out=tmp_path / "out")
    with pytest.raises(NotFoundError, match="there is no bank at"):
        suspects(tmp_path / "none", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_searches_all_images_leaves_out_the_one_itself(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank", normals(), input_size=INPUT)
    history = Recipe(name="history", build=Build(gallery="history", settings={"lists": 2, "train_images": 9}))
    build_index(bank, history)
    found = suspects(Detector.open(bank.path, recipe=history), out=tmp_path / "out", report=ReportOptions(shown=2))
    assert found.ids[0] == f"image {ODD}"


def test_a_detector_that_maps_nothing_finds_suspects_too(folder: Path, tmp_path: Path) -> None:
    found = suspects(Detector.open(folder, method=Method(localize="none")), out=tmp_path / "out", report=ReportOptions(shown=2))
    assert found.ids[0] == f"image {ODD}"
    assert (tmp_path / "out" / "report.html").is_file()
