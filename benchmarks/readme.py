"""README's tables and the package's measurements, computed from benchmarks/results/: `python -m benchmarks.readme`.

A test checks that they agree.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.features import SHAPES
from benchmarks.sweep import page, tables
from benchmarks.sweep.summary import can_recipe, summary_of
from spade_faiss.core.memory import format_bytes
from spade_faiss.diagnostics.recommend import RECALL

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SWEEP = RESULTS / "sweep"
MEASURED = ROOT / "spade_faiss" / "diagnostics" / "measured.json"

Figures = dict[str, Any]


def main() -> None:
    """Write the tables into README, and what `spade-faiss recommend` knows into the package."""
    MEASURED.write_text(measured(), encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


def measured() -> str:
    """The measurements that the package carries."""
    found = summary_of(page.load(SWEEP / page.ROWS))
    kernel = json.loads((RESULTS / "kernel.json").read_bytes())
    found["kernel"] = [
        {"set": row["set"], "k": row["k"], "times": round(row["times_that_of"]["faiss"], 2), "simd_level": kernel["simd_level"]}
        for row in kernel["speed"]
        if row["batch"] == 1 and row["set"] in SHAPES  # advice is about a backbone's shapes
    ]
    parts = {name: "[\n" + ",\n".join(map(json.dumps, found.pop(name))) + "\n]" for name in ("image", "pixel", "kernel")}
    return json.dumps(found)[:-1] + "".join(f', "{name}": {lines}' for name, lines in parts.items()) + "}\n"


def filled(text: str) -> str:
    """README with every table between `<!-- name -->` and `<!-- /name -->` computed anew."""
    figures: Figures = json.loads((RESULTS / "main_job.json").read_bytes())
    figures["codes"] = json.loads((RESULTS / "codes.json").read_bytes())
    figures["gpu"] = json.loads((RESULTS / "gpu.json").read_bytes())
    figures["durability"] = json.loads((RESULTS / "durability.json").read_bytes())
    figures["calibration"] = json.loads((RESULTS / "calibration.json").read_bytes())
    figures["kernel"] = json.loads((RESULTS / "kernel.json").read_bytes())
    figures["gallery"] = json.loads((RESULTS / "gallery.json").read_bytes())
    figures["sweep"] = page.load(SWEEP / page.ROWS)
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README must hold <!-- {name} --> and <!-- /{name} --> once")
        content = table(figures)
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)  # type: ignore[misc]
    return text


def _bottle(figures: Figures) -> str:
    return _table(
        ("normalize", "pool", "k_gallery", "image AUROC, kNN", "image AUROC, map", "pixel AUROC", "AUPRO"),
        (
            (row["normalize"], row["pool"], row["k_gallery"], *_scores(row, "image_auroc_map", "pixel_auroc", "aupro"))
            for row in figures["bottle"]
        ),
    )


def _magnetic_tile(figures: Figures) -> str:
    return _table(
        (
            "resize_mode",
            "kind",
            "defective",
            "unseen",
            "image AUROC, kNN",
            "image AUROC, map",
            "pixel AUROC",
            "pixel AP",
            "AUPRO",
        ),
        (
            (
                row["resize_mode"],
                row["kind"],
                row["images"],
                row["unseen"],
                *_scores(row, "image_auroc_map", "pixel_auroc", "pixel_ap", "aupro"),
            )
            for row in figures["magnetic_tile"]
            if row["resize_mode"] != "stretch" or row["kind"] == "all"
        ),
    )


def _time(figures: Figures) -> str:
    scoring, wide, extraction = figures["scoring"], figures["wide_resnet50_2"], figures["extraction"]
    count = scoring["images"]
    timings = (
        (name, f"{1000 * seconds / count:.1f}", f"{1000 * wide['score_timing_s'].get(name, 0) / wide['score_images']:.1f}")
        for name, seconds in scoring["timing_s"].items()
        if name != "load"
    )
    table = _table(("stage, ms an image", "efficientnet_lite0", "wide_resnet50_2"), timings)
    spread = f"{extraction['ratios'][0]:.2f} to {extraction['ratios'][-1]:.2f}"
    lines = (
        table,
        "",
        f"- Scoring {count} images takes {scoring['total_s']:.1f} s, loading included; peak memory of the process "
        f"{scoring['peak_memory_bytes'] / 2**20:.0f} MiB.",
        f"- Extracting {extraction['images']} images takes {extraction['ratio']:.2f} times their bare forward passes "
        f"(median of {len(extraction['ratios'])}, {spread}).",
        f"- Idle OpenMP threads sleep (OMP_WAIT_POLICY=PASSIVE): {_runs(scoring['total_s_runs']['passive'])}. "
        f"Were they to spin: {_runs(scoring['total_s_runs']['active'])}; the more so, the more else the machine has to do.",
        f"- wide_resnet50_2 (seeded random weights, for its shapes): {wide['bytes_per_image'] / 1e6:.2f} MB of bank an image, "
        f"{wide['fit_s_per_image']:.2f} s an image to extract, {wide['score_s_per_image']:.2f} s to score, peak memory "
        f"{wide['peak_memory_bytes'] / 2**20:.0f} MiB.",
    )
    return "\n".join(lines)


def _gallery(figures: Figures) -> str:
    """Milliseconds an image of every engine, and how many times as fast as gathered faiss.knn ours are."""
    rows = []
    for row in figures["gallery"]["speed"]:
        spent = {name: f"{1000 * found['median']:.0f}" for name, found in row["s_per_image"].items()}
        ours = (f"{spent[name]} ({row['times_that_of'][name]['knn']:.2f})" for name in _RECIPES)
        rows.append((row["set"], row["k"], row["batch"], *(spent.get(name, "–") for name in _ENGINES), *ours))
    return _table(("shapes", "K", "batch", *_ENGINES.values(), "exact by FAISS", *_RECIPES[1:]), rows)


def _kernel(figures: Figures) -> str:
    """Milliseconds an image by the kernel, and how many times as long others take."""
    rows = []
    for row in figures["kernel"]["speed"]:
        others = (
            f"{1000 * row['s_per_image'][name]['median']:.0f} ({row['times_that_of'][name]:.1f})"
            for name in ("knn", "knn_low_threshold", "faiss")
        )
        rows.append((row["set"], row["k"], row["batch"], f"{1000 * row['s_per_image']['native']['median']:.0f}", *others))
    return _table(("shapes", "K", "batch", "kernel", "faiss.knn", "same, lower threshold", "exact by FAISS"), rows)


def _kernel_facts(figures: Figures) -> str:
    found = figures["kernel"]
    machine, equal = found["machine"], found["equality"]
    lines = [
        f"- Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} threads, SIMD level `{found['simd_level']}`, "
        f"faiss-cpu {machine['faiss-cpu']}; a machine that others use, too."
    ]
    for row in found["parts"]:
        if row["level"] == "level1" and row["k"] == 5 and (row["components"] is not None or row["set"] == "wrn50"):
            how = "as they are" if row["components"] is None else f"shortened to {row['components']} components"
            rate = row["filter_multiply_adds_per_s"]
            stands_for = row["float32_flops_that_it_stands_for"] / 1e9
            lines.append(
                f"- {row['set']}, finest level, K=5, one thread, vectors {how}: packing takes {row['pack_rows_ms']:.1f} ms for "
                f"rows and {row['pack_queries_ms']:.1f} for queries, the filter {row['filter_ms']:.1f}, refining "
                f"{row['refine_ms']:.1f}. The filter makes {rate / 1e9:.0f} G multiply-adds a second and "
                f"stands for {stands_for:.0f} GFLOP/s of float32; {row['evaluated_per_query']:.0f} vectors evaluated a query."
            )
    hostile = dict.fromkeys(row["set"] for row in equal if "channels" in row)
    features = [row for row in equal if "channels" not in row]
    dense = ", ".join(f"{100 * row['dense_share']:.1f} % ({row['set']})" for row in features)
    lines.append(
        f"- {sum(row['queries'] for row in equal):,} queries beside float64: {', '.join(hostile)}; features "
        f"({', '.join(row['set'] for row in features)}). None missed, distances off by at most "
        f"{max(row['worst'] for row in equal):.0e} of themselves. A quarter of a block or more was evaluated for {dense} of "
        f"the queries."
    )
    return "\n".join(lines)


def _gallery_quality(figures: Figures) -> str:
    rows = []
    for row in figures["gallery"]["quality"]:
        if "excess" in row and row["set"] == "wrn50":
            finest = next(iter(row["excess"].values()))
            exact = f"{100 * finest['exactly_0']:.1f} %"
            rows.append((row["recipe"], row["k"], exact, *(f"{finest[f'quantile {at}']:.3f}" for at in (0.9, 0.99, 0.999))))
    labeled = [row for row in figures["gallery"]["quality"] if "pixel_auroc" in row]
    base = {row["k_gallery"]: row for row in figures["bottle"] if (row["normalize"], row["pool"]) == ("none", 1)}
    lines = (
        f"{row['recipe']}, K={row['k']}: {row['pixel_auroc']:.4f} ({row['pixel_auroc'] - base[row['k']]['pixel_auroc']:+.4f}), "
        f"AUPRO {row['aupro']:.4f} ({row['aupro'] - base[row['k']]['aupro']:+.4f})"
        for row in labeled
    )
    table = _table(("recipe", "K", "found exactly", "excess, 90 % below", "99 % below", "99.9 % below"), rows)
    return f"{table}\n\nPixel AUROC on bottle (and what it differs from exact's by): {'; '.join(lines)}."


def _codes(figures: Figures) -> str:
    rows = figures["codes"]["codes"]
    return _table(
        ("code", "ms an image", "found exactly", "excess, 99 % below"),
        (
            (row["code"], f"{statistics.median(row['ms']):.0f}", f"{100 * row['found']:.1f} %", f"{row['excess_99']:.3f}")
            for row in rows
        ),
    )


def _gallery_facts(figures: Figures) -> str:
    found = figures["gallery"]
    profile, (small, large), equal = found["profile"][0], found["memory"], found["equal"][0]
    parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in profile["of_threads_time"].items() if share > 0.01)
    lines = [
        f"- `exact` by FAISS at K={profile['k']} runs at {profile['gflop_per_s']['exact']['median']:.0f} GFLOP/s, "
        f"{100 * profile['of_peak']['numpy']:.0f} % of what a matrix product alone reaches; of the threads' time: {parts}.",
        f"- `exact` by FAISS is identical bit by bit for {', '.join(equal['identical'])}; "
        f"at most {equal['off_float64']:.1g} off float64.",
        f"- `--memory 1GiB`, K={small['k']}, wrn50: {_mib(small['peak_bytes'])} at the peak with {small['normals']} normals, "
        f"{_mib(large['peak_bytes'])} with {large['normals']}, after {_mib(small['start_bytes'])} and "
        f"{_mib(large['start_bytes'])} at the start.",
    ]
    alone, together = (row["s_per_image"] for row in found["speed_exact"])
    against = {name: alone[name]["median"] / alone["exact"]["median"] for name in ("knn", "knn_low_threshold")}
    joint, single = (of["knn"]["median"] / together["exact"]["median"] for of in (together, alone))
    lines.append(
        f"- On a machine with nothing else to do, wrn50, K={found['speed_exact'][0]['k']}, `exact` by FAISS is "
        f"{against['knn']:.2f} "
        f"times as fast as `faiss.knn` for a single image ({against['knn_low_threshold']:.2f} with its threshold lowered). In "
        f"a batch of 16 that share their neighbors it is {single:.2f} times as fast as 16 calls for one image each, and "
        f"{joint:.2f} times as fast as one call for all 16."
    )
    for cold in (False, True):
        rows = [row for row in found["scaling"] if row["cold"] == cold]
        spent = "; ".join(f"{row['normals']} normals {_ms(row['image search'])} + {_ms(row['pixel search'])}" for row in rows)
        where = "dropped from the system's cache before each image" if cold else "in the system's cache"
        lines.append(
            f"- lite0, K=5, `--memory 256MiB`, the bank's files {where}, ms an image of image search + pixel search, while the "
            f"machine ran tests, too: {spent}."
        )
    return "\n".join(lines)


def _gpu(figures: Figures) -> str:
    """The torch search on the CPU, a line for each number of neighbors."""
    rows = figures["gpu"]["torch"]
    lines = []
    for k in sorted({row["k"] for row in rows}):
        of_k = [row for row in rows if row["k"] == k]
        spent = {name: sum(row["s_per_image"][name] for row in of_k) for name in of_k[0]["s_per_image"]}
        torch, faiss = (spent[name] / spent["knn"] for name in ("torch", "faiss"))
        same = "the same to the last bit" if all(row["bfloat16_same"] for row in of_k) else "something else"
        lines.append(
            f"- On this machine's CPU, wrn50, K={k}, the torch search takes {torch:.2f} times as long as `faiss.knn` on the "
            f"gathered gallery, `engine=faiss` {faiss:.2f} times (in turn, while others used the machine). With "
            f"`product=bfloat16` it finds {same}."
        )
    return "\n".join(lines)


def _durability(figures: Figures) -> str:
    found = figures["durability"]
    kills, fills, fuzz, readers, add = (found[name] for name in ("kills", "fills", "fuzz", "readers", "add"))
    faults = sum(len(part["faults"]) for part in (kills, fills, fuzz, readers))
    hit = ", ".join(f"{name} {count}" for name, count in sorted(kills["hit"].items()))
    again = add["build_s"] + add["index_s"]
    lines = [
        f"- {kills['count']} kills at random instants ({hit}), each followed by `verify --deep` and the same command again; "
        f"{fills['full']} of {fills['runs']} runs on a disk with little room ran out of it; {fuzz['mutants']} damaged files, "
        f"{fuzz['refused']} refused, {fuzz['equal']} as good as before; {readers['readers']} readers beside a writer that "
        f"added {readers['added']} images and compacted, {readers['results']} results of {readers['generations_seen']} "
        f"generations. Lost, torn or wrong: {faults}.",
        f"- Adding {add['added']} images to {add['images']}: {1000 * add['add_s']:.0f} ms, {_mib(add['bytes_written'])}, "
        f"{add['shards_rewritten']} shards rewritten; the index takes them in in {1000 * add['update_s']:.0f} ms. Building it "
        f"all again: {again:.1f} s, {_mib(add['bank_bytes'])} (features given).",
    ]
    return "\n".join(lines)


def _calibration(figures: Figures) -> str:
    """Alarms among normal and among defective test images, by the rate asked for; both tests together."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for row in figures["calibration"]["rates"]:
        if row["test"] == "both":
            false, detected = row["false_alarms"], row["detected"]
            cell = f"{_percent(false['rate'])} ({_interval(false)}); {100 * detected['rate']:.0f}"
            rows.setdefault((row["set"], _MODES[row["mode"]], row["bank"], row["calibration"]), []).append(cell)
    asked = sorted({row["alpha"] for row in figures["calibration"]["rates"]})
    header = ("set", "calibration", "bank", "n", *(f"alpha {100 * alpha:g} %" for alpha in asked))
    return _table(header, ((*of, *cells) for of, cells in rows.items()))


