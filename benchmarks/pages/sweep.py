"""Exact against approximate search, from the rows in sweep/: the tables of the fastest settings, and every plot."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.pages.text import Figures, markdown_table
from benchmarks.sweep import tables
from benchmarks.sweep.page import Section
from benchmarks.sweep.summary import can_recipe
from benchmarks.sweep.tables import Chart, Table
from spade_faiss.core.memory import format_bytes
from spade_faiss.diagnostics.recommend import RECALL


def recommended_images(figures: Figures) -> str:
    """At each size, exact search, and the fastest index that still finds nearly all: as a recipe has it, and any."""
    images = tables.of_kind(figures["sweep"], "image", k=5)
    lines = []
    for n in sorted({row["n"] for row in images}):
        chosen = [row for row in images if row["n"] == n]
        good = sorted((row for row in chosen if row["recall_k"] >= RECALL), key=lambda row: float(row["p50_ms"]))
        flat = next(row for row in chosen if row["factory"] == "Flat")
        as_recipe = next(row for row in good if can_recipe(row))
        for row in {row["id"]: row for row in (flat, as_recipe, good[0])}.values():
            lines.append(
                (
                    f"{n:,}",
                    row["label"] + ("" if can_recipe(row) else " ¹"),
                    f"{row['recall_k']:.3f}",
                    f"{round(100 * row['excess_mean'], 3) + 0.0:.3f} %",
                    tables.change(row["image_auroc_difference"]),
                    f"{row['p50_ms']:.2f}",
                    f"{row['p99_ms']:.2f}",
                    f"{row['times_flat']:.0f}",
                    f"{row['per_s']:,.0f}",
                    format_bytes(row["memory_bytes_per_image"] * n),
                    f"{row['build_s']:.0f}",
                )
            )
    header = ("N", "index", "recall@5", "score excess", "image AUROC to exact", "p50 ms", "p99 ms", "× Flat", "1/s in a batch")
    note = "¹ re-ranks more candidates than a recipe can ask for (8 beyond K)."
    return f"{markdown_table((*header, 'in memory', 'build s'), lines)}\n\n{note}"


def recommended_pixels(figures: Figures) -> str:
    """On each real set, every recipe as it comes."""
    lines = []
    for row in sorted(tables.of_kind(figures["sweep"], "pixel", side=0), key=lambda row: (row["set"], row["k"], row["per_s"])):
        if "image_auroc" in row and not row["build"] and not row["query"] and row["recipe"] != "hnsw":
            quality = (tables.change(row.get("pixel_auroc_difference")), tables.change(row.get("aupro_difference")))
            near = (f"{100 * row['recall_1']:.1f} %", f"{100 * row['excess_mean']:.2f} %")
            times = (f"{row['p50_ms']:.0f}", f"{row['per_s']:.0f}")
            lines.append((row["set"], row["k"], row["recipe"], *near, *quality, *times))
    header = (
        "set",
        "K",
        "recipe",
        "as near as exact",
        "excess",
        "pixel AUROC to exact",
        "AUPRO to exact",
        "p50 ms",
        "1/s in batches",
    )
    return markdown_table(header, lines)


def peers(figures: Figures) -> str:
    """Other methods on the same features."""
    found = tables.peer_table(figures["sweep"])
    if found is None:
        return "Not measured."
    return _table(found)


def knees(figures: Figures) -> str:
    """The knee of every front, in words."""
    return "\n".join(f"- {words}" for section in figures["sections"] for words in section.words)


def image_plots(figures: Figures) -> str:
    """Every plot of the search by embeddings."""
    return _plots(_section(figures, "Image level").charts)


def pixel_plots(figures: Figures) -> str:
    """Every plot of the search in the neighbors' maps."""
    return _plots(_section(figures, "Pixel level").charts)


def scaling(figures: Figures) -> str:
    """How the cost grows with each dimension of the problem: plots, and fitted exponents."""
    found = _section(figures, "Scaling")
    return "\n\n".join([_plots(found.charts), *map(_table, found.tables)])


def memory(figures: Figures) -> str:
    """Memory and disk that indexes take."""
    return _plots(_section(figures, "Memory and disk").charts)


def searched(figures: Figures) -> str:
    """Whether the generated embeddings look like the real ones."""
    return "\n\n".join(map(_table, _section(figures, "What was searched").tables))


def _section(figures: Figures, title: str) -> Section:
    sections: list[Section] = figures["sections"]
    return next(section for section in sections if section.title.startswith(title))


def _plots(charts: Sequence[Chart]) -> str:
    # Paths are relative to docs/benchmarks/, where a link named `sweep` leads to the folder of results.
    return "\n\n".join(
        f"![{chart.title}](sweep/{chart.name}.svg)" + (f"\n\n*{chart.note}*" if chart.note else "") for chart in charts
    )


def _table(found: Table) -> str:
    rows = (tuple("–" if cell is None else cell for cell in row) for row in found.rows)
    return markdown_table(found.header, rows) + (f"\n\n{found.note}" if found.note else "")
