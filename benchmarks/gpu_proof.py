"""Proves the search on this machine's card, in one command of a few minutes, and writes what was found as one JSON file.

`make gpu-proof` sets up what it needs without a network, and runs it; `python -m benchmarks.gpu_proof` runs it where everything
is installed. `--device cpu --out FILE` is a dry run: the same steps on the CPU, which prove nothing of a card.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit import find_commit
from benchmarks.gpu_steps import STEPS, Row, Settings, Step, machine
from spade_faiss.core.files import write_bytes

ROOT = Path(__file__).parents[1]
# One file for each card; the pages' table is computed from them.
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
KIT = ROOT / ".gpu-kit"
BUDGET_S = 480.0
_MACHINE_S = 60.0
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


def main(argv: list[str] | None = None) -> int:
    """Run the steps and write their results; the exit status is 0 if all of them passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:NUMBER, or cpu for a dry run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="by default benchmarks/results/gpu/CARD.json")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds that all steps may take together")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--quick", action="store_true", help="small problems: for trying the command")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
        parser.error(f"--device {arguments.device} is none of cuda, cuda:NUMBER, cpu")
    dry_run = arguments.device == "cpu" or arguments.quick
    is_whole = not dry_run and len(arguments.only) == len(STEPS)
    if not is_whole and (arguments.out is None or RESULTS in arguments.out.resolve().parents):
        parser.error(f"only a whole run on a card belongs in {RESULTS}: give this one a file of its own, --out FILE")
    settings = Settings(arguments.device, arguments.quick)
    deadline = time.monotonic() + arguments.budget_s
    (facts,) = run_steps({"machine": (machine, _MACHINE_S)}, settings, deadline)
    if facts["state"] != PASSED:
        print(f"{facts['error']}\nnothing was proven; --device cpu --out FILE is a dry run", file=sys.stderr)
        return 1
    found: dict[str, Any] = {
        "dry_run": dry_run,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": find_commit(KIT),
        "budget_s": arguments.budget_s,
        "machine": facts["rows"][0],
        "steps": {},
    }
    target = arguments.out or RESULTS / f"{slug(found['machine']['card']['name'])}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    steps = {name: STEPS[name] for name in arguments.only}
    for result in run_steps(steps, settings, deadline):
        found["steps"][result.pop("step")] = result
        write_bytes(target, (json.dumps(found, indent=1) + "\n").encode())
    states = {name: result["state"] for name, result in found["steps"].items()}
    print(f"wrote {target}: {', '.join(f'{name} {state}' for name, state in states.items())}", file=sys.stderr)
    return 0 if set(states.values()) == {PASSED} else 1


def run_steps(steps: Mapping[str, tuple[Step, float]], settings: Settings, deadline: float) -> Iterator[Row]:
    """Run steps one after the other, each in at most its seconds, and all of them before the deadline.

    Args:
        steps: by name, each step and the most seconds that it may take.
        settings: what the steps run on.
        deadline: when the last of them must have ended, by `time.monotonic`.

    Yields:
        For each step its name, its `state`, the `error` that ended it, its seconds, and the rows that it yielded until then.
    """
    worker: _Worker | None = None
    try:
        for name, (step, limit_s) in steps.items():
            start = time.monotonic()
            result: Row = {"step": name, "state": PASSED, "error": "", "s": 0.0, "rows": []}
            if start >= deadline:
                result |= {"state": NOT_RUN, "error": "the steps before it took all of the time"}
            else:
                print(f"{name} ...", file=sys.stderr, flush=True)
                worker = worker or _Worker()
                error = _run_step(worker, step, settings, min(deadline, start + limit_s), result)
                result["s"] = round(time.monotonic() - start, 1)
                if error:
                    # What it left in its process must not meet the next step.
                    worker.end()
                    worker = None
            wrong = [row["failed"] for row in result["rows"] if row.get("failed")]
            if result["state"] == PASSED and wrong:
                result |= {"state": FAILED, "error": f"{len(wrong)} of {len(result['rows'])} are wrong: {wrong[0]}"}
            print(f"{name}: {result['state']} after {result['s']} s. {result['error']}", file=sys.stderr, flush=True)
            yield result
    finally:
        if worker is not None:
            worker.end()


def _run_step(worker: _Worker, step: Step, settings: Settings, deadline: float, result: Row) -> bool:
    """Run a step into a result; returns whether it ended by an error."""
    try:
        for row in worker.run(step, settings, deadline):
            result["rows"].append(row)
    except TimeoutError:
        result |= {"state": TIMED_OUT, "error": "it took too long"}
    except (RuntimeError, OSError) as error:  # OSError: the process ended after its last step
        result |= {"state": FAILED, "error": str(error)}
    return bool(result["error"])


class _Worker:
    """A process that runs steps: one that hangs or crashes is ended, together with what it started."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, step: Step, settings: Settings, deadline: float) -> Iterator[Row]:
        """Yield the rows of a step.

        Raises:
            TimeoutError: when the deadline is there.
            RuntimeError: if the step raised an error, or ended the process.
        """
        self._connection.send((step, settings))
        while True:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            try:
                kind, value = self._connection.recv()
            except EOFError:
                self._process.join()
                raise RuntimeError(f"its process ended with exit status {self._process.exitcode}") from None
            if kind == "error":
                raise RuntimeError(value)
            if kind == "end":
                return
            yield value

    def end(self) -> None:
        """End the process and those that it started."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):  # its group is there once it has begun to serve
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection) -> None:
    """Run the steps that come, until the connection ends."""
    os.setsid()
    while True:
        try:
            step, settings = connection.recv()
        except EOFError:
            return
        try:
            for row in step(settings):
                connection.send(("row", row))
        except Exception as error:  # the outermost frame of this process: the other one records it
            connection.send(("error", f"{type(error).__name__}: {error}"[:2000]))
        else:
            connection.send(("end", None))


def slug(card: str) -> str:
    """A card's name as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
