"""scores.csv and report.json: every number comes out as it went in."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.core.text import is_hidden
from spade_faiss.decisions.regions import Extent, Region
from spade_faiss.decisions.run_lengths import encode, to_text
from spade_faiss.report.cells import csv_line, defused, read_text, text_cell
from spade_faiss.report.csvfile import rank, write_csv, write_regions_csv
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.scorefile import ScoreFile
from tests.support.scores import NASTY, leftovers, make_scores, write_scores


class TestCsv:
    def read(self, path: Path) -> list[list[str]]:
        with path.open(encoding="utf-8", newline="") as file:
            return [[read_text(cell) for cell in line] for line in csv.reader(file)]

    def test_round_trip(self, tmp_path: Path) -> None:
        scores = make_scores(11)
        kinds = [f"kind,{i}" for i in range(11)]
        write_csv(tmp_path / "s.csv", scores, kinds)
        header, *lines = self.read(tmp_path / "s.csv")
        pairs = ["neighbor_1", "dist_1", "neighbor_2", "dist_2", "neighbor_3", "dist_3"]
        assert header == ["id", "image_score", "map_score", "top_score", "rank", "kind", *pairs]
        assert [line[0] for line in lines] == scores.ids
        assert [line[4] for line in lines] == [str(place) for place in rank(scores.image_score)]
        assert [line[5] for line in lines] == kinds
        np.testing.assert_array_equal(np.array([line[1] for line in lines], np.float32), scores.image_score)
        np.testing.assert_array_equal(np.array([line[2] for line in lines], np.float32), scores.map_score)
        np.testing.assert_array_equal(np.array([line[3] for line in lines], np.float32), scores.top_score)
        assert [line[6::2] for line in lines] == scores.neighbor_ids.tolist()
        np.testing.assert_array_equal(np.array([line[7::2] for line in lines], np.float32), scores.neighbor_dist)
        assert leftovers(tmp_path) == ["s.csv"]

    def test_a_score_file_gives_the_same_lines_as_its_scores_and_no_labels_no_kind(self, tmp_path: Path) -> None:
        scores = make_scores()
        with ScoreFile.open(write_scores(tmp_path / "s.h5", scores)) as file:
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


class TestCells:
    """Fault: names from files reached spreadsheets as formulas, and terminals as orders."""

    HOSTILE = (
        "=1+1",
        "+1",
        "-1.png",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "  =1",
        "\xa0=1",
        "＝1+1",
        "'=1",
        "''",
        "a;=1+1",
        "a\\; =1|@x",
        "a\t=1",
        'a",=1',
        "a|b",
        "\x1b]0;owned\x07",
        "\x9b31m",
        "\x7f",
        "pay\u202egnp.exe",
        "\u2028two",
        "\u200bzero",
        "\U000e0041",
        "back\\slash",
        "\\n is no line",
        "\\\\u202e",
        "caf\udce9",
        "日本/ä ö",
        "",
    )

    @pytest.mark.parametrize("text", HOSTILE)
    def test_no_cell_begins_a_formula_or_a_line_and_each_reads_back(self, text: str) -> None:
        line = csv_line([text_cell(text), 0.5, text_cell(text)])
        ((first, number, last),) = csv.reader([line])
        assert read_text(first) == read_text(last) == text
        assert number == "0.5"
        assert not first.lstrip().startswith(("=", "+", "-", "@", "＝"))
        assert not any(is_hidden(character) for character in first)
        assert line.count("\n") == 1
        line.encode("utf-8")
        # A spreadsheet that separates cells by semicolons or tabs finds no formula either.
        for separator in ";\t|":
            for cells in csv.reader([line], delimiter=separator):
                assert not any(cell.lstrip().startswith(("=", "+", "@")) for cell in cells)

    def test_ordinary_lines_are_what_they_were(self) -> None:
        names = ["spot/000.png", "a,b.png", 'say "cheese".png', "it's 1.png", "日本/ä ö.png"]
        file = io.StringIO()
        csv.writer(file).writerow([*names, np.float32(0.1), 3, -1.5, float("nan")])
        assert csv_line([*map(text_cell, names), np.float32(0.1), 3, -1.5, float("nan")]) == file.getvalue()

    def test_a_mask_that_begins_with_an_equals_sign_is_no_formula(self, tmp_path: Path) -> None:
        mask = np.zeros((20, 24), bool)
        mask[13, 0] = True  # 13 pixels before it: `=` is COCO's letter for 13
        extent = Extent(size=(20, 24), box=(0, 13, 1, 1), area=1, peak=(13, 0), counts=tuple(encode(mask)))
        assert to_text(extent.counts).startswith("=")
        assert defused(to_text(extent.counts)) == "'" + to_text(extent.counts)
        region = Region(score=1.5, p_value=0.25, input=extent, original=extent)
        write_regions_csv(tmp_path / "r.csv", ["=x"], [[region]])
        with (tmp_path / "r.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert (row["id"], row["score"], row["input_mask"]) == ("'=x", "1.5", "'" + to_text(extent.counts))


@pytest.mark.parametrize("name", TestCells.HOSTILE)
def test_json_is_exact_and_shows_a_terminal_no_order(tmp_path: Path, name: str) -> None:
    """Fault: control characters of names reached the terminal through report.json."""
    write_json(tmp_path / "r.json", {"name": name, name: [name]})
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": name, name: [name]}
    assert not any(is_hidden(character) for line in text.splitlines() for character in line)
    assert len(text.splitlines()) == text.count("\n")
