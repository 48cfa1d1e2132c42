"""Scoring on a cluster: workers score pieces of the list of images, each into a scores.h5 of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from spade_faiss.cluster.pieces import PieceRunner, Work
from spade_faiss.cluster.plan import Piece, least_images, piece_size, pieces_of
from spade_faiss.cluster.session import connect
from spade_faiss.core.errors import InputError
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import Bools
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features.datasets import ImageRecord, Survey, check_skipped
from spade_faiss.features.pictures import load_image
from spade_faiss.report.exchange import SCORES
from spade_faiss.report.output_folder import OutputFolder
from spade_faiss.report.pictures import Picture
from spade_faiss.report.scorefile import ScoreWriter
from spade_faiss.report.selection import Values
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores
from spade_faiss.workflows.collected import Collected, collect
from spade_faiss.workflows.kept_parts import PartsRecord, ScoredPart, key_of, read_part, whole_parts, write_part
from spade_faiss.workflows.opened_on_workers import opening
from spade_faiss.workflows.pictures_on_workers import PieceOfPictures
from spade_faiss.workflows.stored_parts import PartsPlace, begin_run

# The most images of a part: its file can be handled, and a worker that is lost has not lost much.
_MOST_IMAGES = 2000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """What a worker needs to know of the run beside its detector.

    Args:
        root: the folder that the ids of images start from.
        place: where the parts are kept.
        settings: JSON text that says how images are scored.
        run: tells the run from all others.
    """

    root: Path
    place: PartsPlace
    settings: str
    run: str


class ScoredParts(NamedTuple):
    """The parts of a run, in the order of their images; `run` tells it from all others."""

    run: str
    parts: list[ScoredPart]


class _Part(NamedTuple):
    """What a worker is asked for: the name of the part's folder, and its images."""

    name: str
    pictures: PieceOfPictures


class NoPictures:
    """Takes the pictures of a run and forgets them: a report that is made elsewhere reads them again."""

    def add(self, pictures: Sequence[Picture], image_score: Values, localized: Bools, defective: Bools | None) -> None:
        """See `PictureStore.add`."""

    def __getitem__(self, i: int) -> Picture:
        raise KeyError(i)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class ReadPictures(NoPictures):
    """Reads the pictures that a report shows from their files, when it asks for them.

    Args:
        detector: says how they lie in the backbone's input.
        collected: the images of the run, by their numbers.
    """

    def __init__(self, detector: Detector, collected: Collected) -> None:
        self._detector = detector
        self._collected = collected

    def __getitem__(self, i: int) -> Picture:
        """See `PictureStore`.

        Raises:
            InputError: if the file cannot be read any more, or is not the one that was scored.
        """
        record, rois = self._collected.records[i], self._detector.rois
        preprocess = self._detector.backbone.source.preprocess
        loaded = load_image(record, preprocess if rois is None else rois.preprocess(record, preprocess))
        if loaded.sha256 != self._collected.sha256[i]:
            raise InputError(f"{record.path} has changed since it was scored")
        return loaded.picture


class _Worker:
    """A detector, open on a worker."""

    def __init__(self, plan: PartPlan, opened: Callable[[], Detector], rules: DecisionRules | None) -> None:
        self._plan = plan
        self._job = opened(), rules

    def score(self, part: _Part) -> ScoredPart:
        """Score images into a scores.h5 of their own, unless they were scored before and are the same."""
        own = {record.id: record for record in part.pictures.records}
        with self._plan.place.part(part.name) as folder, part.pictures.here(self._plan.root) as images:
            found = self._score(folder, images)
        found.collected.records[:] = [own[record.id] for record in found.collected.records]
        return found

    def _score(self, folder: Path, images: tuple[Path, Sequence[ImageRecord]]) -> ScoredPart:
        plan, (detector, _), records = self._plan, self._job, images[1]
        rois = detector.rois
        if (kept := read_part(folder, plan.run, records, rois)) is not None:
            return kept
        folder.mkdir(exist_ok=True)
        tile = detector.bank.layout.input_size if detector.bank.is_tiled else None
        with ExitStack() as stack:
            writers: list[ScoreWriter] = []

            def append(scores: Scores) -> None:
                if not writers:  # there is no file without an image
                    writers.append(stack.enter_context(ScoreWriter(folder / SCORES, plan.settings, run=plan.run, tile=tile)))
                writers[0].append(scores)

            collected = collect(self._job, images, append, NoPictures(), Timings(), allow_none=True)
        return write_part(folder, plan.run, collected, records, rois)


def score_pieces(job: tuple[Detector, DecisionRules | None], found: Survey, folder: OutputFolder, settings: str) -> ScoredParts:
    """Score images on the workers of the cluster that the detector's run names.

    Parts that a run of the same images and settings had scored before it was lost are kept.

    Args:
        job: what scores the images, and what decides about them; each worker opens it for itself.
        found: the images, on storage that all nodes have at the same path or at a URL; so must the bank be, and the results.
        folder: the folder of the results.
        settings: JSON text that says how images are scored.

    Raises:
        InputError: if more images than allowed are unreadable, or all of them.
        ClusterError: if the cluster cannot be reached, or workers are lost again and again.
    """
    (detector, rules), records = job, found.records
    run = detector.run
    assert run.cluster is not None
    parts: list[ScoredPart] = []
    skipped = Collected().skipped
    with connect(run.cluster) as session, opening(session, detector) as opened:
        size = piece_size(
            len(records),
            batch=detector.images_at_a_time,
            most=_MOST_IMAGES,
            workers=session.workers(),
            least=least_images(detector.bank.layout.image_bytes) if not detector.bank.is_tiled else 1,
        )
        new = PartsRecord(run=folder.run, size=size)
        place, here, record = begin_run(folder, key_of(detector, rules, settings, found), new)
        pieces = pieces_of(len(records), record.size)
        before = whole_parts(here)
        plan = PartPlan(root=found.root, place=place, settings=settings, run=record.run)
        runner = PieceRunner(session, Work(partial(_Worker, plan, opened, rules), _Worker.score), run.device)
        asked = ((piece, _Part(_name(piece), PieceOfPictures.of(piece.of(records)))) for piece in pieces)
        with progress_bar(len(records), "score", run.progress) as bar:
            for piece, part in runner(asked):
                for item in part.collected.skipped:
                    _log.warning("skipped %s", item.reason)
                skipped += part.collected.skipped
                check_skipped(skipped, run.max_skipped)
                parts.append(place.taken(_name(piece), part))
                bar.update(len(piece))
    if len(skipped) == len(records):
        raise InputError(f"none of the {len(records)} images could be read; the first: {skipped[0].reason}")
    # A part may also be there because its worker was lost with it in hand.
    if kept := sum(len(part.collected) for part in parts if part.kept and part.file and part.file.parent.name in before):
        _log.warning("%d of %d images had been scored by a run that was lost; their scores were kept", kept, len(records))
    return ScoredParts(record.run, parts)


def _name(piece: Piece) -> str:
    """The name of the folder of a part."""
    return f"{piece.number:06d}"
