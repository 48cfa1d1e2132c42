"""Pictures that are answered while others are scored, and whether the bank is then the one that anybody would build."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve.places import BACKBONE, NAME, SMALL, Places
from benchmarks.serve.server import Load, Server, call, running, wait_until
from spade_faiss import Bank, Detector, Extraction, fit, update_indexes
from spade_faiss.core.settings import Decision
from spade_faiss.decisions.rule import DecisionRule

Row = dict[str, Any]

_CLIENTS = 4
_COMPARED = 40
_UNDONE = 5


def feedback(places: Places) -> Iterator[Row]:
    """The whole of it."""
    bank = places.small_bank("feedback")
    # Pictures of the same product that are not in the bank: the other normals, then those of the test set.
    others = places.normals()[SMALL:]
    yield feedback_under_load(bank, places, others, places.feedbacks)
    shutil.rmtree(bank.parent)


def feedback_under_load(bank: Path, places: Places, paths: Sequence[Path], count: int) -> Row:
    """Answer pictures `normal` while clients send others, take some answers back, and compare with a bank built anew."""
    faults: list[str] = []
    before = Bank.open(bank)
    originals = [before.image_path(name) for name in before.pictures.ids]
    with running([bank], bank.parent / "served") as server:
        load = Load(server, NAME, itertools.cycle(paths), _CLIENTS).start()
        answers: list[str] = []
        seen: set[str] = set()
        start = time.perf_counter()
        while len(answers) < count and not load.errors:
            fresh = [item for item in load.answered if item.picture["sha256"] not in seen]
            if not fresh:
                time.sleep(0.05)
                continue
            seen.add(fresh[0].picture["sha256"])
            reply = call(server.url, "POST", f"/v1/pictures/{fresh[0].picture['id']}/feedback", {"kind": "normal"})
            faults += [] if reply.status == 202 else [f"an answer got {reply.status}: {reply.body[:200]!r}"]
            answers.append(reply.json["id"])
            time.sleep(0.2)
        for answer in answers[:_UNDONE]:
            faults += [] if call(server.url, "POST", f"/v1/answers/{answer}/undo").status == 202 else ["an undo failed"]
        wait_until(lambda: not _state(server)["pending"], 900)
        seconds = time.perf_counter() - start
        load.end()
        faults += load.errors[:5]
        states = [call(server.url, "GET", f"/v1/answers/{answer}").json["state"] for answer in answers]
        expected = ["undone"] * _UNDONE + ["in the bank"] * (count - _UNDONE)
        faults += [] if states == expected else [f"the answers are {states}"]
        changes = call(server.url, "GET", f"/v1/banks/{NAME}/changes").json
        faults += [f"a change failed: {change['error']}" for change in changes if change["error"]]
        generations = sorted({item.picture["generation"] for item in load.answered})
        compared = sorted((places.data / "mvtec_bottle" / "test").rglob("*.png"))[::2][:_COMPARED]
        served = Load(server, NAME, compared, 1)
        served.start().join()
        faults += served.errors
        after = Bank.open(bank)
        files = [path for name in after.pictures.ids if (path := after.image_path(name)) not in originals and path is not None]
    anew = _anew(bank.parent / "anew.bank", [path for path in originals if path], files)
    as_served = _compare(anew, served)
    method = after.usual.method
    for name in ("exact", "index built anew"):
        # By what is in the bank alone; then by its own recipe, whose index is trained on what was there when it was built.
        recipe = "exact" if name == "exact" else None
        if recipe is None:
            update_indexes(Bank.open(bank), rebuild=True)
        ours, theirs = (
            Detector.open(path, recipe=recipe, method=method if recipe else None) for path in (bank, anew.bank.path)
        )
        differ = [path.name for path in compared if _scores(ours, path) != _scores(theirs, path)]
        faults += [f"{name}: {differ[:5]} score otherwise than against a bank built anew"] if differ else []
    return {
        "feedbacks": count,
        "taken_back": _UNDONE,
        "requests": len(load.answered),
        "failed": len(load.errors),
        "generations": generations,
        "changes": len(changes),
        "change_s": {"median": float(np.median([change["seconds"] for change in changes])), "runs": len(changes)},
        "seconds": seconds,
        "in_the_bank": len(after.pictures),
        "compared": len(compared),
        "as_served": as_served,
        "faults": faults,
    }


def _anew(path: Path, originals: Sequence[Path], added: Sequence[Path]) -> Detector:
    """A bank of the same pictures in the same order, made at once."""
    fit([*originals, *added], bank=path, extraction=Extraction(backbone=BACKBONE))
    return Detector.open(path)


def _scores(detector: Detector, path: Path) -> list[float]:
    return [float(values[0]) for values in detector.score(path).image_scores.values()]


def _compare(detector: Detector, served: Load) -> Row:
    """How the verdicts that were served differ from those of a bank built anew, index and calibration included."""
    rule, notice = DecisionRule.of(detector, Decision())
    assert rule is not None, notice
    largest, alarms = 0.0, 0
    for item in served.answered:
        scores = detector.score(item.path)
        verdict, told = rule(scores.image_scores, scores.statistics), item.picture
        for name, values in scores.image_scores.items():
            largest = max(largest, abs(float(told["scores"][name]) / float(values[0]) - 1))
        alarms += bool(told["alarm"]) != bool(verdict.alarm[0])
    return {"largest_relative_difference": largest, "alarms_that_differ": alarms}


def _state(server: Server) -> Row:
    found: Row = call(server.url, "GET", f"/v1/banks/{NAME}").json
    return found
