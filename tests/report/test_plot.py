"""Drawing: ticks are round, lines keep their corners, and a legend hides nothing if it can."""

from __future__ import annotations

import re

import numpy as np
import pytest

from spade_faiss.report.plot import INK, Plot, steps_of, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.01, 0.305, [0, 0.1, 0.2, 0.3]), (1.2, 9.8, [2, 4, 6, 8]), (-3e5, 3e5, None)],
)
def test_ticks_are_round_and_few(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low <= found[0] < found[-1] <= high
    if expected is not None:
        assert found == pytest.approx(expected)


def test_ticks_of_counts_are_whole() -> None:
    assert ticks(0, 2.1, whole=True) == [0, 1, 2]
    assert ticks(0, 11.5, whole=True) == [0, 2, 4, 6, 8, 10]


def path_of(svg: str, color: str) -> list[tuple[float, float]]:
    drawn = re.search(rf'<path d="M([^"]*)" style="stroke: {re.escape(color)}"', svg)
    assert drawn is not None
    return [(float(x), float(y)) for x, y in (point.split() for point in drawn[1].split("L"))]


def test_a_line_keeps_its_corners_and_nothing_between() -> None:
    x = np.linspace(0, 1, 100_001)
    plot = Plot((0, 1), (0, 1), "x", "y")
    plot.line(np.stack([x, np.minimum(1, 2 * x)], axis=1), INK)
    (left, bottom), (middle, top), (right, last) = path_of(plot.svg(), INK)
    assert middle == pytest.approx((left + right) / 2, abs=0.3)
    assert top == pytest.approx(last, abs=0.1)
    assert top < bottom - 100


def test_steps_stay_until_the_next() -> None:
    assert steps_of([0, 1, 3], [5, 6, 7]).tolist() == [[0, 5], [1, 5], [1, 6], [3, 6], [3, 7]][:5]


def test_a_legend_is_where_no_line_is() -> None:
    for height, is_below in ((0.9, True), (0.1, False)):
        plot = Plot((0, 1), (0, 1), "x", "y")
        plot.line(np.array([[0, height], [1, height]]), INK, label="a <name>")
        svg = plot.svg()
        found = re.search(r'y="([\d.]+)" [^>]*>a &lt;name&gt;<', svg)
        assert found is not None
        assert (float(found[1]) > 100) == is_below
