"""A program that kills `score` and `evaluate` at random instants and looks at the folder: python -m ... FOLDER BANK DATASET.

It forks a process for each run, from one that has imported everything and computed nothing: an interpreter of its own would
take longer to start than the run takes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import spade_faiss.scoring.detector
import spade_faiss.workflows.evaluate  # noqa: F401
from spade_faiss.cli import main
from tests.support.runs import run_shown

KILLS = 104
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def start(words: list[str], log: Path) -> int:
    """Run a command in a process of its own; returns its id."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        with log.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            code = main(words)
    finally:
        os._exit(code)
    raise AssertionError


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_runs(folder: Path, bank: str, dataset: str, seed: int) -> dict[str, int]:
    """Kill runs into one folder; returns how often each command was killed, and which run was found."""
    draw, counts = random.Random(seed), Counter[str]()
    out, log = folder / "out", folder / "log"
    runs = {
        "score": ["score", f"{dataset}/test", "--overlays"],
        "evaluate": ["evaluate", dataset],
    }
    words = {name: [*parts, "--bank", bank, "--out", str(out), "--quiet", "--shown", "2"] for name, parts in runs.items()}
    seconds = 0.0
    for parts in words.values():
        started = time.perf_counter()
        assert end(start(parts, log)) == 0, log.read_text()
        seconds = time.perf_counter() - started
        assert run_shown(out)
    for number in range(KILLS):
        name = draw.choice(list(words))
        sent, before, was_clear = SIGNALS[number % 2], run_shown(out), not [*folder.glob(".spade-*")]
        pid = start(words[name], log)
        if number % 4 < 2:
            time.sleep(draw.uniform(0, seconds))
        else:  # about when results are shown
            staged = [*folder.glob(".spade-*.tmp")]
            while not any((place / "new" / "report.json").exists() for place in staged) and not _has_ended(pid):
                time.sleep(0.0005)
                staged = [*folder.glob(".spade-*.tmp")]
            time.sleep(draw.uniform(0, 0.04))
        os.kill(pid, sent)
        os.kill(pid, 0)
        code = end(pid)
        assert code in (0, -sent, 128 + sent), (code, log.read_text())
        after = run_shown(out)
        counts[f"{name} {sent.name}"] += 1
        counts["old run" if after == before else "new run"] += 1
        counts["finished"] += code == 0
        if was_clear and code == 128 + sent:
            assert not [*folder.glob(".spade-*")], "who is asked to end clears what it has made"
    assert end(start(words["score"], log)) == 0, log.read_text()
    assert run_shown(out)
    assert sorted(path.name for path in folder.iterdir()) == ["log", "out"]
    return dict(counts)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    print(json.dumps(kill_runs(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))))
