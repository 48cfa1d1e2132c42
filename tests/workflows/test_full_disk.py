"""A disk that fills up: the error says so, and what was there before is intact."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spade_faiss import Detector, verify
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.index.build import build_index
from spade_faiss.index.built_index import index_folder
from tests.support.banks import assert_holds, batch, files, make_bank
from tests.support.damage import (
    HNSW,
    IVF,
    PARTS,
)


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such reservation here")
@pytest.mark.parametrize(
    "write",
    [
        lambda bank: bank.append(batch("x")),
        lambda bank: bank.compact(),
        lambda bank: build_index(bank, IVF, rebuild=True),
    ],
    ids=["append", "compact", "index"],
)
def test_a_disk_that_has_no_room_for_an_array_takes_nothing_away(
    path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Bank], object]
) -> None:
    bank, before = Bank.open(path), files(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(
            InputError, match=r"there is no room for .*make room and run the command again: what was there before"
        ):
            write(bank)
    assert files(path) == before
    assert verify(path, deep=True).problems == ()
    write(bank)
    assert verify(path, deep=True).problems == ()


LIMITED = """
import json, os, resource, signal, sys
from pathlib import Path
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.index.build import build_index
from spade_faiss.search.recipe import Build, Recipe
from tests.support.banks import batch, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
hnsw = Recipe(name="hnsw", build=Build(image="HNSW4"))
ivf = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2}))
steps = {
    "append": lambda bank: bank.append(batch("x")),
    "remove": lambda bank: bank.remove(["a"]),
    "compact": lambda bank: bank.compact(),
    "hnsw": lambda bank: build_index(bank, hnsw, rebuild=True),
    "ivf": lambda bank: build_index(bank, ivf, rebuild=True),
}
import faiss, spade_faiss.search.ivf, spade_faiss.search.exact  # compiled files are not written under a limit
found = []
before = files(path)
for limit in (0, 60, 700, 4000, 200_000):
    for name, step in steps.items():
        bank = Bank.open(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            step(bank)
            said = "done"
        except SpadeError as error:
            said = str(error)
            if "there is no room for" in said or ("cannot write to" in said and "File too large" in said):
                said = "no room"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        left = [str(leftover) for leftover in path.rglob(TEMPORARY_PATTERN)]
        now = files(path)
        changed = sorted(key for key in before if now.get(key) != before[key])
        found.append([limit, name, said, left, changed if said != "done" else []])
        before = now
large = Path(sys.argv[2])
bank = Bank.open(large)
size = build_index(bank, hnsw).image.bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
try:
    build_index(bank, hnsw, rebuild=True)
    said = "done"
except SpadeError as error:
    said = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([found, said]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_a_limit_on_file_sizes_is_a_full_disk(path: Path, tmp_path: Path) -> None:
    """Writes that begin and do not end: in HDF5's own files, in JSON, in those that FAISS writes."""
    large = make_bank(tmp_path / "large")
    large.append(batch(*map(str, range(60))))
    done = subprocess.run(
        [sys.executable, "-B", "-c", LIMITED, str(path), str(large.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found, last_byte = json.loads(done.stdout)
    assert verify(path, deep=True).problems == ()
    assert not list(path.rglob(TEMPORARY_PATTERN))
    assert [item for item in found if item[2] not in ("no room", "done") or item[3] or item[4]] == []
    assert [item[2] for item in found[:5]] == ["no room"] * 5
    # Of an index that lacks its end, FAISS says nothing: what it wrote last is lost when it closes the file.
    assert verify(large.path).problems == ()
    Detector.open(large.path, recipe=HNSW)
    assert "there is no room for" in last_byte


def test_what_is_there_after_a_full_disk_is_what_was_there_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank.open(path)
    for name in ("fsync", "posix_fallocate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_room)
            with pytest.raises(InputError, match="there is no room for"):
                bank.append(batch("x"))
            if name == "fsync":
                with pytest.raises(InputError, match="there is no room for"):
                    bank.remove(["a"])
        for state in (bank, Bank.open(path)):
            assert state.generation == 4
            assert state.ids == ["a", "../c", "d", 'ü "\n', "e"]
    bank.restore(["b"])
    assert_holds(Bank.open(path), *PARTS)
    assert index_folder(bank, HNSW).is_dir()
