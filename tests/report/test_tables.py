"""scores.csv and report.json: every number comes out as it went in."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.report.csvfile import rank, write_csv
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.scorefile import ScoreFile
from tests.support.scores import NASTY, leftovers, make_scores, write_scores


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
