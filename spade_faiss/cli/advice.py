"""The command that advises: recommend."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from spade_faiss.cli.options import Commands, add_settings, read_settings
from spade_faiss.cli.text import Output
from spade_faiss.core.declaring import ALL
from spade_faiss.core.extraction import Extraction
from spade_faiss.diagnostics.workload import Workload


def register(commands: Commands) -> None:
    """Add the command of this module."""
    command = commands.add(
        "recommend",
        _recommend,
        "say which recipe to take for so many normal images, what it costs and what it loses, from measurements",
        "spade-faiss recommend --images 100000 --k 5 --memory 8GiB",
    )
    add_settings(command, Workload)
    command.add_argument("--extrapolate", action="store_true", help="answer beyond what was measured, too")
    command.add_argument("--out", metavar="FILE", help="write the recipe to a YAML file, to be passed to --recipe")


def _recommend(arguments: argparse.Namespace) -> Output:
    from spade_faiss.core.files import write_bytes
    from spade_faiss.core.memory import format_bytes
    from spade_faiss.diagnostics.recommend import recommend
    from spade_faiss.search.native.extension import usable_simd_level

    advice = recommend(read_settings(arguments, Workload), extrapolate=arguments.extrapolate, simd_level=usable_simd_level())
    recipe = advice.recipe
    lines = [
        f"{recipe.name}: {advice.image_ms + advice.pixel_ms:.3g} ms an image: image search {advice.image_ms:.3g}, pixel search "
        f"{advice.pixel_ms:.3g}; the backbone is not counted",
        f"  memory {format_bytes(advice.memory_bytes)} at the peak, disk {format_bytes(advice.disk_bytes)}",
        f"  finds {100 * advice.recall:.1f} % of the nearest normals; loses at most {advice.loss:.4f} of AUROC and AUPRO",
        *(f"  {line}" for line in advice.evidence),
    ]
    if arguments.out:
        write_bytes(Path(arguments.out), advice.to_yaml().encode())
    use = recipe.name if advice.is_packaged else arguments.out
    if use:
        lines.append(f"use it: spade-faiss index BANK --recipe {use}")
        if advice.store != Extraction().store:
            lines.append(f"and store the bank by: spade-faiss convert BANK OUT --store {advice.store}")
        if read_settings(arguments, Workload).k == ALL:
            lines.append("and score with: --k-gallery all")
    else:
        lines += ["it does not come with the package; --out FILE writes it:", *advice.to_yaml().splitlines()]
    return {**asdict(advice), "packaged": advice.is_packaged}, lines
