"""Durability: what a bank survives (kills, full disks, damaged files, readers during writes), and what adding to it costs.

    python -m benchmarks.durability --out benchmarks/results

Everything is seeded. The test suite runs the same in small (tests/benchmarks/test_durability.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spade_faiss import Backbone, Bank, Detector, FeatureBatch, Level, Network, Preprocess, update_indexes, verify
from spade_faiss.core.errors import BankError, InputError, SpadeError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Method
from spade_faiss.features.batch import concatenate
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.search.recipe import Build, Recipe
from spade_faiss.workflows.extract import extract

LEVELS = [Level("fine", channels=6, stride=4, height=6, width=5), Level("coarse", channels=9, stride=8, height=3, width=3)]
DIM = 12
INPUT = (24, 20)
RECIPES = (
    Recipe(name="graph", build=Build(image="HNSW8")),
    Recipe(name="lists", build=Build(gallery="ivf", settings={"lists": 4, "train_vectors": 400})),
)
# How long a step may take before it counts as stuck.
_STEP_S = 60.0


def features(first: int, count: int) -> FeatureBatch:
    """Images that are determined by their numbers."""
    rngs = [np.random.default_rng([7, number]) for number in range(first, first + count)]
    return FeatureBatch(
        [f"image {number}" for number in range(first, first + count)],
        np.stack([rng.standard_normal(DIM, np.float32) for rng in rngs]),
        {level.name: np.stack([rng.standard_normal(level.shape, np.float32) for rng in rngs]) for level in LEVELS},
    )


# ---- what is done to a bank, step by step; each step may be run again, and then does what is left of it


def _append(folder: Path, first: int, count: int, each: int) -> None:
    if not (folder / "manifest.json").exists():
        Bank.create(folder, Layout(levels=tuple(LEVELS), embedding_dim=DIM, input_size=INPUT))
    bank = Bank.open(folder)
    for start in range(first, first + count, each):
        batch = features(start, min(each, first + count - start))
        if batch.ids[0] not in bank.ids:
            bank.append(batch)


def _remove(folder: Path, numbers: Sequence[int]) -> None:
    Bank.open(folder).remove([f"image {number}" for number in numbers])


def _restore(folder: Path, numbers: Sequence[int]) -> None:
    Bank.open(folder).restore([f"image {number}" for number in numbers])


def _compact(folder: Path) -> None:
    Bank.open(folder).compact(target_bytes=20_000)


def _index(folder: Path) -> None:
    for recipe in RECIPES:
        build_index(Bank.open(folder), recipe)


def _update(folder: Path) -> None:
    update_indexes(Bank.open(folder))


def _extract(folder: Path, images: Path) -> None:
    """A bank of its own beside the other: from image files, through a network."""
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    small = Network.from_module(network, name="small", taps={"x": "1"}, embedding="3")
    backbone = Backbone(small, preprocess=Preprocess(resize=16, size=16))
    done = extract(
        images, bank=folder.with_name(folder.name + " extracted"), extraction=Extraction(backbone=backbone), preset="spade"
    )
    build_index(done.bank, RECIPES[0])


def script(images: Path) -> list[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """A bank's life in short: (name, step, arguments)."""
    return [
        ("append", _append, (0, 12, 3)),
        ("index", _index, ()),
        ("append", _append, (12, 6, 2)),
        ("remove", _remove, ([3, 4, 13],)),
        ("update", _update, ()),
        ("restore", _restore, ([4],)),
        ("compact", _compact, ()),
        ("update", _update, ()),
        ("append", _append, (18, 5, 5)),
        ("remove", _remove, (list(range(5, 11)),)),
        ("compact", _compact, ()),
        ("update", _update, ()),
        ("extract", _extract, (images,)),
    ]


def content(folder: Path) -> dict[str, Any]:
    """All that a bank holds, as digests: what two of them must have in common to be equal byte for byte in content."""
    if not (folder / "manifest.json").exists():
        return {}
    bank = Bank.open(folder)
    maps = hashlib.sha256()
    for row in range(len(bank)):
        for level in bank.layout.levels:
            maps.update(np.ascontiguousarray(bank.level_map(level.name, row)).tobytes())
    return {
        "ids": bank.ids,
        "removed": sorted(bank.removed),
        "embedding": hashlib.sha256(bank.embedding(np.arange(len(bank))).tobytes()).hexdigest(),
        "maps": maps.hexdigest(),
        "sha256_of": bank.sha256_of,
    }


def answers(folder: Path) -> list[Any]:
    """What every recipe says of a few images."""
    query, found = features(1000, 3), []
    for recipe in (Recipe(name="exact"), *RECIPES):
        scores = Detector.open(folder, recipe=recipe, method=Method(k_image=3, k_gallery=3)).score_features(query)
        found += [scores.image_score.tolist(), scores.neighbor_ids.tolist(), scores.map_score.tolist()]
    return found


