"""README's tables, computed from benchmarks/results/. Run as `python -m benchmarks.readme`; a test checks that they agree."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "main_job.json"

Figures = dict[str, Any]


def main() -> None:
    """Write the tables into README."""
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """README with every table between `<!-- name -->` and `<!-- /name -->` computed anew."""
    figures: Figures = json.loads(RESULTS.read_bytes())
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
        ("framing", "kind", "defective", "unseen", "image AUROC, kNN", "image AUROC, map", "pixel AUROC", "pixel AP", "AUPRO"),
        (
            (
                row["framing"],
                row["kind"],
                row["images"],
                row["unseen"],
                *_scores(row, "image_auroc_map", "pixel_auroc", "pixel_ap", "aupro"),
            )
            for row in figures["magnetic_tile"]
            if row["framing"] != "stretch" or row["kind"] == "all"
        ),
    )


def _time(figures: Figures) -> str:
    scoring, wide, extraction = figures["scoring"], figures["wide_resnet50_2"], figures["extraction"]
    count = scoring["images"]
    stages = (
        (name, f"{1000 * seconds / count:.1f}", f"{1000 * wide['score_stage_s'].get(name, 0) / wide['score_images']:.1f}")
        for name, seconds in scoring["stage_s"].items()
        if name != "load"
    )
    table = _table(("stage, ms an image", "efficientnet_lite0", "wide_resnet50_2"), stages)
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


TABLES: dict[str, Callable[[Figures], str]] = {
    "bottle": _bottle,
    "magnetic_tile": _magnetic_tile,
    "time": _time,
    "machine": _machine,
}

if __name__ == "__main__":
    main()
