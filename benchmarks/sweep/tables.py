"""Rows to what the report and the documentation show: tables, charts, and the knees of the fronts in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.sweep import charts
from benchmarks.sweep.charts import Dot
from benchmarks.sweep.embeddings import COMPONENTS
from benchmarks.sweep.rows import Row
from benchmarks.sweep.sets import NORMALIZED
from spade_faiss.core.memory import format_bytes
from spade_faiss.diagnostics.measurements import ALIGNED

Cell = str | float | int | None

# Recall is counted among some thousand neighbors: a loss below this cannot be told from none.
RECALL_FLOOR, SHARE_FLOOR = 5e-4, 1e-5
_EXACT = "exact"
# What misses more than this share of the neighbors is drawn, but is never the knee; nor are recipes that compare places, which
# is another definition of a score.
_MOST_LOST = 0.05


@dataclass(frozen=True)
class Table:
    """A table, with a note on how to read it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart, and the name of its file."""

    name: str
    title: str
    svg: str
    note: str = ""


def of_kind(rows: Sequence[Row], kind: str, **values: Any) -> list[Row]:
    """Return the rows of a kind that have these values."""
    return [row for row in rows if row["kind"] == kind and all(row.get(name) == value for name, value in values.items())]


def image_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table of the image level for each number of normals and K."""
    tables = []
    for n, k in sorted({(row["n"], row["k"]) for row in of_kind(rows, "image")}):
        chosen = sorted(of_kind(rows, "image", n=n, k=k), key=lambda row: (row["factory"] != "Flat", row["p50_ms"]))
        tables.append(
            Table(
                f"N = {n:,}, K = {k}",
                (
                    "index",
                    "recall@1",
                    f"recall@{k}",
                    "score excess",
                    "rank correlation",
                    "image AUROC",
                    "to exact",
                    "p50 ms",
                    "p95 ms",
                    "p99 ms",
                    "× Flat",
                    "1/s in a batch",
                    "cold p50 ms",
                    "MiB in memory",
                    "B/image on disk",
                    "build s",
                    "build peak MiB",
                    "load s, cold",
                    "off float64",
                ),
                tuple(
                    (
                        row["label"],
                        round(row["recall_1"], 4),
                        round(row["recall_k"], 4),
                        float(f"{row['excess_mean']:.2g}"),
                        round(row["rank_correlation"], 5),
                        between(row["image_auroc"]),
                        change(row["image_auroc_difference"]),
                        _sig(row["p50_ms"]),
                        _sig(row["p95_ms"]),
                        _sig(row["p99_ms"]),
                        _sig(row.get("times_flat")),
                        _sig(row["per_s"]),
                        _cold(row),
                        _mib(row["memory_bytes_per_image"] * n),
                        round(row["disk_bytes_per_image"]),
                        _sig(row["build_s"]),
                        _mib(row["build_peak_bytes"]),
                        _sig(row["load_cold_s"]) if row["load_dropped"] else "not dropped",
                        float(f"{row['off_float64']:.1g}"),
                    )
                    for row in chosen
                ),
                "Flat, one query, runs on one thread in FAISS; so do the others. Candidates of rerank are read from a float16 "
                "file of the base; `cold`: dropped from the system's cache before each query.",
            )
        )
    return tables


