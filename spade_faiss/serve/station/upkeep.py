"""A bank follows what people say: pictures come into it or leave it, its indexes and its calibration follow, the server changes
over to the new state, and older alarms are scored again.

All of it happens in one thread for each bank, beside the pictures that are being scored. What was begun before a kill is begun
again at the next start: an answer is `pending` until the bank that is served has followed it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.manifest import read_manifest
from spade_faiss.bank.places import MANIFEST
from spade_faiss.core.errors import BusyError, InputError, SpadeError
from spade_faiss.core.files import is_full
from spade_faiss.core.grouping import NONE
from spade_faiss.core.timing import Timings
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.serve.errors import UnavailableError, UnknownError
from spade_faiss.serve.history.records import Answer, Change, Filter, LaterVerdict, ScoredPicture, State, new_id, utc_now
from spade_faiss.serve.station.served import Served
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.station.verdicts import Scored
from spade_faiss.workflows.extract import add

_log = logging.getLogger(__name__)

# How often the bank is looked at for what others do to it.
_POLL_S = 1.0
# Where a try failed that may succeed later.
_RETRY_S = 2.0


@dataclass(kw_only=True)
class _Round:
    """The answers that are followed together, and what has become of each."""

    answers: Sequence[Answer]
    settled: dict[str, tuple[State, str, str | None]] = field(default_factory=dict)
    added: int = 0
    removed: int = 0

    def settle(self, answer: Answer, state: State, message: str = "", bank_picture: str | None = None) -> None:
        """Note what has become of an answer."""
        self.settled[answer.id] = (state, message, bank_picture)

    def cause(self) -> str:
        """What was done, in words."""
        said = [f"{self.added} answered normal"] if self.added else []
        said += [f"{self.removed} taken back"] if self.removed else []
        return ", ".join(said) or "answers"


class Upkeep:
    """Keeps a station's bank up to what people say, and the station up to its bank.

    Args:
        station: the station.
    """

    def __init__(self, station: Station) -> None:
        self._station = station
        self._history = station.history
        self._files = station.history.files
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"upkeep {station.name}", daemon=True)

    def start(self) -> None:
        """Open the station, and then follow until `close`."""
        self._thread.start()

    def close(self) -> None:
        """End; what has begun is finished before."""
        self._closing.set()
        self._station.wake()
        self._thread.join()

    def _run(self) -> None:
        station = self._station
        while not station.is_open and not self._closing.is_set():
            try:
                station.open()
            except Exception as error:  # outermost frame of a thread
                self._report(error)
                station.state = "failed"
            if not station.is_open:
                self._closing.wait(_RETRY_S)
        station.wake()  # a kill may have left answers
        seen, pause = station.generation, _POLL_S
        while not self._closing.is_set():
            station.changed.wait(pause)
            station.changed.clear()
            if self._closing.is_set():
                return
            pause = _POLL_S
            try:
                pending = self._history.pending(station.name)
                generation = _generation(station.path)
                if pending:
                    self._follow(pending)
                elif generation != station.generation and generation == seen:
                    # Whoever changes it may not have finished: it has stayed as it is for a while.
                    self._change_over(_Round(answers=()), "somebody else changed the bank")
                seen = generation
            except (BusyError, UnavailableError) as error:
                station.state, station.message, pause = "ready", str(error), _RETRY_S
                _log.info("the bank %s is followed later: %s", station.name, error)
            except Exception as error:  # outermost frame of a thread
                self._report(error)
                pause = _RETRY_S

    def _report(self, error: Exception) -> None:
        """Say what went wrong; the state that is served stays."""
        station = self._station
        if not isinstance(error, SpadeError):
            _log.error("the bank %s could not be followed", station.name, exc_info=error)
        if station.message != str(error):
            _log.warning("the bank %s could not be followed: %s", station.name, error)
        station.state, station.message = "ready", str(error)

    def _follow(self, pending: Sequence[Answer]) -> None:
        """Have the bank follow answers, and the station the bank."""
        station, done = self._station, _Round(answers=pending)
        station.state, station.message = "changing", f"{len(pending)} answers are followed"
        before = station.generation
        try:
            self._remove([answer for answer in pending if answer.undone], done)
            self._add([answer for answer in pending if not answer.undone], done)
            if _generation(station.path) != before:
                self._change_over(done, done.cause())
        except BusyError:
            raise
        except SpadeError as error:
            if isinstance(error, UnavailableError) or is_full(error.__cause__):  # it may succeed later
                raise
            for answer in pending:
                if answer.id not in done.settled or done.settled[answer.id][0] != "failed":
                    done.settle(answer, "failed", str(error), done.settled.get(answer.id, ("", "", answer.bank_picture))[2])
            self._settle(done)
            self._history.add_change(replace(self._change(done, before, done.cause()), error=str(error)))
            raise
        self._settle(done)
        station.state, station.message = "ready", station.served.message

    def _remove(self, taken_back: Sequence[Answer], done: _Round) -> None:
        """Take pictures out of the bank whose answers were taken back."""
        if taken_back:
            bank = Bank.open(self._station.path)
            known = dict.fromkeys(name for answer in taken_back if (name := self._bank_name(answer)) is not None)
            held = [name for name in known if bank.pictures.number(name) is not None]
            if held:
                done.removed += bank.remove(held)
        for answer in taken_back:
            done.settle(answer, "undone")

    def _bank_name(self, answer: Answer) -> str | None:
        """What the bank calls the picture of an answer, or would: a kill may have come after it was put there."""
        if answer.bank_picture is not None:
            return answer.bank_picture
        with suppress(UnknownError):
            picture = self._history.get(answer.picture_id)
            return _name_in_bank(picture, f"{picture.id}{picture.suffix}")
        return None

    def _add(self, normal: Sequence[Answer], done: _Round) -> None:
        """Put pictures into the bank that were answered `normal`."""
        station = self._station
        by_name: dict[str, Answer] = {}
        paths: dict[str, Path] = {}
        products: dict[str, str | None] = {}
        for answer in normal:
            try:
                picture = self._history.get(answer.picture_id)
                path = self._keep(picture)
            except UnknownError as error:
                done.settle(answer, "failed", str(error))
                continue
            name = _name_in_bank(picture, path.name)
            by_name[name], paths[name], products[name] = answer, path, picture.product
        if not paths:
            return
        bank = Bank.open(station.path)
        back = [name for name in by_name if name in bank.removed]
        if back:  # it was there before, and was taken back
            done.added += bank.restore(back)
        new = {name: path for name, path in paths.items() if name not in back}
        skipped: dict[str, str] = {}
        same: dict[str, str] = {}
        for product in dict.fromkeys(products[name] for name in new):
            served = station.served
            # Whatever groups the bank has, an upload is by itself: nothing is known of its siblings.
            run = station.run if served.detector.bank.manifest.grouping is None else replace(station.run, group_by=NONE)
            run = replace(run, product=product)
            own = [path for name, path in new.items() if products[name] == product]
            found = add(own, bank=station.path, backbone=served.detector.backbone, run=run)
            done.added += found.added
            skipped |= {item.id: item.reason for item in found.skipped}
            same |= {item.id: item.of for item in found.duplicates}
        bank = Bank.open(station.path)
        gone = {of for of in same.values() if of in bank.removed}
        if gone:  # the same picture was in the bank under another name, and left it
            done.added += bank.restore(sorted(gone))
        for name, answer in by_name.items():
            if name in skipped:
                done.settle(answer, "failed", skipped[name])
            elif same.get(name) in gone:
                done.settle(answer, "in the bank", "", same[name])
            elif name in same:
                done.settle(answer, "in the bank", f"the bank held the same picture before, as {same[name]}")
            else:
                done.settle(answer, "in the bank", "", name)

    def _keep(self, picture: ScoredPicture) -> Path:
        """Have a picture's file where it stays, whatever is removed from the history; its name is its id."""
        folder = self._files.normals(self._station.name)
        folder.mkdir(parents=True, exist_ok=True)
        source, path = self._files.picture_path(picture.id, picture.suffix), folder / f"{picture.id}{picture.suffix}"
        if not path.exists():
            if not source.exists():
                raise UnknownError(f"the file of picture {picture.id} was removed, see --keep and --keep-bytes")
            part = path.with_name(f".{path.name}.part")
            part.unlink(missing_ok=True)
            try:
                os.link(source, part)
            except OSError:  # a file system without links
                shutil.copyfile(source, part)
            part.replace(path)
        return path

    def _change_over(self, done: _Round, cause: str) -> None:
        """Serve the bank as it is now."""
        station, start, before = self._station, perf_counter(), self._station.served
        station.state = "changing"
        served = Served.open(
            station.path,
            station.run,
            backbone=before.detector.backbone,
            before=before.calibrations,
            holdout=station.settings.holdout_of(station.name),
        )
        station.change_over(served)
        station.state, station.message = "ready", served.message
        gone, left = self._score_again(served)
        said = f"{cause}; {served.notice}" if served.notice else cause
        seconds = perf_counter() - start
        change = self._change(done, before.generation, said)
        self._history.add_change(replace(change, alarms_gone=tuple(gone), alarms_left=left, seconds=seconds))

    def _change(self, done: _Round, before: int, cause: str) -> Change:
        station = self._station
        return Change(
            id=new_id(),
            bank=station.name,
            generation_before=before,
            generation_after=station.generation,
            changed=utc_now(),
            cause=cause,
            answers=tuple(answer.id for answer in done.answers),
            added=done.added - done.removed,
        )

    def _settle(self, done: _Round) -> None:
        for answer in done.answers:
            if answer.id in done.settled:
                self._history.settle(answer, *done.settled[answer.id])

    def _score_again(self, served: Served) -> tuple[list[str], int]:
        """Score the last alarms against what is served now; the ids of those that are none any more, and how many still are."""
        most = self._station.settings.score_again
        if not most or served.rules is None:
            return [], 0
        found = self._history.find(Filter(bank=self._station.name, alarm=True, size=most)).items
        gone, left = [], 0
        for part in self._scored([item for item in found if item.kept], served):
            self._history.score_again((item.id, verdict) for item, verdict in part)
            for item, verdict in part:
                if verdict.alarm:
                    left += 1
                elif item.now is None or item.now.alarm:
                    gone.append(item.id)
        return gone, left

    def _scored(self, pictures: Sequence[ScoredPicture], served: Served) -> Iterator[list[tuple[ScoredPicture, LaterVerdict]]]:
        """Score pictures of the history again, some at a time; those that cannot be read any more are left out."""
        detector = served.detector
        features = detector.feature_stream(Timings())
        score, size = detector.batch_scorer(Timings()), detector.images_at_a_time
        for start in range(0, len(pictures), size):
            if self._closing.is_set():
                return
            part, decoded = [], []
            for item in pictures[start : start + size]:
                path = self._files.picture_path(item.id, item.suffix)
                with suppress(InputError):
                    decoded.append(features.decode(ImageRecord(item.id, path)))
                    part.append(item)
            # Those that senders named; where the nearest normals did, they do it again: the bank may hold others by now.
            held = detector.bank.products
            products = {item.id: item.product for item in part if item.confidence is None and item.product in held}
            for extracted in features.extract(decoded, self._files.root) if decoded else ():
                named = [products.get(name) for name in extracted.batch.ids]
                scores = score(extracted.batch, products=named) if any(named) else score(extracted.batch)
                if scores is not None:
                    scored = Scored(served=served, extracted=extracted, scores=scores)
                    yield list(zip(part, scored.later(), strict=True))


def _name_in_bank(picture: ScoredPicture, name: str) -> str:
    """What the bank calls the file of a picture: in a bank of several products, names begin with that of the product."""
    return name if picture.product is None else f"{picture.product}/{name}"


def _generation(path: Path) -> int:
    """The generation of a bank as it is on disk."""
    return read_manifest(path).generation if (path / MANIFEST).is_file() else -1
