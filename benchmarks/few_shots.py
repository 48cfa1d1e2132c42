"""Measures what a bank of a few normal images finds, and what views of them add.

Run as `python -m benchmarks.few_shots --data FOLDER --out benchmarks/results`, FOLDER holding the real sets. The images of a
bank are drawn by fixed seeds, the same ones with and without views; fewer shots are the first of more.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.process import machine
from benchmarks.sweep.sets import BACKBONE, RESIZE_MODES, PixelSet, Places, pixel_set
from spade_faiss import Backbone, Detector, load_backbone, load_recipe
from spade_faiss.core.declaring import ALL
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.features.datasets import load_dataset
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics
from spade_faiss.workflows.extract import extract

Row = dict[str, Any]

SETS = ("mvtec_screw", "mvtec_bottle")
SHOTS = (1, 2, 4, 8)
AUGMENTS = (None, "rotate=8,flip,brightness=0.8:1.2")
SEEDS = (0, 1, 2)
# One picture has one nearest normal, and a few are searched in all: the settings that a bank of one image allows, for all.
METHOD = Method(k_image=1, k_gallery=ALL)
RUN = Run(memory="6GiB")


def main() -> None:
    """Measure all sets, shots and seeds, or those that are named, and write them to few_shots.json."""
    parser = parser_of(__doc__)
    parser.add_argument("--scratch", type=Path, help="where features of test images are kept for the next run")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--shots", nargs="+", type=int, default=SHOTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args()
    figures: Row = {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        places = Places(arguments.data, arguments.scratch or Path(temporary))
        places.scratch.mkdir(parents=True, exist_ok=True)
        for name in arguments.sets:
            for row in _measure(name, places, arguments.shots, arguments.seeds):
                print(json.dumps(row), flush=True)
                figures["rows"].append(row)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "few_shots.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _measure(name: str, places: Places, shots: tuple[int, ...], seeds: tuple[int, ...]) -> Iterator[Row]:
    """Yield what is found with so many shots of a set, drawn by each seed, with and without views."""
    assert places.data is not None
    chosen = pixel_set(name, places)
    backbone = load_backbone(BACKBONE, preprocess=Preprocess(resize_mode=RESIZE_MODES[name]))
    normals = [record.path for record in load_dataset(places.data / name).train]
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(normals))
        for count in shots:
            paths = [normals[number] for number in order[:count].tolist()]
            for augment in AUGMENTS:
                found = _score(chosen, paths, backbone, augment, places)
                yield {"set": name, "shots": count, "seed": seed, "augment": augment or "", **found}


def _score(chosen: PixelSet, paths: list[Path], backbone: Backbone, augment: str | None, places: Places) -> Row:
    """What a bank of these images finds in the test images of a set."""
    folder = places.scratch / "few.bank"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    extraction = Extraction(backbone=backbone, augment=augment, network=False)
    bank = extract(paths, bank=folder, preset="spade", extraction=extraction).bank
    fit_s, timings = time.perf_counter() - start, Timings()
    scores = Detector(bank, load_recipe("exact"), METHOD, RUN).score_features(chosen.tests, timings=timings)
    assert chosen.defective is not None
    assert chosen.masks is not None
    pixel = localization_metrics(chosen.masks, scores.maps, chosen.valid)
    return {
        "entries": len(bank),
        "bank_bytes": bank.bytes_on_disk,
        "fit_s": fit_s,
        "ms": 1000 * timings.seconds["pixel search"] / len(scores),
        **{name: detection_metrics(chosen.defective, scores.image_scores[name]).auroc for name in ("knn", "top")},
        "pixel_auroc": pixel.auroc,
        "aupro": pixel.aupro,
    }


if __name__ == "__main__":
    main()
