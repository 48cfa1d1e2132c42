"""From normal images to a bank that is ready to score: extract, index, calibrate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from spade_faiss.core.settings import DEFAULT_BACKBONE, DEVICE, MAX_SKIPPED, Preprocess
from spade_faiss.decisions.calibration import Calibration
from spade_faiss.features.backbone import Backbone
from spade_faiss.index.build import Built, build_index
from spade_faiss.search.recipe import Recipe, load_recipe
from spade_faiss.workflows.calibrate import calibrate_if_needed
from spade_faiss.workflows.extract import Added, Images, extract


@dataclass(frozen=True, kw_only=True)
class Fit(Added):
    """What `fit` did.

    `index` is None where nothing had to be built; `calibration` where none was asked for, or none could be made: then `notice`
    says why.
    """

    index: Built | None
    calibration: Calibration | None
    notice: str


def fit(
    images: Images,
    *,
    bank: str | Path,
    backbone: str | Backbone = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    precision: str = "float32",
    preprocess: Preprocess | None = None,
    dtype: str = "float16",
    normalize: str = "none",
    pool: int = 1,
    recipe: str | Path | Recipe = "exact",
    calibrate: bool = True,
    device: str = DEVICE,
    max_skipped: int = MAX_SKIPPED,
    progress: bool = False,
) -> Fit:
    """Extract the features of normal images into a bank, build the recipe's index over it, and calibrate.

    What is there is kept: when interrupted, run the same call again and it goes on where it stopped.

    Args:
        images, bank, backbone, weights, precision, preprocess, dtype, normalize, pool, device, max_skipped, progress: see
            `extract`.
        recipe: the index to build.
        calibrate: whether to calibrate the recipe, leaving one out, unless the bank is calibrated as it is; see `calibrate`.

    Raises:
        InputError: for bad input, too many unreadable images, an image that has changed since the bank took it, or an existing
            bank with other settings.
        NotFoundError: if a path does not exist.
        BankError: if the bank is damaged, or another process is writing to it.
    """
    start, chosen = time.perf_counter(), load_recipe(recipe)
    done = extract(
        images,
        bank=bank,
        backbone=backbone,
        weights=weights,
        precision=precision,
        preprocess=preprocess,
        dtype=dtype,
        normalize=normalize,
        pool=pool,
        recipe=chosen,
        device=device,
        max_skipped=max_skipped,
        progress=progress,
    )
    extracted = time.perf_counter()
    index = build_index(done.bank, chosen, progress=progress)
    built = time.perf_counter()
    calibration, notice = calibrate_if_needed(done.bank, chosen, device=device, progress=progress) if calibrate else (None, "")
    end = time.perf_counter()
    stage_s = {**done.stage_s, "index": built - extracted, **({"calibrate": end - built} if calibrate else {})}
    return Fit(
        **{**vars(done), "stage_s": stage_s, "total_s": end - start},
        index=index,
        calibration=calibration,
        notice=notice,
    )
