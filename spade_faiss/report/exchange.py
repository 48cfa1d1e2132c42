"""How the results in a folder are exchanged for others in one step, and what a kill in between leaves is put right.

A run writes into a folder beside that of the results. When it is complete, the two exchange their names. What is shown now is
a new folder, though, and people stand in the old one: shells, file servers, containers that mounted it. So the old one, out
of sight, gets the new results as well (hard links), and comes back by a second exchange. It stays the folder it was, with its
owner, its permissions and whatever else lies in it.

Where two folders cannot be exchanged (the folder is a mount point, or the file system is none of Linux's own), the old
results are removed and then the new ones are renamed into their place, report.json as the last: for some milliseconds the
folder shows a part of one run, and never anything of two. Where a kill hits these, the next run goes on with it first.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from spade_faiss.core.files import TEMPORARY_PATTERN, exchange, is_full, sync_folder, write_bytes
from spade_faiss.core.sole_writer import LOCK

OVERLAYS = "overlays"
# Of a run on a cluster: a folder for each part, with its scores.h5 and tables.
PARTS = "score-parts"
SCORES = "scores.h5"
REPORT = "report.json"
DRIFT_PAGE, DRIFT_NUMBERS = "drift.html", "drift.json"
TUNING_PAGE, TUNING_NUMBERS = "tuning.html", "tuning.json"
# Everything that a run may write; in this order where it cannot appear at once.
RESULTS = (
    SCORES,
    PARTS,
    "scores.csv",
    "regions.csv",
    "suspects.csv",
    OVERLAYS,
    "report.html",
    DRIFT_PAGE,
    DRIFT_NUMBERS,
    TUNING_PAGE,
    TUNING_NUMBERS,
    REPORT,
)
# Those that are folders, and the suffixes of the files that a run puts there: what others put there is not ours to remove.
FOLDERS = {OVERLAYS: (".png",), PARTS: (".h5", ".csv")}
# Lies in a folder of staged results until it is removed, or has become the folder of the results.
COVER = ".spade-cover.tmp"
STAGED = "new"
# Beside the staged results: a folder for each run on a cluster that was lost, with the parts that it has scored.
_KEPT_PARTS = "parts"
# After an error, what had been scored is kept in a folder of this name.
_UNFINISHED = ".unfinished"

_log = logging.getLogger(__name__)


class Place:
    """The folder of the results, and beside it the workspace: the lock, and `staged`, which the other exchanges names with.

    `staged` holds the mark `COVER` as long as it was made by a run; where the mark is in the folder of the results, that one
    is in the workspace, and comes back. `kept_parts` stays from run to run, until complete results are shown.
    """

    def __init__(self, out: Path) -> None:
        self.target = out.resolve()
        self.workspace = _find_workspace(self.target)
        self.staged = self.workspace / STAGED
        self.kept_parts = self.workspace / _KEPT_PARTS
        self._removing = self.workspace / "removing"
        self._moving = self.workspace / "moving"
        self._kept_scores = self.target.with_name(self.target.name + _UNFINISHED)

    def prepare(self) -> None:
        """Make the folder that a run writes to."""
        self.staged.mkdir()
        (self.staged / COVER).touch()
        if self.target.exists():
            self.staged.chmod(self.target.stat().st_mode & 0o7777)  # what is private stays private

    def commit(self, kept: Collection[str]) -> None:
        """Show what was staged in place of the results that are there, except those in `kept`."""
        sync_folder(self.staged)
        if not self.target.exists():
            self.staged.rename(self.target)
        elif self._can_exchange():
            for name in names(self.target):  # what stays is reached through the cover as well
                if name not in RESULTS or name in kept:
                    (self.staged / name).symlink_to(self.staged / name)
            try:
                exchange(self.staged, self.target)
            except OSError as error:  # of a folder that came with the image of a container
                _log.debug("results of %s are replaced one after the other: %s", self.target, error)
                self._replace_each(kept)
        else:
            self._replace_each(kept)
        sync_folder(self.target)
        sync_folder(self.target.parent)
        self.settle()
        self._clear_kept_scores()  # of a run that failed, and has now been repeated
        if PARTS not in kept:  # so have those that were lost, or they are out of date
            shutil.rmtree(self.kept_parts, ignore_errors=True)

    def settle(self) -> None:
        """Bring the folder of the results back if the cover is shown, and clear what a run left in the workspace."""
        self._go_on_replacing()
        if (self.target / COVER).exists():
            if self.staged.exists():
                self._refill()
                exchange(self.staged, self.target)
                sync_folder(self.target.parent)
            else:
                (self.target / COVER).unlink()
        for path in self.workspace.iterdir():
            if path.is_file() and path.name != LOCK:
                path.unlink()
        if not self.staged.exists():
            return
        if (self.staged / COVER).exists() or names(self.staged):
            self._save_strangers()
        shutil.rmtree(self.staged)

    def keep_scores(self, error: Exception) -> None:
        """Keep what was scored, though its report failed: it may have taken hours."""
        if not any((self.staged / name).exists() for name in (SCORES, PARTS)) or self.workspace.parent == self.target:
            return
        if is_full(error) or is_full(error.__cause__):
            return
        with suppress(OSError):
            self._clear_kept_scores()
            self.staged.rename(self._kept_scores)
            (self._kept_scores / COVER).unlink()
            _log.warning("the run has failed, %s is as it was; what was scored is kept in %s", self.target, self._kept_scores)

    def _clear_kept_scores(self) -> None:
        with suppress(OSError):  # its name may be longer than names can be; then there is none
            if self._kept_scores.is_dir() and names(self._kept_scores) <= {*RESULTS, COVER}:
                shutil.rmtree(self._kept_scores)

    def _replace_each(self, kept: Collection[str]) -> None:
        """Replace results in place; what is complete once it has begun, see `_go_on_replacing`."""
        write_bytes(self._removing, "\n".join(kept).encode())
        self._go_on_replacing()

    def _go_on_replacing(self) -> None:
        if self._removing.exists():
            _remove_results(self.target, self._removing.read_text().split())
            sync_folder(self.target)
            self._removing.rename(self._moving)
            sync_folder(self.workspace)
        if self._moving.exists():
            kept = self._moving.read_text().split()
            for name in RESULTS:
                if name not in kept:
                    _move(self.staged / name, self.target / name)
            sync_folder(self.target)
            self._moving.unlink()

    def _refill(self) -> None:
        """Give the folder in the workspace the results that its cover shows."""
        stays = {name for name in names(self.target) if self._is_link_to_hidden(self.target / name)}
        _remove_results(self.staged, stays)
        for name in RESULTS:
            if name not in stays and (self.target / name).exists():
                _link(self.target / name, self.staged / name)
        sync_folder(self.staged)

    def _save_strangers(self) -> None:
        """Move what others put into the folder in the workspace, while it was the one that was shown, to where they put it."""
        for path in [*self.staged.iterdir()]:
            if path.name not in (*RESULTS, COVER) and not self._is_link_to_hidden(path) and not _is_temporary(path):
                self.target.mkdir(exist_ok=True)
                path.replace(self.target / path.name)

    def _is_link_to_hidden(self, path: Path) -> bool:
        return path.is_symlink() and path.readlink() == self.staged / path.name

    def _can_exchange(self) -> bool:
        """Whether the file system has what a change at one stroke takes."""
        if self.workspace.parent == self.target:
            return False
        one, other = self.workspace / "one", self.workspace / "other"
        try:
            one.touch()
            other.hardlink_to(one)
            exchange(one, other)
        except OSError as error:
            _log.debug("results of %s are replaced one after the other: %s", self.target, error)
            return False
        finally:
            one.unlink(missing_ok=True)
            other.unlink(missing_ok=True)
        return True


def _find_workspace(target: Path) -> Path:
    """Beside the folder of the results; inside of it where nothing can be renamed from there to here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, inside = workspaces(target)
    return inside if target.exists() and not _can_move(target.parent, target) else beside


