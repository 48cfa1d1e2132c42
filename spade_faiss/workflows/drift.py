"""Whether normal images have changed: recent results against the calibration of their bank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot, unknown_product
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.hints import calibrate_command, score_command
from spade_faiss.decisions.calibration import Calibration, stored_calibrations
from spade_faiss.decisions.conformal import Doubles, check_rate
from spade_faiss.decisions.drift import DEFECTS, LEVEL, Drift, find_drift
from spade_faiss.report.drift_page import drift_numbers, drift_page, product_drift_numbers, product_drift_page
from spade_faiss.report.exchange import DRIFT_NUMBERS, DRIFT_PAGE, PARTS, SCORES
from spade_faiss.report.html import write_html
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.output_folder import output_folder
from spade_faiss.report.output_place import check_place
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.storage.pictures import local_pictures
from spade_faiss.storage.stores import open_store
from spade_faiss.storage.url import is_url, local_path, parse_url


def drift(
    results: Sequence[str | Path],
    *,
    bank: str | Path,
    level: float = LEVEL,
    defects: float = DEFECTS,
    product: str | None = None,
) -> Drift:
    """Compare the scores of recent images with those that the bank was calibrated with.

    Args:
        results: folders or URLs that `score_folder` wrote to, or their scores.h5, all of one scoring config and state of the
            bank.
        bank: the bank's folder, or a URL.
        level: the chance of a false alarm of the test.
        defects: the share of recent images, those with the highest scores, that may be defects without counting as drift.
        product: of a bank of several products, the one whose images are compared with its calibration.

    Raises:
        NotFoundError: if there is no such bank or result.
        InputError: for results of several scoring configs, or of a state of the bank that is not calibrated.
        BankError: for a damaged bank or calibration.
    """
    _check(results, level, defects)
    opened: Snapshot = Bank.open(bank)
    if product is None and opened.is_of_products:
        raise InputError(
            f"the bank {bank} is of several products, each with a calibration of its own: use drift_of_products, or "
            f"name one: --product NAME"
        )
    if product is not None:
        opened = opened.part(product)
    parts = [_read(_here(item), opened.product) for item in results]
    return _compare(opened, parts, level, defects)


def drift_of_products(
    results: Sequence[str | Path], *, bank: str | Path, level: float = LEVEL, defects: float = DEFECTS
) -> dict[str, Drift | str]:
    """Do what `drift` does for each product of a bank of several that recent images show.

    Returns:
        The result for each product, or in words why there is none, such as a missing calibration. Each is tested at the level
        divided by the number of products (Bonferroni): the chance of any false alarm is at most `level`.

    Raises:
        NotFoundError, InputError, BankError: as `drift`; InputError also if no image shows a product.
    """
    _check(results, level, defects)
    opened = Bank.open(bank)
    if not opened.is_of_products:
        raise InputError(unknown_product(opened, None))
    files = [_here(item) for item in results]
    by_product = {name: [_read(file, name) for file in files] for name in opened.products}
    shown = {name: [part for part in parts if len(part.image)] for name, parts in by_product.items()}
    shown = {name: parts for name, parts in shown.items() if parts}
    if not shown:
        raise InputError("none of the recent images shows a product of the bank")
    found: dict[str, Drift | str] = {}
    for name, parts in shown.items():
        try:
            found[name] = _compare(opened.part(name), parts, level / len(shown), defects)
        except InputError as error:
            found[name] = str(error)
    return found


def _check(results: Sequence[str | Path], level: float, defects: float) -> None:
    check_rate("level", level)
    if defects != 0:
        check_rate("defects", defects)
    if not results:
        raise InputError("drift needs results to compare; give folders that spade-faiss score wrote")


def _here(results: str | Path) -> Path:
    """The folder or the file of this machine that holds results; of those at a URL, the scores are fetched."""
    return local_pictures(results, lambda name: name == SCORES, what=f"results, or their {SCORES},")


def _compare(bank: Snapshot, parts: Sequence[_Recent], level: float, defects: float) -> Drift:
    calibration = _find_calibration(bank, parts)
    image, by_map = (np.concatenate(scores) for scores in zip(*((part.image, part.map) for part in parts), strict=True))
    recent = {"image": image, **({} if np.isnan(by_map).any() else {"map": by_map})}
    return find_drift(calibration, recent, level=level, defects=defects, outdated=calibration.outdated(bank))


def write_drift(
    out: str | Path, found: Drift | Mapping[str, Drift | str], *, results: Sequence[str | Path], bank: str | Path
) -> None:
    """Write drift.json and drift.html into a folder: one of the results that were compared, or one of their own.

    Args:
        out: the folder, which is made if there is none, or a URL.
        found: what `drift` found, or `drift_of_products`.
        results: the results that were compared.
        bank: the bank's folder.

    Raises:
        InputError: if `out` holds results that were not compared, or is no place for results, as for `score_folder`.
    """
    check_place(out, bank=Bank.open(bank, check=False))
    if _holds_scores(out) and _real(out) not in {_real(folder_of(item)) for item in results}:
        raise InputError(f"out={out} holds results that were not compared; choose another folder")
    with output_folder(out, "drift", replaces=(DRIFT_PAGE, DRIFT_NUMBERS)) as folder:
        page = drift_page(found) if isinstance(found, Drift) else product_drift_page(found)
        numbers = drift_numbers(found) if isinstance(found, Drift) else product_drift_numbers(found)
        write_html(folder.staged / DRIFT_PAGE, replace(page, run=folder.run))
        compared = [str(item) for item in results]
        write_json(folder.staged / DRIFT_NUMBERS, {"run": folder.stamp(), "results": compared, **numbers})


def folder_of(results: str | Path) -> str:
    """The folder, or the URL, of results that may be named by their scores.h5."""
    if is_url(results):
        return str(parse_url(str(results))).removesuffix(f"/{SCORES}")
    path = local_path(results)
    return str(path if path.is_dir() else path.parent)


def _holds_scores(out: str | Path) -> bool:
    """Whether there are results of `score_folder`."""
    if is_url(out):
        tops = {stored.name.partition("/")[0] for stored in open_store(parse_url(str(out))).list()}
        return not tops.isdisjoint((SCORES, PARTS))
    return any((local_path(out) / name).exists() for name in (SCORES, PARTS))


def _real(place: str | Path) -> str:
    """What two names of a folder, or of a URL, have in common."""
    return str(parse_url(str(place)) if is_url(place) else local_path(place).resolve())


class _Recent(NamedTuple):
    """The scores of a run, float64, and how they were computed."""

    config: str
    state: str
    image: Doubles
    map: Doubles


def _read(path: Path, product: str) -> _Recent:
    """The scores of a run, those of one product if its bank has several."""
    file, parts = _file_of(path), sorted((path / PARTS).glob(f"*/{SCORES}"))
    if not parts and not file.exists():
        raise NotFoundError(f"there are no results at {path} (no scores.h5); make some with: {score_command()}")
    with ScoreParts.open(parts) if parts else ScoreFile.open(file) as scores:
        settings = json.loads(scores.settings)
        if not isinstance(settings, dict) or not {"scoring_config", "generation"} <= set(settings):
            raise InputError(f"{file} does not say how it was scored; score the images again with this version")
        state, own = settings, np.ones(len(scores), np.bool_)
        if product:
            state, own = settings.get("products", {}).get(product), np.zeros(len(scores), np.bool_)
            if scores.routes is not None and state is not None:
                own = scores.routes.product == product
        return _Recent(
            config="" if state is None else str(state["scoring_config"]),
            state="" if state is None else str(state["state"]) if product else str(settings["generation"]),
            image=scores.image_score[own].astype(np.float64),
            map=scores.map_score[own].astype(np.float64),
        )


def _file_of(path: Path) -> Path:
    return path / SCORES if path.is_dir() else path


def _find_calibration(bank: Snapshot, parts: Sequence[_Recent]) -> Calibration:
    """The calibration that all results are to be compared with."""
    of = f"product {bank.product} of the bank {bank.path}" if bank.product else f"the bank {bank.path}"
    (config, state), *others = dict.fromkeys((part.config, part.state) for part in parts)
    if others:
        raise InputError(
            f"the results were scored with {len(others) + 1} scoring configs, or against as many states of the bank: "
            f"{config} at {_named(bank, state)}, {others[0][0]} at {_named(bank, others[0][1])}; compare results of one"
        )
    calibration = next((found for found in stored_calibrations(bank) if found.scoring_config.key == config), None)
    held = None if calibration is None else calibration.shards_sha256 if bank.product else str(calibration.generation)
    if calibration is None or held != state:
        has = "none for it" if held is None else f"one of {_named(bank, held)}"
        raise InputError(
            f"the results were scored at {_named(bank, state)} with scoring config {config}, {of} has {has}; calibrate with "
            f"the same settings ({calibrate_command(bank.path, product=bank.product)}), then score the images again"
        )
    return calibration


def _named(bank: Snapshot, state: str) -> str:
    """A state of a bank, or of a product's images, in words."""
    return f"state {state[:8]}" if bank.product else f"generation {state}"
