"""Score files, pictures, charts and pages: what goes in comes out, nothing is half-written, nothing is fetched."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.errors import InputError, NotFoundError, SpadeError
from spade_faiss.report import charts, html, pictures
from spade_faiss.report.csvfile import rank, write_csv
from spade_faiss.report.html import shown, write_html
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.model import Card, CardGroup, Chart, Headline, ImageRow, Match, NormalPicture, Report, Table
from spade_faiss.report.scorefile import ScoreFile, ScoreWriter
from spade_faiss.scoring.scores import NEAREST_DTYPE, Scores

NASTY = [
    "a,b.png",
    'say "cheese".png',
    "two\nlines\r\n.png",
    "=1+1",
    "@x",
    "日本/ä ö.png",
    "<script>alert(1)</script>",
    "caf\udce9.png",
]


def make_scores(n: int = 8, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    nearest = {}
    for level, (h, w) in {"layer2": (6, 7), "layer10": (3, 3)}.items():  # not in alphabetical order
        nearest[level] = np.zeros((n, h, w), NEAREST_DTYPE)
        for name, bound in (("neighbor", 3), ("y", h), ("x", w)):
            nearest[level][name] = rng.integers(0, bound, (n, h, w))
    return Scores(
        ids=[NASTY[i % len(NASTY)] + str(i // len(NASTY)) for i in range(n)],
        image_score=rng.random(n, dtype=np.float32),
        maps=rng.random((n, 20, 24), dtype=np.float32),
        neighbor_ids=np.array([[NASTY[(i + j) % len(NASTY)] for j in range(3)] for i in range(n)], dtype=np.str_),
        neighbor_dist=rng.random((n, 3), dtype=np.float32),
        level_dist={},
        nearest=nearest,
        distance="l2",
    )


def part(scores: Scores, rows: slice) -> Scores:
    names = ("ids", "image_score", "maps", "neighbor_ids", "neighbor_dist")
    changed = {name: getattr(scores, name)[rows] for name in names}
    return replace(scores, **changed, nearest={level: nearest[rows] for level, nearest in scores.nearest.items()})


def write(path: Path, scores: Scores, batch: int | None = None, settings: str = "{}") -> Path:
    step = batch or len(scores)
    with ScoreWriter(path, settings) as writer:
        for start in range(0, len(scores), step):
            writer.append(part(scores, slice(start, start + step)))
    return path


def content(path: Path) -> tuple[object, ...]:
    with ScoreFile.open(path) as file:
        arrays: list[Any] = [
            file.image_score,
            file.map_score,
            file.peak,
            file.neighbor_dist,
            *file.match.values(),
            *file.maps(),
        ]
        texts = (file.ids, file.neighbor_ids.tolist(), list(file.match), file.grid, file.size, file.distance, file.settings)
        return (*texts, *[(array.dtype, array.shape, array.tobytes()) for array in arrays])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestScoreFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        scores = make_scores()
        with ScoreFile.open(write(tmp_path / "s.h5", scores, settings='{"k": "ä"}')) as file:
            assert list(file.ids) == scores.ids
            assert file.neighbor_ids.tolist() == scores.neighbor_ids.tolist()
            assert len(file) == len(scores)
            assert (file.size, file.distance, file.settings) == ((20, 24), "l2", '{"k": "ä"}')
            assert file.grid == {"layer2": (6, 7), "layer10": (3, 3)}
            assert list(file.match) == ["layer2", "layer10"]
            for name in ("image_score", "map_score", "neighbor_dist", "peak"):
                np.testing.assert_array_equal(getattr(file, name), getattr(scores, name))
                assert getattr(file, name).dtype == getattr(scores, name).dtype
            np.testing.assert_array_equal(np.stack(list(file.maps())), scores.maps)
            np.testing.assert_array_equal(file.map(3), scores.maps[3])
        with pytest.raises(InputError, match="closed"):
            file.map(0)

    def test_match_is_that_of_the_cell_under_the_strongest_pixel(self, tmp_path: Path) -> None:
        scores = make_scores(40)
        with ScoreFile.open(write(tmp_path / "s.h5", scores)) as file:
            for level, nearest in scores.nearest.items():
                for i, (y, x) in enumerate(scores.peak):
                    cell = nearest[i, int(y * nearest.shape[1] / 20), int(x * nearest.shape[2] / 24)]
                    assert file.match[level][i].tolist() == [cell["neighbor"], cell["y"], cell["x"], cell["row"]]
                assert file.match[level].dtype == np.int32

    def test_uneven_batches_equal_one_batch(self, tmp_path: Path) -> None:
        scores = make_scores(23)
        assert content(write(tmp_path / "a.h5", scores, batch=5)) == content(write(tmp_path / "b.h5", scores))

    def test_batches_may_be_empty_and_an_empty_file_can_be_read(self, tmp_path: Path) -> None:
        with ScoreWriter(tmp_path / "s.h5") as writer:
            writer.append(part(make_scores(), slice(0, 0)))
        with ScoreFile.open(tmp_path / "s.h5") as file:
            assert (len(file), file.neighbor_ids.shape, list(file.maps())) == (0, (0, 3), [])

    def test_maps_are_stored_one_a_chunk_and_as_float32(self, tmp_path: Path) -> None:
        with h5py.File(write(tmp_path / "s.h5", make_scores())) as file:
            assert (file["maps"].chunks, file["maps"].dtype) == ((1, 20, 24), np.float32)
            assert file.attrs["schema"] == 2

    def test_an_interrupted_writer_leaves_what_was_there(self, tmp_path: Path) -> None:
        before = content(write(tmp_path / "s.h5", make_scores(4)))

        def interrupted() -> None:
            with ScoreWriter(tmp_path / "s.h5") as writer:
                writer.append(make_scores(8))
                assert len(leftovers(tmp_path)) == 2
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert content(tmp_path / "s.h5") == before
        assert leftovers(tmp_path) == ["s.h5"]

    def test_a_writer_without_a_batch_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no batch"), ScoreWriter(tmp_path / "s.h5"):
            pass
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"distance": "squared_l2"}, "distance=squared_l2"),
            ({"maps": np.zeros((8, 9, 9), np.float32)}, r"size=\(9, 9\)"),
            ({"nearest": {}}, "levels={}"),
            ({"neighbor_ids": np.full((8, 2), "a"), "neighbor_dist": np.zeros((8, 2), np.float32)}, "neighbors=2"),
            ({"image_score": np.zeros(7, np.float32)}, "do not fit"),
            ({"ids": ["nul\0"] * 8}, "NUL"),
        ],
    )
    def test_a_batch_that_does_not_fit_is_refused(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        scores = make_scores()
        changed = replace(scores, **change)  # type: ignore[arg-type]

        def append_both() -> None:
            with ScoreWriter(tmp_path / "s.h5") as writer:
                writer.append(scores)
                writer.append(changed)

        with pytest.raises(InputError, match=message):
            append_both()
        assert leftovers(tmp_path) == []

    def test_misuse_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="JSON"):
            ScoreWriter(tmp_path / "s.h5", "{not json")
        with pytest.raises(InputError, match="not open"):
            ScoreWriter(tmp_path / "s.h5").append(make_scores())

    def test_damage_is_an_error_that_names_the_file_and_never_another_score(self, tmp_path: Path) -> None:
        path = write(tmp_path / "s.h5", make_scores(4))
        good, data, bad = content(path), path.read_bytes(), tmp_path / "bad.h5"
        for length in range(0, len(data), 997):
            bad.write_bytes(data[:length])
            with pytest.raises(SpadeError, match=re.escape(str(bad))):
                content(bad)
        errors = 0
        rng = np.random.default_rng(0)
        for place in rng.integers(0, len(data), 300):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            bad.write_bytes(flipped)
            try:
                assert content(bad) == good
            except SpadeError:
                errors += 1
        assert errors > 200

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="none"):
            ScoreFile.open(tmp_path / "none.h5")
        (tmp_path / "text.h5").write_text("hello")
        with h5py.File(tmp_path / "other.h5", "w") as file:
            file["x"] = 1
        with h5py.File(write(tmp_path / "next.h5", make_scores()), "a") as file:
            file.attrs["schema"] = 3
        for name, message in (
            ("text.h5", "damaged"),
            ("other.h5", "schema None"),
            ("next.h5", "schema 3, this version reads 2"),
        ):
            with pytest.raises(SpadeError, match=message):
                ScoreFile.open(tmp_path / name)


class TestCsv:
    def read(self, path: Path) -> list[list[str]]:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return list(csv.reader(file))

    def test_round_trip(self, tmp_path: Path) -> None:
        scores = make_scores(11)
        kinds = [f"kind,{i}" for i in range(11)]
        write_csv(tmp_path / "s.csv", scores, kinds)
        header, *lines = self.read(tmp_path / "s.csv")
        pairs = ["neighbor_1", "dist_1", "neighbor_2", "dist_2", "neighbor_3", "dist_3"]
        assert header == ["id", "image_score", "map_score", "rank", "kind", *pairs]
        assert [line[0] for line in lines] == scores.ids
        assert [line[3] for line in lines] == [str(place) for place in rank(scores.image_score)]
        assert [line[4] for line in lines] == kinds
        np.testing.assert_array_equal(np.array([line[1] for line in lines], np.float32), scores.image_score)
        np.testing.assert_array_equal(np.array([line[2] for line in lines], np.float32), scores.map_score)
        assert [line[5::2] for line in lines] == scores.neighbor_ids.tolist()
        np.testing.assert_array_equal(np.array([line[6::2] for line in lines], np.float32), scores.neighbor_dist)
        assert leftovers(tmp_path) == ["s.csv"]

    def test_a_score_file_gives_the_same_lines_as_its_scores_and_no_labels_no_kind(self, tmp_path: Path) -> None:
        scores = make_scores()
        with ScoreFile.open(write(tmp_path / "s.h5", scores)) as file:
            write_csv(tmp_path / "a.csv", file)
        write_csv(tmp_path / "b.csv", scores)
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
        assert "kind" not in self.read(tmp_path / "a.csv")[0]

    def test_one_kind_an_image(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="1 kinds for 8 images"):
            write_csv(tmp_path / "s.csv", make_scores(), ["good"])

    def test_equal_scores_share_the_smaller_rank(self) -> None:
        assert rank([5.0, 7.0, 5.0, 9.0, 1.0]).tolist() == [3, 2, 3, 1, 5]
        assert rank([]).tolist() == []


class TestJson:
    def test_numbers_that_json_lacks_become_null(self, tmp_path: Path) -> None:
        data = {"nan": float("nan"), "list": [np.float32("inf"), 1.5], "array": np.array([[1.0, np.nan]]), "n": np.int64(3)}
        write_json(tmp_path / "r.json", {**data, "text": NASTY, "none": None, "yes": True})
        expected = {"nan": None, "list": [None, 1.5], "array": [[1.0, None]], "n": 3, "text": NASTY, "none": None, "yes": True}
        assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == expected

    def test_what_json_cannot_hold_is_named_with_its_place(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"data\.a\[1\] is of type Path|data\.a\[1\] is of type PosixPath"):
            write_json(tmp_path / "r.json", {"a": [1, tmp_path]})
        with pytest.raises(InputError, match="key 1 is of type int"):
            write_json(tmp_path / "r.json", {"a": {1: 2}})
        assert leftovers(tmp_path) == []


class TestPictures:
    low, high = 2.0, 4.0

    def picture(self, size: tuple[int, int] = (12, 16)) -> pictures.Picture:
        return np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)

    def test_the_picture_stays_where_the_score_is_low_and_turns_to_the_map_where_it_is_high(self) -> None:
        picture = self.picture()
        scores = np.full((12, 16), 1.0, np.float32)
        scores[0], scores[1], scores[2] = self.low, 3.0, 99.0
        before = picture.copy(), scores.copy()
        shaded = pictures.overlay(picture, scores, self.low, self.high)
        np.testing.assert_array_equal(shaded[3:], picture[3:])
        np.testing.assert_array_equal(shaded[0], picture[0])
        heat = pictures.heat_map(scores, self.low, self.high).astype(float)
        distance = np.abs(shaded - heat).mean(axis=(1, 2))
        assert distance[2] < distance[1] < distance[0]
        assert distance[2] < 0.2 * np.abs(picture - heat).mean(axis=(1, 2))[2]
        np.testing.assert_array_equal(picture, before[0])
        np.testing.assert_array_equal(scores, before[1])

    def test_colors_get_lighter_with_the_score_and_stop_at_the_ends_of_the_range(self) -> None:
        scores = np.linspace(self.low, self.high, 50, dtype=np.float32)[None]
        heat = pictures.heat_map(scores, self.low, self.high)
        assert heat.shape == (1, 50, 3)
        assert (np.diff(heat[0] @ np.array([0.2126, 0.7152, 0.0722])) > 0).all()
        ends = pictures.heat_map(np.array([[-9, 2, 4, 99]], np.float32), self.low, self.high)[0]
        assert ends[0].tolist() == ends[1].tolist() == list(pictures.color_scale(9)[0])
        assert ends[2].tolist() == ends[3].tolist() == list(pictures.color_scale(9)[-1])

    def test_the_outline_goes_around_the_mask_and_leaves_its_inside(self) -> None:
        picture, mask = self.picture(), np.zeros((12, 16), bool)
        mask[4:7, 0:5] = True
        before = picture.copy()
        drawn = pictures.outline(picture, mask)
        np.testing.assert_array_equal(drawn[mask], picture[mask])
        assert (drawn[3, 0:6] == pictures.OUTLINE).all()
        assert (drawn[3:8, 5] == pictures.OUTLINE).all()
        np.testing.assert_array_equal(drawn[9:], picture[9:])
        np.testing.assert_array_equal(picture, before)
        np.testing.assert_array_equal(pictures.outline(picture, np.zeros((12, 16), bool)), picture)

    def test_cells_cover_the_picture(self) -> None:
        assert pictures.cell_box((1, 2), (4, 4), (224, 224)) == (56, 112, 112, 168)
        assert pictures.cell_box((1, 0), (3, 3), (10, 10)) == (3, 0, 7, 4)
        with pytest.raises(InputError, match="outside"):
            pictures.cell_box((3, 0), (3, 3), (10, 10))

    def test_color_range_by_hand(self) -> None:
        def maps(*maxima: float) -> Iterator[np.ndarray]:
            for top in maxima:
                yield np.append(np.zeros(99, np.float32), np.float32(top)).reshape(10, 10)

        # Normal maxima 1, 2, 3 and defective ones 10, 20, 60: color from 2, full at 20.
        labels = [False, False, False, True, True, True]
        assert pictures.color_range(maps(1, 2, 3, 10, 20, 60), labels) == (2.0, 20.0)
        low, high = pictures.color_range(maps(1, 2, 3, 4))
        assert low == 0.0
        assert 3.9 < high <= 4.0
        low, high = pictures.color_range(maps(0, 0))  # nothing scores, yet the range rises
        assert low == 0.0 < high
        with pytest.raises(InputError, match="at least one map"):
            pictures.color_range(maps())
        with pytest.raises(InputError, match="1 labels for 2 maps"):
            pictures.color_range(maps(1, 2), [True])

    def test_pictures_that_do_not_fit_are_refused(self) -> None:
        scores = np.zeros((12, 16), np.float32)
        for bad in (self.picture((16, 12)), self.picture().astype(np.float32), self.picture()[..., 0]):
            with pytest.raises(InputError, match="picture"):
                pictures.overlay(bad, scores, 0, 1)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="must rise"):
            pictures.heat_map(scores, 1, 1)

    def test_png_round_trip(self, tmp_path: Path) -> None:
        pictures.write_png(tmp_path / "p.png", self.picture())
        with Image.open(tmp_path / "p.png") as image:
            np.testing.assert_array_equal(np.asarray(image), self.picture())
        assert leftovers(tmp_path) == ["p.png"]


class TestCharts:
    scores = np.random.default_rng(0).normal(size=60)
    labels = np.arange(60) % 3 == 0

    def curve(self, label: str, n: int = 50) -> charts.Curve:
        x = np.linspace(0, 1, n)
        return charts.Curve(label, x, np.sqrt(x), 0.6667)

    def every_chart(self) -> list[str]:
        roc = charts.roc_chart([self.curve("image"), self.curve("pixel")])
        labeled = charts.histogram("image score", self.scores, self.labels)
        marked = charts.histogram("marked", self.scores, thresholds={"alarm": 4.0, "nowhere": np.inf})
        rates = charts.rate_chart({"normal": abs(self.scores) / 9, "defective": abs(self.scores) / 90}, 0.2)
        pro = charts.pro_chart([self.curve("pixel")], 0.3)
        return [labeled, marked, rates, charts.histogram("map", self.scores), roc, pro]

    def test_charts_are_one_deterministic_svg_that_needs_nothing_else(self) -> None:
        first = self.every_chart()
        assert first == self.every_chart()
        ids = re.findall(r' id="([^"]*)"', "".join(first))
        assert len(ids) == len(set(ids))
        for svg in first:
            assert svg.startswith("<svg")
            assert svg.endswith("</svg>")
            assert not re.search(r"<(metadata|style|image|script)|@import", svg)
            assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", svg))

    def test_a_histogram_marks_thresholds_that_are_somewhere(self) -> None:
        marked = charts.histogram("marked", self.scores, thresholds={"alarm": 4.0, "nowhere": np.inf})
        assert ">alarm<" in marked
        assert "nowhere" not in marked
        assert ">4<" in marked, "the axis reaches a threshold above all scores"

    def test_rates_of_three_groups_at_most(self) -> None:
        p = {name: np.array([0.01, 0.5]) for name in "abcd"}
        with pytest.raises(InputError, match="tells 3 groups apart, got 4"):
            charts.rate_chart(p, 0.2)
        assert all(f">{text}<" in charts.rate_chart({"a": p["a"]}, 0.2) for text in ("a", "alpha asked", "asked = achieved"))

    def test_a_histogram_tells_normal_from_defective_only_with_labels(self) -> None:
        labeled, plain, *_ = self.every_chart()
        assert "normal (40)" in labeled
        assert "defective (20)" in labeled
        assert charts.DEFECTIVE in labeled
        assert charts.DEFECTIVE not in plain
        assert "normal" not in plain.replace("--normal", "")

    def test_legends_say_the_areas(self) -> None:
        *_, roc, pro = self.every_chart()
        assert "AUROC" in roc
        assert roc.count("0.667") == 2
        assert "AUPRO to 0.3" in pro

    def test_names_are_text_neither_markup_nor_formulas(self) -> None:
        svg = charts.histogram("<b> & $x_1$", self.scores)
        assert "&lt;b&gt; &amp; $x_1$" in svg

    def test_a_curve_of_a_million_points_is_drawn_by_its_corners(self) -> None:
        x = np.concatenate([np.zeros(500_000), np.linspace(0, 1, 500_000)])
        y = np.concatenate([np.linspace(0, 0.5, 500_000), np.full(500_000, 0.5)])
        assert len(charts.roc_chart([charts.Curve("pixel", x, y, 0.5)])) < 40_000

    def test_input_that_cannot_be_drawn_is_refused(self) -> None:
        with pytest.raises(InputError, match="finite"):
            charts.histogram("x", np.array([1.0, np.nan]))
        with pytest.raises(InputError, match="as many x as y"):
            charts.roc_chart([charts.Curve("x", np.zeros(2), np.zeros(3), 0.0)])
        with pytest.raises(InputError, match="3 curves"):
            charts.roc_chart([self.curve(str(i)) for i in range(4)])


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text without scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.raw: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        (self.raw if self.elements and self.elements[-1][0] in ("script", "style") else self.texts).append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def make_report(n: int = 10, cards: int = 4, normals: int = 2, labels: bool = True, size: int = 32) -> Report:
    rng = np.random.default_rng(3)
    smooth = np.kron(rng.integers(40, 200, (4, 4, 3)), np.ones((size // 4, size // 4, 1))).astype(np.uint8)
    images = tuple(
        ImageRow(
            id=NASTY[i % len(NASTY)] + str(i),
            image_score=float(rng.random() * 10),
            map_score=float(rng.random() * 50),
            neighbor_id=f"<u>normal {i}",
            neighbor_dist=float(rng.random() * 10),
            kind=("good", "<b>scratch</b>")[i % 2] if labels else None,
            defective=bool(i % 2) if labels else None,
        )
        for i in range(n)
    )
    mask = np.zeros((size, size), bool)
    mask[4:9, 4:9] = True
    shown_cards = tuple(
        Card(
            image=images[i],
            map=rng.random((size, size), dtype=np.float32),
            peak=(i, size - 1),
            picture=None if i == 1 else smooth + np.uint8(i),
            missing="<i>moved</i> away" if i == 1 else "",
            mask=mask if labels and i % 2 else None,
            normals=tuple(
                NormalPicture(
                    id=f"near {i} {j} {NASTY[j % len(NASTY)]}",
                    place=j + 1,
                    distance=1.5 + i + j / 10,
                    picture=None if (i, j) == (2, 1) else smooth + np.uint8(50 + 5 * i + j),
                    matches=(Match(level="layer1", corners=(0, 0, 4, 4)), Match(level="layer2", corners=(8, 8, 16, 16))),
                    missing="disk is gone" if (i, j) == (2, 1) else "",
                )
                for j in range(normals)
            ),
        )
        for i in range(cards)
    )
    metrics = Table(title="Metrics", header=("score", "AUROC"), rows=(("image", 0.98765), ("pixel", None)))
    settings = Table(title="Settings", header=("name", "value"), rows=(("k_image", 5), ("fusion", "mean"), ("sigma", 4.0)))
    return Report(
        title="Bottles <1> & more",
        subtitle="a 'test'",
        notices=("3 files skipped",),
        headlines=(Headline(label="Images", value=12345), Headline(label="Highest", value=float("nan"), note="none")),
        summary=(metrics,) if labels else (),
        charts=(Chart(title="Image score", svg=charts.histogram("image score", np.arange(9.0))),),
        groups=(CardGroup(title="Most anomalous", cards=shown_cards), CardGroup(title="Again", cards=shown_cards[:1])),
        colors=(0.2, 0.9),
        levels=("layer1", "layer2"),
        images=images,
        details=(settings,),
    )


class TestHtml:
    def page(self, tmp_path: Path, report: Report) -> Page:
        write_html(tmp_path / "report.html", report)
        return Page(tmp_path / "report.html")

    def test_nothing_is_fetched(self, tmp_path: Path) -> None:
        page = self.page(tmp_path, make_report())
        assert {tag for tag, _ in page.elements}.isdisjoint(
            {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
        )
        sources = page.values("src")
        assert len(sources) == 4 - 1 + 4 + 4 * 2 - 1 + 2 + 2  # photos, heat maps, normals; and the card shown twice
        assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
        for name in ("href", "xlink:href"):
            assert all(target.startswith("#") for target in page.values(name))
        code = "\n".join([*page.raw, *page.values("style")])
        assert not re.search(r"@import|https?:|//[a-z]|fetch\(|XMLHttp|import\(", code)
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", code))
        assert not {name for _, attributes in page.elements for name in attributes} & {
            "srcset",
            "poster",
            "background",
            "action",
        }
        assert "default-src 'none'" in " ".join(page.values("content"))

    def test_names_are_text_never_markup(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        assert sum(tag == "script" for tag, _ in page.elements) == 1
        assert all(attributes.get("class") in ("ramp", "ring", "swatch") for tag, attributes in page.elements if tag == "i")
        for image in report.images:
            assert shown(image.id) in page.texts
        assert "<u>normal 3" in page.texts
        assert "<b>scratch</b>" in page.texts
        assert "<i>moved</i> away" in page.texts
        assert "Bottles <1> & more" in page.texts
        assert shown("a\nb\u202e\udce9") == r"a\nb\u202e\udce9"
        assert shown("日本 ä") == "日本 ä"

    def test_every_number_is_there(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        ranks = rank([image.image_score for image in report.images])
        rows = [text for text in page.texts if text]
        start = rows.index("its distance")
        for place, image in sorted(zip(ranks, report.images, strict=True), key=lambda pair: int(pair[0])):
            expected = [str(place), shown(image.id), str(image.kind), f"{image.image_score:.3f}", f"{image.map_score:.2f}"]
            expected += [image.neighbor_id, f"{image.neighbor_dist:.3f}"]
            assert rows[start + 1 : start + 8] == expected
            start += 7
        values = page.values("data-v")
        for image in report.images:  # sorting compares all digits, not the ones that are shown
            assert {repr(image.image_score), repr(image.map_score), repr(image.neighbor_dist)} <= set(values)
        for text in ("12,345", "–", "0.988", "5", "mean", "4", "3 files skipped"):
            assert text in page.texts
        for card in report.groups[0].cards:
            for normal in card.normals:
                assert f"{normal.distance:.3f}" in page.texts

    def test_rows_link_to_the_first_card_of_their_image(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        targets = [target[1:] for target in page.values("href")]
        assert set(targets) <= set(ids)
        assert sorted(target for target in targets if target.startswith("card")) == ["card-1", "card-2", "card-3", "card-4"]
        assert [name for name in ids if name.startswith("card")] == ["card-1", "card-2", "card-3", "card-4", "card-5"]

    def test_pictures_marks_and_placeholders(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        images = [attributes for tag, attributes in page.elements if tag == "img"]
        assert all(image["loading"] == "lazy" and image["alt"] for image in images)
        with Image.open(io.BytesIO(b64decode(images[0]["src"].split(",")[1]))) as photo:
            difference = np.asarray(photo).astype(float) - report.groups[0].cards[0].picture
            assert photo.size == (32, 32)
            assert np.abs(difference).mean() < 8
        assert page.texts.count("disk is gone") == 1
        assert page.texts.count("No picture") == 2
        assert "clippath" in {tag for tag, _ in page.elements}  # of the chart
        circles = [attributes for tag, attributes in page.elements if tag == "circle"]
        assert circles[0]["cy"] == "0.5"
        assert circles[0]["cx"] == "31.5"
        frames = [attributes for tag, attributes in page.elements if tag == "rect" and attributes.get("class") == "line"]
        colors = {color for frame in frames for color in re.findall(r"#\w{6}", frame["style"])}
        assert colors == {"#{:02x}{:02x}{:02x}".format(*c) for c in pictures.level_colors(["layer1", "layer2"]).values()}
        assert (frames[1]["x"], frames[1]["y"], frames[1]["width"], frames[1]["height"]) == ("7", "7", "10", "10")

    def test_without_labels_there_are_no_metrics(self, tmp_path: Path) -> None:
        page = self.page(tmp_path, make_report(labels=False))
        for word in ("AUROC", "ROC", "kind", "ground truth", "Metrics"):
            assert word not in page.text
        assert not {"normal", "defective"} & {word for value in page.values("class") for word in value.split()}

    def test_a_report_of_nothing_is_a_page(self, tmp_path: Path) -> None:
        page = self.page(tmp_path, Report(title="nothing"))
        assert "nothing" in page.texts
        assert "table" not in {tag for tag, _ in page.elements}

    def test_the_same_report_gives_the_same_bytes(self, tmp_path: Path) -> None:
        write_html(tmp_path / "a.html", make_report())
        write_html(tmp_path / "b.html", make_report())
        assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()

    def test_forty_cards_stay_below_ten_megabytes(self, tmp_path: Path) -> None:
        write_html(tmp_path / "r.html", make_report(n=40, cards=40, normals=5, size=224))  # its maps are noise: the worst case
        assert (tmp_path / "r.html").stat().st_size < 10e6

    def test_a_picture_of_noise_can_be_written(self) -> None:
        # Whatever a picture holds, it is encoded: Pillow's `optimize` failed beyond about a byte a pixel.
        noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        for crisp in (False, True):
            with Image.open(io.BytesIO(b64decode(html._data_uri(noise, crisp=crisp).split(",")[1]))) as image:
                assert image.size == (224, 224)

    def test_a_table_too_long_says_what_it_leaves_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(html, "MAX_ROWS", 4)
        report = make_report()
        page = self.page(tmp_path, report)
        assert "The 4 most anomalous of 10; the rest is in scores.csv." in page.texts
        lowest = min(report.images, key=lambda image: image.image_score)
        assert lowest.neighbor_id not in page.texts

    def test_contradictions_are_refused(self, tmp_path: Path) -> None:
        report = make_report()
        card = report.groups[0].cards[0]
        wrong = replace(card, mask=np.zeros((5, 5), bool))
        for bad, message in (
            (replace(report, colors=None), "needs `colors`"),
            (replace(report, levels=("layer1",)), "level 'layer2'"),
            (replace(report, charts=(Chart(title="x", svg="<img>"),)), "no <svg>"),
            (replace(report, groups=(CardGroup(title="x", cards=(wrong,)),)), "both must have the size"),
        ):
            with pytest.raises(InputError, match=message):
                write_html(tmp_path / "r.html", bad)
        with pytest.raises(InputError, match="1 cells, the header has 2"):
            Table(title="x", header=("a", "b"), rows=((1,),))
        assert leftovers(tmp_path) == []


def test_reports_load_neither_torch_nor_faiss_and_pages_no_hdf5() -> None:
    code = """
import sys
import spade_faiss.report.charts, spade_faiss.report.html, spade_faiss.report.jsonfile
print(sorted({"h5py", "matplotlib.pyplot"} & set(sys.modules)))
import spade_faiss.report.scorefile
print(sorted({"torch", "faiss"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "[]"]
