"""`python -m benchmarks run SWEEP.yaml --out RESULTS` measures, `python -m benchmarks report RESULTS --out DIR` shows."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import spade_faiss  # noqa: F401  # before torch and faiss: idle OpenMP threads sleep only if the first import says so
from benchmarks.sweep.points import load_sweep, point_of
from benchmarks.sweep.sets import Places
from spade_faiss.core.errors import SpadeError


def main(argv: list[str] | None = None) -> int:
    """Run a command; 1 if a point failed, or for an error that we can name."""
    arguments = _parse(argv)
    try:
        if arguments.command == "report":
            from benchmarks.sweep.page import report

            print(f"wrote {report(arguments.results, arguments.out)}")
            return 0
        return _run(arguments)
    except SpadeError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.sweep.peers import PYTHON
    from benchmarks.sweep.run import do, here, in_a_process, run

    arguments.scratch.mkdir(parents=True, exist_ok=True)
    places = Places(arguments.data, arguments.scratch)
    if arguments.command == "step":
        do(arguments.step, point_of(json.loads(arguments.point), "point"), arguments.out, places)
        return 0
    if arguments.patchcore_python:
        os.environ[PYTHON] = arguments.patchcore_python
    step = here(arguments.out, places) if arguments.one_process else in_a_process(arguments.out, places)
    failed = run(
        [point for path in arguments.sweep for point in load_sweep(path)],
        arguments.out,
        places,
        step,
        lambda line: print(line, flush=True),
    )
    return 1 if failed else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure the points of sweeps; those that are there are left alone")
    run.add_argument("sweep", type=Path, nargs="+", metavar="SWEEP.yaml")
    run.add_argument("--one-process", action="store_true", help="all points in this process: quicker, peak memory is shared")
    run.add_argument("--patchcore-python", metavar="PYTHON", help="of an environment that has anomalib")
    step = commands.add_parser("step", help="one step of one point, for a process of its own")
    step.add_argument("step", choices=("build", "measure"))
    step.add_argument("point", help="JSON")
    for command in (run, step):
        command.add_argument("--out", type=Path, required=True, help="the folder of results, one file a point")
        command.add_argument("--data", type=Path, help="a folder that holds mvtec_bottle and magnetic_tile")
        command.add_argument("--scratch", type=Path, default=Path("scratch"), help="for banks and indexes, gigabytes of them")
    report = commands.add_parser("report", help="compute every table and plot from results")
    report.add_argument("results", type=Path)
    report.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