# ---- kills


@dataclass
class Kills:
    """What came of killing: how often each step was hit, and everything that was not as it should be."""

    hit: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Processes that were killed in a step."""
        return sum(self.hit.values())


def kill(count: int, scratch: Path, *, seed: int = 0) -> Kills:
    """Kill steps at random instants until `count` were hit; after each kill look at the bank, then run the same step again.

    Half of the kills come at a random time, half at a random access to a file: short steps are hit everywhere that way.
    """
    rng, found = np.random.default_rng(seed), Kills()
    context = _forks()
    images = _images(scratch / "images")
    whole, times = scratch / "whole", {}
    for number, (_, step, arguments) in enumerate(script(images)):
        start = time.perf_counter()
        _run(context, step, (whole, *arguments))
        times[number] = time.perf_counter() - start
    expected = [content(whole), content(whole.with_name("whole extracted")), answers(whole)]

    for life in range(10_000):
        folder = scratch / f"life {life}"
        for number, (name, step, arguments) in enumerate(script(images)):
            for _ in range(int(rng.integers(1, 4))):
                before = content(folder)
                by_time = bool(rng.integers(2))
                after_s = float(rng.uniform(0, times[number]))
                was_hit = _run_and_kill(
                    context, step, (folder, *arguments), after_s if by_time else None, int(rng.integers(1, 120))
                )
                if was_hit:
                    found.hit[name] = found.hit.get(name, 0) + 1
                else:
                    found.missed += 1
                found.faults += [f"life {life}, {name}: {fault}" for fault in _faults(folder, name, before)]
            _run(context, step, (folder, *arguments))
        now = [content(folder), content(folder.with_name(folder.name + " extracted")), answers(folder)]
        found.faults += [f"life {life}: {part} differs" for part, a, b in zip("ABC", now, expected, strict=True) if a != b]
        for path in scratch.glob(f"life {life}*"):
            found.faults += [f"life {life}: {problem}" for problem in verify(path, deep=True).problems]
            shutil.rmtree(path)
        if found.count >= count:
            return found
    raise AssertionError("nothing is ever hit")


def _faults(folder: Path, name: str, before: dict[str, Any]) -> Iterator[str]:
    """What a kill has broken."""
    try:
        after = content(folder)
        for path in (folder, folder.with_name(folder.name + " extracted")):
            if (path / "manifest.json").exists():
                yield from verify(path, deep=True).problems
    except (SpadeError, OSError) as error:
        yield f"{type(error).__name__}: {error}"
        return
    held, holds = set(before.get("ids", ())), set(after.get("ids", ()))
    if name == "append":
        lost = held - holds
    elif name in ("remove", "restore"):
        lost = (held | set(before["removed"])) - (holds | set(after["removed"]))
    else:
        lost = held ^ holds
    if lost:
        yield f"lost {sorted(lost)}"


def _run(context: BaseContext, step: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    process = context.Process(target=step, args=arguments)  # type: ignore[attr-defined]
    process.start()
    process.join(_STEP_S)
    if process.exitcode != 0:
        raise AssertionError(f"{step.__name__}{arguments} ended with {process.exitcode}")


def _run_and_kill(
    context: BaseContext, step: Callable[..., None], arguments: tuple[Any, ...], after_s: float | None, access: int
) -> bool:
    """Run a step in a process of its own and kill it: whether it was still at it."""
    ready = context.Event()
    process = context.Process(  # type: ignore[attr-defined]
        target=_stepping, args=(step, arguments, ready, 0 if after_s is not None else access)
    )
    process.start()
    if after_s is not None:
        ready.wait(_STEP_S)
        time.sleep(after_s)
        process.kill()
    process.join(_STEP_S)
    return bool(process.exitcode == -signal.SIGKILL)


def _stepping(step: Callable[..., None], arguments: tuple[Any, ...], ready: Any, access: int) -> None:
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.utime", "os.link"):
            seen += 1
            if seen == access:
                os.kill(os.getpid(), signal.SIGKILL)

    if access:
        sys.addaudithook(hook)
    ready.set()
    step(*arguments)


def _forks() -> BaseContext:
    """Processes that start quickly: copies of one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    # Run as a program, this module is `__main__`, which each process makes for itself.
    own = [] if __name__ == "__main__" else [__name__]
    context.set_forkserver_preload([*own, "spade_faiss.workflows.score", "spade_faiss.workflows.verify", "torch", "faiss"])
    return context


def _images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


# ---- full disks


