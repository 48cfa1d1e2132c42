"""Fills the generated parts of a page: `GENERATED[NAME]` computes what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from benchmarks import gpu
from benchmarks.pages import (
    cards,
    cluster,
    deployment,
    few_shots,
    products,
    quality,
    reference,
    serve,
    speed,
    stores,
    sweep,
    tiles,
    tuning,
    upkeep,
    watch,
    whole_bank,
    windows,
)
from benchmarks.pages.text import Figures
from benchmarks.sweep import page as sweep_page

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"

_PART = re.compile(r"<!-- (?P<name>[a-z]\w*) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)
# Each of these is a file of benchmarks/results/; main_job.json is the rest.
_FILES = (
    *(
        "codes",
        "gpu",
        "durability",
        "calibration",
        "kernel",
        "gallery",
        "whole_bank",
        "few_shots",
        "products",
        "windows",
        "tiles",
        "deployment",
        "tuning",
        "tuning_inputs",
        "serve",
        "stores",
        "cluster",
    ),
)


def pages() -> list[Path]:
    """README and every page of the documentation."""
    return [README, *sorted(DOCS.rglob("*.md"))]


def filled(text: str) -> str:
    """A page with all of its generated parts computed anew.

    Raises:
        KeyError: for a part that nothing generates.
    """
    return _PART.sub(lambda part: f"<!-- {part['name']} -->\n{_content(part['name'])}\n<!-- /{part['name']} -->", text)


def names_in(text: str) -> list[str]:
    """The names of a page's generated parts."""
    return [part["name"] for part in _PART.finditer(text)]


@cache
def load_figures() -> Figures:
    """Everything that was measured."""
    figures: Figures = json.loads((RESULTS / "main_job.json").read_bytes())
    figures |= {name: json.loads((RESULTS / f"{name}.json").read_bytes()) for name in _FILES}
    if (RESULTS / "watch.json").is_file():
        figures["watch"] = json.loads((RESULTS / "watch.json").read_bytes())
    figures["cards"] = cards.load(RESULTS / "gpu")
    figures["sweep"] = sweep_page.load(RESULTS / "sweep" / sweep_page.ROWS)
    figures["sections"] = sweep_page.sections_of(figures["sweep"])  # draws every plot: once is enough
    return figures


@cache
def _content(name: str) -> str:
    return GENERATED[name](load_figures())


GENERATED: dict[str, Callable[[Figures], str]] = {
    "readme_quality": whole_bank.presets,
    "presets_quality": whole_bank.presets,
    "readme_speed": speed.summary,
    "bottle": quality.bottle,
    "magnetic_tile": quality.magnetic_tile,
    "time": quality.time,
    "machine": quality.machine,
    "kernel": speed.kernel,
    "kernel_facts": speed.kernel_facts,
    "gallery": speed.gallery,
    "gallery_quality": speed.gallery_quality,
    "gallery_facts": speed.gallery_facts,
    "codes": speed.codes,
    "gpu": speed.gpu,
    "readme_gpu": cards.summary,
    "gpu_lines": cards.lines,
    "gpu_results": cards.results,
    "durability": upkeep.durability,
    "cluster_equal": cluster.equal,
    "cluster_overhead": cluster.overhead,
    "cluster_facts": cluster.facts,
    "cluster_owners": cluster.owners,
    "cluster_at_scale": cluster.at_scale,
    "calibration": upkeep.calibration,
    "calibration_facts": upkeep.calibration_facts,
    "readme_whole_bank": whole_bank.summary,
    "whole_bank_speed": whole_bank.speed,
    "whole_bank_growth": whole_bank.growth,
    "whole_bank_quality": whole_bank.quality,
    "few_shots": few_shots.table,
    "products": products.table,
    "products_left_out": products.left_out,
    "watch": watch.facts,
    "tiles_quality": tiles.quality,
    "tiles_large": tiles.large,
    "windows_speed": windows.speed,
    "windows_growth": windows.growth,
    "windows_dino": windows.dino,
    "deployment_aims": deployment.aims,
    "deployment_passes": deployment.passes,
    "deployment_cold": deployment.cold,
    "deployment_environment": deployment.environment,
    "deployment_warm": deployment.warm,
    "deployment_folder": deployment.folder,
    "deployment_fitting": deployment.fitting,
    "deployment_peers": deployment.peers,
    "deployment_peer_fits": deployment.peer_fits,
    "deployment_decoders": deployment.decoders,
    "deployment_equality": deployment.equality,
    "serve_load": serve.load,
    "serve_memory": serve.memory,
    "serve_held": serve.held,
    "api_operations": serve.operations,
    "api_fields": serve.picture_fields,
    "stores_quality": stores.quality,
    "stores_losses": stores.losses,
    "stores_cost": stores.cost,
    "stores_large": stores.large,
    "sweep_images": sweep.recommended_images,
    "sweep_pixels": sweep.recommended_pixels,
    "sweep_peers": sweep.peers,
    "sweep_knees": sweep.knees,
    "sweep_image_plots": sweep.image_plots,
    "sweep_pixel_plots": sweep.pixel_plots,
    "sweep_scaling": sweep.scaling,
    "sweep_memory": sweep.memory,
    "sweep_searched": sweep.searched,
    "tuning_table": tuning.table,
    "tuning_choices": tuning.choices,
    "tuning_aims": tuning.aims,
    "tuning_inputs": tuning.inputs,
    "plans": lambda _: gpu.plans(),
    "command_line": lambda _: reference.command_line(),
    "recipes": lambda _: reference.recipes(),
    "presets": lambda _: reference.presets(),
    "search_settings": lambda _: reference.search_settings(),
}
