"""Which normal images are least like the others: how people find the bad part that slipped into the good folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.facts import facts_of
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.settings import ReportOptions
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.folders import LeftOut
from spade_faiss.features.placement import Visible
from spade_faiss.report.cells import csv_line, text_cell
from spade_faiss.report.exchange import REPORT, SCORES
from spade_faiss.report.html import write_html
from spade_faiss.report.inputs import DetectorFacts, ReportInputs
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.normals import NormalPictures
from spade_faiss.report.output_folder import OutputFolder, output_folder
from spade_faiss.report.output_place import check_place
from spade_faiss.report.page import run_page
from spade_faiss.report.results import Results
from spade_faiss.report.scorefile import ScoreFile, ScoreWriter
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.score import peak_memory_bytes

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Suspects:
    """All normal images of a bank, the least normal one first, with their image scores against the others; files in `out`.

    Where several entries were made of a picture, its score is that of its original; of its tiles, the highest.

    In a bank of several products, an image is scored against the others of its own, and how much higher its score is than the
    median of its product ranks it: what is far in one may be near in another.

    Args:
        out: the folder.
        ids: the images.
        image_score: their scores.
        products: the product of each, in a bank of several.
        left_out: by product, why its images are not among them: there are too few.
    """

    out: Path
    ids: list[str]
    image_score: FloatArray
    products: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def suspects(bank: str | Path | Detector, *, out: str | Path, report: ReportOptions = ReportOptions()) -> Suspects:
    """Score every normal image against those of other groups; write all to suspects.csv, the first to scores.h5, report.html.

    They are ranked by the distance to their nearest normals, whichever score the detector ranks by: all others are made of
    maps, which would take long for a whole bank.

    Args:
        bank: a bank's folder, to be searched with the default settings, or an opened detector.
        out: the folder to write to; it is made if there is none, and results that are there are replaced as a whole.
        report: how many of the least normal ones get a map and are shown.

    Raises:
        InputError: for a bank with too few images; if `out` is no place for results, as for `score_folder`.
    """
    check_at_least("shown", report.shown, 1)
    timings = Timings()
    detector = bank if isinstance(bank, Detector) else Detector.open(bank)
    detector = detector.with_method(replace(detector.method, score="knn"))
    if not detector.bank.is_of_products:
        detector.neighbors.check_leave_one_out()
    check_place(out, bank=detector.bank)
    with output_folder(out, "suspects") as folder:
        held, left_out = detector.bank, _too_few(detector)
        originals = held.pictures.originals
        products = np.array(held.products)[held.products_at(originals)] if held.is_of_products else np.full(len(originals), "")
        chosen = np.flatnonzero(~np.isin(products, [*left_out]))
        if not len(chosen):
            raise InputError("; ".join(left_out.values()))
        originals, products = originals[chosen], products[chosen]
        image_score = _score_all(detector, originals, timings)
        order = np.argsort(-_relative(image_score, products), kind="stable")
        found = Suspects(
            out=folder.out,
            ids=held.pictures.names(originals[order]),
            image_score=image_score[order],
            products=products[order].tolist() if held.is_of_products else [],
            left_out=left_out,
        )
        _write_csv(folder.staged, found, detector)
        _write_scores(folder, detector, originals[order[: report.shown]].tolist(), timings)
        _write_page(folder, found, detector, report.shown, timings)
        write_json(folder.staged / REPORT, {"run": folder.stamp(), "bank": facts_of(detector.bank), "images": len(found.ids)})
    return found


def _too_few(detector: Detector) -> dict[str, str]:
    """By product, why its images cannot be compared with each other."""
    found = {}
    for name in detector.bank.products if detector.bank.is_of_products else ():
        try:
            detector.of_product(name).neighbors.check_leave_one_out()
        except InputError as error:
            found[name] = str(error)
    return found


def _relative(image_score: FloatArray, products: npt.NDArray[np.str_]) -> FloatArray:
    """(n,) scores relative to the median of their product; in a bank that is of one, the scores."""
    found = image_score.copy()
    for name in dict.fromkeys(products.tolist()):
        own = products == name
        if name and (median := np.median(image_score[own])) > 0:
            found[own] /= median
    return found


def _score_all(detector: Detector, originals: IntArray, timings: Timings) -> FloatArray:
    """(n,) image scores of pictures of the bank, by their first rows, each against all the others."""
    by_distance = replace(detector.method, localize="none", flag_above=None, image_scores=("knn",))
    by_image, parts = detector.with_method(by_distance), []
    with progress_bar(len(originals), "suspects", detector.run.progress) as bar:
        size = 1 if detector.bank.is_tiled else _ROWS_AT_A_TIME
        for start in range(0, len(originals), size):
            rows = originals[start : start + size].tolist()
            parts.append(by_image.score_rows(rows, timings=timings).image_score)
            bar.update(len(rows))
    return np.concatenate(parts)


def _write_csv(staged: Path, found: Suspects, detector: Detector) -> None:
    with atomic_path(staged / "suspects.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        groups = detector.bank.group_of
        names = [*(["group"] if groups else []), *(["product"] if found.products else [])]
        file.write(csv_line(["id", "image_score", "rank", "path", *names]))
        for place, (name, score) in enumerate(zip(found.ids, found.image_score, strict=True), start=1):
            path = detector.bank.image_path(name)
            group = [text_cell(groups.get(name, ""))] if groups else []
            group += [text_cell(found.products[place - 1])] if found.products else []
            file.write(csv_line([text_cell(name), score, place, "" if path is None else text_cell(str(path)), *group]))


def _write_scores(folder: OutputFolder, detector: Detector, rows: Sequence[int], timings: Timings) -> None:
    settings = json.dumps({**asdict(detector.method), "recipe": detector.recipe.name})
    tile = detector.bank.layout.input_size if detector.bank.is_tiled else None
    with ScoreWriter(folder.staged / SCORES, settings, run=folder.run, tile=tile) as writer:
        for row in rows:
            writer.append(detector.score_rows([row], timings=timings))


def _write_page(folder: OutputFolder, found: Suspects, detector: Detector, shown: int, timings: Timings) -> None:
    bank = detector.bank
    names, normal_picture = found.ids[:shown], NormalPictures(bank)
    results = Results(
        out=found.out,
        images=len(names),
        skipped=(),
        left_out=LeftOut(),
        visible=Visible.of((), ""),
        in_bank=(),
        metrics=None,
        decisions=None,
        notice="",
        passed_over={},
        timing_s=timings.seconds,
        total_s=timings.total_s,
        peak_memory_bytes=peak_memory_bytes(),
    )
    with ScoreFile.open(folder.staged / SCORES) as scores:
        inputs = ReportInputs(
            facts=DetectorFacts.of(detector),
            results=results,
            scores=scores,
            records=[ImageRecord(name, bank.image_path(name) or Path(name)) for name in names],
            masks=None,
            picture=lambda i: normal_picture(names[i]),
            normal_ids=bank.pictures.names(np.arange(len(bank))),
            normal_picture=normal_picture,
            normal_group=bank.group_of,
            normal_places=bank.tile_places,
        )
        page = replace(
            run_page(inputs, shown),
            title="Suspects",
            notices=tuple(f"Product {name} is left out: {why}." for name, why in found.left_out.items()),
            subtitle=f"The {len(names)} of {bank.size_text} in {bank.path.name} that look least like the others",
            run=folder.run,
        )
        write_html(folder.staged / "report.html", page)
