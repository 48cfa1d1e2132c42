"""Charts: deterministic SVG that needs nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.report import charts


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

    def test_rates_of_five_groups_at_most(self) -> None:
        p = {name: np.array([0.01, 0.5]) for name in "abcdef"}
        with pytest.raises(InputError, match="tells 5 groups apart, got 6"):
            charts.rate_chart(p, 0.2)
        assert all(f">{text}<" in charts.rate_chart({"a": p["a"]}, 0.2) for text in ("a", "alpha", "observed = promised"))

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
        with pytest.raises(InputError, match="5 curves"):
            charts.roc_chart([self.curve(str(i)) for i in range(6)])
        five = charts.roc_chart([self.curve(str(i)) for i in range(5)])
        assert len(set(re.findall(r"stroke: var\((--\w+)", five))) >= 5
