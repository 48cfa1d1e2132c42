"""Runs a sweep: measures every point that is missing, each in a process of its own, and stores it at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.process import machine
from benchmarks.sweep import image_level, peers, pixel_level, store
from benchmarks.sweep.embeddings import looks_of, open_base
from benchmarks.sweep.points import ImagePoint, LookPoint, PixelPoint, Point, as_mapping, point_id
from benchmarks.sweep.sets import Places

# Runs a step ("build" or "measure") of a point.
Step = Callable[[str, Point], None]


def run(points: Sequence[Point], out: Path, places: Places, step: Step, say: Callable[[str], None] = print) -> list[Point]:
    """Measure the missing points of a sweep, in its order. If a point fails, it is named, and the others are measured.

    Args:
        points: the points of the sweep.
        out: the folder of results.
        places: where data and scratch files are; the index of an image-level build is deleted after its last point.
        step: does the work.
        say: takes a line about each point.

    Returns:
        The points that failed.
    """
    missing = [point for point in points if not store.path_of(out, point).is_file()]
    say(f"{len(points)} points, {len(points) - len(missing)} of them are there")
    failed = []
    for number, point in enumerate(missing, 1):
        start = time.perf_counter()
        try:
            if isinstance(point, ImagePoint | PixelPoint) and _lacks_index(point, places):
                step("build", point)
            step("measure", point)
            done = f"{time.perf_counter() - start:.1f} s"
        except (subprocess.CalledProcessError, OSError, ValueError, RuntimeError) as error:
            failed.append(point)
            done = f"FAILED: {error}"
        say(f"[{number}/{len(missing)}] {point_id(point)} {point.set} {point.label}: {done}")
        later = {other.build_key for other in missing[number:] if isinstance(other, ImagePoint)}
        if isinstance(point, ImagePoint) and point.build_key not in later:
            for path in image_level.index_path(point, places).parent.glob(f"{point.build_key}.*"):
                path.unlink()
    return failed


def in_a_process(out: Path, places: Places) -> Step:
    """Return a step that starts a process, so that its peak memory is that of the point alone."""

    def step(name: str, point: Point) -> None:
        command = [sys.executable, "-m", "benchmarks", "step", name, json.dumps(as_mapping(point)), "--out", str(out)]
        command += ["--scratch", str(places.scratch), *(["--data", str(places.data)] if places.data else [])]
        subprocess.run(command, check=True)

    return step


def here(out: Path, places: Places) -> Step:
    """Return a step that runs in this process."""

    def step(name: str, point: Point) -> None:
        do(name, point, out, places)

    return step


def do(name: str, point: Point, out: Path, places: Places) -> None:
    """Do one step of a point."""
    if name == "build":
        if isinstance(point, ImagePoint):
            image_level.build(point, places)
        elif isinstance(point, PixelPoint):
            pixel_level.build(point, places)
        return
    if isinstance(point, ImagePoint):
        raw = image_level.measure(point, places)
    elif isinstance(point, PixelPoint):
        raw = pixel_level.measure(point, places)
    elif isinstance(point, LookPoint):
        base = open_base(point.set, point.n, point.queries, places)
        raw = store.Raw(point, {}, looks_of(base.rows, base.xq))
    else:
        raw = peers.measure(point, places)
    store.write(out, replace(raw, facts={**raw.facts, "machine": machine()}))


def _lacks_index(point: ImagePoint | PixelPoint, places: Places) -> bool:
    if isinstance(point, ImagePoint):
        return not image_level.index_path(point, places).is_file()
    # A recipe without an index needs no process to build it.
    return pixel_level.needs_build(point)
