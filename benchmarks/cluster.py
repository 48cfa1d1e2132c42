"""Clusters: small ones on this machine do what one process does; what that costs, what travels, and what losses change.

    python -m benchmarks.cluster --data FOLDER --out benchmarks/results

FOLDER holds `mvtec_bottle`; ELPV comes from the package elpv-dataset. One machine stands for many: its nodes share its
processors, so that CPU seconds are compared, not times. Every command runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.arguments import parser_of
from benchmarks.datasets import write_elpv
from benchmarks.features import INPUT_SIZE, SHAPES, Shape
from benchmarks.main_job import machine
from benchmarks.small_cluster import LOSSES, SmallCluster, run_with_loss, small_cluster
from spade_faiss import Bank, Detector, FeatureBatch, Layout, Method, Run
from spade_faiss.cluster.owned_detector import OwnedDetector
from spade_faiss.cluster.owner import OwnedBank
from spade_faiss.cluster.owners import open_owners
from spade_faiss.cluster.session import connect
from spade_faiss.report.exchange import PARTS
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.scores import Scores
from spade_faiss.search.distances import import_faiss

Row = dict[str, Any]

LITE0 = ("--backbone", "efficientnet_lite0", "--preset", "spade")
NODES = (2, 4)
# How often all commands are run on a set, in one process and on each cluster in turn.
ROUNDS = {"mvtec_bottle": 3, "elpv": 1}
LOST = 30
# What loses something, and the most seconds that its workers have been there by then.
COMMANDS = ("extract", "fit", "add", "index", "calibrate", "score", "evaluate")
_LATEST_S = 1.5
PICTURES = (1000, 10_000)
NORMALS, SHARDS, QUERIES, NEIGHBORS = 20_000, 40, 32, 5
_SIDE = 64
_CPU_S = ("cpu_s", "workers_cpu_s", "ray_cpu_s", "alone_cpu_s")
# What a calibration says of the bank.
_STATE = ("generation", "shards_sha256", "sha256", "versions")
# Embeddings that are looked at, to measure how long that takes.
_SCANNED = 50_000


def main() -> None:
    """Measure everything, or what --only names, and write cluster.json; other figures in it stay as they are."""
    arguments = parser_of(__doc__, FIGURES).parse_args()
    target = arguments.out / "cluster.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    figures["machine"] = machine()
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as scratch:
            figures[name] = FIGURES[name](arguments.data, Path(scratch))
        target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(figures[name])}", flush=True)


# ---- the same as one process


def equality(data: Path, scratch: Path) -> list[Row]:
    """Extract, index, calibrate and score bottle and ELPV in one process and on clusters: what differs, and CPU seconds."""
    write_elpv(scratch / "elpv", ("mono", "poly"))
    rows = []
    for name, folder in (("elpv", scratch / "elpv"), ("mvtec_bottle", data / "mvtec_bottle")):
        rounds = [_round(name, folder, scratch) for _ in range(ROUNDS[name])]
        for place in range(len(NODES)):
            mine = [found[place] for found in rounds]
            same = {key: all(row[key] for row in mine) for key in mine[0] if key.startswith("same_")}
            cpu = {key: statistics.median(row[key] for row in mine) for key in _CPU_S}
            load = statistics.median(row["load"] for row in mine)
            known = {key: mine[0][key] for key in ("set", "normals", "scored", "nodes")}
            rows.append({**known, **same, **cpu, "rounds": len(mine), "load": load})
            print(rows[-1], flush=True)
    return rows


def _round(name: str, folder: Path, scratch: Path) -> list[Row]:
    """Run all commands on a set once, in one process and on each cluster; returns what came of each cluster."""
    for path in scratch.glob(f"{name}-*"):
        shutil.rmtree(path)
    commands, rows = partial(_commands, folder, scratch), list[Row]()
    load = os.getloadavg()[0]
    alone = _alone(commands("one", ()), scratch / "log")
    for nodes in NODES:
        with small_cluster(nodes) as cluster:
            spent = [cluster.cpu_s(words, scratch / "log") for words in commands(f"{nodes}", ("--cluster", "auto"))]
        one, many = (scratch / f"{name}-{of}.bank" for of in ("one", nodes))
        rows.append(
            {
                "set": name,
                "normals": len(Bank.open(one)),
                "scored": count_scores(scratch / f"{name}-one"),
                "nodes": nodes,
                "same_bank": same_banks(one, many),
                "same_calibration": _calibrations(one) == _calibrations(many),
                "same_scores": same_scores(scratch / f"{name}-one", scratch / f"{name}-{nodes}"),
                "cpu_s": sum(map(sum, spent)),
                "workers_cpu_s": sum(each.workers for each in spent),
                "ray_cpu_s": sum(each.ray for each in spent),
                "alone_cpu_s": alone,
                "load": load,
            }
        )
        print(rows[-1], flush=True)
    return rows


def _commands(folder: Path, scratch: Path, of: str, where: tuple[str, ...]) -> list[list[str]]:
    """What is done with a set."""
    bank = str(scratch / f"{folder.name}-{of}.bank")
    return [
        ["extract", str(folder / "train/good"), "--bank", bank, *LITE0, "--quiet", *where],
        ["index", bank, "--recipe", "clusters", "--quiet", *where],
        ["calibrate", bank, "--quiet", *where],
        ["score", str(folder / "test"), "--bank", bank, "--out", str(scratch / f"{folder.name}-{of}"), "--quiet", *where],
    ]


def _alone(commands: list[list[str]], log: Path) -> float:
    """Run commands in processes of their own, one after the other; returns their CPU seconds."""
    _children_s(reset=True)
    for words in commands:
        with log.open("wb") as file:
            subprocess.run([sys.executable, "-m", "spade_faiss", *words], check=True, stdout=file, stderr=file)
    return _children_s(reset=True)


_counted = 0.0


def _children_s(*, reset: bool) -> float:
    """CPU seconds of the processes that have ended since the last reset."""
    global _counted
    times = os.times()
    total = times.children_user + times.children_system
    spent = total - _counted
    if reset:
        _counted = total
    return spent


def _calibrations(bank: Path) -> list[Row]:
    """What the calibrations of a bank say, but for the state of its shards, which may end elsewhere."""
    found = [json.loads(path.read_bytes()) for path in sorted((bank / "calibration").glob("*.json"))]
    assert found
    return [{name: value for name, value in each.items() if name not in _STATE} for each in found]


def same_banks(one: Path, other: Path) -> bool:
    """Whether two banks hold the same images in the same order, bit for bit."""
    first, second = Bank.open(one), Bank.open(other)
    if first.ids != second.ids or first.sha256_of != second.sha256_of:
        return False
    rows = np.arange(len(first))
    if not np.array_equal(first.embedding(rows), second.embedding(rows)):
        return False
    levels = [level.name for level in first.layout.levels]
    return all(
        np.array_equal(first.level_map(level, row), second.level_map(level, row)) for level in levels for row in rows.tolist()
    )


def count_scores(results: Path) -> int:
    """How many images the results of one process are of."""
    with ScoreFile.open(results / "scores.h5") as scores:
        return len(scores)


def same_scores(one: Path, parted: Path) -> bool:
    """Whether the results of one process and those of a cluster are of the same images and scores, bit for bit."""
    parts = sorted((parted / PARTS).glob("*/scores.h5"))
    with ScoreFile.open(one / "scores.h5") as scores, ScoreParts.open(parts) as joined:
        if scores.ids != joined.ids:
            return False
        columns = ("image_score", "map_score", "top_score", "peak", "neighbor_ids", "neighbor_dist")
        alike = all(np.array_equal(getattr(scores, name), getattr(joined, name)) for name in columns)
        return alike and all(np.array_equal(*maps) for maps in zip(scores.maps(), joined.maps(), strict=True))


# ---- memory, losses


def memory(data: Path, scratch: Path) -> list[Row]:
    """The most memory that the driver takes, by the number of pictures that are extracted on two nodes."""
    rows = []
    for count in PICTURES:
        folder = write_pictures(scratch / f"{count}", count)
        with small_cluster(2) as cluster:
            words = ["extract", str(folder), "--bank", str(scratch / f"{count}.bank"), *_TINY, "--cluster", "auto", "--quiet"]
            driver = cluster.start(words, scratch / "log")
            peak = 0
            while driver.poll() is None:
                peak = max(peak, _peak_bytes(driver.pid))
                time.sleep(0.2)
            if driver.returncode:
                raise RuntimeError((scratch / "log").read_text())
        rows.append({"pictures": count, "images": len(Bank.open(scratch / f"{count}.bank")), "peak_bytes": peak})
        print(rows[-1], flush=True)
    return rows


_TINY = (*LITE0, "--resize", "72", "--size", str(_SIDE))


def write_pictures(folder: Path, count: int) -> Path:
    """Write generated pictures, all of them different."""
    folder.mkdir()
    rng = np.random.default_rng(count)
    base = rng.integers(0, 256, (80, 96, 3), np.uint8)
    for number in range(count):
        picture = base.copy()
        picture[: 8 + number % 50, :8] = rng.integers(0, 256, (8 + number % 50, 8, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{count}-{number:06d}.png", compress_level=1)
    return folder


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split("VmHWM:")[1].split()[0]) if "VmHWM:" in status else 0


def losses(data: Path, scratch: Path, count: int = LOST) -> Row:
    """Lose a worker, a node or the driver in the middle of each command; compare with what one process makes."""
    draw, found = random.Random(7), []
    alone = _Alone(scratch)
    with small_cluster(2, "benchmarks.small_pieces") as cluster:
        alone.prepare(cluster)
        for number in range(count):
            loss, command = LOSSES[number % len(LOSSES)], COMMANDS[number // len(LOSSES) % len(COMMANDS)]
            out = scratch / f"lost-{number}"
            words = alone.words(command, out, ("--cluster", "auto", "--quiet"))
            working: Callable[[], bool] = _Working(cluster, draw.uniform(0, _LATEST_S))
            if command in ("score", "evaluate"):  # not before there is something to lose
                working = partial(_has_parts, scratch, draw.randint(1, 3))
            outcome = run_with_loss(cluster, words, loss, working, draw)
            row = {
                "loss": loss,
                "command": command,
                "outcome": outcome,
                "same": alone.same(command, out),
                "left_over": bool(_left_over(scratch, out)),
                "went_on": "their scores were kept" in Path(f"{words[-1]}.log").read_text(),
            }
            found.append(row)
            print(row, flush=True)
    return {"count": count, "load": os.getloadavg()[0], "rows": found}


class _Working:
    """Whether workers have been there for some seconds."""

    def __init__(self, cluster: SmallCluster, seconds: float) -> None:
        self._cluster, self._seconds = cluster, seconds
        self._since: float | None = None

    def __call__(self) -> bool:
        if self._since is None and self._cluster.workers():
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since >= self._seconds


def _has_parts(folder: Path, count: int) -> bool:
    """Whether so many parts of a run are whole."""
    return len([*folder.glob(".spade-*/parts/*/*/part.json")]) >= count


class _Alone:
    """Commands on a small labeled set, what they start from, and what one process makes of it.

    Args:
        scratch: where all of it is.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._set = scratch / "set"
        (self._set / "train").mkdir(parents=True)
        write_pictures(self._set / "train" / "good", 240)
        (self._set / "test").mkdir()
        write_pictures(self._set / "test" / "good", 121)
        write_pictures(self._set / "test" / "spot", 122)
        self._more = write_pictures(scratch / "more", 123)

    def prepare(self, cluster: SmallCluster) -> None:
        """Make the bank that commands work on, in several shards, and run each command in one process."""
        bank = str(self._scratch / "shards.bank")
        words = ["extract", str(self._set / "train" / "good"), *_TINY, "--quiet", "--cluster", "auto", "--bank", bank]
        cluster.run(words, self._scratch / "log")
        for command in COMMANDS:
            _alone([self.words(command, self._scratch / f"one-{command}", ("--quiet",))], self._scratch / "log")

    def words(self, command: str, out: Path, where: tuple[str, ...]) -> list[str]:
        """A command, whose result is at `out`: a bank, or a folder of scores."""
        good, bank = str(self._set / "train" / "good"), str(self._scratch / "shards.bank")
        if command in ("extract", "fit"):
            return [command, good, *_TINY, *where, "--bank", str(out)]
        if command in ("score", "evaluate"):
            source = self._set / "test" if command == "score" else self._set
            return [command, str(source), "--bank", bank, *where, "--out", str(out)]
        shutil.copytree(bank, out)
        if command == "add":
            return ["add", str(self._more), *where, "--bank", str(out)]
        return [command, *(["--recipe", "clusters"] if command == "index" else []), *where, str(out)]

    def same(self, command: str, out: Path) -> bool:
        """Whether the result is that of one process."""
        one = self._scratch / f"one-{command}"
        if command in ("score", "evaluate"):
            metrics = [json.loads((path / "report.json").read_bytes()).get("metrics") for path in (one, out)]
            return same_scores(one, out) and metrics[0] == metrics[1]
        if command == "index":
            files = [{path.name: path.read_bytes() for path in (of / "indexes").rglob("*.h5")} for of in (one, out)]
            return bool(files[0]) and files[0] == files[1] and same_banks(one, out)
        is_calibrated = command in ("fit", "calibrate")
        return same_banks(one, out) and (not is_calibrated or _calibrations(one) == _calibrations(out))


