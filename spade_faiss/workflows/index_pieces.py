"""Indexes on a cluster: what a search method learns is learned once, and workers encode the shards of the bank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.cluster.pieces import PieceRunner, Work
from spade_faiss.cluster.plan import least_images, plan_pieces
from spade_faiss.cluster.session import connect
from spade_faiss.core.copies import copy_of
from spade_faiss.core.files import FileEntry
from spade_faiss.core.settings import Run
from spade_faiss.index.encoding import Encode, Encoder, Encoding, Job, encode_here


def encode_by(run: Run, bank: Snapshot) -> Encode:
    """What encodes shards: this process, or the workers of the cluster that a run names.

    The copy of a bank at a URL is of this node alone: it is encoded here. So is a bank that is too small for two workers: this
    process has done it before one would have started.
    """
    if run.cluster is None or copy_of(bank.path) is not None or len(bank) < 2 * least_images(bank.layout.image_bytes):
        return encode_here
    return partial(_encode_on, run.cluster)


def _encode_on(cluster: str, encoding: Encoding[Job], jobs: Sequence[Job]) -> Iterator[tuple[int, FileEntry]]:
    with connect(cluster) as session:
        pieces = plan_pieces(len(jobs), batch=1, most=1, workers=session.workers())
        runner = PieceRunner(session, Work(encoding.open, _encode))
        for piece, entry in runner((piece, jobs[piece.start]) for piece in pieces):
            yield piece.number, entry


def _encode(encoder: Encoder[Job], job: Job) -> FileEntry:
    return encoder.encode(job)
