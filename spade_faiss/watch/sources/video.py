"""A video file as a source: its frames, in order; those that were scored before are passed over."""

from __future__ import annotations

import time
from pathlib import Path

from spade_faiss.core.files import hash_file
from spade_faiss.core.settings import Run
from spade_faiss.features.datasets import records_of
from spade_faiss.watch.arrivals import Arrival, picture_id
from spade_faiss.watch.ledger import Ledger
from spade_faiss.watch.sources.queue import QueuedSource


class VideoSource(QueuedSource):
    """The frames of a video file.

    Args:
        path: the file.
        ledger: knows which frames were scored.
        run: says which frames are taken.
    """

    def __init__(self, path: Path, ledger: Ledger, run: Run) -> None:
        super().__init__(path.name)
        self._path = path.resolve()
        self._ledger = ledger
        self._run = run

    def find(self) -> None:
        """See `QueuedSource`."""
        sha256 = hash_file(self._path)
        for record in records_of(self._path, self._path.parent, self._run):
            name = picture_id(record.id, sha256)
            if self.stopping.is_set():
                return
            if not self._ledger.has_picture(name):
                self.put(Arrival(id=name, record=record, arrived_s=time.time()))
