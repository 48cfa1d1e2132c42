"""What searching the whole bank costs, how that grows, and what it is worth, from whole_bank.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.pages.text import Figures, markdown_table, measured_on, mebibytes

_METRICS = ("image_auroc", "pixel_auroc", "aupro")
# What is compared in a few words, and the searches that it is, of which the first that was measured counts.
_PRESETS = {
    "preset `default`": ("K=100, averaged, in windows",),
    "preset `spade`": ("K=5",),
    "anomalib's PatchCore 1 %": ("PatchCore 1 %", "PatchCore 1 %, our k-center"),
}
_OTHERS = {"five": "K=5", "scan": "scan", "global": "`global`", "faiss": "faiss.knn"}


def summary(figures: Figures) -> str:
    """README's sentence on the whole bank as the gallery."""
    rows = figures["whole_bank"]["speed"]["rows"]
    row = next(row for row in rows if (row["set"], row["search"]) == ("mvtec_bottle", "joined"))
    ms = {engine: f"{found['median']:.0f} ms" for engine, found in row["ms"].items()}
    return (
        f"All {row['normals']} normals of MVTec AD bottle as the gallery, levels 2 and 3 joined, on another machine: "
        f"{ms['clusters']} with the recipe `clusters` (exact), {ms['global']} with `global`; a scan takes {ms['scan']}, "
        f"five neighbors at three levels {ms['five']}. [All figures](docs/benchmarks/whole-bank.md)."
    )


def presets(figures: Figures) -> str:
    """What banks of two presets are worth, beside PatchCore on the same maps, and the means over the sets that have masks."""
    found = figures["whole_bank"]
    rows = {(row["set"], row["search"]): row for part in ("quality", "patchcore") for row in found[part]["rows"]}
    names = [name for name in dict.fromkeys(name for name, _ in rows) if (name, _PRESETS["preset `default`"][0]) in rows]
    compared = [[_first_of(rows, name, searches) for name in names] for searches in _PRESETS.values()]
    lines = [(f"{name} ({of_set[0]['normals']})", *map(_three, of_set)) for name, *of_set in zip(names, *compared, strict=True)]
    with_masks = [place for place, name in enumerate(names) if all("aupro" in found[place] for found in compared)]
    means = [{metric: statistics.mean(found[i][metric] for i in with_masks) for metric in _METRICS} for found in compared]
    lines.append((f"mean of {', '.join(names[place] for place in with_masks)}", *map(_three, means)))
    return markdown_table(("set (normal images)", *_PRESETS), lines)


def _first_of(rows: Mapping[tuple[str, str], Mapping[str, Any]], name: str, searches: Sequence[str]) -> Mapping[str, Any]:
    return next((rows[name, search] for search in searches if (name, search) in rows), {})


def _three(row: Mapping[str, Any]) -> str:
    return " / ".join(f"{row[metric]:.3f}" if metric in row else "–" for metric in _METRICS)


def speed(figures: Figures) -> str:
    """Milliseconds an image of all normals, beside others."""
    found = figures["whole_bank"]["speed"]
    return f"{_costs(found['rows'])}\n\n{_machine(found)}"


