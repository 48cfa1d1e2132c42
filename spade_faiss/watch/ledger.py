"""What was scored and what waits to be delivered, on disk: one SQLite file, which survives a kill and a power cut.

A picture is scored, and in one transaction its id and a parcel for each destination are written. A parcel goes when its
destination has it. So a picture that was not scored yet is found again by its source, and one that was is delivered until
somebody confirms.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.watch.arrivals import Stamp

SCHEMA = "1"
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pictures (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, sink TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    overlay BLOB, map BLOB, picture BLOB, path TEXT, tries INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS outbox_by_sink ON outbox (sink, seq);
CREATE TABLE IF NOT EXISTS refused (sink TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL, reason TEXT NOT NULL, at REAL);
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Parcel:
    """What one destination is to get of one picture.

    Args:
        sink: the destination's name.
        id: the picture's.
        body: the verdict as a line of JSON, in UTF-8.
        overlay: the picture under its heat map, a PNG.
        map: its score map, as `numpy.save` writes it.
        picture: the picture itself, a PNG, where it is in no file of its own.
        path: the file that is the picture.
        seq: its number among all parcels, 0 before it is in the ledger.
    """

    sink: str
    id: str
    body: bytes
    overlay: bytes | None = None
    map: bytes | None = None
    picture: bytes | None = None
    path: str | None = None
    seq: int = 0


class Ledger:
    """The state of one watched source; threads may share it, and one process at a time has it.

    Args:
        path: the file, which is made; None to remember nothing beyond the process.
        source: what is watched; a file that is of another source is refused.

    Raises:
        NotFoundError: if the folder of `path` does not exist.
        InputError: if another process has it, if it is of another source, or is no such file.
    """

    def __init__(self, path: Path | None, source: str) -> None:
        self._path = path
        self._lock = threading.RLock()
        if path is not None and not path.parent.is_dir():
            raise NotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
        try:
            self._db = sqlite3.connect(":memory:" if path is None else path, timeout=0.2, check_same_thread=False)
            self._db.isolation_level = None
            # The file stays locked for as long as the process lives, and not longer.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute("BEGIN EXCLUSIVE")
            for statement in filter(str.strip, _TABLES.split(";")):
                self._db.execute(statement)
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise InputError(
                    f"another process uses {path}; give each watched source a state of its own: --state"
                ) from error
            raise InputError(f"cannot use the state {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is not the state of a watched source ({error}); give another file: --state") from error
        self._check("schema", SCHEMA, "is of another version of spade_faiss")
        self._check("source", source, "is of another source")

    def _check(self, name: str, value: str, wrong: str) -> None:
        found = self.fact(name)
        if found is None:
            with self._transaction():
                self._set(name, value)
        elif found != value:
            self.close()
            raise InputError(f"{self._path} {wrong}: {found!r}, not {value!r}; give another file: --state")

    def fact(self, name: str) -> str | None:
        """Return what is remembered under a name."""
        row = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if row is None else str(row[0])

    def has_picture(self, name: str) -> bool:
        """Whether a picture was scored, or skipped for good."""
        return self._one("SELECT 1 FROM pictures WHERE id = ?", name) is not None

    def stamp(self, name: str) -> Stamp | None:
        """Return the state of a file in which all of its images were settled."""
        row = self._one("SELECT size, mtime_ns FROM files WHERE name = ?", name)
        return None if row is None else Stamp(int(row[0]), int(row[1]))

    def add(self, pictures: Iterable[str], parcels: Iterable[Parcel], files: Mapping[str, Stamp]) -> None:
        """Write down at once which pictures are settled, what is to be delivered of them, and which files are done with.

        It is on disk when this returns.
        """
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO pictures VALUES (?)", [(name,) for name in pictures])
            db.executemany(
                "INSERT INTO outbox (sink, id, body, overlay, map, picture, path) VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(each.sink, each.id, each.body, each.overlay, each.map, each.picture, each.path) for each in parcels],
            )
            db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", [(name, *stamp) for name, stamp in files.items()])

    def waiting(self, sink: str, most: int) -> list[Parcel]:
        """Return the first parcels that a destination has not confirmed."""
        with self._lock:
            rows = self._db.execute(
                "SELECT sink, id, body, overlay, map, picture, path, seq FROM outbox WHERE sink = ? ORDER BY seq LIMIT ?",
                (sink, most),
            ).fetchall()
        return [
            Parcel(sink=row[0], id=row[1], body=row[2], overlay=row[3], map=row[4], picture=row[5], path=row[6], seq=row[7])
            for row in rows
        ]

    def count_waiting(self) -> dict[str, int]:
        """Return how many parcels each destination has not confirmed."""
        with self._lock:
            return dict(self._db.execute("SELECT sink, count(*) FROM outbox GROUP BY sink").fetchall())

    def count_refused(self) -> int:
        """Return how many parcels destinations did not take for good."""
        row = self._one("SELECT count(*) FROM refused")
        assert row is not None
        return int(row[0])

    def confirm(self, parcels: Sequence[Parcel], fact: tuple[str, str] | None = None) -> None:
        """Forget parcels that were delivered; remember a fact in the same step."""
        with self._transaction() as db:
            db.executemany("DELETE FROM outbox WHERE seq = ?", [(parcel.seq,) for parcel in parcels])
            if fact is not None:
                self._set(*fact)

    def refuse(self, parcel: Parcel, reason: str) -> None:
        """Put a parcel aside that its destination will never take."""
        with self._transaction() as db:
            db.execute("DELETE FROM outbox WHERE seq = ?", (parcel.seq,))
            db.execute("INSERT INTO refused VALUES (?, ?, ?, ?, ?)", (parcel.sink, parcel.id, parcel.body, reason, time.time()))

    def close(self) -> None:
        """Let others have it."""
        with self._lock:
            self._db.close()

    def _set(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def _one(self, statement: str, *values: str) -> tuple[Any, ...] | None:
        with self._lock:
            row: tuple[Any, ...] | None = self._db.execute(statement, values).fetchone()
        return row

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:  # a full disk
                raise InputError(f"cannot write the state {self._path}: {error}; make room and start again") from error
