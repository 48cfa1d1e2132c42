"""The figures of the main job: quality on real sets, time and memory of extraction and scoring.

Run as `python -m benchmarks.main_job --data FOLDER --out benchmarks/results`, FOLDER holding `mvtec_bottle` and
`magnetic_tile`. Every command runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser_of

PACKAGES = ("spade-faiss", "faiss-cpu", "torch", "torchvision", "timm", "numpy", "scipy", "h5py")
# The figures are of the method as its paper has it, unless they say otherwise.
SPADE = ("--preset", "spade")
LITE0 = ("--backbone", "efficientnet_lite0", *SPADE)
REPEATS = 5


def main() -> None:
    """Measure everything, or what --only names, and write main_job.json; other figures in it stay as they are."""
    arguments = parser_of(__doc__, FIGURES).parse_args()
    target = arguments.out / "main_job.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    figures["machine"] = machine()
    for name in arguments.only:
        dataset, measure = FIGURES[name]
        with tempfile.TemporaryDirectory() as scratch:
            figures[name] = measure(arguments.data / dataset, Path(scratch))
    arguments.out.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": names[0],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def bottle_quality(dataset: Path, scratch: Path) -> list[dict[str, Any]]:
    """All four combinations of `normalize` and `pool`, and a gallery of 50."""
    rows = []
    for normalize in ("none", "l2"):
        for pool in ("1", "3"):
            bank = scratch / f"bottle-{normalize}-{pool}.bank"
            cli("fit", dataset / "train/good", "--bank", bank, *LITE0, "--normalize", normalize, "--pool", pool)
            for k_gallery in ("5", "50"):
                found = evaluate(dataset, bank, scratch, "--k-gallery", k_gallery)
                rows.append(
                    {"normalize": normalize, "pool": int(pool), "k_gallery": int(k_gallery), **summary(found["metrics"])}
                )
                print(rows[-1], flush=True)
    return rows


def tile_quality(dataset: Path, scratch: Path) -> list[dict[str, Any]]:
    """The resize modes, all defects together and by kind."""
    rows = []
    for resize_mode in ("crop", "stretch", "letterbox"):
        bank = scratch / f"tile-{resize_mode}.bank"
        cli("fit", dataset / "train/good", "--bank", bank, *LITE0, "--resize-mode", resize_mode)
        metrics = evaluate(dataset, bank, scratch)["metrics"]
        for kind, found in {"all": metrics, **metrics["kinds"]}.items():
            counts = {"images": found["images"], "unseen": found["not_visible"]}
            rows.append({"resize_mode": resize_mode, "kind": kind, **counts, **summary(found)})
            print(rows[-1], flush=True)
    return rows


def extraction_overhead(dataset: Path, scratch: Path) -> dict[str, Any]:
    """Wall time of a whole extraction over the time of its forward passes alone, measured in turn in one process."""
    return script(
        f"""
        import json, time
        from pathlib import Path
        import numpy as np
        from spade_faiss.features.loading import load_backbone
        from spade_faiss.core.memory import BATCH_SIZE
        from spade_faiss.core.extraction import Extraction
        from spade_faiss.workflows.fit import fit
        from spade_faiss.features.datasets import find_images
        from spade_faiss.features.pictures import load_image, to_input
        backbone = load_backbone("efficientnet_lite0")
        images = {str(dataset / "train/good")!r}
        preprocess = backbone.source.preprocess
        inputs = np.stack([to_input(load_image(record, preprocess).picture, preprocess) for record in find_images(images)[1]])
        batches = [inputs[start : start + BATCH_SIZE] for start in range(0, len(inputs), BATCH_SIZE)]
        rows = []
        for repeat in range({REPEATS} + 1):
            start = time.perf_counter()
            for batch in batches:
                backbone(batch)
            forward_s = time.perf_counter() - start
            start = time.perf_counter()
            bank = Path({str(scratch)!r}) / f"{{repeat}}.bank"
            done = fit(images, bank=bank, extraction=Extraction(backbone=backbone), preset="spade", calibrate=False)
            extract_s = time.perf_counter() - start
            if repeat:  # the first one warms up
                rows.append(dict(forward_s=forward_s, extract_s=extract_s, timing_s=done.timing_s))
        ratios = sorted(row["extract_s"] / row["forward_s"] for row in rows)
        print(json.dumps(dict(images=len(inputs), ratio=ratios[len(ratios) // 2], ratios=ratios, repeats=rows)))
        """
    )


def scoring_cost(dataset: Path, scratch: Path) -> dict[str, Any]:
    """Time and peak memory of scoring bottle's test images, and how much slower it is if idle threads spin."""
    bank = scratch / "bottle.bank"
    cli("fit", dataset / "train/good", "--bank", bank, *LITE0)
    runs: dict[str, list[dict[str, Any]]] = {"passive": [], "active": []}
    for _ in range(REPEATS):
        for policy, found in runs.items():
            # The package sets PASSIVE unless the variable is set.
            environment = {} if policy == "passive" else {"OMP_WAIT_POLICY": "ACTIVE"}
            words = ("score", dataset / "test", "--bank", bank, "--out", scratch / "scored")
            numbers = cli(*words, environment=environment)
            found.append({"peak_memory_bytes": numbers["peak_memory_bytes"], **numbers["time"]})
    middle = {policy: sorted(found, key=lambda run: float(run["total_s"]))[len(found) // 2] for policy, found in runs.items()}
    return {
        "images": numbers["images"],
        **middle["passive"],
        "active_over_passive": middle["active"]["total_s"] / middle["passive"]["total_s"],
        "total_s_runs": {policy: [run["total_s"] for run in found] for policy, found in runs.items()},
    }


def wide_resnet(dataset: Path, scratch: Path) -> dict[str, Any]:
    """Bytes and seconds an image of the default backbone, with seeded random weights so that nothing is downloaded."""
    weights = scratch / "wide_resnet50_2.pt"
    script(
        f"""
        import torch, torchvision
        torch.manual_seed(0)
        torch.save(torchvision.models.wide_resnet50_2().state_dict(), {str(weights)!r})
        print("{{}}")
        """
    )
    bank = scratch / "wide.bank"
    fitted = cli("fit", dataset / "train/good", "--bank", bank, "--weights", weights, *SPADE, "--no-calibrate")
    scored = cli("score", dataset / "test", "--bank", bank, "--out", scratch / "wide")
    return {
        "bytes_per_image": fitted["bytes"] / fitted["images"],
        "fit_s_per_image": fitted["time"]["total_s"] / fitted["images"],
        "score_s_per_image": scored["time"]["total_s"] / scored["images"],
        "score_timing_s": scored["time"]["timing_s"],
        "score_images": scored["images"],
        "peak_memory_bytes": scored["peak_memory_bytes"],
    }


def evaluate(dataset: Path, bank: Path, scratch: Path, *options: str) -> dict[str, Any]:
    """The report.json of an evaluation."""
    out = scratch / "evaluated"
    cli("evaluate", dataset, "--bank", bank, "--out", out, *options)
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return found


def summary(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers that tables show."""
    pixel = metrics["pixel"] or {}
    return {
        "image_auroc_knn": metrics["by_knn"]["auroc"],
        "image_auroc_map": metrics["by_map"]["auroc"],
        "pixel_auroc": pixel.get("auroc"),
        "pixel_ap": pixel.get("ap"),
        "aupro": pixel.get("aupro"),
    }


def cli(*words: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a spade-faiss command in a process of its own; its JSON."""
    command = [sys.executable, "-m", "spade_faiss", *map(str, words), "--json", "--quiet"]
    return _run(command, environment or {})


def script(source: str) -> dict[str, Any]:
    """Run a Python script in a process of its own; the JSON it prints."""
    return _run([sys.executable, "-c", textwrap.dedent(source)], {})


def _run(command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


FIGURES: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "bottle": ("mvtec_bottle", bottle_quality),
    "magnetic_tile": ("magnetic_tile", tile_quality),
    "extraction": ("mvtec_bottle", extraction_overhead),
    "scoring": ("mvtec_bottle", scoring_cost),
    "wide_resnet50_2": ("mvtec_bottle", wide_resnet),
}

if __name__ == "__main__":
    main()