def pixel_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table of the pixel level for each set and K on which several recipes were measured."""
    tables = []
    for name, normals, k in pixel_tasks(rows):
        chosen = sorted(_of_task(rows, name, normals, k), key=lambda row: (row["recipe"] != _EXACT, row["p50_ms"]))
        header = ["recipe", "as near as exact", "excess", "99 % below", "rank corr.", "image AUROC (map)", "to exact"]
        masks = any("aupro" in row for row in chosen)
        header += ["pixel AUROC", "to exact", "AUPRO", "to exact"] if masks else []
        header += ["p50 ms", "p95 ms", "p99 ms", "1/s in batches", "cold p50 ms", "KiB/image on disk", "build s", "peak MiB"]
        lines: list[tuple[Cell, ...]] = []
        for row in chosen:
            line: list[Cell] = [
                row["label"],
                _sig(row.get("recall_1"), 5),
                float(f"{row.get('excess_mean', float('nan')):.2g}"),
                float(f"{row.get('excess_p99', float('nan')):.2g}"),
                _sig(row.get("rank_correlation"), 5),
                between(row.get("image_auroc")),
                change(row.get("image_auroc_difference")),
            ]
            if masks:
                for metric in ("pixel_auroc", "aupro"):
                    line += [between(row.get(metric)), change(row.get(f"{metric}_difference"))]
            line += [_sig(row["p50_ms"]), _sig(row["p95_ms"]), _sig(row["p99_ms"]), _sig(row.get("per_s")), _cold(row)]
            line += [round(row["disk_bytes_per_image"] / 1024, 1), _sig(row["build_s"]), _mib(row.get("peak_bytes"))]
            lines.append(tuple(line))
        tables.append(
            Table(
                f"{name}, {chosen[0]['normals']} normals, K = {k}",
                tuple(header),
                tuple(lines),
                "From features to map, without the backbone. `as near as exact`: recall@1 of locations, by distance. In "
                "brackets 95 % intervals, bootstrapped over images; differences are paired." + _grade(chosen),
            )
        )
    return tables


def _grade(chosen: Sequence[Row]) -> str:
    """A sentence on how far exact search is from float64."""
    off = [row["off_float64"] for row in chosen if "off_float64" in row]
    return f" Distances of exact are at most {max(off):.0e} off float64's, relatively." if off else ""


def peer_table(rows: Sequence[Row]) -> Table | None:
    """Return a table of peers and recipes on the same features."""
    peers = of_kind(rows, "peer")
    lines: list[tuple[Cell, ...]] = []
    for name, k in dict.fromkeys((row["set"], row["k"]) for row in peers):
        sets = (name, f"{name}{NORMALIZED}")
        ours = [row for row in _plain(rows) if (row["set"] in sets and row["k"] == k) and _counts_as_peer(row)]
        for row in sorted([*of_kind(rows, "peer", set=name, k=k), *ours], key=lambda row: row["p50_ms"]):
            label = row["label"] + (" (extrapolated)" if row.get("extrapolated") else "")
            label += ", unit vectors" if row["set"].endswith(NORMALIZED) else ""
            shown = "–" if row["kind"] == "peer" and row["peer"] == "patchcore" else k
            quality = [between(row.get(metric)) for metric in ("image_auroc", "pixel_auroc", "aupro")]
            build, peak = _sig(row.get("build_s")), _mib(row.get("peak_bytes"))
            lines.append((name, shown, label, *quality, build, _sig(row["p50_ms"]), _sig(row.get("per_s")), peak))
    if not lines:
        return None
    header = ("set", "K", "method", "image AUROC (map)", "pixel AUROC", "AUPRO", "fit s", "p50 ms", "1/s", "peak MiB")
    return Table(
        "Peers on the same features",
        header,
        tuple(lines),
        "All of them get the same maps of efficientnet_lite0; its forward pass is in none of the times. PatchCore: anomalib's, "
        "levels 2 and 3, its image score its own. The published loop finds what exact search does (in its first blocks).",
    )


def look_table(rows: Sequence[Row]) -> Table | None:
    """Return a table of the statistics of generated and real embeddings."""
    looks = of_kind(rows, "look")
    if not looks:
        return None
    return Table(
        "Generated embeddings look like the real ones",
        ("embeddings", "n", *(f"variance in {c}" for c in COMPONENTS), "dimension", "at queries", "nearest / spread"),
        tuple(
            (
                row["set"],
                row["n"],
                *(round(value, 3) for value in row["spectrum"]),
                *(_quartiles(row[name]) for name in ("dimension", "query_dimension", "apart")),
            )
            for row in sorted(looks, key=lambda row: (row["set"].split("-")[0], row["n"], row["set"]))
        ),
        "Share of the variance in the first components; local intrinsic dimension (Levina & Bickel, 20 neighbors), its median "
        "and quartiles, at rows and at queries; distance of queries to their nearest row. At queries it grows with n: real "
        "images that no row was made from keep their distance from a cloud that gets denser.",
    )


def image_front(rows: Sequence[Row], n: int, k: int) -> tuple[Chart, str] | None:
    """Return the Pareto chart of the image level at one size, and its knee in words."""
    chosen = of_kind(rows, "image", n=n, k=k, threads=2)
    if len(chosen) < 3:
        return None
    dots = [Dot(1000 / row["p50_ms"], 1 - row["recall_k"], row["label"], family_of(row)) for row in chosen]
    title = f"Image search, N = {n:,}: neighbors lost against speed"
    svg = charts.pareto(title, dots, x="queries a second, one at a time", y=f"1 - recall@{k}", floor=RECALL_FLOOR)
    knee = charts.knee_of(charts.front_of([dot for dot in dots if dot.y <= _MOST_LOST]), RECALL_FLOOR)
    row = next(row for row in chosen if row["label"] == knee.label)
    held = format_bytes(row["memory_bytes_per_image"] * n)
    words = (
        f"Image search, N = {n:,}, K = {k}: **{knee.label}** finds {100 * row['recall_k']:.1f} % of the nearest normals in "
        f"{row['p50_ms']:.2f} ms, {row['times_flat']:.0f} times as fast as Flat, with {held} in memory; image scores are "
        f"{100 * row['excess_mean']:.2f} % off in the mean, their AUROC differs from exact's by "
        f"{row['image_auroc_difference']['value']:+.4f}."
    )
    return Chart(f"pareto-image-{n}-k{k}", title, svg, "Drawn at the floor: nothing lost."), words


def pixel_fronts(rows: Sequence[Row], name: str, normals: int, k: int) -> list[tuple[Chart, str]]:
    """Return the Pareto charts of the pixel level for one task, excess distances and AUPRO, each with its knee in words."""
    chosen = [row for row in _of_task(rows, name, normals, k) if "per_s" in row and "recall_1" in row]
    if len(chosen) < 3:
        return []
    task = f"{name}, K = {k}"
    # A recipe that searches all normal images finds nearer vectors than exact search among the neighbors: it has no excess.
    among_neighbors = [row for row in chosen if row["excess_mean"] >= 0]
    dots = [Dot(row["per_s"], row["excess_mean"], row["label"], row["recipe"]) for row in among_neighbors]
    title = f"Pixel search, {task}: how much farther than the nearest, against speed"
    svg = charts.pareto(title, dots, x="images a second, in batches", y="mean excess of distances", floor=SHARE_FLOOR)
    found = [(Chart(f"pareto-pixel-{name}-k{k}", title, svg, "Drawn at the floor: none."), _pixel_knee(chosen, dots, task))]
    if all("aupro_difference" in row for row in chosen):
        best = next(row["aupro"]["value"] for row in chosen if row["recipe"] == _EXACT)
        dots = [Dot(row["per_s"], 1 - row["aupro"]["value"], row["label"], row["recipe"]) for row in chosen]
        title = f"Pixel search, {task}: 1 - AUPRO against speed (exact: {1 - best:.4f})"
        svg = charts.pareto(title, dots, x="images a second, in batches", y="1 - AUPRO", floor=None)
        found.append((Chart(f"aupro-{name}-k{k}", title, svg), ""))
    return found


def _pixel_knee(chosen: Sequence[Row], dots: Sequence[Dot], task: str) -> str:
    exact = next((row for row in chosen if row["recipe"] == _EXACT), None)
    approximate = {row["label"] for row in chosen if row["recipe"] not in ALIGNED}
    knee = charts.knee_of(charts.front_of([dot for dot in dots if dot.label in approximate]), SHARE_FLOOR)
    row = next(row for row in chosen if row["label"] == knee.label)
    words = f"Pixel search, {task}: **{knee.label}**, {row['per_s']:.0f} images a second"
    if exact and exact is not row:
        words += f", {row['per_s'] / exact['per_s']:.1f} times as many as exact; distances are "
        words += f"{100 * row['excess_mean']:.2f} % too large in the mean"
    if "aupro_difference" in row:
        words += f"; AUPRO {row['aupro']['value']:.4f} ({change(row['aupro_difference'])})"
    return words + "."


def memory_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return charts of the memory that indexes over embeddings take, at the two largest sizes."""
    found = []
    for n in sorted({row["n"] for row in of_kind(rows, "image")})[-2:]:
        held = {row["factory"]: row["memory_bytes_per_image"] * n / 2**20 for row in of_kind(rows, "image", n=n)}
        largest_first = {name: {"in memory": held[name]} for name in sorted(held, key=lambda name: -held[name])}
        title = f"Memory of an index over N = {n:,} embeddings, MiB"
        found.append(Chart(f"memory-images-{n}", title, charts.bars(title, largest_first, x="MiB")))
    return found


