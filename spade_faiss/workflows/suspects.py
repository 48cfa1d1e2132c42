"""Which normal images are least like the others: how people find the bad part that slipped into the good folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.settings import ReportOptions
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.folders import LeftOut
from spade_faiss.features.placement import Visible
from spade_faiss.report.html import write_html
from spade_faiss.report.inputs import DetectorFacts, ReportInputs
from spade_faiss.report.normals import NormalPictures
from spade_faiss.report.page import run_page
from spade_faiss.report.results import Results
from spade_faiss.report.scorefile import ScoreFile, ScoreWriter
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.score import SCORES, peak_memory_bytes

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Suspects:
    """All normal images of a bank, the least normal one first, with their image scores against the others; files in `out`."""

    out: Path
    ids: list[str]
    image_score: FloatArray


def suspects(bank: str | Path | Detector, *, out: str | Path, report: ReportOptions = ReportOptions()) -> Suspects:
    """Score every normal image against all the others; write all to suspects.csv, the first to scores.h5 and report.html.

    Args:
        bank: a bank's folder, to be searched with the default settings, or an opened detector.
        out: the folder to write to; it is made if there is none, and files of the same names are replaced.
        report: how many of the least normal ones get a map and are shown.

    Raises:
        InputError: for a bank with too few images, or a recipe that searches the maps of the whole bank.
    """
    check_at_least("shown", report.shown, 1)
    out, timings = Path(out), Timings()
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; choose a folder")
    detector = bank if isinstance(bank, Detector) else Detector.open(bank)
    detector.check_leave_one_out()
    image_score = _score_all(detector, timings)
    order = np.argsort(-image_score, kind="stable")
    found = Suspects(out=out, ids=[detector.bank.ids[row] for row in order], image_score=image_score[order])
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(found, detector)
    _write_scores(out, detector, order[: report.shown].tolist(), timings)
    _write_page(found, detector, report.shown, timings)
    return found


def _score_all(detector: Detector, timings: Timings) -> FloatArray:
    """(n,) image scores of the bank's images, each against all the others."""
    by_image, total, parts = detector.with_localize("none"), len(detector.bank), []
    with progress_bar(total, "suspects", detector.run.progress) as bar:
        for start in range(0, total, _ROWS_AT_A_TIME):
            rows = range(start, min(start + _ROWS_AT_A_TIME, total))
            parts.append(by_image.score_rows(rows, timings=timings).image_score)
            bar.update(len(rows))
    return np.concatenate(parts)


def _write_csv(found: Suspects, detector: Detector) -> None:
    with (
        atomic_path(found.out / "suspects.csv") as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        lines = csv.writer(file)
        lines.writerow(["id", "image_score", "rank", "path"])
        for place, (name, score) in enumerate(zip(found.ids, found.image_score, strict=True), start=1):
            lines.writerow([name, score, place, detector.bank.image_path(name) or ""])


def _write_scores(out: Path, detector: Detector, rows: Sequence[int], timings: Timings) -> None:
    settings = json.dumps({**asdict(detector.method), "recipe": detector.recipe.name})
    with ScoreWriter(out / SCORES, settings) as writer:
        for row in rows:
            writer.append(detector.score_rows([row], timings=timings))


def _write_page(found: Suspects, detector: Detector, shown: int, timings: Timings) -> None:
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
        timing_s=timings.seconds,
        total_s=timings.total_s,
        peak_memory_bytes=peak_memory_bytes(),
    )
    with ScoreFile.open(found.out / SCORES) as scores:
        inputs = ReportInputs(
            facts=DetectorFacts.of(detector),
            results=results,
            scores=scores,
            records=[ImageRecord(name, bank.image_path(name) or Path(name)) for name in names],
            masks=None,
            picture=lambda i: normal_picture(names[i]),
            normal_ids=bank.ids,
            normal_picture=normal_picture,
        )
        page = replace(
            run_page(inputs, shown),
            title="Suspects",
            subtitle=f"The {len(names)} of {len(bank)} normal images in {bank.path.name} that look least like the others",
        )
        write_html(found.out / "report.html", page)
