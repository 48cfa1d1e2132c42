"""What tiles of large pictures find and cost, from tiles.json."""

from __future__ import annotations

from benchmarks.pages.text import Figures, markdown_table

_METRICS = ("image_auroc_knn", "image_auroc_max", "image_auroc_top", "pixel_auroc", "aupro")
_WAYS = {"shrunk": "shrunk to 224", "tiles": "tiles of 224"}


def quality(figures: Figures) -> str:
    """Metrics and milliseconds of pictures in tiles, beside the same pictures shrunk to one tile."""
    found = figures["tiles"]["quality"]
    lines = [
        (
            _WAYS[row["way"]],
            row["neighbors"] if row["way"] == "tiles" else "",
            *(f"{row[name]:.3f}" for name in _METRICS),
            f"{row['ms']['median']:.0f} ({row['ms']['min']:.0f}–{row['ms']['max']:.0f})",
        )
        for row in found["rows"]
    ]
    header = ("pictures", "neighbors", "image AUROC, `knn`", "`max`", "`top`", "pixel AUROC", "AUPRO", "ms a picture")
    return f"{markdown_table(header, lines)}\n\n{_machine(found['machine'])}"


def large(figures: Figures) -> str:
    """Seconds and memory of pictures of growing size."""
    found = figures["tiles"]["large"]
    lines = [
        (
            f"{row['width']} x {row['height']}",
            row["tiles"],
            f"{row['ms']['median'] / 1000:.1f}",
            f"{row['ms']['median'] / row['tiles']:.0f}",
            f"{row['bytes_grown'] / 2**20:.0f}",
        )
        for row in found["rows"]
    ]
    header = ("pixels", "tiles of 448", "seconds a picture", "ms a tile", "the process grows by, MiB")
    return f"{markdown_table(header, lines)}\n\n{_machine(found['machine'])}"


def _machine(machine: Figures) -> str:
    return (
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['cores']} cores; others used the machine at the same time."
    )