def disk_chart(rows: Sequence[Row]) -> Chart | None:
    """Return a chart of what a normal image takes on disk."""
    parts: dict[str, dict[str, float]] = {}
    for row in of_kind(rows, "pixel", side=0, k=5):
        if "bank_bytes_per_image" in row:
            settings = " ".join(f"{name}={value}" for name, value in row["build"].items())
            label = f"{row['set']} {row['recipe']} {settings}".strip()
            parts[label] = {"bank": row["bank_bytes_per_image"] / 1024, "index": row["disk_bytes_per_image"] / 1024}
    title = "Disk that a normal image takes, KiB"
    return Chart("disk-pixels", title, charts.bars(title, parts, x="KiB an image")) if parts else None


def between(found: dict[str, float] | None) -> str:
    """Return the text of an estimate with its interval."""
    return "–" if found is None else f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def change(found: dict[str, float] | None) -> str:
    """Return the text of a difference with its interval."""
    return "–" if found is None else f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def pixel_tasks(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """Return set, number of normals and K of the tasks on which several recipes were measured."""
    recipes: dict[tuple[str, int, int], set[str]] = {}
    for row in _plain(rows):
        recipes.setdefault((row["set"], row["normals"], row["k"]), set()).add(row["label"])
    return sorted(task for task, labels in recipes.items() if len(labels) >= 3)


def _of_task(rows: Sequence[Row], name: str, normals: int, k: int) -> list[Row]:
    return [row for row in _plain(rows) if (row["set"], row["normals"], row["k"]) == (name, normals, k)]


def _plain(rows: Sequence[Row]) -> Iterable[Row]:
    """Pixel points that vary neither image size nor threads."""
    return (row for row in of_kind(rows, "pixel", side=0) if row["threads"] == 2)


def _counts_as_peer(row: Row) -> bool:
    """Whether a row stands beside the peers: a recipe as it comes, with unit vectors, or comparing one place only."""
    as_it_comes = not row["build"] and not row["query"]
    return as_it_comes or row["set"].endswith(NORMALIZED) or row["query"] == {"radius": 0} or row["build"] == {"lists": 1}


_CODES = {
    "HNSW": "graph (HNSW)",
    "PQ": "product quantization",
    "SQ": "scalar quantization",
    "IVF": "lists of vectors (IVF, Flat)",
}


def family_of(row: Row) -> str:
    """Return the family of indexes that a row belongs to."""
    factory: str = row["factory"]
    name = next((text for code, text in _CODES.items() if code in factory), factory)
    return f"{name}, fewer dimensions (PCA)" if "PCA" in factory and "PQ" not in factory else name


def _quartiles(values: Sequence[float]) -> str:
    return f"{values[1]:.3g} ({values[0]:.3g} to {values[2]:.3g})"


def _cold(row: Row) -> Cell:
    if "cold_p50_ms" not in row:
        return None
    return _sig(row["cold_p50_ms"]) if row["cold_dropped"] else "not dropped"


def _mib(count: float | None) -> Cell:
    return None if count is None else round(count / 2**20)


def _sig(value: float | None, digits: int = 3) -> Cell:
    return None if value is None else float(f"{value:.{digits}g}")
