"""How fast the server is, beside `score` of the same folder and the library's own calls."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process import spread
from benchmarks.serve.places import NAME, Places
from benchmarks.serve.server import Answered, Load, Server, call, running
from spade_faiss import Detector

Row = dict[str, Any]

CLIENTS = (1, 4, 16)
_MOST = 16
# At least so many pictures are sent by one client, or four.
_FEW = 400


def load(places: Places) -> Iterator[Row]:
    """Throughput with 16 clients and that of `score`, in turn; then latency by the number of clients, and the library's own."""
    bank, paths = places.bank(), places.folder(places.pictures)
    pairs: list[tuple[float, float]] = []
    faults: list[str] = []
    with running([bank], places.fresh("load") / "served") as server:
        _warm(server, paths)
        for repeat in range(places.repeats):
            by_score, reference = _score(bank, paths, places.fresh("scored"))
            before, wall, done = _total(server), *_serve(server, paths, _MOST)
            faults += _faults(server, done, paths, reference, _total(server) - before)
            pairs.append((len(paths) / by_score, len(paths) / wall))
            print("load", repeat, pairs[-1], flush=True)
        yield {
            "what": "throughput",
            "pictures": len(paths),
            "clients": _MOST,
            "score_per_s": spread([a for a, _ in pairs]),
            "served_per_s": spread([b for _, b in pairs]),
            "share": spread([b / a for a, b in pairs]),
            "faults": faults,
        }
        few = paths[: min(len(paths), _FEW)]
        for clients in CLIENTS:
            _, done = _serve(server, paths if clients == _MOST else few, clients)
            yield {"what": "latency", "clients": clients, **_percentiles([item.seconds for item in done])}
    yield {"what": "latency", "clients": 0, **_percentiles(_library(bank, few))}


def memory(places: Places) -> Iterator[Row]:
    """The memory of the server while it answers thousands of requests."""
    bank, paths = places.bank(), places.folder(places.pictures)
    with running([bank], places.fresh("memory") / "served", "--keep-bytes", "200MB") as server:
        _warm(server, paths)
        rows: list[tuple[int, int]] = [(0, server.resident_bytes())]
        done = 0
        while done < places.requests:
            part = paths[: min(len(paths), places.requests - done)]
            _, answered = _serve(server, part, _MOST)
            done += len(answered)
            rows.append((done, server.resident_bytes()))
            print("memory", rows[-1], flush=True)
        counts, sizes = np.array(rows, np.float64).T
        half = len(rows) // 2
        slope = float(np.polyfit(counts[half:], sizes[half:], 1)[0]) if len(rows) - half > 1 else 0.0
        yield {"requests": done, "resident_bytes": rows, "bytes_per_request_second_half": slope}


def _warm(server: Server, paths: Sequence[Path]) -> None:
    _serve(server, paths[:64], _MOST)


def _serve(server: Server, paths: Sequence[Path], clients: int) -> tuple[float, list[Answered]]:
    found = Load(server, NAME, paths, clients)
    wall = found.start().join()
    assert not found.errors, found.errors[:3]
    return wall, found.answered


def _score(bank: Path, paths: Sequence[Path], out: Path) -> tuple[float, dict[str, Row]]:
    """The seconds of `score`, without those of starting Python, and what it says of each picture."""
    words = [sys.executable, "-m", "spade_faiss", "score", str(paths[0].parent), "--bank", str(bank), "--out", str(out / "out")]
    done = subprocess.run([*words, "--json", "--quiet"], capture_output=True, text=True, check=True)
    report = json.loads((out / "out" / "report.json").read_bytes())
    return float(json.loads(done.stdout)["time"]["total_s"]), {row["id"]: row for row in report["scores"]}


def _faults(
    server: Server, done: Sequence[Answered], paths: Sequence[Path], reference: dict[str, Row], recorded: int
) -> list[str]:
    """What is wrong: pictures that were lost, answered twice, or got another verdict than `score` gives."""
    faults = [f"{path.name} was lost" for path in sorted({*paths} - {item.path for item in done})[:5]]
    if len({item.picture["id"] for item in done}) != len(done):
        faults.append("two pictures got one record")
    if recorded != len(paths):
        faults.append(f"{recorded} records of {len(paths)} pictures")
    for item in done:
        told, row = item.picture, reference[item.path.name]
        same = [told["name"] == item.path.name, bool(told["alarm"]) == row["alarm"], told["p_value"] == row["p_value"]]
        pairs = (("knn", "image_score"), ("max", "map_score"), ("top", "top_score"))
        same += [np.float32(told["scores"][ours]) == np.float32(row[theirs]) for ours, theirs in pairs]
        same.append(
            [region["input"]["box"] for region in told["regions"]] == [region["input"]["box"] for region in row["regions"]]
        )
        if not all(same):
            faults.append(f"{item.path.name}: {told['scores']} {told['p_value']}, score says {row}"[:500])
    return faults


def _library(bank: Path, paths: Sequence[Path]) -> list[float]:
    """The seconds of the library's own call for each picture."""
    detector = Detector.open(bank)
    seconds = []
    for path in paths:
        start = time.perf_counter()
        detector.score(path)
        seconds.append(time.perf_counter() - start)
    return seconds[len(seconds) // 10 :]


def _percentiles(seconds: Sequence[float]) -> Row:
    p50, p95, p99 = np.percentile(1000 * np.asarray(seconds), (50, 95, 99))
    return {"n": len(seconds), "p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


def _total(server: Server) -> int:
    return int(call(server.url, "GET", f"/v1/banks/{NAME}/pictures?size=1").json["total"])
