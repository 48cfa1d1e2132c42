"""Draws lines and areas over two axes as an <svg> element: what the charts of a report need, in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]

# Colors follow the page, which may set these CSS variables for a dark ground.
INK, MUTED, LINE = "var(--ink, #1d2127)", "var(--muted, #5b6470)", "var(--line, #d9dde3)"
# In units of the picture, which the page scales; small, so that text stays readable on a phone.
_WIDTH, _HEIGHT, _FONT = 360.0, 200.0, 9.0
_RIGHT, _TOP, _BOTTOM, _GAP = 10.0, 8.0, 36.0, 4.0
# The width of a character on average, in sizes of the font, and the height of a line of text.
_CHARACTER, _TEXT_LINE = 0.56, 13.0
_SWATCH = 20.0
# The most intervals of an axis, and the steps between ticks, of which the smallest is taken that makes no more.
_INTERVALS, _STEPS = 6, (1.0, 2.0, 2.5, 5.0, 10.0)
# How far a line may be from the points that it leaves out.
_TOLERANCE = 0.1


class Entry(NamedTuple):
    """A line of the legend: its text, its color, and how it is dashed."""

    text: str
    color: str
    dashes: str


@dataclass
class Plot:
    """A picture of lines over two axes.

    Args:
        x, y: the range of each axis.
        x_label, y_label: what they show.
        whole_y: whether y counts something, so that its ticks are whole numbers.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    whole_y: bool = False
    _shapes: list[str] = field(default_factory=list)
    _drawn: list[Points] = field(default_factory=list)
    _legend: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._x_ticks, self._y_ticks = ticks(*self.x), ticks(*self.y, whole=self.whole_y)
        widest = max((len(_number(tick)) for tick in self._y_ticks), default=1)
        self._left = _TEXT_LINE + widest * _CHARACTER * _FONT + 2 * _GAP

    def line(self, points: Points, color: str, *, dashes: str = "", width: float = 1.8, label: str = "") -> None:
        """Draw a line through points (n, 2), with a line in the legend if there is a label."""
        placed = self._placed(points)
        self._drawn.append(placed)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._shapes.append(f'<path d="{_path(placed)}" style="stroke: {color}" stroke-width="{width:g}"{dashed}/>')
        if label:
            self._legend.append(Entry(label, color, dashes))

    def area(self, points: Points, color: str) -> None:
        """Fill what points (n, 2) surround."""
        self._shapes.append(f'<path d="{_path(self._placed(points))}Z" style="fill: {color}" fill-opacity=".3" stroke="none"/>')

    def svg(self, legend_title: str = "") -> str:
        """The picture: deterministic, without size, which the page sets."""
        bottom = _HEIGHT - _BOTTOM
        grid, marks = [], []
        for tick in self._x_ticks:
            at = _text(self._at_x(tick))
            grid.append(f"M{at} {_TOP:g}V{bottom:g}")
            marks.append(f'<text x="{at}" y="{bottom + _FONT + _GAP:g}" text-anchor="middle">{_number(tick)}</text>')
        for tick in self._y_ticks:
            line = self._at_y(tick)
            grid.append(f"M{_text(self._left)} {_text(line)}H{_WIDTH - _RIGHT:g}")
            place = f'x="{_text(self._left - _GAP)}" y="{_text(line + _FONT / 3)}"'
            marks.append(f'<text {place} text-anchor="end">{_number(tick)}</text>')
        middle_x, middle_y = _text((self._left + _WIDTH - _RIGHT) / 2), _text((_TOP + bottom) / 2)
        marks.append(f'<text x="{middle_x}" y="{_HEIGHT - _GAP:g}" text-anchor="middle">{escape(self.x_label)}</text>')
        turned = f'x="{_FONT:g}" y="{middle_y}" text-anchor="middle" transform="rotate(-90 {_FONT:g} {middle_y})"'
        marks.append(f"<text {turned}>{escape(self.y_label)}</text>")
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" font-size="{_FONT:g}">',
                f'<path d="{"".join(grid)}" style="stroke: {LINE}" stroke-width=".6" fill="none"/>',
                f'<g style="fill: {MUTED}">',
                *marks,
                '</g>\n<g fill="none" stroke-linejoin="round">',
                *self._shapes,
                "</g>",
                *self._legend_lines(legend_title),
                "</svg>",
            ]
        )

    def _legend_lines(self, title: str) -> list[str]:
        """The legend in the corner where the fewest points of lines are."""
        if not self._legend:
            return []
        texts = [*([title] if title else []), *(entry.text for entry in self._legend)]
        width = max(_SWATCH + _GAP + len(text) * _CHARACTER * _FONT for text in texts)
        height = _TEXT_LINE * len(texts)
        lefts = _WIDTH - _RIGHT - _GAP - width, self._left + 2 * _GAP
        tops = _TOP + _GAP, _HEIGHT - _BOTTOM - _GAP - height
        corners = [(left, top) for top in tops for left in lefts]
        drawn = np.concatenate([_dense(points) for points in self._drawn])

        def hidden(corner: tuple[float, float]) -> int:
            left, top = corner
            x, y = drawn.T
            return int(((x > left) & (x < left + width) & (y > top) & (y < top + height)).sum())

        left, top = min(corners, key=hidden)
        found, y = [], top + _FONT
        if title:
            found.append(f'<text x="{_text(left)}" y="{_text(y)}" style="fill: {MUTED}">{escape(title)}</text>')
            y += _TEXT_LINE
        for text, color, dashes in self._legend:
            dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
            swatch = f"M{_text(left)} {_text(y - _FONT / 3)}h{_SWATCH:g}"
            found.append(f'<path d="{swatch}" style="stroke: {color}" stroke-width="1.8"{dashed}/>')
            place = f'x="{_text(left + _SWATCH + _GAP)}" y="{_text(y)}"'
            found.append(f'<text {place} style="fill: {INK}">{escape(text)}</text>')
            y += _TEXT_LINE
        return found

    def _at_x(self, value: float) -> float:
        return float(self._left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _RIGHT - self._left))

    def _at_y(self, value: float) -> float:
        bottom = _HEIGHT - _BOTTOM
        return float(bottom - (value - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - _TOP))

    def _placed(self, points: Points) -> Points:
        """Points in units of the picture, within the axes."""
        (left, right), (low, high) = (
            (self._at_x(self.x[0]), self._at_x(self.x[1])),
            (self._at_y(self.y[1]), self._at_y(self.y[0])),
        )
        x = np.interp(points[:, 0], self.x, (left, right))
        y = np.interp(points[:, 1], self.y, (high, low))
        return _thinned(np.stack([x, y], axis=1))


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, ascending."""
    span = (high - low) / _INTERVALS
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * step for step in _STEPS if power * step >= span * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{round(value, 12) + 0.0:.6g}"


def _text(value: float) -> str:
    return f"{round(value, 2) + 0.0:g}"


def _path(points: Points) -> str:
    return "M" + "L".join(f"{_text(x)} {_text(y)}" for x, y in points.tolist())


def _thinned(points: Points) -> Points:
    """Those of points (n, 2) that a line through all of them needs (Douglas & Peucker, 1973)."""
    # Near each other, they look like one; of many, that leaves few.
    near = np.append(True, np.abs(np.diff(np.rint(points / _TOLERANCE), axis=0)).any(axis=1))
    near[-1] = True
    points = points[near]
    kept = np.zeros(len(points), np.bool_)
    kept[[0, -1]] = True
    parts = [(0, len(points) - 1)]
    while parts:
        first, last = parts.pop()
        (x, y), (dx, dy) = points[first], points[last] - points[first]
        inner = points[first + 1 : last] - (x, y)
        length = math.hypot(dx, dy)
        away = np.abs(inner @ (-dy, dx)) / length if length else np.hypot(*inner.T)
        if len(away) and away.max() > _TOLERANCE:
            furthest = first + 1 + int(away.argmax())
            kept[furthest] = True
            parts += [(first, furthest), (furthest, last)]
    return points[kept]


def _dense(points: Points) -> Points:
    """Points on the lines between points, a few units apart."""
    found = [points[:1]]
    for start, end in pairwise(points):
        steps = max(1, int(np.abs(end - start).max() / 4))
        found.append(start + (end - start) * (np.arange(1, steps + 1) / steps)[:, np.newaxis])
    return np.concatenate(found)


def steps_of(x: Sequence[float] | Points, y: Sequence[float] | Points) -> Points:
    """The corners (m, 2) of steps that rise at `x` (n,) to `y` (n,) and stay there until the next one."""
    return np.stack([np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]], axis=1).astype(np.float64)
