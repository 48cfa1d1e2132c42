"""Measures tiles: what they are worth beside a picture that is shrunk, and what a large picture costs.

Run as `python -m benchmarks.tiles --data FOLDER --out benchmarks/results`, FOLDER holding mvtec_screw. What is compared runs in
turn, in one process; memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.process import machine, peak_bytes, resident_bytes, seconds, spread
from spade_faiss import Detector, evaluate, fit
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.features.datasets import find_images, survey
from spade_faiss.features.tiles import TileGrid

Row = dict[str, Any]

SET = "mvtec_screw"
# The screws are 512 x 512 pixels: whole at 224 (the picture is a square, stretching keeps its aspect ratio), and in tiles.
WAYS = {
    "shrunk": Preprocess(resize_mode="stretch", size=224),
    "tiles": Preprocess(tile=224, overlap=32),
}
NEIGHBORS = ("anywhere", "same-place")
BACKBONES = ("efficientnet_lite0",)
TIMED, REPEATS = 12, 5

# Pictures of 0.75, 3 and 12 megapixels: a quarter, a half and all of 4000 x 3000.
LARGE, SHARES, NORMALS = (4000, 3000), (4, 2, 1), 5
LARGE_BACKBONE, LARGE_TILES, MEMORY = "efficientnet_lite0", Preprocess(tile=448, overlap=64), "1GiB"


def main() -> None:
    """Measure both sections, or the one that --only names, and write them to tiles.json; the other stays as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of results")
    parser.add_argument("--data", type=Path, help="the folder of the real sets")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--child", nargs=2, metavar=("BANK", "IMAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(score_one(*map(Path, arguments.child))))
        return
    if arguments.out is None or arguments.data is None:
        parser.error("--out and --data are required")
    target = arguments.out / "tiles.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    for name in arguments.only:
        figures[name] = {"machine": machine(), "rows": []}
        with tempfile.TemporaryDirectory() as scratch:
            for row in SECTIONS[name](arguments.data / SET, Path(scratch)):
                print(name, json.dumps(row), flush=True)
                figures[name]["rows"].append(row)
        target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def quality(data: Path, scratch: Path, backbones: Sequence[str] = BACKBONES) -> Iterator[Row]:
    """What tiles find that a shrunk picture does not show, and the milliseconds that they take; each map at its own size."""
    for backbone in backbones:
        detectors: dict[tuple[str, str], Detector] = {}
        for way, preprocess in WAYS.items():
            bank = scratch / f"{backbone}-{way}.bank"
            extraction = Extraction(backbone=backbone, preprocess=preprocess)
            fit(data / "train/good", bank=bank, preset="spade", extraction=extraction, calibrate=False)
            for neighbors in NEIGHBORS if way == "tiles" else NEIGHBORS[:1]:
                detectors[way, neighbors] = Detector.open(bank, method=Method(tile_neighbors=neighbors))
        ms = _ms_in_turn(detectors, data)
        for (way, neighbors), detector in detectors.items():
            metrics = evaluate(data, bank=detector, out=scratch / "out").metrics
            assert metrics is not None
            assert metrics.pixel is not None
            yield {
                "set": SET,
                "backbone": backbone,
                "way": way,
                "neighbors": neighbors,
                "entries": len(detector.bank),
                "bank_bytes": detector.bank.bytes_on_disk,
                "image_auroc_knn": metrics.by_knn.auroc,
                "image_auroc_max": metrics.by_map.auroc,
                "image_auroc_top": metrics.by_top.auroc,
                "pixel_auroc": metrics.pixel.auroc,
                "aupro": metrics.pixel.aupro,
                "ms": spread(ms[way, neighbors]),
            }


def _ms_in_turn(detectors: dict[tuple[str, str], Detector], data: Path) -> dict[tuple[str, str], list[float]]:
    """Milliseconds a picture of each detector in each repeat, after a round that warms up."""
    images = [record.path for record in survey(data / "test").records][:TIMED]
    found: dict[tuple[str, str], list[float]] = {name: [] for name in detectors}
    for repeat in range(-1, REPEATS):
        for name, detector in detectors.items():
            took = seconds(lambda detector=detector: detector.score(images))  # type: ignore[misc]
            if repeat >= 0:
                found[name].append(1000 * took / len(images))
    return found


def large(data: Path, scratch: Path) -> Iterator[Row]:
    """What pictures of three sizes cost, each beside a bank of pictures of its size: time follows the number of tiles."""
    good = [record.path for record in survey(data / "train/good").records][: NORMALS + 1]
    for share in SHARES:
        width, height = LARGE[0] // share, LARGE[1] // share
        folder = scratch / f"{width}x{height}"
        for number, path in enumerate(good):
            name = f"good/{number}.png" if number < NORMALS else "new/query.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(enlarged(path, width, height)).save(folder / name)
        bank, extraction = folder / "bank", Extraction(backbone=LARGE_BACKBONE, preprocess=LARGE_TILES)
        fit(folder / "good", bank=bank, preset="spade", extraction=extraction, calibrate=False)
        command = [sys.executable, "-m", "benchmarks.tiles", "--child", str(bank), str(folder / "new/query.png")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        tiles = len(TileGrid.of((width, height), LARGE_TILES))
        yield {
            "width": width,
            "height": height,
            "tiles": tiles,
            "backbone": LARGE_BACKBONE,
            "normals": NORMALS,
            "memory": MEMORY,
            **json.loads(done.stdout.splitlines()[-1]),
        }


def enlarged(path: Path, width: int, height: int) -> npt.NDArray[np.uint8]:
    """A picture of any size that is made of a real one, mirrored at its borders again and again; nothing of it is resized."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return np.pad(pixels, ((0, max(0, height - len(pixels))), (0, max(0, width - pixels.shape[1])), (0, 0)), "symmetric")[
        :height, :width
    ]


def score_one(bank: Path, image: Path) -> Row:
    """Score one picture again and again; runs in a process of its own, whose memory grows by what scoring takes."""
    detector = Detector.open(bank, run=Run(memory=MEMORY))
    _ = detector.backbone
    before = resident_bytes()
    root, records = find_images(image)
    runs = []
    for repeat in range(REPEATS + 1):
        took = seconds(lambda: [None for _ in detector.stream(Timings(), "score")(root, records)])
        runs += [1000 * took] if repeat else []
    return {"batch": detector.plan.batch, "bytes_grown": peak_bytes() - before, "ms": spread(runs)}


SECTIONS = {"quality": quality, "large": large}

if __name__ == "__main__":
    main()
