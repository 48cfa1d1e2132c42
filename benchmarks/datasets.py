"""Lays out real image sets as MVTec AD, for the demo and the measurements."""

from __future__ import annotations

import csv
import shutil
from importlib.resources import as_file, files
from pathlib import Path

# Every sixth of the surely functional cells is held out for the test.
_HELD_OUT = 6


def write_elpv(folder: Path, cell_types: tuple[str, ...] = ("mono",)) -> None:
    """Lay out the ELPV solar cells of some types.

    Cells in train/good and test/good are surely functional, those in test/defective surely defective. Cells that experts were
    in doubt about (a probability of 1/3 or 2/3) are left out. There are no masks.

    Source: https://github.com/zae-bayern/elpv-dataset, the PyPI package `elpv-dataset` (CC BY-NC-SA 4.0).
    """
    shutil.rmtree(folder, ignore_errors=True)
    with as_file(files("elpv_dataset") / "data") as data:
        functional = 0
        for path, probability, found_type in csv.reader(
            (" ".join(line.split()) for line in (data / "labels.csv").read_text().splitlines()), delimiter=" "
        ):
            if found_type not in cell_types or float(probability) not in (0.0, 1.0):
                continue
            kind = "test/defective"
            if float(probability) == 0.0:
                functional += 1
                kind = "test/good" if functional % _HELD_OUT == 0 else "train/good"
            (folder / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(data / path, folder / kind)
