"""Which normal images look least normal to the others: how people find the bad part that slipped into the good folder."""

from __future__ import annotations

import csv
import json
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
from spade_faiss.features.images import ImageRecord
from spade_faiss.report.html import write_html
from spade_faiss.report.presenter import Presenter, Results
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
    """Score every normal image against all the others; write suspects.csv of all, scores.h5 and report.html of the first.

    Args:
        bank: a bank's folder, to be searched with the defaults, or an opened detector.
        out: the folder to write to; made if there is none, files of the same names are replaced.
        report: how many of the least normal ones get a map and are shown.

    Raises:
        InputError: for a bank with too few images, or a recipe that searches the maps of the whole bank.
    """
    shown = report.shown
    check_at_least("shown", shown, 1)
    out, timings = Path(out), Timings()
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; choose a folder")
    detector = bank if isinstance(bank, Detector) else Detector.open(bank)
    detector.check_leave_one_out()
    by_image = detector.with_localize("none")
    opened, parts = detector.bank, []
    with progress_bar(len(opened), "suspects", detector.run.progress) as bar:
        for start in range(0, len(opened), _ROWS_AT_A_TIME):
            rows = range(start, min(start + _ROWS_AT_A_TIME, len(opened)))
            parts.append(by_image.score_rows(rows, timings=timings).image_score)
            bar.update(len(rows))
    image_score = np.concatenate(parts)
    order = np.argsort(-image_score, kind="stable")
    found = Suspects(out=out, ids=[opened.ids[row] for row in order], image_score=image_score[order])

    out.mkdir(parents=True, exist_ok=True)
    _write_csv(found, detector)
    with ScoreWriter(out / SCORES, json.dumps({**asdict(detector.method), "recipe": detector.recipe.name})) as writer:
        for row in order[:shown]:
            writer.append(detector.score_rows([int(row)], timings=timings))
    records = [ImageRecord(name, opened.image_path(name) or Path(name)) for name in found.ids[:shown]]
    results = Results(
        out=out,
        images=len(records),
        skipped=(),
        metrics=None,
        decisions=None,
        notice="",
        timing_s=timings.seconds,
        total_s=timings.total_s,
        peak_memory_bytes=peak_memory_bytes(),
    )
    with ScoreFile.open(out / SCORES) as scores:
        presenter = Presenter(detector, results, scores, records, [])
        page = replace(
            presenter.report(shown),
            title="Suspects",
            subtitle=f"The {len(records)} of {len(opened)} normal images in {opened.path.name} that look least like the others",
        )
        write_html(out / "report.html", page)
    return found


def _write_csv(found: Suspects, detector: Detector) -> None:
    with (
        atomic_path(found.out / "suspects.csv") as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        lines = csv.writer(file)
        lines.writerow(["id", "image_score", "rank", "path"])
        for place, (name, score) in enumerate(zip(found.ids, found.image_score, strict=True), start=1):
            lines.writerow([name, score, place, detector.bank.image_path(name) or ""])