def _calibration_facts(figures: Figures) -> str:
    found = figures["calibration"]
    fdr = found["simulation"]["fdr"]
    lines = [*_simulated(found["simulation"])]
    lines.append(
        f"- `--fdr {fdr['asked']:g}` there, {fdr['normal']} normal images and {fdr['outliers']} outliers a batch: "
        f"{_percent(fdr['false_share'])} % of the alarms were false on average "
        f"(± {_percent(1.96 * fdr['false_share_error'])}), {100 * fdr['found']:.0f} % of the outliers were found."
    )
    for name in dict.fromkeys(row["set"] for row in found["official"]):
        parts = []
        for mode, text in _MODES.items():
            rows = [row for row in found["official"] if (row["set"], row["mode"]) == (name, mode)]
            rates = (f"{_percent(row['normal']['rate'])} ({_interval(row['normal'])})" for row in rows if row["alpha"] >= 0.05)
            parts.append(f"{text}, n={rows[0]['calibration']}: {', '.join(rates)}")
        lines.append(f"- {name}'s own split, false alarms in % at alpha 5 and 10 %: {'; '.join(parts)}.")
    for row in found["cost"]:
        lines.append(
            f"- Calibrating {row['n']} of {row['normals']} images (efficientnet_lite0's shapes) takes {row['total_s']:.1f} s; "
            f"{_mib(row['peak_bytes'])} at the peak, {_mib(row['start_bytes'])} at the start, `--memory {row['memory']}`."
        )
    return "\n".join(lines)


