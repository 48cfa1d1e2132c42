"""A program that runs `fit` at URLs and kills it at a request to the storage: python -m ... FOLDER PICTURES BUCKET RUN ...

A run is `NAME:NUMBER:WHEN`: the bank's name, the request at which it is killed (0 for none), and whether `before` or `after`
that is done. Each is forked from a process that has imported everything and computed nothing. Written are, as JSON, the exit
codes and how many requests each run made.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spade_faiss.scoring.detector
import spade_faiss.workflows.fit
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Caching
from spade_faiss.storage.cache import use_cache
from spade_faiss.storage.cloud import CloudStore
from spade_faiss.workflows import extract
from tests.support.backbones import tiny_backbone

_REQUESTS = ("list", "find", "read", "download", "put", "delete", "_put")


def fit_tiny(pictures: Path, bank: str | Path) -> None:
    """Fit a bank of several shards in a moment."""
    vars(extract).update(SHARD_BYTES=1, BATCH_SIZE=6)  # so many commits
    spade_faiss.workflows.fit.fit(pictures, bank=bank, preset="spade", extraction=Extraction(backbone=tiny_backbone()))


def _kill_at(number: int, when: str, count: list[int]) -> None:
    def counted(request: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            count[0] += 1
            is_last = count[0] == number
            if is_last and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return request(*arguments)
            finally:  # whether it was done or refused
                if is_last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in _REQUESTS:
        setattr(CloudStore, name, counted(getattr(CloudStore, name)))


def _run(folder: Path, pictures: Path, url: str, number: int, when: str) -> tuple[int, int]:
    told = folder / "count"
    told.write_text("0")
    if (pid := os.fork()) == 0:
        code = 70
        try:
            use_cache(Caching(cache=str(folder / "cache")))
            count = [0]
            _kill_at(number, when, count)
            fit_tiny(pictures, url)
            told.write_text(str(count[0]))
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(told.read_text())


def main(folder: Path, pictures: Path, bucket: str, runs: list[str]) -> None:
    found = []
    for run in runs:
        name, number, when = run.split(":")
        found.append(_run(folder, pictures, f"{bucket}/{name}", int(number), when))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
