"""What banks of a few images find, with and without views of them, from few_shots.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages.text import Figures, markdown_table, mebibytes

_METRICS = {"knn": "image AUROC by `knn`", "top": "by `top`", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}


def table(figures: Figures) -> str:
    """The mean over the draws of each set, number of images and augmentation, and the range where there are several."""
    found = figures["few_shots"]
    if not found["rows"]:
        return "*Not measured yet.*"
    draws: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        draws.setdefault((row["set"], row["shots"], row["augment"]), []).append(row)
    lines = [
        (
            name,
            shots,
            f"`{augment}`" if augment else "none",
            rows[0]["entries"],
            *(_of_draws([row[metric] for row in rows]) for metric in _METRICS),
            f"{statistics.median(row['fit_s'] for row in rows):.1f}",
            f"{statistics.median(row['ms'] for row in rows):.0f}",
            mebibytes(rows[0]["bank_bytes"]),
        )
        for (name, shots, augment), rows in draws.items()
    ]
    header = ("set", "images", "views", "entries", *_METRICS.values(), "fit s", "ms an image", "bank")
    machine, seeds = found["machine"], len({row["seed"] for row in found["rows"]})
    return (
        f"{markdown_table(header, lines)}\n\n"
        f"Means of {seeds} draws of the images, in brackets from the lowest to the highest. Measured on {machine['date']}: "
        f"{machine['cpu']}, {machine['threads']} threads, faiss-cpu {machine['faiss-cpu']}."
    )


def _of_draws(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