def _simulated(simulation: Figures) -> Iterable[str]:
    yield (
        f"- Simulated exchangeable features, {simulation['repetitions']} repetitions of {simulation['tested']} test images, "
        "false alarms in % at alpha 5 %, by the image score, the map's maximum, and both together:"
    )
    asked = [row for row in simulation["rows"] if row["alpha"] == 0.05]
    for mode, bank in dict.fromkeys((row["mode"], row["bank"]) for row in asked):
        rows = {row["test"]: row for row in asked if (row["mode"], row["bank"]) == (mode, bank)}
        rates = ", ".join(f"{_percent(rows[test]['rate'])} ({_interval(rows[test])})" for test in ("image", "map", "both"))
        n = rows["image"]["calibration"]
        most = _percent(math.floor(0.05 * (n + 1) + 1e-9) / (n + 1))
        yield f"  - {_MODES[mode]}, {bank} images in the bank, n={n}, of which {most} can be had: {rates}"
    firsts = [row for row in simulation["rows"] if row["mode"] == "split"]
    inside = sum(row["first"]["interval"][0] <= row["alpha"] <= row["first"]["interval"][1] for row in firsts)
    yield (
        "- Split, of one test image a repetition, which makes the counts binomial: "
        f"the promised rate lies in {inside} of {len(firsts)} 95 % intervals."
    )


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _interval(row: Figures) -> str:
    return "–".join(_percent(max(0.0, bound)) for bound in row["interval"])


