"""What stores take, lose and cost, from stores.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.pages.text import Figures, markdown_table, measured_on, milliseconds_of
from benchmarks.sweep.measures import exponent

METRICS = ("map_auroc", "pixel_auroc", "aupro")
# What losses of the tables are against, and what is taken unasked.
BASE, USUAL = "float32", "float16"
_SEARCHES = {"spade": "preset `spade`", "default": "preset `default`"}
_SHAPES = {"wrn50": "wide_resnet50_2", "lite0": "efficientnet_lite0"}


def quality(figures: Figures) -> str:
    """Each set by each preset and store: what a picture takes, and the metrics."""
    found = figures["stores"]["quality"]
    lines = []
    for row in found["rows"]:
        metrics = (f"{row[name]:.4f}" if row.get(name) is not None else "–" for name in ("knn_auroc", *METRICS))
        lines.append((row["set"], row["search"], row["store"], _kilobytes(row["bytes"]), *metrics))
    lines += list(_patchcore(figures, {row["set"] for row in found["rows"]}))
    header = ("set", "preset", "store", "bytes a picture", "image AUROC, knn", "image AUROC, map", "pixel AUROC", "AUPRO")
    return f"{markdown_table(header, lines)}\n\n{measured_on(found)}"


def losses(figures: Figures) -> str:
    """For each store, what a picture takes and the most that it loses against float32, of all sets, metric by metric."""
    rows = figures["stores"]["quality"]["rows"]
    lines = []
    for search, title in _SEARCHES.items():
        for store in stores_of(rows):
            of = [row for row in rows if (row["search"], row["store"]) == (search, store)]
            worst = (worst_loss(rows, search, store, (name,)) for name in METRICS)
            lines.append((title, f"`{store}`", _kilobytes(of[0]["bytes"]), *(f"{lost[0]:.4f} ({lost[1]})" for lost in worst)))
    header = ("searched by", "store", "bytes a picture", "image AUROC, map", "pixel AUROC", "AUPRO")
    sets = "; ".join(
        f"{title}: {', '.join(dict.fromkeys(row['set'] for row in rows if row['search'] == search))}"
        for search, title in _SEARCHES.items()
    )
    note = (
        f"The most that any set loses against `{BASE}`, and which one; below 0 where all gain. The nearest pictures, and the "
        f"image AUROC by them, are the same for all: embeddings are stored as they were. Sets: {sets}."
    )
    return f"{markdown_table(header, lines)}\n\n{note}"


def cost(figures: Figures) -> str:
    """What a search takes with each store, beside float16."""
    found = figures["stores"].get("cost")
    if found is None:
        return "Not measured yet: `python -m benchmarks.stores --only cost`."
    lines = [
        (
            _SHAPES[row["set"]],
            row["search"],
            f"`{row['store']}`",
            _kilobytes(row["bytes"]),
            milliseconds_of(row["ms"]),
            f"{row['prepare_ms']['median']:.1f} ms",
            f"{row['times']:.2f}",
        )
        for row in found["rows"]
    ]
    header = ("shapes", "preset", "store", "bytes a picture", "search", "of it, preparing", "times `float16`")
    (normals,) = {row["normals"] for row in found["rows"]}
    return (
        f"{markdown_table(header, lines)}\n\n{normals} normals, generated features, one picture at a time. {measured_on(found)}"
    )


def large(figures: Figures) -> str:
    """A bank of codes of many pictures."""
    found = figures["stores"].get("large")
    if found is None:
        return "Not measured yet: `python -m benchmarks.stores --only large`."
    grown = [row for row in found["rows"] if "cold_ms" in row]
    lines = [
        (
            f"{row['normals']:,}",
            f"{row['bytes'] * row['normals'] / 1e9:.2f} GB",
            "–" if row["build_per_s"] is None else f"{row['build_per_s']['median']:.0f}",
            f"{row['open_s']:.2f} s",
            milliseconds_of(row["cold_ms"]),
            milliseconds_of(row["warm_ms"]),
            f"{row['grown_bytes'] / 2**20:.0f} MiB of {row['memory']}",
        )
        for row in grown
    ]
    header = ("pictures", "bank", "stored a second", "opened in", "score, cold", "score, warm", "memory")
    powers = [("grows to the power", *_powers(grown))] if len(grown) > 1 else []
    text = markdown_table(header, [*lines, *powers])
    if powers:
        text += (
            "\n\nThe last row is the power of the number of pictures that each figure grows with: the slope of a line that is "
            "fitted to their logarithms by least squares."
        )
    for row in found["rows"]:
        if "add_s" in row:
            text += (
                f"\n\nAdding {row['added']} pictures to the {row['normals']:,} takes {row['add_s']:.2f} s, removing "
                f"{row['removed']} {row['remove_s']:.2f} s, bringing them back {row['restore_s']:.2f} s."
            )
    return f"{text}\n\n{measured_on(found)}"


def _powers(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The power of the number of pictures that each figure of `large` grows with; a dash for one that was not measured."""
    counts = [row["normals"] for row in rows]
    for values in (
        [row["bytes"] * row["normals"] for row in rows],
        [row["build_per_s"]["median"] if row["build_per_s"] else 0 for row in rows],
        [row["open_s"] for row in rows],
        [row["cold_ms"]["median"] for row in rows],
        [row["warm_ms"]["median"] for row in rows],
        [row["grown_bytes"] for row in rows],
    ):
        yield f"{exponent(counts, values):.2f}" if min(values) > 0 else "–"


def stores_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stores that were measured, in the order of the rows."""
    return list(dict.fromkeys(row["store"] for row in rows))


def worst_loss(
    rows: Sequence[Mapping[str, Any]], search: str, store: str, metrics: Sequence[str] = METRICS
) -> tuple[float, str]:
    """The most that any set loses by a store against float32 in some metrics, and the set."""
    by = {(row["set"], row["search"], row["store"]): row for row in rows}
    found = []
    for name in dict.fromkeys(row["set"] for row in rows if row["search"] == search):
        base, row = by[name, search, BASE], by[name, search, store]
        found += [(base[metric] - row[metric], name) for metric in metrics if base.get(metric) is not None]
    return max(found)


def _patchcore(figures: Figures, sets: set[str]) -> Iterator[tuple[str, ...]]:
    """What stands beside them: a coreset of 1 % of the same features, whose vectors are float32."""
    for row in figures["whole_bank"]["patchcore"]["rows"]:
        if row["set"] in sets and row["search"].split(",")[0] == "PatchCore 1 %":
            metrics = (
                f"{row[name]:.4f}" if row.get(name) is not None else "–" for name in ("image_auroc", "pixel_auroc", "aupro")
            )
            yield row["set"], row["search"], "float32", "–", "–", *metrics


def _kilobytes(count: float) -> str:
    return f"{count / 1000:.1f} kB"
