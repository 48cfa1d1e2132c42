"""Measures what choosing an input is worth: by spoilt copies of normal pictures alone, and only then by real defects.

Run as `python -m benchmarks.tuning_inputs --data FOLDER --out benchmarks/results --scratch DIR`. FOLDER holds sets laid out as
MVTec AD; which inputs are tried is said as `spade-faiss tune` takes it. After an interruption, the same command goes on; what
tuning_inputs.json has is not measured again. The choice never sees a test folder. Every input is searched by the default
options, and all are measured on the grid of the whole picture: a defect that an input cuts off is one that it misses.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.process import machine
from benchmarks.sweep.sets import BACKBONE
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.origin import Origin
from spade_faiss.cli.options import add_settings, read_settings
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.presets import of_few
from spade_faiss.core.settings import Run, Tuning
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord, load_dataset
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics
from spade_faiss.search.recipe import load_recipe
from spade_faiss.tuning.inputs import FoundInput, Input, search_inputs
from spade_faiss.tuning.picture_grid import on_picture
from spade_faiss.tuning.samples import Samples, read_samples
from spade_faiss.tuning.search import Question
from spade_faiss.workflows.tune_inputs import candidates

Row = dict[str, Any]
SETS = ("aws_cookies", "mvtec_bottle", "mvtec_toothbrush", "mvtec_screw", "magnetic_tile")
_RUN = Run(memory="2GiB")
_BATCH = 32


def main() -> None:
    """Measure the sets that are not measured yet, one after the other."""
    parser = parser_of(__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="where features are kept")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="the names of the sets (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=0, help="the most test images of a set, evenly spread (default: all)")
    parser.add_argument("--backbone", default=BACKBONE, help="the default network (default: %(default)s)")
    add_settings(parser, Preprocess, only=("size",))
    add_settings(parser, Tuning, only=("backbones", "sizes", "resize_modes", "seed"))
    arguments = parser.parse_args()
    target, tuning = arguments.out / "tuning_inputs.json", read_settings(arguments, Tuning)
    figures: Row = json.loads(target.read_bytes()) if target.exists() else {"rows": []}
    for name in arguments.sets:
        if name in {row["set"] for row in figures["rows"]}:
            continue
        asked = Extraction(backbone=arguments.backbone, network=False, preprocess=read_settings(arguments, Preprocess))
        row = measure(arguments.data / name, arguments.scratch / name, asked, tuning, arguments.tests)
        figures["rows"].append(row)
        target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)


def measure(root: Path, scratch: Path, asked: Extraction, tuning: Tuning, tests: int = 0) -> Row:
    """Choose an input for a set by its normal pictures, then measure all of them on its defects."""
    dataset, start = load_dataset(root), time.perf_counter()
    question = Question(records=dataset.train)
    several = [
        Input(backbone=each.backbone, folder=scratch / str(number), question=question)
        for number, each in enumerate(candidates(scratch / "none.bank", asked, tuning, dataset.train, _RUN))
    ]
    found = search_inputs(several, tuning, _RUN)
    assert found is not None, "one input is no choice"
    seconds = time.perf_counter() - start
    labeled = _part(dataset.test, tests)
    return {
        "set": root.name,
        "normals": len(dataset.train),
        "tests": len(labeled),
        "machine": machine(),
        "copies": len(found.table.spoilt_group),
        "found": int(found.table.found().sum()),
        "s": seconds,
        "default": several[0].name,
        "chosen": found.input.name,
        "reason": found.chosen.reason,
        "inputs": [_row(found, place, dataset.train, labeled) for place in range(len(several))],
    }


def _row(found: FoundInput, place: int, normals: Sequence[ImageRecord], labeled: Sequence[ImageRecord]) -> Row:
    trial = found.trials[place]
    return {
        "name": found.inputs[place].name,
        "ms": {"network": found.forward_ms[place], "search": trial.ms},
        "bytes": trial.bytes,
        "memory": trial.memory,
        "spoilt": {
            kind: {name: float(getattr(each, name)[place]) for name in ("value", "difference", "low", "high")}
            | {"sure": bool(each.sure[place])}
            for kind, each in (("image", found.image), ("maps", found.maps))
        },
        "real": _real(found.inputs[place], [each.preprocess for each in found.inputs], normals, labeled),
    }


def _real(
    own: Input, preprocesses: Sequence[Preprocess], normals: Sequence[ImageRecord], labeled: Sequence[ImageRecord]
) -> Row:
    """What the default options are worth on the real defects in an input, by a bank of all normal pictures."""
    samples, _ = read_samples(own.folder / "real" / "samples", own.backbone, normals, labeled, _RUN, preprocesses)
    option, network = own.option, own.backbone
    stored = vars(option.map.stored)
    layout = Layout(levels=network.levels, embedding_dim=network.embedding_dim, input_size=network.input_size, **stored)
    shutil.rmtree(own.folder / "real.bank", ignore_errors=True)
    bank = Bank.create(own.folder / "real.bank", layout, Origin())
    for start in range(0, len(samples.references), 2 * _BATCH):
        bank.append(samples.references[start : start + 2 * _BATCH])
    recipe = load_recipe(option.map.recipe).with_levels(option.map.method.levels)
    build_index(bank, recipe)
    return _metrics(Detector(bank, recipe, of_few(option.map.method, len(bank)), _RUN), samples, option.score)


def _metrics(detector: Detector, samples: Samples, score: str) -> Row:
    assert samples.normals is not None
    assert samples.in_picture is not None
    where, values, maps = samples.in_picture, list[FloatArray](), list[FloatArray]()
    for batch, sizes in ((samples.normals, where.normal_sizes), (samples.spoilt, where.spoilt_sizes)):
        for start in range(0, len(batch), _BATCH):
            part = detector.score_features(batch[start : start + _BATCH], timings=Timings())
            values.append(part.image_scores[score])
            if where.masks is not None:
                maps.append(on_picture(part.maps, sizes[start : start + _BATCH], where.preprocess))
    defective = np.arange(len(samples.normals) + len(samples.spoilt)) >= len(samples.normals)
    row: Row = {"image_auroc": detection_metrics(defective, np.concatenate(values)).auroc}
    if where.masks is not None:
        scores = np.concatenate(maps)
        scores = np.where(np.isfinite(scores), scores, scores[np.isfinite(scores)].min() - 1)  # below all that is shown
        nothing = np.zeros((len(samples.normals), *where.masks.shape[1:]), np.bool_)
        pixels = localization_metrics(np.concatenate([nothing, where.masks]), scores)
        row |= {"pixel_auroc": pixels.auroc, "aupro": pixels.aupro}
    return row


def _part(records: Sequence[ImageRecord], most: int) -> list[ImageRecord]:
    if most == 0 or most >= len(records):
        return list(records)
    return [records[int(place)] for place in np.linspace(0, len(records) - 1, most).round()]


if __name__ == "__main__":
    main()