def _left_over(scratch: Path, out: Path) -> list[Path]:
    """Files that belong to nothing any more: beside the shards of a bank, or where results were staged."""
    found = [*scratch.glob(".spade-*"), *out.rglob(".spade-*")]
    if (out / "features").is_dir():
        shards = {shard.file for shard in Bank.open(out).manifest.shards}
        found += [path for path in (out / "features").iterdir() if path.name not in shards]
    return found


# ---- owners


def owners(data: Path, scratch: Path) -> Row:
    """Search 20,000 generated normals in 40 shards by owners on 2 and 4 nodes: bytes, ms beside one process, recall."""
    bank = _write_bank(scratch / "bank")
    queries = _features(SHAPES["lite0"], range(NORMALS, NORMALS + QUERIES))
    method = Method(k_image=NEIGHBORS, k_gallery=NEIGHBORS)
    alone = Detector.open(bank, method=method)
    expected, alone_s = _timed(alone, queries)
    rows = []
    for nodes in NODES:
        with small_cluster(nodes) as cluster, cluster.connected(), connect("auto") as session:
            owned = OwnedBank(
                bank=alone.bank, recipe=alone.recipe, method=method, memory="2GiB", threads=session.cpus, replicas=1
            )
            run = Run(cluster="auto", replicas=1)
            with open_owners(session, owned) as found:
                together = OwnedDetector(alone.bank, alone.recipe, method, run, None, found)
                scores, seconds = _timed(together, queries)
                traffic, calls = found.traffic, 3  # the warm-up is counted too
                received, sent = traffic.received / calls / QUERIES, traffic.sent / calls / QUERIES
        rows.append(
            {
                "nodes": nodes,
                "ms": 1000 * seconds / QUERIES,
                "alone_ms": 1000 * alone_s / QUERIES,
                "sent_bytes": sent,
                "received_bytes": received,
                "bound_bytes": _bound(nodes, alone),
                "same": _same(expected, scores),
                "recall": float(np.mean(expected.neighbor_ids == scores.neighbor_ids)),
            }
        )
        print(rows[-1], flush=True)
    return {
        "normals": NORMALS,
        "shards": SHARDS,
        "queries": QUERIES,
        "image_bytes": alone.bank.layout.image_bytes,
        "rows": rows,
    }