def fill(count: int, scratch: Path, *, seed: int = 0) -> dict[str, Any]:
    """Run steps on a small disk with a random amount of room; what fails must say so and leave the state before intact.

    Needs the right to mount; where there is none, says so.
    """
    rng, images = np.random.default_rng(seed), _images(scratch / "images")
    full, fine, faults = 0, 0, []
    for number in range(count):
        disk = scratch / f"disk {number}"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
            return {"skipped": "no right to mount a small disk"}
        try:
            steps, folder = script(images), disk / "bank"
            chosen = int(rng.integers(len(steps)))
            for _, step, arguments in steps[:chosen]:
                step(folder, *arguments)
            before = content(folder)
            name, step, arguments = steps[chosen]
            free = shutil.disk_usage(disk).free
            # HDF5 files reserve a MiB more than they hold: around there it is decided.
            (disk / "ballast").write_bytes(bytes(max(0, free - int(rng.integers(0, 3 << 19)))))
            try:
                step(folder, *arguments)
                fine += 1
            except (InputError, BankError) as error:
                full += 1
                if "room" not in str(error) and "No space" not in str(error) and "bytes free" not in str(error):
                    faults.append(f"{name}: {error}")
            except BaseException as error:
                faults.append(f"{name}: {type(error).__name__}: {error}")
            faults += [f"{name}: {fault}" for fault in _faults(folder, name, before)]
            (disk / "ballast").unlink()
            for _, step, arguments in steps[chosen:]:
                step(folder, *arguments)
            faults += list(verify(folder, deep=True).problems)
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)  # files stay mapped
    return {"runs": count, "full": full, "had_room": fine, "faults": faults}


# ---- damaged files


def fuzz(count: int, scratch: Path, *, seed: int = 0) -> dict[str, Any]:
    """Change files of a bank at random, one at a time: it must load with the same content, or raise a SpadeError."""
    rng, folder = np.random.default_rng(seed), scratch / "bank"
    for _, step, arguments in script(_images(scratch / "images"))[:9]:
        step(folder, *arguments)
    # A row of levels that is read twice would hide a change: each mutant is a new place.
    expected, found = (content(folder), answers(folder)), {"refused": 0, "equal": 0}
    faults: list[str] = []
    names = [path for path in sorted(folder.rglob("*")) if path.suffix in (".h5", ".json", ".faiss")]
    for number in range(count):
        path = names[int(rng.integers(len(names)))]
        data, status = path.read_bytes(), path.stat()
        path.write_bytes(_mutated(data, rng))
        try:
            now = (content(folder), answers(folder))
        except SpadeError:
            found["refused"] += 1
        except BaseException as error:
            faults.append(f"mutant {number} of {path.name}: {type(error).__name__}: {error}")
        else:
            found["equal"] += 1
            if now != expected:
                faults.append(f"mutant {number} of {path.name} loads with other content")
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return {"mutants": count, "files": len(names), **found, "faults": faults}


