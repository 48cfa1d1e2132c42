"""How well it does on labeled sets, and where the time of a run goes, from main_job.json."""

from __future__ import annotations

import statistics

from benchmarks.pages.text import Figures, markdown_table, scores

_METRICS = ("image_auroc_knn", "image_auroc_map", "pixel_auroc", "aupro")


def bottle(figures: Figures) -> str:
    """All combinations of the bank's options on MVTec AD's bottle."""
    return markdown_table(
        ("normalize", "pool", "k_gallery", "image AUROC, kNN", "image AUROC, map", "pixel AUROC", "AUPRO"),
        ((row["normalize"], row["pool"], row["k_gallery"], *scores(row, *_METRICS)) for row in figures["bottle"]),
    )


def magnetic_tile(figures: Figures) -> str:
    """By resize mode and kind of defect."""
    return markdown_table(
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
                *scores(row, *_METRICS[:3], "pixel_ap", "aupro"),
            )
            for row in figures["magnetic_tile"]
            if row["resize_mode"] != "stretch" or row["kind"] == "all"
        ),
    )


def time(figures: Figures) -> str:
    """Milliseconds an image by stage, and what whole runs take."""
    scoring, wide, extraction = figures["scoring"], figures["wide_resnet50_2"], figures["extraction"]
    count = scoring["images"]
    timings = (
        (name, f"{1000 * seconds / count:.1f}", f"{1000 * wide['score_timing_s'].get(name, 0) / wide['score_images']:.1f}")
        for name, seconds in scoring["timing_s"].items()
        if name != "load"
    )
    table = markdown_table(("stage, ms per image", "efficientnet_lite0", "wide_resnet50_2"), timings)
    spread = f"{extraction['ratios'][0]:.2f} to {extraction['ratios'][-1]:.2f}"
    lines = (
        table,
        "",
        f"- Scoring {count} images takes {scoring['total_s']:.1f} s, loading included; peak memory of the process "
        f"{scoring['peak_memory_bytes'] / 2**20:.0f} MiB.",
        f"- Extracting {extraction['images']} images takes {extraction['ratio']:.2f} times their bare forward passes "
        f"(median of {len(extraction['ratios'])}, {spread}).",
        f"- With idle OpenMP threads asleep (`OMP_WAIT_POLICY=PASSIVE`, which the package sets) the run takes "
        f"{_runs(scoring['total_s_runs']['passive'])}; with spinning ones {_runs(scoring['total_s_runs']['active'])}. "
        "The difference grows with whatever else the machine has to do.",
        "- `wide_resnet50_2` (with seeded random weights, which show its cost and not its quality): "
        f"{wide['bytes_per_image'] / 1e6:.2f} MB in the bank per image, "
        f"{wide['fit_s_per_image']:.2f} s per image to extract, {wide['score_s_per_image']:.2f} s to score, peak memory "
        f"{wide['peak_memory_bytes'] / 2**20:.0f} MiB.",
    )
    return "\n".join(lines)


def machine(figures: Figures) -> str:
    """What the figures of main_job.json were measured on."""
    found = figures["machine"]
    packages = ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("date", "cpu", "cores", "python"))
    return f"Measured on {found['date']}: {found['cpu']}, {found['cores']} cores, Python {found['python']}, {packages}."


def _runs(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (median of {len(seconds)}, {min(seconds):.1f} to {max(seconds):.1f})"