def _recommended_images(figures: Figures) -> str:
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
    note = "¹ compares more candidates again than a recipe does (8 beyond K)."
    return f"{_table((*header, 'in memory', 'build s'), lines)}\n\n{note}"


def _recommended_pixels(figures: Figures) -> str:
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
    return _table(header, lines)


def _peers(figures: Figures) -> str:
    found = tables.peer_table(figures["sweep"])
    if found is None:
        return "Not measured."
    rows = (["–" if cell is None else cell for cell in row] for row in found.rows)
    return f"{_table(found.header, map(tuple, rows))}\n\n{found.note}"


def _knees(figures: Figures) -> str:
    return "\n".join(f"- {words}" for words in page.knees(figures["sweep"]))


def _ms(spread: Figures) -> str:
    return f"{1000 * spread['median']:.1f}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def _runs(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s in the median of {len(seconds)} ({min(seconds):.1f} to {max(seconds):.1f})"


def _machine(figures: Figures) -> str:
    found = figures["machine"]
    packages = ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("date", "cpu", "cores", "python"))
    return f"Measured on {found['date']}: {found['cpu']}, {found['cores']} cores, Python {found['python']}, {packages}."


def _scores(row: Figures, *names: str) -> tuple[str, ...]:
    return tuple("–" if row[name] is None else f"{row[name]:.3f}" for name in ("image_auroc_knn", *names))


def _table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


_ENGINES = {
    "published": "published loop",
    "rebuilt": "IndexFlatL2 rebuilt",
    "knn": "faiss.knn",
    "knn_low_threshold": "same, lower threshold",
}
_MODES = {"split": "split", "leave_one_out": "leave one out"}
_RECIPES = ("exact", "ivf", "compact", "location", "history")

TABLES: dict[str, Callable[[Figures], str]] = {
    "bottle": _bottle,
    "magnetic_tile": _magnetic_tile,
    "time": _time,
    "kernel": _kernel,
    "kernel_facts": _kernel_facts,
    "gallery": _gallery,
    "gallery_quality": _gallery_quality,
    "gallery_facts": _gallery_facts,
    "codes": _codes,
    "gpu": _gpu,
    "durability": _durability,
    "calibration": _calibration,
    "calibration_facts": _calibration_facts,
    "sweep_images": _recommended_images,
    "sweep_pixels": _recommended_pixels,
    "sweep_peers": _peers,
    "sweep_knees": _knees,
    "machine": _machine,
}

if __name__ == "__main__":
    main()
