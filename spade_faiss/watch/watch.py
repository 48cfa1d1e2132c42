"""The loop: pictures that arrive together are scored together, written down, and delivered."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.features.decoding import MAX_PIXELS, decode, naming_file
from spade_faiss.features.frames import Frame
from spade_faiss.features.pages import split_page
from spade_faiss.features.pixels import to_rgb
from spade_faiss.features.video_frames import VideoFrame, frame_of
from spade_faiss.report.jsonfile import json_text
from spade_faiss.report.pictures import to_png
from spade_faiss.watch.arrivals import Arrival, Source, Stamp
from spade_faiss.watch.courier import Courier
from spade_faiss.watch.judge import FAST, Judge, Judged
from spade_faiss.watch.ledger import Ledger, Parcel
from spade_faiss.watch.settings import WatchSettings
from spade_faiss.watch.sinks.folder import files_of
from spade_faiss.watch.sinks.sink import Sink

_log = logging.getLogger(__name__)

# Without a bank of one's own, nothing is scored here: so many pictures are handed on together.
_HANDED_ON = 16
_IDLE_S = 0.2
_LATENCIES = 10_000


@dataclass(frozen=True, eq=False, kw_only=True)
class Line:
    """Verdicts on a batch as people and programs are told."""

    facts: Mapping[str, Any]
    alarm: bool | None = None
    skipped: str = ""


@dataclass(eq=False)
class Watched:
    """What was done.

    Args:
        scored: how many pictures were scored, or handed on to a server that scores them.
        alarms: how many of them were alarms.
        skipped: how many could not be read.
        dropped: how many frames of a camera came too fast.
        delivered: how many verdicts each destination took.
        waiting: how many it has not taken yet.
        refused: how many it will not take.
        latencies_s: of the last pictures, from their arrival until their verdict was written down.
    """

    scored: int = 0
    alarms: int = 0
    skipped: int = 0
    dropped: int = 0
    delivered: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))


class Watch:
    """Watches a source until it ends or `stopping` is set.

    Args:
        source_name: what verdicts call the source.
        source: where pictures come from.
        judge: scores them; None to hand them on to servers alone.
        sinks: where verdicts go to.
        ledger: the state.
        settings: how it is watched.
    """

    def __init__(
        self,
        source_name: str,
        source: Source,
        judge: Judge | None,
        sinks: Sequence[Sink],
        ledger: Ledger,
        settings: WatchSettings,
    ) -> None:
        self.stopping = threading.Event()
        self.done = Watched()
        self._name = source_name
        self._source = source
        self._judge = judge
        self._sinks = sinks
        self._ledger = ledger
        self._settings = settings
        self._couriers = [Courier(sink, ledger) for sink in sinks]
        self._wants_pictures = any(sink.wants_pictures for sink in sinks)

    def __call__(self, tell: Callable[[Line], None]) -> Watched:
        """Watch; each picture is told of when what is known of it is on disk.

        Raises:
            SpadeError: if the source, a destination or the ledger cannot be used.
        """
        for sink in self._sinks:
            sink.open(self._ledger.fact(sink.name))
        try:
            for courier in self._couriers:
                courier.start()
            self._source.start()
            self._run(tell)
            self._drain()
        finally:
            self._source.stop()
            for courier in self._couriers:
                courier.stop(self._settings.drain_s)
                courier.sink.close()
        self._count()
        return self.done

    def _run(self, tell: Callable[[Line], None]) -> None:
        while not self.stopping.is_set():
            self._check_couriers()
            if self._is_congested():
                self.stopping.wait(_IDLE_S)
                continue
            batch = self._gather()
            if not batch:
                if self._source.has_ended:
                    return
                if self._judge is not None:
                    self._judge.follow()
                continue
            for line in self._handle(batch):
                tell(line)
            self.done.dropped = self._source.dropped

    def _gather(self) -> list[Arrival]:
        """Pictures that arrived, as many as are scored together or came in time."""
        first = self._source.get(_IDLE_S)
        if first is None:
            return []
        batch, end = [first], time.monotonic() + self._settings.max_wait_ms / 1000
        most = _HANDED_ON if self._judge is None else self._judge.at_a_time
        while len(batch) < most:
            # What is there already is taken whatever the time is.
            found = self._source.get(max(0.0, end - time.monotonic()))
            if found is None:
                break
            batch.append(found)
        return batch

    def _handle(self, batch: Sequence[Arrival]) -> list[Line]:
        """Score a batch and write it down; returns what to tell of it."""
        readable, failed = self._decoded(batch)
        judged: list[Judged] = []
        if self._judge is not None and readable:
            self._judge.follow()
            judged, unread = self._judge(readable)
            failed += unread
        told: list[tuple[Arrival, Line, Judged | None]] = []
        for each in judged:
            arrival = each.arrival
            if arrival.sha256 and each.loaded.sha256 and each.loaded.sha256 != arrival.sha256:
                # It was written anew while it waited; what it is now arrives by itself.
                if self._source.unreadable(arrival, changed=True):
                    failed.append((arrival, "it changed while it was read"))
                continue
            told.append((arrival, Line(facts={**self._facts(arrival, "verdict"), **each.facts}, alarm=each.alarm), each))
        if self._judge is None:
            told += [(arrival, Line(facts=self._facts(arrival, "handed on")), None) for arrival in readable]
        lines: list[Line] = []
        parcels: list[Parcel] = []
        settled: list[Arrival] = []
        for arrival, line, own in told:
            try:
                parcels += self._parcels(arrival, line, own)
            except InputError as error:  # the file went away, or a page of it cannot be sent as a picture
                failed.append((arrival, str(error)))
                continue
            lines.append(line)
            settled.append(arrival)
        for arrival, reason in failed:
            if self._source.unreadable(arrival, changed=False):
                lines.append(Line(facts={**self._facts(arrival, "skipped"), "reason": reason}, skipped=reason))
                parcels += self._parcels(arrival, lines[-1], None)
                settled.append(arrival)
        self._write_down(settled, parcels)
        self.done.scored += sum(not line.skipped for line in lines)
        self.done.alarms += sum(bool(line.alarm) for line in lines)
        self.done.skipped += sum(bool(line.skipped) for line in lines)
        return lines

    def _decoded(self, batch: Sequence[Arrival]) -> tuple[list[Arrival], list[tuple[Arrival, str]]]:
        """The pictures as they can be scored and handed on; frames are decoded once, if servers get them as well."""
        if not self._wants_pictures:
            return list(batch), []
        readable: list[Arrival] = []
        failed: list[tuple[Arrival, str]] = []
        for arrival in batch:
            try:
                with naming_file(arrival.record.path):
                    readable.append(self._opened(arrival))
            except InputError as error:
                failed.append((arrival, str(error)))
        return readable, failed

    def _opened(self, arrival: Arrival) -> Arrival:
        record = arrival.record
        if isinstance(record, Frame):
            return arrival
        if (frame := frame_of(record)) is not None:
            pixels = frame.video.read(frame.number)
            return replace(arrival, record=Frame(record.id, record.path, pixels=pixels), time_s=frame.time_s)
        if self._judge is None:  # a file whose writer only paused is not handed on before it is whole
            file, page = split_page(record.path)
            decode(file.read_bytes(), MAX_PIXELS, page)
        return arrival

    def _facts(self, arrival: Arrival, kind: str) -> dict[str, Any]:
        arrived = datetime.fromtimestamp(arrival.arrived_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        facts: dict[str, Any] = {
            "kind": kind,
            "id": arrival.id,
            "name": arrival.record.id,
            "source": self._name,
            "arrived": arrived,
        }
        if isinstance(arrival.record, VideoFrame):
            facts["time_s"] = arrival.record.time_s
        elif arrival.time_s is not None:
            facts["time_s"] = arrival.time_s
        return facts

    def _parcels(self, arrival: Arrival, line: Line, judged: Judged | None) -> list[Parcel]:
        """What each destination gets of a picture."""
        parcels = []
        for sink in self._sinks:
            if self._settings.alarms_only and not sink.takes_all and not line.alarm:
                continue
            if sink.wants_pictures:
                if not line.skipped:
                    parcels.append(_picture_parcel(sink.name, arrival))
                continue
            if self._judge is None:
                continue
            facts, overlay, score_map = line.facts, None, None
            if sink.wants_files and line.alarm and judged is not None:
                overlay, score_map = judged.overlay(), judged.map_file()
                facts = {**facts, **files_of(arrival.id, has_map=overlay is not None)}
            body = json_text(facts).encode()
            parcels.append(Parcel(sink=sink.name, id=arrival.id, body=body, overlay=overlay, map=score_map))
        return parcels

    def _write_down(self, settled: Sequence[Arrival], parcels: Sequence[Parcel]) -> None:
        # A file is done with when the last of its images is; those that are to be tried again are not among them.
        left: dict[int, int] = {}
        files: dict[str, Stamp] = {}
        for arrival in settled:
            if (job := arrival.job) is not None:
                left[id(job)] = left.get(id(job), job.waiting) - 1
                if left[id(job)] == 0 and not job.failed:
                    files[job.name] = job.stamp
        self._ledger.add([arrival.id for arrival in settled if arrival.is_remembered], parcels, files)
        now = time.time()
        for arrival in settled:
            self.done.latencies_s.append(now - arrival.arrived_s)
            self._source.settled(arrival)
        for courier in self._couriers:
            courier.wake()

    def _is_congested(self) -> bool:
        counts = self._ledger.count_waiting()
        return any(counts.get(sink.name, 0) >= self._settings.max_undelivered for sink in self._sinks)

    def _check_couriers(self) -> None:
        for courier in self._couriers:
            if courier.error is not None:
                raise courier.error

    def _drain(self) -> None:
        """Wait until everything is delivered, as long as destinations take something."""
        end = time.monotonic() + self._settings.drain_s
        before = -1
        while time.monotonic() < end:
            self._check_couriers()
            counts = self._ledger.count_waiting()
            waiting = sum(counts.get(sink.name, 0) for sink in self._sinks)
            if not waiting:
                return
            if waiting != before:
                before, end = waiting, time.monotonic() + self._settings.drain_s
            time.sleep(0.02)

    def _count(self) -> None:
        counts = self._ledger.count_waiting()
        self.done.dropped = self._source.dropped
        for courier in self._couriers:
            name = courier.sink.name
            self.done.delivered[name] = courier.delivered
            self.done.waiting[name] = counts.get(name, 0)
            self.done.refused[name] = courier.refused


def _picture_parcel(sink: str, arrival: Arrival) -> Parcel:
    """A picture for a server: as its file, or as a PNG where it is only a part of one."""
    record = arrival.record
    name = record.id.encode()
    if not isinstance(record, Frame):
        file, page = split_page(record.path)
        if page is None:
            return Parcel(sink=sink, id=arrival.id, body=name, path=f"{file}#{arrival.sha256}")
        with naming_file(record.path):
            data = to_png(to_rgb(decode(file.read_bytes(), MAX_PIXELS, page), None), FAST)
        return Parcel(sink=sink, id=arrival.id, body=name, picture=data)
    pixels = record.pixels
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return Parcel(sink=sink, id=arrival.id, body=name, picture=to_png(picture, FAST))


def state_folder(path: Path) -> Path:
    """Make the folder of a state, which may be that of a destination."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
