"""One picture in a new process, and the size of the environment that it needs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path

from benchmarks.deployment.measure import ROOT, ProcessCost, Row, folder_bytes, in_turn, run_alone, spreads
from benchmarks.deployment.places import PRESETS, Places, no_row

_LARGE = 5 << 20


def cold(places: Places) -> Iterator[Row]:
    """What `score ONE.png` costs in a process of its own, in an environment without torch and by torch in the full one."""
    banks, test = {preset: places.bank("elpv", preset) for preset in PRESETS}, places.dataset("elpv").test
    picture = next(record.path for record in test if record.defective)
    pythons = {"torch": sys.executable}
    if places.edge_python is not None:
        pythons = {"onnxruntime": places.edge_python, "openvino": places.edge_python, **pythons}
    out = places.scratch / "cold"

    def run(engine: str, preset: str) -> ProcessCost:
        words = ("score", picture, "--bank", banks[preset], "--out", out / engine, "--quiet", "--engine", engine)
        return run_alone((pythons[engine], "-m", "spade_faiss", *words))

    ways = list(product(pythons, PRESETS))
    found = in_turn({" ".join(way): partial(run, *way) for way in ways}, places.repeats)
    for (engine, preset), costs in zip(ways, found.values(), strict=True):
        environment = "full" if engine == "torch" else "edge"
        yield {"engine": engine, "preset": preset, "environment": environment, "normals": 490, **spreads(costs)}
    if places.edge_python is None:
        yield no_row("the engines that need no torch", "no environment without torch was named: --edge-python")


def environment(places: Places) -> Iterator[Row]:
    """The size on disk of new environments with this project's wheel, at the versions that it is tested with."""
    wheel = _wheel(places.scratch / "wheel")
    for extras in ("edge", "openvino", "cpu"):
        folder = places.scratch / f"environment-{extras}"
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        empty = folder_bytes(folder)
        # The core needs a FAISS, which the extra openvino does not name.
        others = ["faiss-cpu"] if extras == "openvino" else []
        wanted = ["--constraint", str(ROOT / "constraints.txt"), f"{wheel}[{extras}]", *others]
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *wanted], check=True)
        sizes = {path.name: folder_bytes(path) for path in packages.iterdir() if path.is_dir()}
        largest = sorted((size, name) for name, size in sizes.items() if size >= _LARGE)[::-1]
        yield {
            "extras": extras,
            "bytes": folder_bytes(folder),
            "empty_bytes": empty,
            "largest": {name: size for size, name in largest},
        }


def _wheel(folder: Path) -> Path:
    """Build the wheel from what is committed: the working tree may hold older builds."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(source, filter="data")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))