def workspaces(target: Path) -> tuple[Path, Path]:
    """Where the workspace of a folder of results may be: beside it, or inside of it."""
    name = TEMPORARY_PATTERN.replace("*", hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16])
    return target.parent / name, target / name


def _can_move(source: Path, target: Path) -> bool:
    """Whether what is in `source` can be renamed to `target`."""
    if not os.access(source, os.W_OK | os.X_OK) or source.stat().st_dev != target.stat().st_dev:
        return False
    name = TEMPORARY_PATTERN.replace("*", secrets.token_hex(8))
    try:  # one disk may be mounted at two places: Linux says so before it says that there is no such file
        (source / name).rename(target / name)
    except OSError as error:
        return error.errno not in (errno.EXDEV, errno.EROFS)
    return True


def _is_temporary(path: Path) -> bool:
    """Whether it is a file that a killed run had begun to write; a folder may be the workspace of another run."""
    return path.match(TEMPORARY_PATTERN) and path.is_file()


def names(folder: Path) -> set[str]:
    """What lies in a folder."""
    return {path.name for path in folder.iterdir()}


def _remove_results(folder: Path, kept: Collection[str]) -> None:
    """Remove the results in a folder that are not to be kept; what says that they are complete goes first."""
    for name in reversed(RESULTS):
        path = folder / name
        if name in kept or not os.path.lexists(path):
            continue
        if name in FOLDERS and path.is_dir() and not path.is_symlink():
            _remove_files(path, FOLDERS[name])
        else:
            path.unlink()


def _remove_files(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Remove the files of some suffixes below a folder, and the folders that are empty then."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if name.endswith(suffixes):
                Path(parent, name).unlink()
        with suppress(OSError):
            Path(parent).rmdir()


def _move(source: Path, target: Path) -> None:
    """Rename a file or folder; a folder goes into one that is there."""
    if not source.exists():
        return
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move(path, target / path.name)
    else:
        source.rename(target)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or for all files of a folder."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
    else:
        target.hardlink_to(source)
