"""What windows among few and many images cost, from windows.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.text import Figures, markdown_table, measured_on, mebibytes, milliseconds_of

_SHAPES = {"lite0": "efficientnet_lite0, 224", "vits14": "ViT-S/14, 448"}


def speed(figures: Figures) -> str:
    """Milliseconds an image of windows, beside exact search and beside windows without the kernel."""
    found = figures["windows"]["speed"]
    lines = [
        (
            _SHAPES[row["set"]],
            row["k"],
            row["radius"],
            milliseconds_of(row["ms"]["window"]),
            *(_beside(row, name) for name in ("exact", "plain")),
        )
        for row in found["rows"]
    ]
    table = markdown_table(("shapes", "K", "radius", "window", "`exact`", "window without the kernel"), lines)
    (normals,) = {row["normals"] for row in found["rows"]}
    return (
        f"{table}\n\n{normals} normals. In brackets: how many times as long as the window by the kernel. {measured_on(found)}"
    )


def growth(figures: Figures) -> str:
    """Milliseconds an image as banks grow: windows, with room for the codes of all images and of few, beside five neighbors."""
    found = figures["windows"].get("growth")
    if found is None:
        return "Not measured yet: `python -m benchmarks.windows --only growth`."
    header = ("normals", "bank", *(name if name == "exact" else f"windows, {name}" for name in found["rows"][0]["ms"]))
    lines = [
        (f"{row['normals']:,}", mebibytes(row["bank_bytes"]), *(milliseconds_of(ms) for ms in row["ms"].values()))
        for row in found["rows"]
    ]
    return f"{markdown_table(header, lines)}\n\n{measured_on(found)}"


def dino(figures: Figures) -> str:
    """ViT-S/14 at 448: forward passes, the bank, and searches of all normals beside AnomalyDINO's."""
    found = figures["windows"]["dino"]
    (row,) = found["rows"]
    theirs = row["ms"]["AnomalyDINO"]
    names = {"exact": "`exact`", "clusters": "`clusters`", "window": "`location`, radius 1"}
    lines = [("AnomalyDINO: `IndexFlatL2` over all patches", milliseconds_of(theirs), "", "")]
    for name, title in names.items():
        off = f"{row['off'][name]:.0e}" if name != "window" else "another definition"
        lines.append((title, milliseconds_of(row["ms"][name]), f"{row['times'][name]:.1f}", off))
    table = markdown_table(("search", "ms a picture", "times as fast", "score off by at most"), lines)
    passes = ", ".join(f"{engine} {ms['median']:.0f} ms" for engine, ms in row["forward_ms"].items())
    return (
        f"{table}\n\n"
        f"{row['normals']} normals, {row['tests']} test pictures. The bank takes {mebibytes(row['bank_bytes'])} and was "
        f"made in {row['extract_s']:.0f} s. The forward pass of one picture: {passes}. {measured_on(found)}"
    )


def _beside(row: Mapping[str, Any], name: str) -> str:
    return f"{row['ms'][name]['median']:.0f} ms ({row['times'][name]:.1f})" if name in row["ms"] else "–"
