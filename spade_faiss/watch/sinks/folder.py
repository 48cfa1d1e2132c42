"""A folder as a destination: a line of JSON for each picture in `verdicts.jsonl`, and files of alarms beside it.

Each picture has one line, whatever happens: after a kill, the lines that the ledger does not know of are read back, so that
none is written again, and a line that was cut off is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import sync_folder, write_bytes
from spade_faiss.watch.ledger import Parcel
from spade_faiss.watch.sinks.sink import Delivered, TryLaterError

LINES = "verdicts.jsonl"
OVERLAYS = "overlays"
MAPS = "maps"


class FolderSink:
    """Appends verdicts to a file; they are on disk when they count as delivered.

    Args:
        folder: the folder, which is made.
    """

    takes_all = True
    wants_files = True
    wants_pictures = False
    at_a_time = 200

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = f"folder:{folder}"
        self._file: FileIO | None = None
        self._size = 0
        self._unconfirmed: set[str] = set()

    def open(self, fact: str | None) -> None:
        """See `Sink`; the fact is how long the file was when the ledger last heard of it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / LINES
            self._file = _append_to(path)
            sync_folder(self._folder)
            length = path.stat().st_size
            # A file that was moved away meanwhile, as logs are, has begun anew.
            start = int(fact or 0) if int(fact or 0) <= length else 0
            self._unconfirmed, self._size = _read_back(path, start)
            if self._size < length:
                os.truncate(path, self._size)
        except OSError as error:
            raise InputError(f"cannot write to {self._folder}: {error.strerror}; choose another folder") from error

    def deliver(self, parcels: Sequence[Parcel]) -> Delivered:
        """See `Sink`."""
        assert self._file is not None
        new = [parcel for parcel in parcels if parcel.id not in self._unconfirmed]
        try:
            for parcel in new:
                for folder, data, suffix in ((OVERLAYS, parcel.overlay, ".png"), (MAPS, parcel.map, ".npy")):
                    if data is not None:
                        (self._folder / folder).mkdir(exist_ok=True)
                        write_bytes(self._folder / folder / f"{parcel.id}{suffix}", data)
            if new and not (self._folder / LINES).exists():  # moved away, as logs are
                self._file.close()
                self._file, self._size = _append_to(self._folder / LINES), 0
                sync_folder(self._folder)
            lines = b"".join(parcel.body + b"\n" for parcel in new)
            self._append(lines)
        except (OSError, InputError) as error:  # a full disk, a folder that went away
            raise TryLaterError(str(error)) from error
        self._unconfirmed.difference_update(parcel.id for parcel in parcels)
        return Delivered(parcels, fact=(self.name, str(self._size)))

    def _append(self, lines: bytes) -> None:
        """Append lines, all or none of them."""
        assert self._file is not None
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(lines)

    def close(self) -> None:
        """See `Sink`."""
        if self._file is not None:
            self._file.close()


def _append_to(path: Path) -> FileIO:
    return FileIO(path, "ab")


def files_of(name: str, *, has_map: bool) -> dict[str, str | None]:
    """Where the files of an alarm lie below the folder, by their keys in its line."""
    return {
        "overlay": f"{OVERLAYS}/{name}.png" if has_map else None,
        "map": f"{MAPS}/{name}.npy" if has_map else None,
    }


def _read_back(path: Path, start: int) -> tuple[set[str], int]:
    """The ids of the pictures whose lines are complete from `start` on, and where the last one ends."""
    found, end = set[str](), start
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                break
            with suppress(ValueError, KeyError, TypeError):  # somebody else wrote it
                found.add(str(json.loads(line)["id"]))
            end += len(line)
    return found, end
