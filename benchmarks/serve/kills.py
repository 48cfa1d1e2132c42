"""Servers that are killed while they work, again and again: what they had answered is there, and the rest is done."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve.places import NAME
from benchmarks.serve.server import Load, Server, call, running, wait_until
from spade_faiss import verify

Row = dict[str, Any]

_CLIENTS = 8
# Between the moments at which a server is ready and at which it is killed, at most.
_ALIVE_S = 3.0
_FILES = ("incoming", "exports")


def kill_under_load(bank: Path, data: Path, paths: Sequence[Path], kills: int, seed: int = 0) -> Row:
    """Kill a server at random instants while clients send pictures and answer some, and start it again each time.

    Args:
        bank: the bank, which is changed.
        data: the server's folder, new.
        paths: the pictures to begin with; they are sent again and again, under new keys.
        kills: how often.
        seed: of the instants.

    Returns:
        What was counted, and what is wrong.
    """
    draw = random.Random(seed)
    known = verify(bank, deep=True).problems
    # Without an end: on a fast machine any number of pictures could be answered before the last kill.
    endless = itertools.cycle(paths)
    with running([bank], data, "--max-queue", "16") as server:
        with Load(server, NAME, endless, _CLIENTS, keyed=True, patient=True) as load:
            sent, recovery = _kill(server, load, kills, draw)
            before = len(load.answered)
            wait_until(lambda: len(load.answered) >= before + len(paths) or bool(load.errors), 300)  # the queue goes on
        faults = load.errors[:5]
        wait_until(lambda: not _pending(server), 300)
        faults += _lost(server, load)
        generation = int(call(server.url, "GET", f"/v1/banks/{NAME}").json["generation"])
        if (code := server.stop()) != 0:
            faults.append(f"the server ended with {code}")
    left = [path.name for name in _FILES for path in (data / name).iterdir()]
    faults += [f"files were left: {left[:5]}"] if left else []
    found = verify(bank, deep=True)
    faults += [f"the bank is damaged: {problem}" for problem in found.problems if problem not in known]
    return {
        "kills": kills,
        "answered": len(load.answered),
        "feedbacks": sent,
        "generation": generation,
        "recovery_s": {"median": sorted(recovery)[len(recovery) // 2], "max": max(recovery)},
        "faults": faults,
    }


def kills(places: Any) -> Iterator[Row]:
    """The whole of it."""
    bank = places.small_bank("kills")
    yield kill_under_load(bank, bank.parent / "served", places.folder(100), places.kills)
    shutil.rmtree(bank.parent / "served")


def _kill(server: Server, load: Load, kills: int, draw: random.Random) -> tuple[int, list[float]]:
    """Kill and start; returns how many answers were stored, and the seconds from each kill until the server was ready."""
    port, sent, recovery = server.port, 0, []
    answered: set[str] = set()
    for _ in range(kills):
        until = time.monotonic() + draw.uniform(0.2, _ALIVE_S)
        while time.monotonic() < until:
            if (fresh := [item for item in load.answered if item.picture["id"] not in answered]) and len(answered) < 3 * kills:
                name = draw.choice(fresh).picture["id"]
                answered.add(name)
                sent += _answer(server, name, draw)
            time.sleep(0.1)
        server.kill()
        start = time.perf_counter()
        server.start(port)
        recovery.append(time.perf_counter() - start)
    return sent, recovery


def _lost(server: Server, load: Load) -> list[str]:
    """What is wrong with the verdicts that were answered."""
    faults = []
    for item in load.answered:
        reply = call(server.url, "GET", f"/v1/pictures/{item.picture['id']}")
        if reply.status != 200:
            faults.append(f"a verdict that was answered is lost: {item.picture['id']}")
        elif any(
            reply.json[name] != item.picture[name] for name in ("name", "scores", "p_value", "alarm", "regions", "sha256")
        ):
            faults.append(f"a verdict has changed: {item.picture['id']}")
    total = int(call(server.url, "GET", f"/v1/banks/{NAME}/pictures?size=1").json["total"])
    # A client that was told to end may have sent a picture whose verdict it did not wait for.
    if not len(load.answered) <= total <= len(load.answered) + _CLIENTS:
        faults.append(f"{total} records of {len(load.answered)} answered pictures: some were scored twice")
    return faults


def _answer(server: Server, name: str, draw: random.Random) -> int:
    """Answer a picture; returns how many answers were stored."""
    kind = draw.choice(("normal", "normal", "defect"))
    try:
        return int(call(server.url, "POST", f"/v1/pictures/{name}/feedback", {"kind": kind}).status == 202)
    except OSError:
        return 0


def _pending(server: Server) -> bool:
    """Whether an answer has not been followed."""
    return bool(call(server.url, "GET", f"/v1/banks/{NAME}").json["pending"])
