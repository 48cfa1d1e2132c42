"""How fast exact search and the other recipes are, from kernel.json, gallery.json, codes.json and gpu.json."""

from __future__ import annotations

import statistics

from benchmarks.pages.text import Figures, markdown_table, mebibytes, milliseconds

_ENGINES = {
    "published": "published loop",
    "rebuilt": "IndexFlatL2 rebuilt",
    "knn": "faiss.knn",
    "knn_low_threshold": "faiss.knn, lower threshold",
}
_RECIPES = ("exact", "ivf", "compact", "location", "history")
_SHAPES = {"wrn50": "wide_resnet50_2", "lite0": "efficientnet_lite0"}


def summary(figures: Figures) -> str:
    """README's table: the exact pixel search of one image at a time."""
    rows = (
        (
            _SHAPES[row["set"]],
            row["k"],
            f"{1000 * row['s_per_image']['native']['median']:.0f} ms",
            *(
                f"{1000 * row['s_per_image'][name]['median']:.0f} ms ({row['times_that_of'][name]:.1f} times)"
                for name in ("knn", "faiss")
            ),
        )
        for row in figures["kernel"]["speed"]
        if row["batch"] == 1 and row["set"] in _SHAPES
    )
    return markdown_table(("maps of", "neighbors", "our kernel", "`faiss.knn`", "ours by FAISS"), rows)


def kernel(figures: Figures) -> str:
    """Milliseconds per image by the kernel, and how many times as long others take."""
    rows = []
    for row in figures["kernel"]["speed"]:
        others = (
            f"{1000 * row['s_per_image'][name]['median']:.0f} ({row['times_that_of'][name]:.1f})"
            for name in ("knn", "knn_low_threshold", "faiss")
        )
        rows.append((row["set"], row["k"], row["batch"], f"{1000 * row['s_per_image']['native']['median']:.0f}", *others))
    return markdown_table(("shapes", "K", "batch", "kernel", "faiss.knn", "faiss.knn, lower threshold", "exact by FAISS"), rows)


def kernel_facts(figures: Figures) -> str:
    """Where the kernel's time goes, and that it misses nothing."""
    found = figures["kernel"]
    machine, equal = found["machine"], found["equality"]
    lines = [
        f"- Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} threads, SIMD level `{found['simd_level']}`, "
        f"faiss-cpu {machine['faiss-cpu']}. Others used the machine at the same time."
    ]
    for row in found["parts"]:
        if row["level"] == "level1" and row["k"] == 5 and (row["components"] is not None or row["set"] == "wrn50"):
            how = "as they are" if row["components"] is None else f"shortened to {row['components']} components"
            rate = row["filter_multiply_adds_per_s"]
            stands_for = row["float32_flops_that_it_stands_for"] / 1e9
            lines.append(
                f"- {row['set']}, finest level, K=5, one thread, vectors {how}: packing takes {row['pack_rows_ms']:.1f} ms "
                f"for the rows and {row['pack_queries_ms']:.1f} ms for the queries, the filter {row['filter_ms']:.1f} ms, "
                f"refining {row['refine_ms']:.1f} ms. The filter makes {rate / 1e9:.0f} G multiply-adds per second, which "
                f"replace {stands_for:.0f} GFLOP/s of float32; {row['evaluated_per_query']:.0f} vectors "
                "are evaluated per query."
            )
    hostile = dict.fromkeys(row["set"] for row in equal if "channels" in row)
    features = [row for row in equal if "channels" not in row]
    dense = ", ".join(f"{100 * row['dense_share']:.1f} % ({row['set']})" for row in features)
    lines.append(
        f"- {sum(row['queries'] for row in equal):,} queries were compared with float64: {', '.join(hostile)}; and features "
        f"({', '.join(row['set'] for row in features)}). No nearest vector was missed; distances are off by at most "
        f"{max(row['worst'] for row in equal):.0e} of themselves. A quarter of a block or more had to be evaluated for {dense} "
        "of the queries."
    )
    return "\n".join(lines)


