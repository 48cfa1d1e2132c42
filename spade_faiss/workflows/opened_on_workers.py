"""How a detector is opened on the workers of a cluster: with all of its bank, or asking the owners of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from spade_faiss.cluster.owned_detector import OwnedDetector
from spade_faiss.cluster.owner import OwnedBank
from spade_faiss.cluster.owners import open_owners
from spade_faiss.cluster.session import Session
from spade_faiss.core.settings import Run
from spade_faiss.scoring.detector import Detector


@contextmanager
def opening(session: Session, detector: Detector) -> Iterator[Callable[[], Detector]]:
    """What opens a detector on a worker; where the bank's shards have owners, these end with the `with` block.

    Args:
        session: the connection.
        detector: as this process opened it; its run says whether shards have owners.

    Raises:
        InputError: for a `Backbone` that was passed to it: no worker has it.
    """
    run = detector.run
    there = replace(run, cluster=None, replicas=None, progress=False, engine=_engine(detector))
    if run.replicas is None:
        yield detector.reopening(there)
        return
    owned = OwnedBank(
        bank=detector.bank,
        recipe=detector.recipe,
        method=detector.method,
        memory=run.memory,
        threads=session.cpus,
        replicas=run.replicas,
    )
    with open_owners(session, owned) as owners:
        # It keeps `replicas`: no worker opens all embeddings.
        kept = replace(there, cluster=run.cluster, replicas=run.replicas)
        yield partial(OwnedDetector, detector.bank, detector.recipe, detector.method, kept, None, owners)


def _engine(detector: Detector) -> str:
    """What runs the forward pass on workers: what runs it here, if there is a network to run."""
    return Run.engine if detector.bank.manifest.source is None else detector.backbone.engine