def _bound(nodes: int, detector: Detector) -> int:
    """The most that is sent for an image: its features to each owner, and for each level which rows to search."""
    layout, number = detector.bank.layout, np.dtype(np.int64).itemsize
    return nodes * layout.image_bytes + len(layout.levels) * number * (NEIGHBORS + nodes)


def _timed(detector: Detector, queries: FeatureBatch) -> tuple[Scores, float]:
    """What a detector finds, and the seconds of the second and the third call, the shorter ones."""
    found, seconds = detector.score_features(queries), []
    for _ in range(2):
        start = time.perf_counter()
        found = detector.score_features(queries)
        seconds.append(time.perf_counter() - start)
    return found, min(seconds)


def _same(one: Scores, other: Scores) -> bool:
    columns = ("image_score", "maps", "neighbor_ids", "neighbor_dist")
    alike = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)
    return alike and all(np.array_equal(one.nearest[name], other.nearest[name]) for name in one.nearest)


def _write_bank(folder: Path) -> Path:
    layout = Layout(levels=SHAPES["lite0"].levels, embedding_dim=SHAPES["lite0"].embedding_dim, input_size=INPUT_SIZE)
    bank, each = Bank.create(folder, layout), NORMALS // SHARDS
    for start in range(0, NORMALS, each):
        bank.append(_features(SHAPES["lite0"], range(start, start + each)))
    return folder


