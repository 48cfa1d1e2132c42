"""A folder as a source: files count when they are complete, those that are there already as well as those that come.

The system reports changes (watchfiles), and every now and then the whole folder is looked through: reports get lost when very
many files come at once, and network file systems make none.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import hash_file
from spade_faiss.core.settings import Run
from spade_faiss.features.datasets import records_of
from spade_faiss.features.folders import Walk, is_image
from spade_faiss.features.pages import part_digest
from spade_faiss.features.video_names import can_read_videos, is_video
from spade_faiss.watch.arrivals import Arrival, FileJob, Stamp, picture_id
from spade_faiss.watch.ledger import Ledger
from spade_faiss.watch.settings import WatchSettings
from spade_faiss.watch.sources.queue import QueuedSource

_log = logging.getLogger(__name__)

# Looking through a folder takes at most this share of the time.
_SCAN_SHARE = 0.05
_TICK_S = 0.1


@dataclass(eq=False)
class _Seen:
    """A file that may not be complete yet."""

    stamp: Stamp
    since_s: float


@dataclass(eq=False)
class _Doubtful:
    """A complete file that could not be read; perhaps its writer only paused."""

    stamp: Stamp
    since_s: float


class FolderSource(QueuedSource):
    """The images and videos of a folder and of the folders in it, hidden ones left out.

    Args:
        folder: the folder.
        ledger: knows which files and images were scored.
        run: says which frames of videos are taken.
        settings: when a file counts as complete.

    Raises:
        DependencyError: if watchfiles is not installed.
    """

    def __init__(self, folder: Path, ledger: Ledger, run: Run, settings: WatchSettings) -> None:
        from spade_faiss.watch.packages import import_watchfiles

        super().__init__(folder.name)
        self._watchfiles = import_watchfiles()
        self._folder = folder.resolve()
        self._ledger = ledger
        self._run = run
        self._settings = settings
        self._pending: dict[Path, _Seen] = {}
        self._lock = threading.Lock()
        self._queued: dict[str, Stamp] = {}
        self._doubtful: dict[str, _Doubtful] = {}
        self._warned: set[str] = set()

    def find(self) -> None:
        """See `QueuedSource`."""
        changes = self._changes()
        for path in next(changes, ()):  # watched from now on: nothing comes unseen between the first look and the first report
            self._see(path)
        next_scan = 0.0
        while not self.stopping.is_set():
            if time.monotonic() >= next_scan:
                started = time.monotonic()
                self._scan()
                taken = time.monotonic() - started
                next_scan = time.monotonic() + max(self._settings.rescan_s, taken / _SCAN_SHARE)
            self._take_complete()
            if self._settings.once and not self._pending and not self._queued and not self._doubtful:
                return
            for path in next(changes, ()):
                self._see(path)

    def _changes(self) -> Iterator[list[Path]]:
        """Yield what the system reports, or an empty list every now and then."""
        reports = self._watchfiles.watch(
            self._folder,
            watch_filter=None,
            debounce=100,
            step=20,
            stop_event=self.stopping,
            rust_timeout=round(1000 * _TICK_S),
            yield_on_timeout=True,
            raise_interrupt=False,
            ignore_permission_denied=True,
        )
        for report in reports:
            paths = [Path(name) for _, name in report]
            yield [
                inside
                for path in paths
                for inside in (self._walked(path) if path.is_dir() else [path])
                if self._is_wanted(inside)
            ]

    def _walked(self, folder: Path) -> list[Path]:
        """What is in a folder that came as a whole: there are no reports of what it held before."""
        if any(part.startswith(".") for part in folder.relative_to(self._folder).parts):
            return []
        try:
            return Walk()([folder])[0]
        except InputError as error:
            _log.warning("%s", error)
            return []

    def _is_wanted(self, path: Path) -> bool:
        if not path.is_relative_to(self._folder):
            return False
        inside = path.relative_to(self._folder)
        if any(part.startswith(".") for part in inside.parts):
            return False
        return is_image(path.name) or (is_video(path.name) and can_read_videos())

    def _scan(self) -> None:
        try:
            (found,) = Walk()([self._folder])
        except InputError as error:  # a folder went away, or is closed to us: the others count at the next look
            _log.warning("%s", error)
            return
        stamps = [(stamp.mtime_ns, path) for path in found if (stamp := _stamp(path)) is not None]
        for _, path in sorted(stamps):
            self._see(path)

    def _see(self, path: Path) -> None:
        """Take note of a file that is there, unless all of it was scored in its present state."""
        stamp = _stamp(path)
        if stamp is None:
            self._pending.pop(path, None)
            return
        name = self._name(path)
        with self._lock:
            doubtful = self._doubtful.get(name)
            if self._queued.get(name) == stamp or (doubtful is not None and doubtful.stamp == stamp):
                return
        if self._ledger.stamp(name) == stamp:
            return
        seen = self._pending.get(path)
        if seen is None or seen.stamp != stamp:
            self._pending[path] = _Seen(stamp, time.monotonic())

    def _take_complete(self) -> None:
        now, now_ns = time.monotonic(), time.time_ns()
        with self._lock:
            due = [name for name, each in self._doubtful.items() if now - each.since_s >= self._settings.give_up_s]
        for path, seen in list(self._pending.items()):
            if self.stopping.is_set():
                return
            stamp = _stamp(path)
            if stamp is None:
                del self._pending[path]
                continue
            if stamp != seen.stamp:
                self._pending[path] = _Seen(stamp, now)
                continue
            with self._lock:
                is_on_its_way = self._name(path) in self._queued
            if is_on_its_way:  # taken once that is settled: until then, nothing says that its images were scored
                continue
            # A file that was renamed into place, or lay there before, is older than that already.
            age_s = max(now - seen.since_s, (now_ns - stamp.mtime_ns) / 1e9)
            if age_s >= self._settings.settle_s:
                del self._pending[path]
                self._take(path, stamp, is_last_try=age_s >= self._settings.give_up_s)
        for name in due:
            with self._lock:
                doubtful = self._doubtful.pop(name, None)
            if doubtful is None:
                continue  # it was taken just now, in another state
            path = self._folder / name
            if (stamp := _stamp(path)) == doubtful.stamp:
                self._take(path, stamp, is_last_try=True)
            else:
                self._see(path)

    def _take(self, path: Path, stamp: Stamp, *, is_last_try: bool) -> None:
        """Hand over those images of a complete file that were not scored yet."""
        name, arrived = self._name(path), time.time()
        try:
            sha256 = hash_file(path)
            records = records_of(path, self._folder, self._run)
        except (OSError, ValueError) as error:  # it went away, is closed to us, or has a name that is no UTF-8
            if name not in self._warned:
                self._warned.add(name)
                _log.warning("left out %s for now: %s", name, error)
            return
        new = [(picture_id(record.id, sha256), record) for record in records]
        new = [(own, record) for own, record in new if not self._ledger.has_picture(own)]
        if not new:
            self._ledger.add([], [], {name: stamp})
            return
        job = FileJob(name, stamp, len(new), is_last_try)
        with self._lock:
            self._doubtful.pop(name, None)
            self._queued[name] = stamp
        for own, record in new:
            digest = part_digest(sha256, record.path)
            self.put(Arrival(id=own, record=record, sha256=digest, arrived_s=arrived, job=job))

    def unreadable(self, arrival: Arrival, *, changed: bool) -> bool:
        """See `Source`: final if the file has not changed for long."""
        job = arrival.job
        assert job is not None
        if job.is_last_try and not changed:
            return True
        job.failed = True
        self._settle(job)
        return False

    def settled(self, arrival: Arrival) -> None:
        """See `Source`."""
        assert arrival.job is not None
        self._settle(arrival.job)

    def _settle(self, job: FileJob) -> None:
        job.waiting -= 1
        if job.waiting:
            return
        with self._lock:
            if job.failed:
                self._doubtful[job.name] = _Doubtful(job.stamp, time.monotonic())
            if self._queued.get(job.name) == job.stamp:
                del self._queued[job.name]

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _stamp(path: Path) -> Stamp | None:
    """The state of a file; None if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116  # a link counts as the file that it leads to
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns)
