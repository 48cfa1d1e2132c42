"""Watching in tests: runs in the process, and pictures that arrive."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.core.settings import Decision, Run
from spade_faiss.scoring.detector import Detector
from spade_faiss.watch.destinations import Secrets, make_sinks, make_source, source_name
from spade_faiss.watch.judge import Judge
from spade_faiss.watch.ledger import Ledger
from spade_faiss.watch.settings import WatchSettings
from spade_faiss.watch.watch import Line, Watch
from tests.support.pictures import save_png, weave, with_spot

# Of so few normal images, the bank of the tests promises this rate.
ALPHA = 0.05
QUICK = {"settle_s": 0.15, "give_up_s": 0.6, "rescan_s": 0.5, "drain_s": 5.0}


def write_pictures(folder: Path, count: int, *, seed: int = 0) -> list[str]:
    """Normal pictures, and every third one with a spot; returns their names."""
    rng, names = np.random.default_rng(seed), []
    for number in range(count):
        picture = weave(rng)
        names.append(f"{'sub/' if number % 2 else ''}{seed:02}-{number:03}.png")
        save_png(with_spot(picture, rng)[0] if number % 3 == 0 else picture, folder / names[-1])
    return names


def judge_of(bank: Path, alpha: float | None = ALPHA) -> Judge:
    return Judge(lambda: Detector.open(bank), Decision(alpha=alpha))


def read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "verdicts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Running:
    """A watch that runs in a thread."""

    def __init__(self, watch: Watch, ledger: Ledger) -> None:
        self.watch = watch
        self.lines: list[Line] = []
        self.error: BaseException | None = None
        self._ledger = ledger
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.watch(self.lines.append)
        except BaseException as error:
            self.error = error
        finally:
            self._ledger.close()

    def start(self) -> None:
        self._thread.start()

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 20) -> None:
        end = threading.Event()
        for _ in range(round(timeout_s / 0.01)):
            if condition():
                return
            if not self._thread.is_alive():
                break
            end.wait(0.01)
        if self.error is not None:
            raise self.error
        assert condition(), [line.facts for line in self.lines]

    def join(self, timeout_s: float = 30) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.watch.stopping.set()
        self.join()

    @property
    def names(self) -> list[str]:
        return [str(line.facts["name"]) for line in self.lines]


@contextmanager
def watching(
    source: str | Path, to: list[str], *, judge: Judge | None, state: Path | None = None, every: int = 1, **settings: Any
) -> Iterator[Running]:
    """Watch while the block runs; with `once`, until the source ends."""
    name, chosen = source_name(str(source)), WatchSettings(**{**QUICK, **settings})
    sinks = make_sinks(to, Secrets(), name)
    ledger = Ledger(state, name)
    watched = make_source(str(source), ledger, Run(every=every), chosen, 8)
    running = Running(Watch(name, watched, judge, sinks, ledger, chosen), ledger)
    running.start()
    try:
        yield running
        if chosen.once:
            running.join()
    finally:
        running.stop()
