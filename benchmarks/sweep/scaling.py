"""Shows how cost grows with the number of normals, K, image size and threads: curves on log axes, and their exponents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.sweep import charts
from benchmarks.sweep.charts import Line
from benchmarks.sweep.measures import exponent
from benchmarks.sweep.rows import Row
from benchmarks.sweep.tables import Chart, Table, family_of, of_kind


def scaling_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return charts of the cost by the number of normals, K, image size and threads."""
    found = []
    flat: dict[str, list[tuple[int, float, float]]] = {}
    for row in of_kind(rows, "image", k=5):
        flat.setdefault(family_of(row), []).append((row["n"], row["p50_ms"], row["recall_k"]))
    lines = []
    for family, points in flat.items():
        good: dict[int, float] = {}
        for n, ms, recall in points:
            if recall >= 0.99:
                good[n] = min(ms, good.get(n, ms))
        if len(good) > 1:
            lines.append(Line(family, sorted(good), [good[n] for n in sorted(good)]))
    if lines:
        title = "Image search: the fastest setting of each index with recall@5 of 0.99"
        svg = charts.scaling(title, lines, x="normal images", y="ms a query, median")
        found.append(Chart("scaling-images", title, svg))
    for name, axis, label in (
        ("normals", "normals", "normal images"),
        ("k", "k", "nearest normals whose maps are searched, K"),
        ("locations", "locations", "locations of the finest level"),
        ("threads", "threads", "threads"),
    ):
        lines = _scaling_lines(rows, axis)
        if lines:
            title = f"Pixel search by {label}"
            found.append(Chart(f"scaling-{name}", title, charts.scaling(title, lines, x=label, y="ms an image, median")))
    return found


def _scaling_lines(rows: Sequence[Row], axis: str) -> list[Line]:
    """Lines of pixel search in which only `axis` varies; they are of generated features, which come in every size."""
    groups: dict[tuple[Any, ...], dict[float, float]] = {}
    for row in of_kind(rows, "pixel"):
        if row["set"] not in ("lite0", "wrn50"):
            continue
        fixed = [row[name] for name in ("set", "label")]
        fixed += [row[name] for name in ("normals", "k", "locations", "threads") if name != axis]
        groups.setdefault(tuple(fixed), {})[row[axis]] = row["pixel_ms"]
    long = {key: points for key, points in groups.items() if len(points) > 2 or (axis == "threads" and len(points) > 1)}
    names = [name for name in ("normals", "K", "locations", "threads") if {"K": "k"}.get(name, name) != axis]
    lines = []
    for key, points in sorted(long.items(), key=lambda item: str(item[0])):
        rest = ", ".join(f"{name} {value}" for name, value in zip(names, key[2:], strict=True) if name in ("K",) or axis == "k")
        lines.append(
            Line(f"{key[0]} {key[1]}" + (f", {rest}" if rest else ""), sorted(points), [points[x] for x in sorted(points)])
        )
    return lines[: len(charts.COLORS)]


def exponent_table(rows: Sequence[Row]) -> Table | None:
    """Return the fitted exponents of all scaling lines."""
    lines = [
        (axis, line.label, f"{min(line.x):,g} to {max(line.x):,g}", len(line.x), round(exponent(line.x, line.y), 2))
        for axis in ("normals", "k", "locations", "threads")
        for line in _scaling_lines(rows, axis)
    ]
    header = ("cost grows with", "what", "measured from", "points", "as a power of")
    return Table("Fitted exponents of the pixel search", header, tuple(lines)) if lines else None
