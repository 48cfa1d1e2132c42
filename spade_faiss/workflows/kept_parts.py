"""The parts of a run on a cluster stay until its results are complete: if its command is lost, the same command goes on.

A run has a folder below that of all kept parts, named after what its parts depend on: how images are scored and decided on, the
state of the bank, and the list of images. A part is a folder in it, with `scores.h5`, what else is known of its images, and, as
the last file, a record that says that they are whole. Whoever begins a part that is there takes it as it is, if the pictures
are still the same: their content is compared, not their time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from spade_faiss.core.copies import named
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.files import FileEntry, hash_file
from spade_faiss.core.signed_json import hash_json, read_signed, write_signed
from spade_faiss.decisions.calibration import state_of
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features.datasets import ImageRecord, Survey
from spade_faiss.features.pages import hash_image
from spade_faiss.features.roi_folder import RoiFolder
from spade_faiss.index.build import views_of
from spade_faiss.index.built_index import index_folder
from spade_faiss.report.exchange import SCORES
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.collected import Collected
from spade_faiss.workflows.collected_file import read_collected, write_collected

COLLECTED = "collected.h5"
_REMEDY = "remove it"

_log = logging.getLogger(__name__)


class ScoredPart(NamedTuple):
    """A part of the run: its scores.h5, None if none of its images could be read, and what is known of its images.

    `kept` says that it was there already.
    """

    file: Path | None
    collected: Collected
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class PartsRecord:
    """What the parts of a run have in common.

    Args:
        run: tells the run from all others.
        size: how many images a part has; the last one may have fewer.
    """

    FORMAT: ClassVar[str] = "spade_faiss parts of a run"
    FILE: ClassVar[str] = "run.json"

    run: str
    size: int


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """That a part is whole.

    Args:
        run: the run that it is of.
        scored: how many images are in its scores.h5; there is no file without one.
        collected: the file that says what else is known of its images.
    """

    FORMAT: ClassVar[str] = "spade_faiss part of a run"
    FILE: ClassVar[str] = "part.json"

    run: str
    scored: int
    collected: FileEntry


def begin_parts(place: Path, key: str, record: PartsRecord) -> tuple[Path, PartsRecord]:
    """Make the folder of a run's parts, or go on with that of a run whose parts would be the same.

    Parts of other runs stay: whoever gave other settings by mistake can still go on with them. They go when results are
    complete, whichever run's.

    Args:
        place: where the folders of all runs are.
        key: see `key_of`.
        record: of the run, if none is there.

    Returns:
        The folder, and what its parts have in common.
    """
    folder = place / key
    try:
        found = read_signed(folder / PartsRecord.FILE, PartsRecord, PartsRecord.FORMAT, 1, _REMEDY)
    except (SpadeError, FileNotFoundError):
        others = [path for path in place.glob("*/*") if (path / PartRecord.FILE).is_file()]
        if others:
            _log.warning(
                "a run that was lost has left %d parts of other images or settings: this run begins anew, and that one can go "
                "on, by its own command, until this one is complete",
                len(others),
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_signed(folder / PartsRecord.FILE, PartsRecord.FORMAT, 1, asdict(record))
        return folder, record
    return folder, found


def whole_parts(folder: Path) -> frozenset[str]:
    """The names of the parts of a run that say that they are whole."""
    return frozenset(path.parent.name for path in folder.glob(f"*/{PartRecord.FILE}"))


def key_of(detector: Detector, rules: DecisionRules | None, settings: str, found: Survey) -> str:
    """What the parts of a run depend on, beside the content of the pictures, as a short text that names it.

    Args:
        detector: scores the images.
        rules: decide about them.
        settings: JSON text that says how images are scored.
        found: the images.
    """
    bank, run = detector.bank, detector.run
    folders = {part.product: index_folder(part, detector.recipe) for part in views_of(bank)}
    indexes = {
        f"{product}/{path.relative_to(folder).as_posix()}": hash_file(path)
        for product, folder in folders.items()
        for path in sorted(folder.rglob("*.json"))
    }
    rule_of = {} if rules is None else rules.by_product
    decided = {
        product: None
        if rule is None
        else {
            "calibration": hash_json(asdict(rule.calibration)),
            "thresholds": asdict(rule.thresholds),
            "tests": rule.tests,
            "fdr": rule.fdr,
        }
        for product, rule in rule_of.items()
    }
    known = {
        "settings": settings,
        "bank": {
            **state_of(bank),
            "path": named(str(bank.path.resolve())),
            "removed": hash_json({"ids": sorted(bank.removed)}),
        },
        "indexes": indexes,
        "decided": decided,
        "engine": detector.backbone.engine,
        "device": run.device,
        "batch": detector.images_at_a_time,
        "roi": str(run.roi),
        "root": named(str(found.root)),
        "images": hash_json({"ids": [record.id for record in found.records]}),
    }
    return hash_json(known)[:32]


def write_part(
    folder: Path, run: str, collected: Collected, records: Sequence[ImageRecord], rois: RoiFolder | None
) -> ScoredPart:
    """Record that a part is whole, whose scores.h5 is written.

    Args:
        folder: of the part.
        run: the run that it is of.
        collected: what is known of its images.
        records: all images that it was asked for.
        rois: the regions of interest of pictures, if each has one of its own.
    """
    of_file = dict(zip([record.id for record in collected.records], collected.sha256, strict=True))
    digests = [_with_roi(of_file.get(record.id) or _digest(record), record, rois) for record in records]
    entry = write_collected(folder / COLLECTED, collected, records, digests)
    record = PartRecord(run=run, scored=len(collected), collected=entry)
    write_signed(folder / PartRecord.FILE, PartRecord.FORMAT, 1, asdict(record))
    return ScoredPart(folder / SCORES if len(collected) else None, collected)


def read_part(folder: Path, run: str, records: Sequence[ImageRecord], rois: RoiFolder | None) -> ScoredPart | None:
    """A part that is there, if it is whole and of these pictures; all of its files and all pictures are read.

    Args:
        folder, run, records, rois: see `write_part`.
    """
    if not (folder / PartRecord.FILE).is_file():
        return None
    try:
        part = read_signed(folder / PartRecord.FILE, PartRecord, PartRecord.FORMAT, 1, _REMEDY)
        collected, digests = read_collected(folder / COLLECTED, part.collected, records)
        file = folder / SCORES if part.scored else None
        if part.run != run or part.scored != len(collected):
            return None
        if file is not None and not _is_whole(file, run, collected):
            return None
    except (SpadeError, LookupError, ValueError) as error:
        _log.warning("%s; it is scored again", error)
        return None
    # What comes of a picture that cannot be read now is seen when it is scored.
    if "" in digests or digests != [_with_roi(_digest(record), record, rois) for record in records]:
        return None
    return ScoredPart(file, collected, kept=True)


def _is_whole(file: Path, run: str, collected: Collected) -> bool:
    """Whether a scores.h5 holds what is known of its images; each map has a checksum, which is compared where it is read."""
    with ScoreFile.open(file) as scores:
        for _ in scores.maps():
            pass
        alike = np.array_equal(scores.image_score, collected.scores["knn"])
        return alike and scores.run == run and list(scores.ids) == [record.id for record in collected.records]


def _digest(record: ImageRecord) -> str:
    """The sha256 that names a picture by its content; empty if the system does not read it."""
    try:
        return hash_image(record.path)
    except OSError:
        return ""


def _with_roi(digest: str, record: ImageRecord, rois: RoiFolder | None) -> str:
    """The digest of a picture together with that of the mask that says what of it is inspected."""
    mask = None if rois is None else rois.mask_of(record)
    return digest if mask is None or not digest else f"{digest}-{hash_image(mask)}"
