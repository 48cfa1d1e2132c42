"""Extraction on a cluster: workers compute pieces of the list of images and write their shards, and the driver commits them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from spade_faiss.bank.backbone import backbone_of
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.places import leftovers
from spade_faiss.bank.shards import StagedShard
from spade_faiss.cluster.pieces import PieceRunner, Work
from spade_faiss.cluster.plan import Piece, least_images, plan_pieces
from spade_faiss.cluster.session import connect
from spade_faiss.core.errors import InputError
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import Duplicate, Skipped, Survey, check_skipped
from spade_faiss.features.names import is_known
from spade_faiss.features.placement import Placement
from spade_faiss.features.stream import FeatureStream
from spade_faiss.workflows.pictures_on_workers import PieceOfPictures
from spade_faiss.workflows.shard_buffer import Belonging, ShardBuffer

# A picture that is cut into tiles has any number of entries: of such pictures, a piece has so many at most.
_TILED_PICTURES = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Extracting:
    """How new images are extracted into a bank.

    Args:
        found: the images that were found; their records are those that the bank does not hold.
        run: how the work is done.
        batch_size: how many inputs the network takes at once.
        shard_bytes: how large a shard becomes.
        allow_none: whether all images may be unreadable.
        belongs: where the images belong.
    """

    found: Survey
    run: Run
    batch_size: int
    shard_bytes: int
    allow_none: bool
    belongs: Belonging


class Pass(NamedTuple):
    """What came of a list of images.

    Attributes:
        placements: how each image that was extracted lies in the backbone's input.
        skipped: the images that could not be read.
        duplicates: the images that have the same content as another one.
    """

    placements: Sequence[Placement]
    skipped: Sequence[Skipped]
    duplicates: Sequence[Duplicate]


class _Part(NamedTuple):
    """What a worker is asked for: some images, where they belong, and the ids of known images by the sha256 of their files."""

    pictures: PieceOfPictures
    belongs: Belonging
    known: dict[str, str]


class _Done(NamedTuple):
    """What a worker made of it: shards that are not committed yet."""

    shards: Sequence[StagedShard]
    came: Pass


class _Worker:
    """A bank and its backbone, open on a worker."""

    def __init__(self, place: str, work: Extracting) -> None:
        self._work = work
        self._bank = Bank.open(place, check=False)
        self._backbone = backbone_of(self._bank, None, work.run)

    def extract(self, part: _Part) -> _Done:
        """Extract images into shards beside those of the bank."""
        work, bank, timings, shards = self._work, self._bank, Timings(), list[StagedShard]()
        stream = FeatureStream(
            self._backbone,
            work.run,
            batch_size=work.batch_size,
            timings=timings,
            allow_none=True,
            known=dict(part.known),
        )

        def stage(batch: FeatureBatch, product: str) -> None:
            shards.append(bank.stage(batch, product=product))

        with (
            part.pictures.here(work.found.root) as (root, records),
            ShardBuffer(stage, bank.layout, work.shard_bytes, timings) as buffer,
        ):
            extracted = stream(root, records, "extract", bank.manifest.augment)
            placements = buffer.fill(extracted, part.belongs)
        return _Done(shards, Pass(placements, tuple(stream.skipped), tuple(stream.duplicates)))


def extract_pieces(bank: Bank, backbone: Backbone, work: Extracting, known: dict[str, str]) -> Pass:
    """Extract images into a bank that this process writes to, on the workers of the cluster that `work.run` names.

    The bank holds then what a single process puts into it, in the same order, to the bit where processors are alike.

    Args:
        bank: the bank, on storage that all nodes have at the same path, or at a URL.
        backbone: the bank's; workers open it from the bank.
        work: what is extracted, and how.
        known: the id of each image that the bank held, by the sha256 of its file; new images are added to it.

    Raises:
        InputError: for a backbone that workers cannot open, and for too many unreadable images.
        ClusterError: if the cluster cannot be reached, or workers are lost again and again.
    """
    assert work.run.cluster is not None
    _check_backbone(bank, backbone)
    records = work.found.records
    # The engine that was chosen here, so that all workers compute the same; by another than torch, it is what the bank carries.
    weights = work.run.weights if bank.manifest.network is None or backbone.engine == "torch" else None
    there = replace(work.run, cluster=None, progress=False, weights=weights, engine=backbone.engine)
    job = replace(work, found=replace(work.found, records=[]), run=there, belongs=Belonging({}, {}))
    augment = bank.manifest.augment
    views = 1 if augment is None else augment.views
    with _swept(bank), connect(work.run.cluster) as session:  # when its workers have ended, if they end with this job
        pieces = plan_pieces(
            len(records),
            batch=max(1, work.batch_size // views) if not bank.is_tiled else 1,
            most=_TILED_PICTURES if bank.is_tiled else max(1, -(-work.shard_bytes // (views * bank.layout.image_bytes))),
            workers=session.workers(),
            least=least_images(views * bank.layout.image_bytes) if not bank.is_tiled else 1,
        )
        runner = PieceRunner(session, Work(partial(_Worker, bank.name, job), _Worker.extract), work.run.device)

        def part(piece: Piece, held: dict[str, str]) -> tuple[Piece, _Part]:
            some = piece.of(records)
            return piece, _Part(PieceOfPictures.of(some), work.belongs.part(record.id for record in some), held)

        placements, skipped, duplicates = list[Placement](), list[Skipped](), list[Duplicate]()
        with progress_bar(len(records), "extract", work.run.progress) as bar:
            for piece, done in runner(part(piece, {}) for piece in pieces):
                # A worker knows the images of its piece alone.
                if held := {digest: known[digest] for digest in _digests(done) if digest in known}:
                    ((_, done),) = runner([part(piece, held)])
                for shard in done.shards:
                    bank.append_staged(shard)
                    known.update(zip(shard.sha256, shard.pictures, strict=False))
                for item in done.came.skipped:
                    _log.warning("skipped %s", item.reason)
                placements += done.came.placements
                skipped += done.came.skipped
                duplicates += done.came.duplicates
                check_skipped(skipped, work.run.max_skipped)
                bar.update(len(piece))
    if records and len(skipped) == len(records) and not work.allow_none:
        raise InputError(f"none of the {len(records)} images could be read; the first: {skipped[0].reason}")
    return Pass(placements, skipped, duplicates)


def _digests(done: _Done) -> Iterator[str]:
    for shard in done.shards:
        yield from shard.sha256


@contextmanager
def _swept(bank: Bank) -> Iterator[None]:
    """Remove at the end what workers wrote and nobody commits any more: pieces that were begun twice, or not ended."""
    try:
        yield
    finally:
        for path in leftovers(bank.path):
            path.unlink(missing_ok=True)


def _check_backbone(bank: Bank, backbone: Backbone) -> None:
    """Raise InputError for a backbone that exists in this process alone."""
    source, network = bank.manifest.source, bank.manifest.network
    assert source is not None
    if backbone.engine == "torch" and not is_known(source.backbone):
        carried = "" if network is None else "; the bank carries it: choose what runs it, with --engine onnxruntime"
        raise InputError(f"the backbone {source.backbone!r} is a module of this process, and workers have none of it{carried}")
