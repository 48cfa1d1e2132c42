"""The scores of normal images that a calibration records; on a cluster, workers score pieces of the images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spade_faiss.cluster.pieces import PieceRunner, Work
from spade_faiss.cluster.plan import least_images, plan_pieces
from spade_faiss.cluster.session import connect
from spade_faiss.core.errors import InputError
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.timing import Timings
from spade_faiss.decisions.conformal import PixelCounts
from spade_faiss.features.datasets import Skipped, Survey, check_skipped
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores
from spade_faiss.workflows.opened_on_workers import opening
from spade_faiss.workflows.pictures_on_workers import PieceOfPictures

# The most images of a piece: a worker that is lost has not lost much.
_MOST_IMAGES = 500

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class NormalScores:
    """What a calibration records of n normal images; it grows batch by batch, and piece by piece.

    Args:
        names: their ids.
        image_score: (n,) image scores.
        map_score: (n,) the maxima of their maps.
        statistics: (n, 3), see `Scores`.
        pixels: the pixel scores of all maps.
    """

    names: list[str] = field(default_factory=list)
    image_score: list[float] = field(default_factory=list)
    map_score: list[float] = field(default_factory=list)
    statistics: list[list[float]] = field(default_factory=list)
    pixels: PixelCounts = field(default_factory=lambda: PixelCounts(keys=(), counts=()))

    def add(self, scores: Scores, detector: Detector) -> None:
        """Take in a batch that a detector has scored."""
        self.names += scores.ids
        self.image_score += scores.image_score.tolist()
        self.map_score += scores.map_score.tolist()
        self.statistics += scores.statistics.tolist()
        has_roi = detector.bank.layout.roi is not None or detector.bank.layout.own_rois
        for scored in scores.own_maps() if detector.bank.is_tiled else [scores.maps]:
            self.pixels += PixelCounts.of(scored if scores.valid is None or not has_roi else scored[scores.valid])

    def extend(self, other: NormalScores) -> None:
        """Take in the images that follow."""
        for name, values in vars(other).items():
            setattr(self, name, getattr(self, name) + values)


class _Part(NamedTuple):
    """What a worker is asked for: rows of the bank, or images that are not in it."""

    rows: Sequence[int]
    pictures: PieceOfPictures


class _Worker:
    """A detector, open on a worker."""

    def __init__(self, root: Path, opened: Callable[[], Detector]) -> None:
        self._root = root
        self._detector = opened()

    def score(self, part: _Part) -> tuple[NormalScores, Sequence[Skipped]]:
        detector, found = self._detector, NormalScores()
        size = detector.images_at_a_time
        for start in range(0, len(part.rows), size):
            found.add(detector.score_rows(part.rows[start : start + size]), detector)
        if not part.pictures.records:  # rows need neither the network nor masks
            return found, ()
        stream = detector.stream(Timings(), "calibrate", allow_none=True)
        with part.pictures.here(self._root) as images:
            for _, scores in stream(*images):
                found.add(scores, detector)
        return found, tuple(stream.skipped)


def score_on_cluster(detector: Detector, rows: Sequence[int], held_out: Survey | None = None) -> NormalScores:
    """Score rows of the bank, each against the others, or held-out images, on the cluster that the detector's run names.

    Args:
        detector: what scores; each worker opens it for itself.
        rows: rows of the bank.
        held_out: images that are not in it, in place of rows.

    Raises:
        InputError: as `Detector.score_rows`, and for too many images that cannot be read.
        ClusterError: if the cluster cannot be reached, or workers are lost again and again.
    """
    run, records = detector.run, [] if held_out is None else held_out.records
    assert run.cluster is not None
    if held_out is None:
        detector.neighbors.check_leave_one_out()
    root = Path() if held_out is None else held_out.root
    found, skipped, count = NormalScores(), list[Skipped](), len(rows) + len(records)
    with connect(run.cluster) as session, opening(session, detector) as opened:
        pieces = plan_pieces(
            count,
            batch=detector.images_at_a_time,
            most=_MOST_IMAGES,
            workers=session.workers(),
            least=least_images(detector.bank.layout.image_bytes) if not detector.bank.is_tiled else 1,
        )
        runner = PieceRunner(session, Work(partial(_Worker, root, opened), _Worker.score), run.device)
        with progress_bar(count, "calibrate", run.progress) as bar:
            for piece, (scores, lost) in runner(
                (piece, _Part(piece.of(rows), PieceOfPictures.of(piece.of(records)))) for piece in pieces
            ):
                found.extend(scores)
                skipped += lost
                for item in lost:
                    _log.warning("skipped %s", item.reason)
                check_skipped(skipped, run.max_skipped)
                bar.update(len(piece))
    if records and len(skipped) == len(records):
        raise InputError(f"none of the {len(records)} images could be read; the first: {skipped[0].reason}")
    return found
