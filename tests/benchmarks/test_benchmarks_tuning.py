"""The page on tuning: regrets, means and aims by hand-made figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import tuning_inputs
from benchmarks.pages import tuning
from spade_faiss import Bank, Detector, Extraction, Preprocess, Tuning
from spade_faiss.core.presets import of_few
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import concatenate
from spade_faiss.features.datasets import load_dataset
from spade_faiss.features.pictures import to_mask
from spade_faiss.features.placement import place
from spade_faiss.features.stream import FeatureStream
from spade_faiss.search.recipe import load_recipe
from spade_faiss.tuning import inputs
from spade_faiss.tuning.options import default_option
from spade_faiss.workflows import tune_inputs
from tests.support.backbones import tiny_backbone

Row = dict[str, Any]


def option(name: str, spoilt: float, **real: float) -> Row:
    return {"name": name, "spoilt": {kind: {"value": spoilt} for kind in ("image", "maps")}, "real": real}


def figures() -> Row:
    options = [
        option("default", 0.5, image_auroc=0.9, pixel_auroc=0.95, aupro=0.8),
        option("chosen", 0.7, image_auroc=0.98, pixel_auroc=0.94, aupro=0.85),
        option("best", 0.6, image_auroc=1.0, pixel_auroc=0.97, aupro=0.83),
    ]
    spoils = {"pictures": 40, "copies": 240, "found": 120}
    seconds = {"cpu": 100.0, "clock": 60.0, "load": 1.0}
    one = {
        "set": "one",
        "normals": 50,
        "default": "default",
        "chosen": "chosen",
        "options": options,
        "spoils": spoils,
        "s": seconds,
    }
    only_labels = [option("default", 0.5, image_auroc=0.9), option("other", 0.4, image_auroc=0.89)]
    two = {**one, "set": "two", "chosen": "default", "options": only_labels}
    beside = {"set": "one", "search": "PatchCore 1 %", "image_auroc": 0.97, "pixel_auroc": 0.93, "aupro": 0.84}
    return {"tuning": {"rows": [one, two]}, "whole_bank": {"patchcore": {"rows": [beside]}}}


def test_regret_is_what_the_best_option_is_ahead() -> None:
    table = tuning.table(figures())
    assert "| one (50) | 0.900 | 0.980 | 1.000 | best | 0.020 (0.100) | 1.00 | 0.970 |" not in table  # ranks differ
    assert "| one (50) | 0.900 | 0.980 | 1.000 | best | 0.020 (0.100) | 0.50 | 0.970 |" in table
    assert "| two (50) | 0.900 | 0.900 | 0.900 | default | 0.000 (0.000) | 1.00 | – |" in table
    assert "| mean | 0.900 | 0.940 | 0.950 |  | 0.010 (0.050) |  | – |" in table
    assert table.count("| one (50) |") == 3
    assert table.count("| two (50) |") == 1  # it has no masks


def test_aims_say_what_is_missed() -> None:
    lines = tuning.aims(figures()).splitlines()
    assert lines[0].endswith("0.0100; the aim is 0.01 (met).") or "(missed)" in lines[0]
    assert "one (pixel AUROC -0.010)" in lines[2]
    assert "0.9800 tuned, 0.9700 by PatchCore 1 % (above)" in lines[3]
    assert "0.9400 tuned, 0.9300" in lines[4]


def test_choices_name_the_default() -> None:
    table = tuning.choices(figures())
    assert "| one | chosen | 240 of 40 | 120 | 100 s | 60 s at a load of 1 |" in table
    assert "| two | the default |" in table


def test_nothing_measured_is_said() -> None:
    empty: Row = {"tuning": {"rows": []}, "tuning_inputs": {"rows": []}, "whole_bank": {"patchcore": {"rows": []}}}
    parts = (tuning.table, tuning.aims, tuning.choices, tuning.inputs)
    assert {part(empty) for part in parts} == {"No set was measured yet."}


def test_inputs_are_shown_with_what_spoils_said_and_what_is_so() -> None:
    spoilt = {"difference": 0.02, "low": 0.01, "high": 0.03, "sure": True}
    each = {
        "name": "net; crop 224",
        "bytes": 262_000.0,
        "memory": float(64 << 20),
        "spoilt": {"image": {**spoilt, "difference": 0.0, "low": 0.0, "high": 0.0, "sure": False}, "maps": spoilt},
        "real": {"image_auroc": 0.9},
    }
    row = {"set": "one", "normals": 50, "default": "net; crop 224", "chosen": "net; letterbox 224"}
    row["inputs"] = [
        each,
        {**each, "name": "net; letterbox 224", "real": {"image_auroc": 1, "pixel_auroc": 0.5, "aupro": 0.25}},
    ]
    table = tuning.inputs({"tuning_inputs": {"rows": [row]}})
    said = "+0.000 (+0.000 to +0.000) | +0.020 (+0.010 to +0.030, sure)"
    assert f"| one (50) | net; crop 224 (default) | {said} | 0.900 | – | – | 262 kB, 64 MiB |" in table
    assert f"| one (50) | net; letterbox 224 (chosen) | {said} | 1.000 | 0.500 | 0.250 | 262 kB, 64 MiB |" in table


def test_inputs_are_measured_on_the_whole_picture(
    dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretched picture is seen whole: its metrics are those of its maps, each pixel repeated as often as the grid has it."""

    def load(extraction: Extraction, run: Run) -> Backbone:
        return tiny_backbone(0, str(extraction.backbone), extraction.preprocess)

    monkeypatch.setattr(tune_inputs, "load_named", load)
    monkeypatch.setattr(tuning_inputs, "_RUN", Run(engine="torch"))
    monkeypatch.setattr(inputs, "MOST_SPOILT", 3)
    monkeypatch.setattr(inputs, "_COPIES", 9)
    asked = Extraction(backbone="tiny", network=False, preprocess=Preprocess(size=28))
    row = tuning_inputs.measure(dataset_folder, tmp_path / "scratch", asked, Tuning(resize_modes=("stretch",)))
    crop, stretch = row["inputs"]
    assert (crop["name"], stretch["name"]) == ("tiny; crop 28", "tiny; stretch 28")
    assert row["default"] == "tiny; crop 28"
    bank = Bank.open(tmp_path / "scratch" / "1" / "real.bank")
    assert len(bank) == 24
    records = load_dataset(dataset_folder).test
    backbone = tiny_backbone(0, "tiny", Preprocess(resize_mode="stretch", size=28))
    option = default_option([level.name for level in backbone.levels]).map
    recipe = load_recipe(option.recipe).with_levels(option.method.levels)
    stream = FeatureStream(backbone, Run(), batch_size=16, timings=Timings())
    batch = concatenate([each.batch for each in stream(dataset_folder, records, "x")])
    scores = Detector(bank, recipe, of_few(option.method, len(bank))).score_features(replace(batch, source=None))
    where = place(96, 80, backbone.source.preprocess)
    masks = np.stack([np.zeros((28, 28), bool) if each.mask is None else to_mask(each.mask, where) for each in records])
    labels = np.array([bool(each.defective) for each in records])
    assert stretch["real"]["image_auroc"] == pytest.approx(roc_auc_score(labels, scores.top_score))
    assert stretch["real"]["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), scores.maps.ravel()), abs=0.01)
    assert crop["real"]["pixel_auroc"] != stretch["real"]["pixel_auroc"]
