"""Measures what tuning is worth: settings are chosen by spoilt copies of normal pictures, and only then real defects are seen.

Run as `python -m benchmarks.tuning --data FOLDER --out benchmarks/results --scratch DIR`. FOLDER holds sets laid out as MVTec
AD; --sets names others than the usual six. After an interruption, the same command goes on; a set that is in tuning.json is not
measured again. The search never sees a test folder: it gets the names of the files in train/good, and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.datasets import write_elpv
from benchmarks.process import machine
from benchmarks.sweep.sets import BACKBONE, RESIZE_MODES
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.origin import Origin
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.presets import of_few
from spade_faiss.core.settings import Run, Tuning
from spade_faiss.core.signed_json import hash_json
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import load_dataset
from spade_faiss.features.layout import Layout
from spade_faiss.features.loading import load_backbone
from spade_faiss.index.build import build_index
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics
from spade_faiss.search.recipe import load_recipe
from spade_faiss.tuning.options import MapOption, Stored
from spade_faiss.tuning.samples import Samples, read_samples
from spade_faiss.tuning.search import Found, Question, search
from spade_faiss.tuning.trials import comparable, of_map

Row = dict[str, Any]
SETS = ("aws_cookies", "mvtec_bottle", "mvtec_toothbrush", "mvtec_screw", "magnetic_tile", "elpv")
_RUN = Run(memory="2GiB")
_BATCH = 32


def main() -> None:
    """Measure the sets that are not measured yet, one after the other."""
    parser = parser_of(__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="where features and results are kept")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="the names of the sets (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=0, help="the most test images of a set, evenly spread (default: all)")
    arguments = parser.parse_args()
    target = arguments.out / "tuning.json"
    figures: Row = json.loads(target.read_bytes()) if target.exists() else {"rows": []}
    done = {row["set"] for row in figures["rows"]}
    for name in arguments.sets:
        if name not in done:
            row = measure(name, arguments.data, arguments.scratch, arguments.tests)
            figures["rows"].append(row)
            target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print(name, json.dumps({key: value for key, value in row.items() if key != "options"}), flush=True)


def measure(name: str, data: Path, scratch: Path, tests: int) -> Row:
    """Choose settings for a set by its normal pictures, then measure all options on its defects."""
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    root = data / name
    if name == "elpv":
        root = folder / "images"
        if not (folder / "written").exists():
            shutil.rmtree(root, ignore_errors=True)
            write_elpv(root, ("mono", "poly"))
            (folder / "written").touch()
    elif not root.is_dir():
        raise InputError(f"the set {name!r} is not there; say where with: --data FOLDER, the folder that holds {name}")
    backbone = load_backbone(BACKBONE, preprocess=Preprocess(resize_mode=RESIZE_MODES.get(name, "crop")))
    dataset = load_dataset(root)
    found, seconds = _search(folder, backbone, Question(records=dataset.train))
    real = _real(folder, backbone, dataset.train, dataset.test, found, tests)
    return {
        "set": name,
        "normals": len(dataset.train),
        "tests": len(_part(dataset.test, tests)),
        "machine": machine(),
        "spoils": {
            "pictures": found.samples.normal_count,
            "copies": len(found.samples.spoilt),
            "found": int(found.table.found().sum()),
            "telling": {"image": found.image.telling, "maps": found.maps.telling},
        },
        "s": seconds,
        "default": found.options[found.default].name,
        "chosen": found.option.name,
        "reason": found.chosen.reason,
        "by_image": found.options[found.chosen.by_image].name,
        "by_map": found.options[found.chosen.by_map].name,
        "options": [_option(found, place, real) for place in range(len(found.options))],
    }


def _search(folder: Path, backbone: Backbone, question: Question) -> tuple[Found, Row]:
    """Search, and what the attempt took that ended it: by the clock and of the processors."""
    clock, cpu = time.perf_counter(), time.process_time()
    spent = folder / "spent.json"
    before: Row = json.loads(spent.read_bytes()) if spent.exists() else {"clock": 0.0, "cpu": 0.0}
    found = search(folder / "search", backbone, question, Tuning(), _RUN)
    if not spent.exists():
        before = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu, "load": os.getloadavg()[0]}
        spent.write_text(json.dumps(before), encoding="utf-8")
    return found, {**before, "options": sum(trial.s for trial in found.trials.values())}


def _option(found: Found, place: int, real: dict[MapOption, Row]) -> Row:
    option = found.options[place]
    trial = found.trial(option)
    own = real[of_map(option, found.trials)]
    return {
        "name": option.name,
        "ms": trial.ms,
        "bytes": trial.bytes,
        "spoilt": {
            kind: {
                "value": float(each.value[place]),
                "difference": float(each.difference[place]),
                "low": float(each.low[place]),
                "high": float(each.high[place]),
                "sure": bool(each.sure[place]),
            }
            for kind, each in (("image", found.image), ("maps", found.maps))
        },
        "real": {"image_auroc": own["image_auroc"][option.score], **own["pixels"]},
    }


def _part(records: Sequence[Any], most: int) -> list[Any]:
    if most in (0, len(records)) or most > len(records):
        return list(records)
    return [records[int(place)] for place in np.linspace(0, len(records) - 1, most).round()]


def _real(
    folder: Path, backbone: Backbone, normals: Sequence[Any], labeled: Sequence[Any], found: Found, tests: int
) -> dict[MapOption, Row]:
    """What every map that was tried is worth on the real defects, by a bank of all normal pictures."""
    samples, _ = read_samples(folder / "real" / "samples", backbone, normals, _part(labeled, tests), _RUN)
    layout = Layout(levels=backbone.levels, embedding_dim=backbone.embedding_dim, input_size=backbone.input_size)
    rows: dict[MapOption, Row] = {}
    bank: tuple[Stored, Bank] | None = None
    for option in found.trials:
        path = folder / f"real-{hash_json({'option': repr(comparable(option))})[:16]}.json"
        if not path.exists():
            if bank is None or bank[0] != option.stored:
                bank = option.stored, _bank(folder / "real.bank", samples.references, layout, option.stored)
            path.write_text(json.dumps(_metrics(bank[1], samples, option)), encoding="utf-8")
            print(folder.name, option.name, path.read_text(encoding="utf-8"), flush=True)
        rows[option] = json.loads(path.read_bytes())
    return rows


def _bank(path: Path, references: FeatureBatch, layout: Layout, stored: Stored) -> Bank:
    shutil.rmtree(path, ignore_errors=True)
    bank = Bank.create(path, replace(layout, **vars(stored)), Origin())
    for start in range(0, len(references), 2 * _BATCH):
        bank.append(references[start : start + 2 * _BATCH])
    return bank


def _metrics(bank: Bank, samples: Samples, option: MapOption) -> Row:
    recipe = load_recipe(option.recipe).with_levels(option.method.levels if option.recipe != "exact" else ())
    build_index(bank, recipe, rebuild=True)
    detector = Detector(bank, recipe, of_few(option.method, len(bank)), _RUN)
    assert samples.normals is not None
    scores: dict[str, list[FloatArray]] = {"knn": [], "max": [], "top": []}
    maps, valid = [], []
    for batch in (samples.normals, samples.spoilt):
        for start in range(0, len(batch), _BATCH):
            part = detector.score_features(batch[start : start + _BATCH], timings=Timings())
            for kind, values in scores.items():
                values.append(part.image_scores[kind])
            if samples.masks is not None:
                maps.append(part.maps)
                valid.append(np.ones(part.maps.shape, np.bool_) if part.valid is None else part.valid)
    defective = np.arange(len(samples.normals) + len(samples.spoilt)) >= len(samples.normals)
    image = {kind: detection_metrics(defective, np.concatenate(values)).auroc for kind, values in scores.items()}
    pixels: Row = {}
    if samples.masks is not None:
        nothing = np.zeros((len(samples.normals), *samples.masks.shape[1:]), np.bool_)
        found = localization_metrics(np.concatenate([nothing, samples.masks]), np.concatenate(maps), np.concatenate(valid))
        pixels = {"pixel_auroc": found.auroc, "aupro": found.aupro}
    return {"image_auroc": image, "pixels": pixels}


if __name__ == "__main__":
    main()
