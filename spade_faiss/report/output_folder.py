"""The folder of a run's results: it shows one complete run at any instant, whenever its writer is killed."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spade_faiss.core.errors import InputError, SpadeError
from spade_faiss.core.files import hash_file, is_full
from spade_faiss.core.interrupts import uninterrupted
from spade_faiss.core.sole_writer import SoleWriter
from spade_faiss.report.exchange import (
    COVER,
    DRIFT_NUMBERS,
    FOLDERS,
    PARTS,
    RESULTS,
    SCORES,
    STAGED,
    TUNING_NUMBERS,
    Place,
    names,
    workspaces,
)
from spade_faiss.report.output_url import KEPT_PARTS, folder_for
from spade_faiss.storage.url import is_url, local_path, parse_url

# The results that no folder has by chance.
_SIGNS = (SCORES, PARTS, "suspects.csv", DRIFT_NUMBERS, TUNING_NUMBERS)
# What systems put into folders, beside hidden files.
_LITTER = ("lost+found", "Thumbs.db", "desktop.ini")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """What a run writes, and where it will be.

    Args:
        out: the folder of the results, as the user named it.
        staged: where the run writes them, under their names.
        kept_parts: where a run may keep parts that the next one goes on with if this one is lost, in a folder for each run; it
            need not exist, and goes when results are complete.
        kept_url: where it may keep them if results are stored at a URL; empty if they are not.
        run: tells this run from all others; every file says it, or has its checksum in report.json.
        command: what makes the results.
    """

    out: Path
    staged: Path
    kept_parts: Path
    run: str
    command: str
    kept_url: str = ""

    def stamp(self) -> dict[str, Any]:
        """The run, and the sha256 of each file that was written; scores.h5 has checksums of its own and names the run."""
        written = [path for path in sorted(self.staged.rglob("*")) if path.is_file() and path.name not in (SCORES, COVER)]
        files = {path.relative_to(self.staged).as_posix(): hash_file(path) for path in written}
        return {"id": self.run, "command": self.command, "sha256": files}


@contextmanager
def output_folder(out: str | Path, command: str, *, replaces: Collection[str] = RESULTS) -> Iterator[OutputFolder]:
    """Hold a folder of results for one run, which writes below `staged`; that becomes the results when the block ends well.

    If it does not, `out` stays as it was. What others put into `out` is left alone; in `overlays`, PNG files are results. What
    killed runs left is cleared.

    Args:
        out: the folder; it is made, with its parents, if there is none. Or a URL, see `output_url`.
        command: what makes the results.
        replaces: the results that go when those of this run come; others stay beside them.

    Raises:
        InputError: if `out` is a file, or holds other files and no results, if another process is writing to it, or there is
            no room.
    """
    if is_url(out):
        url = parse_url(str(out))
        with folder_for(url, replaces) as here, output_folder(here, command, replaces=replaces) as folder:
            yield replace(folder, kept_url=f"{url}/{KEPT_PARTS}")
        return
    out = local_path(out)
    check_folder(out)
    with _errors_named(out) as place, _writing(out, place):
        place.settle()
        place.prepare()
        folder = OutputFolder(
            out=out, staged=place.staged, kept_parts=place.kept_parts, run=secrets.token_hex(8), command=command
        )
        try:
            yield folder
        except Exception as error:
            place.keep_scores(error)
            raise
        place.commit({*RESULTS} - {*replaces})


def check_folder(out: Path) -> None:
    """Raise InputError if `out` exists and is no folder for results: it holds other files, and none of a run."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"out={out} is a file; choose a folder")
    present = sorted(names(out))
    others = [name for name in present if name not in (*RESULTS, *_LITTER) and not name.startswith(".")]
    if others and not any(name in present for name in _SIGNS) and not any(path.exists() for path in workspaces(out.resolve())):
        some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise InputError(f"out={out} holds other files and no results ({some}); choose a new or an empty folder")
    for name in RESULTS:
        if name not in FOLDERS and (out / name).is_dir():
            raise InputError(f"{out / name} is a folder, and a file of the results has its name; rename it, or choose another")


@contextmanager
def _errors_named(out: Path) -> Iterator[Place]:
    """The place of `out`; errors from below it name `out`, not where results are staged."""
    target = out.resolve()
    staged = [str(workspace / STAGED) for workspace in workspaces(target)]
    try:
        yield Place(out)
    except SpadeError as error:
        if is_full(error.__cause__):
            raise _no_room(out, error.__cause__) from error
        text = str(error)
        for path in staged:
            text = text.replace(path, str(out))
        if text != str(error):
            raise type(error)(text) from error
        raise
    except OSError as error:
        if is_full(error):
            raise _no_room(out, error) from error
        if error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(target.parent):
            raise InputError(f"cannot write results to {out}: {error.strerror}") from error
        raise


def _no_room(out: Path, error: BaseException | None) -> InputError:
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"errno = (\d+)", str(error))):  # HDF5 says it in words
        number = int(found[1])
    reason = error if number is None else os.strerror(number)
    return InputError(
        f"there is no room for {out} ({reason}); make room and run the command again: what it held before is intact"
    )


@contextmanager
def _writing(out: Path, place: Place) -> Iterator[None]:
    writer = None
    try:
        with uninterrupted():
            writer = SoleWriter(place.workspace, f"results to {out}")
        yield
    finally:
        try:
            _clear(place, out, writer)
        except KeyboardInterrupt:  # it may have come before it could be held off
            _clear(place, out, writer)
            raise


def _clear(place: Place, out: Path, writer: SoleWriter | None) -> None:
    with uninterrupted():
        if writer is None or not writer.holds:
            return
        try:
            place.settle()
        except OSError as error:
            _log.warning("%s could not be cleared (%s); the next run that writes to %s does it", place.workspace, error, out)
        finally:
            writer.end()