def _mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, cut off, cut out, written over, put in, or nothing at all."""
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    noise = rng.integers(0, 256, length, np.uint8).tobytes()
    flipped = bytearray(data)
    flipped[place] ^= 1 << int(rng.integers(8))
    kinds = [
        bytes(flipped),
        data[:place],
        data[:place] + data[place + length :],
        data[:place] + noise + data[place + length :],
        data[:place] + noise + data[place:],
        bytes(len(data)),
        b"",
        data,
    ]
    return kinds[int(rng.choice(len(kinds), p=[0.3, 0.1, 0.1, 0.3, 0.1, 0.03, 0.03, 0.04]))]


# ---- readers beside a writer


def read_beside(added: int, scratch: Path, *, readers: int = 4, base: int = 40) -> dict[str, Any]:
    """Readers score again and again while a writer adds images one by one and compacts: each result is that of a generation."""
    folder, context = scratch / "bank", _forks()
    _append(folder, 0, base, 20)
    stop, results = context.Event(), context.Queue()
    processes = [context.Process(target=_read, args=(folder, stop, results)) for _ in range(readers)]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    writer = Bank.open(folder)
    states: dict[int, list[str]] = {writer.generation: list(writer.ids)}
    for number in range(base, base + added):
        writer.append(features(number, 1))
        states[writer.generation] = list(writer.ids)
        if number % 50 == 49:
            writer.remove([f"image {number - 20}"])
            states[writer.generation] = list(writer.ids)
            writer.compact(target_bytes=200_000)
            states[writer.generation] = list(writer.ids)
    stop.set()
    found = [results.get(timeout=_STEP_S) for _ in processes]
    for process in processes:
        process.join(_STEP_S)
    faults = [fault for _, of in found for fault in of]
    scored = [line for lines, _ in found for line in lines]
    expected: dict[int, Any] = {}
    for generation in sorted({generation for generation, _ in scored}):
        fresh = scratch / f"fresh {generation}"
        bank = Bank.create(fresh, Layout(levels=tuple(LEVELS), embedding_dim=DIM, input_size=INPUT))
        bank.append(concatenate([features(int(name.split()[1]), 1) for name in states[generation]]))
        expected[generation] = _score(fresh)
        shutil.rmtree(fresh)
    faults += [f"a result of generation {g} is not its own" for g, result in scored if result != expected[g]]
    return {
        "readers": readers,
        "added": added,
        "results": len(scored),
        "generations_seen": len(expected),
        "generations": writer.generation,
        "faults": faults,
    }


def _read(folder: Path, stop: Any, results: Any) -> None:
    lines: list[tuple[int, Any]] = []
    faults: list[str] = []
    while not stop.is_set():
        try:
            detector = Detector.open(folder, method=Method(k_image=3, k_gallery=3))
            for _ in range(3):  # the writer goes on in between
                lines.append((detector.bank.generation, _score(detector)))
                time.sleep(0.02)
        except Exception as error:
            faults.append(f"a reader met {type(error).__name__}: {error}")
    results.put((lines, faults))


def _score(bank: Path | Detector) -> list[Any]:
    detector = bank if isinstance(bank, Detector) else Detector.open(bank, method=Method(k_image=3, k_gallery=3))
    scores = detector.score_features(features(1000, 2))
    return [scores.image_score.tolist(), scores.neighbor_ids.tolist(), scores.maps.sum().item()]


# ---- what adding costs


def add_cost(images: int, added: int, scratch: Path) -> dict[str, Any]:
    """Seconds and bytes of adding to a bank, against building it again; features of efficientnet_lite0's shapes."""
    levels = [
        Level("blocks.1", channels=24, stride=4, height=56, width=56),
        Level("blocks.2", channels=40, stride=8, height=28, width=28),
        Level("blocks.4", channels=112, stride=16, height=14, width=14),
    ]
    rng = np.random.default_rng(0)

    def batch(first: int, count: int) -> FeatureBatch:
        shapes = {level.name: (count, *level.shape) for level in levels}
        maps = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        return FeatureBatch([f"{first + i}" for i in range(count)], rng.standard_normal((count, 1280), np.float32), maps)

    def timed(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    graph = Recipe(name="hnsw", build=Build(image="HNSW32"))
    bank = Bank.create(scratch / "bank", Layout(levels=tuple(levels), embedding_dim=1280, input_size=(224, 224)))
    batches = [batch(first, 500) for first in range(0, 1000, 500)]
    build_s = 0.0
    for first in range(0, images, 500):
        part = batches[first // 500 % 2]
        named = FeatureBatch([f"{first + i}" for i in range(500)], part.embedding, part.levels)
        build_s += timed(lambda named=named: bank.append(named))  # type: ignore[misc]
    index_s = timed(lambda: build_index(bank, graph))
    files = {path: path.stat().st_mtime_ns for path in (bank.path / "features").glob("*.h5")}
    new = batch(images, added)
    add_s = timed(lambda: bank.append(new))
    update_s = timed(lambda: build_index(bank, graph))
    rewritten = [path for path, stamp in files.items() if path.stat().st_mtime_ns != stamp]
    return {
        "images": images,
        "added": added,
        "build_s": build_s,
        "index_s": index_s,
        "add_s": add_s,
        "update_s": update_s,
        "bank_bytes": bank.bytes_on_disk,
        "bytes_written": bank.manifest.shards[-1].bytes + (bank.path / "manifest.json").stat().st_size,
        "shards_rewritten": len(rewritten),
    }


def main() -> None:
    """Run everything and write durability.json."""
    from benchmarks.main_job import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write durability.json to")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--fills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    with _scratch() as scratch:
        kills = kill(arguments.kills, scratch, seed=arguments.seed)
        found["kills"] = {"count": kills.count, "hit": kills.hit, "too_late": kills.missed, "faults": kills.faults}
        _say("kills", found)
    with _scratch() as scratch:
        found["fills"] = fill(arguments.fills, scratch, seed=arguments.seed)
        _say("fills", found)
    with _scratch() as scratch:
        found["fuzz"] = fuzz(arguments.mutants, scratch, seed=arguments.seed)
        _say("fuzz", found)
    with _scratch() as scratch:
        found["readers"] = read_beside(500, scratch)
        _say("readers", found)
    with _scratch() as scratch:
        found["add"] = add_cost(5000, 100, scratch)
        _say("add", found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "durability.json").write_text(json.dumps(found, indent=1) + "\n")


def _say(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found[name]}", flush=True)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="durability-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