def growth(figures: Figures) -> str:
    """The same by the number of normals, and the exponents of the growth."""
    found = figures["whole_bank"]["growth"]
    lines = [_costs(row for row in found["rows"] if "ms" in row), ""]
    for row in found["rows"]:
        if "exponent" in row:
            lines.append(
                f"- {row['set']}: time grows with the number of normals to the power {row['exponent']['clusters']:.2f}, "
                f"what is looked at to the power {row['exponent_looked_at']:.2f}; time by `global` to the power "
                f"{row['exponent']['global']:.2f}."
            )
    for row in figures["whole_bank"]["large"]["rows"]:
        ms, index, build_s = (row[name]["global"] for name in ("ms", "index_bytes", "build_s"))
        together = row["ms"]["global, 12 together"]
        lines.append(
            f"- {row['set']}, {row['normals']:,} normals: `global` takes {ms['median']:.0f} ms "
            f"({ms['min']:.0f} to {ms['max']:.0f}) an image by itself, "
            f"{together['median']:.0f} ms ({together['min']:.0f} to {together['max']:.0f}) where 12 are searched together; "
            f"its index, {mebibytes(index)} beside a bank of {mebibytes(row['bank_bytes'])}, is built in {build_s:.0f} s."
        )
    for row in figures["whole_bank"]["leave_one_out"]["rows"]:
        lines.append(
            f"- {row['set']}, {row['normals']} normals: an image of the bank against all others takes "
            f"{row['times_scoring']:.2f} times as long as scoring, all stages together."
        )
    equal = figures["whole_bank"]["equality"]["rows"]
    lines.append(
        f"- {sum(row['queries'] for row in equal):,} queries of vectors that are hard to tell apart or to compute with were "
        f"compared with float64: no nearest vector was missed; distances are off by at most "
        f"{max(row['worst'] for row in equal):.0e} of themselves."
    )
    for row in figures["whole_bank"]["thin"]["rows"]:
        lines.append(
            f"- {row['set']}: greedy k-center picks {row['picks']:,} of {row['vectors']:,} vectors in "
            f"{row['s']['median']:.1f} s (`thin: kcenter`; whole vectors, nothing projected)."
        )
    return "\n".join([*lines, "", _machine(found)])


def quality(figures: Figures) -> str:
    """Metrics by set and search, and the means over the sets that all of them were measured on."""
    found = figures["whole_bank"]
    rows = [*found["quality"]["rows"], *found.get("patchcore", {"rows": []})["rows"]]
    order = list(dict.fromkeys(row["set"] for row in rows))
    rows.sort(key=lambda row: order.index(row["set"]))
    lines = [
        (
            f"{row['set']} ({row['normals']})",
            row["search"],
            *(f"{row[name]:.3f}" if name in row else "–" for name in _METRICS),
            f"{row['fit_s']:.1f}",
        )
        for row in rows
    ]
    table = markdown_table(("set (normals)", "search", "image AUROC", "pixel AUROC", "AUPRO", "fit s"), lines)
    return f"{table}\n\n{_means(rows)}"


def _means(rows: list[Mapping[str, Any]]) -> str:
    """Each search's mean over the sets that have masks, as far as it was measured on all of them."""
    by_search: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if "aupro" in row:
            by_search.setdefault(row["search"], {})[row["set"]] = row
    sets = list(dict.fromkeys(name for found in by_search.values() for name in found))
    lines = [
        (name, *(f"{statistics.mean(found[of][metric] for of in sets):.4f}" for metric in _METRICS))
        for name, found in by_search.items()
        if set(sets) <= set(found)
    ]
    table = markdown_table(("search", "image AUROC", "pixel AUROC", "AUPRO"), lines)
    return f"Means over {', '.join(sets)}:\n\n{table}"


def _costs(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        ms, times = row["ms"], row["times"]
        others = [
            "–" if name not in ms else f"{ms[name]['median']:.0f} ms" + (f" ({times[name]:.2f})" if name in times else "")
            for name in _OTHERS
        ]
        passed = ", ".join(f"{100 * share:.1f} %" for share in row["passed_over"].values())
        clusters = ms["clusters"]
        lines.append(
            (
                row["set"],
                row["normals"],
                row["search"],
                f"{clusters['median']:.1f} ms ({clusters['min']:.1f} to {clusters['max']:.1f})",
                passed,
                *others,
                f"{100 * row['found_as_near']:.1f} %",
                *(f"{row['build_s'][name]:.0f} s, {mebibytes(row['index_bytes'][name])}" for name in ("clusters", "global")),
            )
        )
    header = (
        "set",
        "normals",
        "levels 2 and 3",
        "all normals",
        "passed over",
        *_OTHERS.values(),
        "`global` finds",
        "index",
        "index of `global`",
    )
    return markdown_table(header, lines)


def _machine(found: Mapping[str, Any]) -> str:
    return f"{measured_on(found)} In brackets: how many times as long all normals take."
