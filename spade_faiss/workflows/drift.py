"""Whether normal images have changed: recent results against the calibration of their bank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.hints import calibrate_command, score_command
from spade_faiss.decisions.calibration import Calibration, stored_calibrations
from spade_faiss.decisions.conformal import Doubles, check_rate
from spade_faiss.decisions.drift import DEFECTS, LEVEL, Drift, find_drift
from spade_faiss.report.drift_page import drift_numbers, drift_page
from spade_faiss.report.exchange import DRIFT_NUMBERS, DRIFT_PAGE, SCORES
from spade_faiss.report.html import write_html
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.output_folder import output_folder
from spade_faiss.report.output_place import check_place
from spade_faiss.report.scorefile import ScoreFile


def drift(results: Sequence[str | Path], *, bank: str | Path, level: float = LEVEL, defects: float = DEFECTS) -> Drift:
    """Compare the scores of recent images with those that the bank was calibrated with.

    Args:
        results: folders that `score_folder` wrote, or their scores.h5, all of one scoring config and state of the bank.
        bank: the bank's folder.
        level: the chance of a false alarm of the test.
        defects: the share of recent images, those with the highest scores, that may be defects without counting as drift.

    Raises:
        NotFoundError: if there is no such bank or result.
        InputError: for results of several scoring configs, or of a state of the bank that is not calibrated.
        BankError: for a damaged bank or calibration.
    """
    check_rate("level", level)
    if defects != 0:
        check_rate("defects", defects)
    if not results:
        raise InputError("drift needs results to compare; give folders that spade-faiss score wrote")
    opened = Bank.open(bank)
    parts = [_read(Path(item)) for item in results]
    calibration = _find_calibration(opened, parts)
    image, by_map = (np.concatenate(scores) for scores in zip(*((part.image, part.map) for part in parts), strict=True))
    recent = {"image": image, **({} if np.isnan(by_map).any() else {"map": by_map})}
    return find_drift(calibration, recent, level=level, defects=defects, outdated=calibration.outdated(opened))


def write_drift(out: str | Path, found: Drift, *, results: Sequence[str | Path], bank: str | Path) -> None:
    """Write drift.json and drift.html into a folder: one of the results that were compared, or one of their own.

    Args:
        out: the folder; it is made if there is none.
        found: what `drift` found.
        results: the results that were compared.
        bank: the bank's folder.

    Raises:
        InputError: if `out` holds results that were not compared, or is no place for results, as for `score_folder`.
    """
    folders = {_file_of(Path(item)).parent.resolve() for item in results}
    check_place(out, bank=Bank.open(bank, check=False))
    if (Path(out) / SCORES).exists() and Path(out).resolve() not in folders:
        raise InputError(f"out={out} holds results that were not compared; choose another folder")
    with output_folder(out, "drift", replaces=(DRIFT_PAGE, DRIFT_NUMBERS)) as folder:
        write_html(folder.staged / DRIFT_PAGE, replace(drift_page(found), run=folder.run))
        compared = [str(item) for item in results]
        write_json(folder.staged / DRIFT_NUMBERS, {"run": folder.stamp(), "results": compared, **drift_numbers(found)})


class _Recent(NamedTuple):
    """The scores of a run, float64, and how they were computed."""

    config: str
    generation: int
    image: Doubles
    map: Doubles


def _read(path: Path) -> _Recent:
    file = _file_of(path)
    if not file.exists():
        raise NotFoundError(f"there are no results at {path} (no scores.h5); make some with: {score_command()}")
    with ScoreFile.open(file) as scores:
        settings = json.loads(scores.settings)
        if not isinstance(settings, dict) or not {"scoring_config", "generation"} <= set(settings):
            raise InputError(f"{file} does not say how it was scored; score the images again with this version")
        return _Recent(
            config=str(settings["scoring_config"]),
            generation=int(settings["generation"]),
            image=scores.image_score.astype(np.float64),
            map=scores.map_score.astype(np.float64),
        )


def _file_of(path: Path) -> Path:
    return path / SCORES if path.is_dir() else path


def _find_calibration(bank: Bank, parts: Sequence[_Recent]) -> Calibration:
    """The calibration that all results are to be compared with."""
    (config, generation), *others = dict.fromkeys((part.config, part.generation) for part in parts)
    if others:
        raise InputError(
            f"the results were scored with {len(others) + 1} scoring configs, or against as many states of the bank: "
            f"{config} at generation {generation}, {others[0][0]} at {others[0][1]}; compare results of one"
        )
    calibration = next((found for found in stored_calibrations(bank) if found.scoring_config.key == config), None)
    if calibration is None or calibration.generation != generation:
        has = "none for it" if calibration is None else f"one of generation {calibration.generation}"
        raise InputError(
            f"the results were scored at generation {generation} with scoring config {config}, the bank {bank.path} has "
            f"{has}; calibrate with the same settings ({calibrate_command(bank.path)}), then score the images again"
        )
    return calibration
