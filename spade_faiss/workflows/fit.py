"""Fitting: normal images become a bank that is ready for scoring; they are extracted, indexed and calibrated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from spade_faiss.cluster.session import connected
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.presets import Preset
from spade_faiss.core.settings import Run
from spade_faiss.decisions.calibration import Calibration
from spade_faiss.features.datasets import Images
from spade_faiss.index.build import Built, build_index
from spade_faiss.search.recipe import load_recipe
from spade_faiss.workflows.calibrate import calibrate_whole_if_needed
from spade_faiss.workflows.extract import Added, choose_preset, extract
from spade_faiss.workflows.index_pieces import encode_by


@dataclass(frozen=True, kw_only=True)
class Fit(Added):
    """What `fit` did.

    Args:
        index: the indexes that were built; None if the recipe needs none.
        calibration: the calibration; None if none was asked for, or if it could not be made.
        notice: why there is no calibration; empty otherwise.
        products: of a bank of several products, the calibration of each, or why it has none; then there is none of the whole.
    """

    index: Built | None
    calibration: Calibration | None
    notice: str
    products: dict[str, Calibration | str] = field(default_factory=dict)


def fit(
    images: Images,
    *,
    bank: str | Path,
    extraction: Extraction = Extraction(),
    preset: str | Path | Preset | None = None,
    calibrate: bool = True,
    run: Run = Run(),
) -> Fit:
    """Extract the features of normal images into a bank, build the indexes that it is searched by, and calibrate.

    What is there already is kept: after an interruption, the same call goes on where it stopped.

    Args:
        images: a folder, an image, or a list of them.
        bank: the bank's folder; it is created if there is none.
        extraction: the backbone, and how its features are stored; where a setting is at its default, that of the preset counts.
        preset: how features are stored, and how the bank is searched unless something else is asked for; that of the bank, or
            `default` for a new one, unless given.
        calibrate: whether to score a sample of the images against the others, unless the bank has a calibration that holds.
        run: the device, the weights and the memory budget.

    Raises:
        InputError: for bad input, a folder that holds defects or masks beside normal images, too many unreadable images, an
            image that has changed since the bank took it, or an existing bank with other settings.
        NotFoundError: if a path, the preset or its recipe does not exist.
        BankError: if the bank is damaged, or another process is writing to it.
        ClusterError: if the cluster that `run` names cannot be reached, or workers are lost again and again.
    """
    start, preset = time.perf_counter(), choose_preset(bank, preset)
    recipe = load_recipe(preset.recipe)
    with connected(run.cluster):
        done = extract(images, bank=bank, extraction=extraction, preset=preset, run=run)
        extracted = time.perf_counter()
        index = build_index(done.bank, recipe, progress=run.progress, encode=encode_by(run, done.bank))
        built = time.perf_counter()
        calibration, notice, products = calibrate_whole_if_needed(done.bank, run) if calibrate else (None, "", {})
        end = time.perf_counter()
    timing_s = {**done.timing_s, "index": built - extracted, **({"calibrate": end - built} if calibrate else {})}
    return Fit(
        **{**vars(done), "timing_s": timing_s, "total_s": end - start},
        index=index,
        calibration=calibration,
        notice=notice,
        products=products,
    )