def _features(network: Shape, numbers: range) -> FeatureBatch:
    """Features with structure: a few prototypes of each level, moved and scaled, so that neighbors are near."""
    rng = np.random.default_rng(numbers.start)
    prototypes = np.random.default_rng(5)
    embeddings = prototypes.standard_normal((64, network.embedding_dim), np.float32)
    kind = rng.integers(0, 64, len(numbers))
    levels = {}
    for level in network.levels:
        base = prototypes.standard_normal((64, *level.shape), np.float32)
        noise = rng.standard_normal((8, *level.shape), np.float32) * 0.3
        levels[level.name] = (base[kind] + noise[rng.integers(0, 8, len(numbers))]).astype(np.float16)
    noise = rng.standard_normal((len(numbers), network.embedding_dim), np.float32) * 0.5
    return FeatureBatch([f"image {number}" for number in numbers], embeddings[kind] + noise, levels)


def scan(data: Path, scratch: Path) -> list[Row]:
    """Seconds of one thread for a look at one normal's embedding, for batches of 32 pictures; the shorter of three."""
    faiss, rows = import_faiss(), []
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for name, shape in SHAPES.items():
            rng = np.random.default_rng(0)
            index = faiss.IndexFlatL2(shape.embedding_dim)
            index.add(rng.standard_normal((_SCANNED, shape.embedding_dim), np.float32))
            xq = rng.standard_normal((QUERIES, shape.embedding_dim), np.float32)
            index.search(xq, NEIGHBORS)
            seconds = []
            for _ in range(3):
                start = time.process_time()
                index.search(xq, NEIGHBORS)
                seconds.append(time.process_time() - start)
            rows.append({"shape": name, "rows": _SCANNED, "queries": QUERIES, "row_s": min(seconds) / QUERIES / _SCANNED})
            print(rows[-1], flush=True)
    finally:
        faiss.omp_set_num_threads(before)
    return rows


FIGURES: dict[str, Callable[[Path, Path], Any]] = {
    "equality": equality,
    "memory": memory,
    "losses": losses,
    "owners": owners,
    "scan": scan,
}

if __name__ == "__main__":
    main()
