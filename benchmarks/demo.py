"""Does the main job on real images, by the commands that a user types: `python -m benchmarks.demo FOLDER`."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

from benchmarks.datasets import write_elpv
from spade_faiss.cli import main as spade_faiss


def main() -> None:
    """Fit a bank on functional solar cells, evaluate it on others and on defective ones, and say where the report is."""
    folder = Path(sys.argv[1])
    print("Solar cells in electroluminescence (ELPV, monocrystalline), from the package elpv-dataset.")
    write_elpv(folder / "cells")
    shutil.rmtree(folder / "cells.bank", ignore_errors=True)
    start = time.perf_counter()
    for line in (
        f"fit {folder}/cells/train/good --bank {folder}/cells.bank --backbone efficientnet_lite0",
        f"info {folder}/cells.bank",
        f"evaluate {folder}/cells --bank {folder}/cells.bank --out {folder}/results",
    ):
        print(f"\n$ spade-faiss {line}", flush=True)
        if code := spade_faiss(shlex.split(line)):
            sys.exit(code)
    report = (folder / "results" / "report.html").resolve()
    print(f"\nThe main job took {time.perf_counter() - start:.0f} s. Open the report: {report}")


if __name__ == "__main__":
    main()
