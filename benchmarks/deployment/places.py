"""Where the measured pictures, banks and environments are; banks are made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.datasets import write_elpv
from benchmarks.deployment.measure import REPEATS, Row
from spade_faiss import Detector, Extraction, Run, fit
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import Dataset, ImageRecord, load_dataset
from spade_faiss.features.pictures import load_image, to_input
from spade_faiss.features.proof import prove

BACKBONE = "efficientnet_lite0"
SETS = ("mvtec_bottle", "elpv")
EXPORTED = ("onnxruntime", "openvino")
ENGINES = (*EXPORTED, "torch")
# What users get, and the method as its paper has it.
PRESETS = ("default", "spade")
_PROVEN = 4


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders and environments.

    Args:
        data: the folder that holds `mvtec_bottle`.
        scratch: takes pictures, banks and environments.
        edge_python: the Python of an environment without torch that has onnxruntime and openvino; None if there is none.
        peers_python: the Python of an environment that has anomalib; None if there is none.
        repeats: how often everything is measured.
    """

    data: Path
    scratch: Path
    edge_python: str | None = None
    peers_python: str | None = None
    repeats: int = REPEATS

    def dataset(self, name: str) -> Dataset:
        """One of `SETS`; of ELPV the monocrystalline cells: 490 functional ones to learn from, 411 to test with."""
        if name != "elpv":
            return load_dataset(self.data / name)
        folder = self.scratch / "elpv"
        if not folder.is_dir():
            temporary = folder.with_suffix(".making")
            write_elpv(temporary)
            temporary.rename(folder)
        return load_dataset(folder)

    def bank(self, name: str, preset: str = "spade") -> Path:
        """A calibrated bank of one of `SETS`, as `fit` makes it by one of `PRESETS`, with the network in it."""
        path = self.scratch / (f"{name}.bank" if preset == "spade" else f"{name}-{preset}.bank")
        fit(self.dataset(name).root / "train" / "good", bank=path, extraction=Extraction(backbone=BACKBONE), preset=preset)
        return path

    def detector(self, name: str, engine: str, preset: str) -> Detector:
        """A detector that searches as its preset says, and whose network is open already."""
        detector = Detector.open(self.bank(name, preset), run=Run(engine=engine))
        assert detector.backbone.engine == engine
        return detector


def inputs_of(records: list[ImageRecord], backbone: Backbone) -> FloatArray:
    """The inputs of some pictures, (n, 3, H, W)."""
    preprocess = backbone.source.preprocess
    return np.stack([to_input(load_image(record, preprocess).picture, preprocess) for record in records])


def by_engine(backbone: Backbone, engine: str, inputs: FloatArray) -> Backbone:
    """A backbone that torch loaded, run by another engine."""
    return prove(backbone, inputs[:_PROVEN], engine).open(engine)


def no_row(subject: str, reason: str) -> Row:
    """A row that says why something was not measured."""
    return {"subject": subject, "not_measured": reason}