def gallery(figures: Figures) -> str:
    """Milliseconds per image of every engine, and how many times as fast as gathered faiss.knn ours are."""
    rows = []
    for row in figures["gallery"]["speed"]:
        spent = {name: f"{1000 * found['median']:.0f}" for name, found in row["s_per_image"].items()}
        ours = (f"{spent[name]} ({row['times_that_of'][name]['knn']:.2f})" for name in _RECIPES)
        rows.append((row["set"], row["k"], row["batch"], *(spent.get(name, "–") for name in _ENGINES), *ours))
    return markdown_table(("shapes", "K", "batch", *_ENGINES.values(), "exact by FAISS", *_RECIPES[1:]), rows)


def gallery_quality(figures: Figures) -> str:
    """How far the distances of approximate recipes are above the true ones."""
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
    table = markdown_table(("recipe", "K", "found exactly", "excess, 90 % below", "99 % below", "99.9 % below"), rows)
    return f"{table}\n\nPixel AUROC on bottle (and what it differs from exact's by): {'; '.join(lines)}."


def gallery_facts(figures: Figures) -> str:
    """What else was measured of the search by FAISS: efficiency, equality, memory, growth with the bank."""
    found = figures["gallery"]
    profile, (small, large), equal = found["profile"][0], found["memory"], found["equal"][0]
    parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in profile["of_threads_time"].items() if share > 0.01)
    lines = [
        f"- `exact` by FAISS at K={profile['k']} computes {profile['gflop_per_s']['exact']['median']:.0f} GFLOP/s, "
        f"{100 * profile['of_peak']['numpy']:.0f} % of what a matrix product alone reaches. The threads spend their time as "
        f"follows: {parts}.",
        f"- `exact` by FAISS gives identical bits for {', '.join(equal['identical'])}; "
        f"it is at most {equal['off_float64']:.1g} off float64.",
        f"- With `--memory 1GiB`, K={small['k']} and wrn50, the process holds {mebibytes(small['peak_bytes'])} at the peak "
        f"with {small['normals']} normals and {mebibytes(large['peak_bytes'])} with {large['normals']}, of which "
        f"{mebibytes(small['start_bytes'])} and {mebibytes(large['start_bytes'])} were there at the start.",
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
        spent = "; ".join(
            f"{row['normals']} normals {milliseconds(row['image search'])} + {milliseconds(row['pixel search'])}"
            for row in rows
        )
        where = "dropped from the system's cache before each image" if cold else "in the system's cache"
        lines.append(
            f"- Milliseconds per image of image search + pixel search by the size of the bank (lite0, K=5, `--memory 256MiB`, "
            f"the bank's files {where}, while the machine ran tests, too): {spent}."
        )
    return "\n".join(lines)


def codes(figures: Figures) -> str:
    """What `compact` was chosen from."""
    rows = figures["codes"]["codes"]
    return markdown_table(
        ("code", "ms per image", "found exactly", "excess, 99 % below"),
        (
            (row["code"], f"{statistics.median(row['ms']):.0f}", f"{100 * row['found']:.1f} %", f"{row['excess_99']:.3f}")
            for row in rows
        ),
    )


def gpu(figures: Figures) -> str:
    """The torch search on the CPU, a line for each number of neighbors."""
    rows = figures["gpu"]["torch"]
    lines = []
    for k in sorted({row["k"] for row in rows}):
        of_k = [row for row in rows if row["k"] == k]
        spent = {name: sum(row["s_per_image"][name] for row in of_k) for name in of_k[0]["s_per_image"]}
        torch, faiss = (spent[name] / spent["knn"] for name in ("torch", "faiss"))
        same = "the same to the last bit" if all(row["bfloat16_same"] for row in of_k) else "something else"
        lines.append(
            f"- On a CPU, with wrn50 and K={k}, the torch search takes {torch:.2f} times as long as `faiss.knn` on the "
            f"gathered gallery, and `engine=faiss` {faiss:.2f} times (measured in turn, while others used the machine). With "
            f"`product=bfloat16` it finds {same}."
        )
    return "\n".join(lines)
