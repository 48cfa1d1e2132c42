"""One writer, many readers: a second writer is told who the first is; what somebody reads stays; who died holds nobody up."""

from __future__ import annotations

import errno
import gc
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from spade_faiss import Detector, verify
from spade_faiss.bank import bank as bank_module
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.locks import READERS, WRITER, Lease
from spade_faiss.cli import main
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.core.settings import Method
from spade_faiss.index import build as index_build
from spade_faiss.index.build import build_index
from spade_faiss.index.image_index import build_image_index
from spade_faiss.search.recipe import Build, Recipe
from tests.support.banks import FINE, assert_holds, batch, files, make_bank

HNSW = Recipe(name="hnsw", build=Build(image="HNSW4"))

# Does what it is told on stdin, a line at a time, and says when it is done.
OTHER = """
import os, sys, threading
from spade_faiss.bank.bank import Bank
bank = Bank.open(sys.argv[1])
hold = None
print("ready", flush=True)
for line in sys.stdin:
    if line == "write\\n":
        hold = bank.writing()
        hold.__enter__()
    elif line == "end\\n":
        hold.__exit__(None, None, None)
    elif line == "half\\n":
        open(os.path.join(bank.path, "features", ".spade-0123.tmp"), "w").write("half a shard")
    elif line == "open\\n":
        bank = Bank.open(sys.argv[1])
    elif line == "read\\n":
        for row in range(len(bank)):
            assert float(bank.level_map("blocks.1", row).sum()) != 0
    elif line == "forget\\n":
        from spade_faiss.core import arrays
        from spade_faiss.bank import shards
        arrays.map_arrays.cache_clear()
        shards.map_shard.cache_clear()
    print("done", flush=True)
"""


class Other:
    """Another process with the bank open."""

    def __init__(self, bank: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(bank), "--some", "option"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._hear()

    def __call__(self, *words: str) -> None:
        for word in words:
            assert self.process.stdin is not None
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
            self._hear()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() in ("ready\n", "done\n")

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bank of three images in two shards, which nobody has open."""
    made = make_bank(tmp_path / "bank")
    made.append(batch("a", "b"))
    made.append(batch("c"))
    return made.path


@pytest.fixture
def bank(folder: Path) -> Bank:
    """The same, opened."""
    return Bank.open(folder)


@pytest.fixture
def other(bank: Bank) -> Iterator[Other]:
    process = Other(bank.path)
    yield process
    process.close()


# ---- one writer


def take(bank: Bank) -> None:
    """Take the right to write."""
    with bank.writing():
        pass


def test_a_second_process_that_would_write_is_told_who_does(bank: Bank, other: Other) -> None:
    other("write")
    before = files(bank.path)
    attempts: list[Callable[[], object]] = [
        lambda: bank.append(batch("d")),
        lambda: bank.remove(["a"]),
        lambda: bank.restore(["a"]),
        lambda: bank.compact(),
        lambda: take(bank),
    ]
    for refused in attempts:
        with pytest.raises(BankError) as caught:
            refused()
        said = str(caught.value)
        assert (
            f"another process is writing to the bank {bank.path}: process {other.process.pid} on {socket.gethostname()}" in said
        )
        assert f"(-c {bank.path} --some option)" in said
        assert said.endswith("; wait until it has finished")
    assert files(bank.path) == before
    assert_holds(Bank.open(bank.path), batch("a", "b"), batch("c"))
    build_index(Bank.open(bank.path), HNSW)  # an index is beside the bank
    other("end")
    bank.append(batch("d"))
    assert_holds(Bank.open(bank.path), batch("a", "b"), batch("c"), batch("d"))
    with bank.writing(), pytest.raises(AssertionError):
        other("write")


def test_the_command_line_says_it_too(bank: Bank, other: Other, capsys: pytest.CaptureFixture[str]) -> None:
    other("write")
    for words in (["remove", "a", "--bank", str(bank.path)], ["compact", str(bank.path)]):
        assert main(words) == 1
        assert f"process {other.process.pid} on" in capsys.readouterr().err
    assert main(["info", str(bank.path)]) == 0
    assert main(["verify", str(bank.path), "--quiet"]) == 0
    capsys.readouterr()


def test_another_bank_object_of_this_process_is_another_writer(bank: Bank) -> None:
    second = Bank.open(bank.path)
    with bank.writing():
        with pytest.raises(BankError, match=rf"process {os.getpid()} on "):
            second.append(batch("d"))
        bank.append(batch("e"))
        with pytest.raises(BankError, match=rf"process {os.getpid()} on "):
            second.remove(["a"])
    second.remove(["a"])
    assert second.ids == ["b", "c", "e"]


def test_who_holds_the_bank_says_so_in_a_file_and_takes_it_away(bank: Bank) -> None:
    with bank.writing():
        who = json.loads((bank.path / WRITER).read_text())
        assert (who["pid"], who["host"]) == (os.getpid(), socket.gethostname())
        with bank.writing():
            bank.append(batch("d"))
        assert (bank.path / WRITER).exists(), "the inner one did not take it"
    assert not (bank.path / WRITER).exists()
    with pytest.raises(KeyError), bank.writing():
        raise KeyError
    assert not (bank.path / WRITER).exists()
    Bank.open(bank.path).append(batch("e"))
    assert not (bank.path / WRITER).exists()


def test_the_right_to_write_is_the_objects_in_all_its_threads(bank: Bank) -> None:
    with bank.writing():
        thread = threading.Thread(target=bank.append, args=[batch("d")])
        thread.start()
        thread.join()
        with pytest.raises(BankError, match="another process is writing"):
            Bank.open(bank.path).append(batch("e"))
    assert_holds(Bank.open(bank.path), batch("a", "b"), batch("c"), batch("d"))


def test_threads_of_one_object_lose_nothing(bank: Bank) -> None:
    names = [f"image {number}" for number in range(24)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: bank.append(batch(name)), names))
        list(pool.map(lambda name: bank.remove([name]), names[::2]))
    found = Bank.open(bank.path)
    assert sorted(found.ids) == sorted(["a", "b", "c", *names[1::2]])
    assert sorted(found.removed) == sorted(names[::2])
    assert found.generation == 2 + 24 + 12
    assert verify(bank.path, deep=True).problems == ()


def test_what_a_killed_writer_left_holds_nobody_up(bank: Bank, other: Other, caplog: pytest.LogCaptureFixture) -> None:
    other("write", "half")
    leftover = bank.path / "features" / TEMPORARY_PATTERN.replace("*", "0123")
    pid = other.process.pid
    other.kill()
    assert leftover.exists()
    assert (bank.path / WRITER).exists()
    Bank.open(bank.path)
    with caplog.at_level(logging.WARNING, "spade_faiss"):
        bank.append(batch("d"))
    (record,) = caplog.records
    assert f"the last writer of the bank {bank.path}, process {pid} on {socket.gethostname()} since" in record.getMessage()
    assert record.getMessage().endswith("was interrupted; what it had committed is kept")
    assert not leftover.exists()
    assert not (bank.path / WRITER).exists()
    caplog.clear()
    bank.append(batch("e"))
    assert not caplog.records
    assert_holds(Bank.open(bank.path), batch("a", "b"), batch("c"), batch("d"), batch("e"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"pid": 1}', b"\xff\xfe", b'"x"', b"[" * 10_000])
def test_an_unreadable_name_of_the_last_writer_is_no_obstacle(
    bank: Bank, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (bank.path / WRITER).write_bytes(content)
    with caplog.at_level(logging.WARNING, "spade_faiss"):
        bank.append(batch("d"))
    assert "its name is not known, was interrupted" in caplog.text
    second = Bank.open(bank.path)
    with bank.writing():
        (bank.path / WRITER).write_bytes(content)
        with pytest.raises(BankError, match=r"is writing to the bank .*: its name is not known; wait until it has finished"):
            second.append(batch("e"))


def test_a_disk_too_full_for_the_writers_name_is_an_error_of_ours(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(Path, "write_bytes", full)
        # The right is given back, or the second of these would say something else.
        for _ in range(2):
            with pytest.raises((BankError, ValueError), match=r"bank.*(No space|no room)"):
                bank.append(batch("d"))
    Bank.open(bank.path).append(batch("d"))
    assert_holds(Bank.open(bank.path), batch("a", "b"), batch("c"), batch("d"))


def test_an_index_is_built_by_one_at_a_time(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Bank.open(bank.path)
    build, said = build_image_index, []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(index_build, "build_image_index", build)
        with pytest.raises(BankError) as caught:
            build_index(second, HNSW)
        said.append(str(caught.value))
        second.append(batch("d"))  # the bank is free
        return build(*arguments, **options)

    monkeypatch.setattr(index_build, "build_image_index", meanwhile)
    build_index(bank, HNSW)
    assert f"another process is writing to the index {bank.path}/indexes/hnsw: process {os.getpid()} on" in said[0]
    assert build_index(second, HNSW) is not None
    assert not list((bank.path / "indexes").rglob(WRITER))


# ---- many readers


def test_readers_are_counted_while_they_read(bank: Bank) -> None:
    assert bank.readers() == []
    old = Bank.open(bank.path)
    bank.append(batch("d"))
    new, again = Bank.open(bank.path), Bank.open(bank.path)
    assert sorted(bank.readers()) == [2, 3, 3]
    assert sorted(old.readers())[-2:] == [3, 3]
    del again
    gc.collect()
    assert sorted(bank.readers()) == [2, 3]
    detector = Detector.open(bank.path, method=Method(k_image=1, k_gallery=1))
    assert len(bank.readers()) == 3
    del detector, old, new
    gc.collect()
    assert bank.readers() == []
    assert len(list((bank.path / READERS).iterdir())) == 1  # this one's own


def test_a_bank_that_cannot_be_opened_is_read_by_nobody(bank: Bank) -> None:
    shard = bank.path / "features" / bank.manifest.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BankError):
        Bank.open(bank.path)
    gc.collect()
    assert bank.readers() == []


def test_what_another_process_reads_stays_until_it_dies(bank: Bank, other: Other) -> None:
    old = {shard.file for shard in bank.manifest.shards}
    bank.remove(["a"])
    bank.compact()
    assert bank.readers() == [2]
    other("forget", "read")
    assert old < {path.name for path in (bank.path / "features").iterdir()}
    (lease,) = set((bank.path / READERS).iterdir()) - {bank._lease.path}
    other.kill()
    assert lease.exists()
    assert bank.readers() == []
    assert not lease.exists()
    bank.compact()
    assert {path.name for path in (bank.path / "features").iterdir()} == {bank.manifest.shards[0].file}
    assert_holds(Bank.open(bank.path), batch("b"), batch("c"))


def test_a_reader_that_opens_while_another_compacts_gets_a_state_that_stays(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading the manifest and taking a lease, what it names may be deleted: then it begins again."""
    leases: list[int] = []

    def late(folder: Path, generation: int) -> Lease:
        leases.append(generation)
        if len(leases) == 1:
            bank.remove(["a"])
            bank.compact()
        return Lease(folder, generation)

    monkeypatch.setattr(bank_module, "Lease", late)
    reader = Bank.open(bank.path)
    assert leases == [2, 4]
    assert_holds(reader, batch("b"), batch("c"))
    assert bank.readers() == [4]


def test_other_files_among_the_leases_are_no_reader(bank: Bank) -> None:
    (bank.path / READERS / "7-0123456789abcdef").touch()  # of one who died
    (bank.path / READERS / "notes").touch()
    assert bank.readers() == []
    assert not (bank.path / READERS / "7-0123456789abcdef").exists()
    assert (bank.path / READERS / "notes").exists()


# ---- a disk that cannot be written


@pytest.fixture
def read_only(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bank's folder as on a file system that is mounted read-only; permissions do not bind root."""

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(str(bank.path))

    def refuse(name: str) -> None:
        function = getattr(os, name)

        def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
            writes = name != "open" or arguments[0] & (os.O_RDWR | os.O_WRONLY | os.O_CREAT)
            if not inside(path) or not writes:
                return function(path, *arguments, **options)
            exclusive = name == "mkdir" or (name == "open" and arguments[0] & os.O_EXCL)
            if exclusive and Path(path).exists():
                raise FileExistsError(errno.EEXIST, "File exists", str(path))
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        monkeypatch.setattr(os, name, refusing)

    for name in ("open", "mkdir", "unlink", "rename", "replace", "utime"):
        refuse(name)


@pytest.mark.usefixtures("read_only")
def test_a_bank_that_cannot_be_written_can_be_read(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    reader = Bank.open(bank.path)
    assert_holds(reader, batch("a", "b"), batch("c"))
    assert len(Detector.open(bank.path, method=Method(k_image=2, k_gallery=2)).score_features(batch("query"))) == 1
    assert verify(bank.path, deep=True).problems == ()
    for refused in (lambda: reader.append(batch("d")), lambda: reader.remove(["a"]), lambda: reader.compact()):
        with pytest.raises(BankError, match=r"cannot write to the bank .*Read-only file system"):
            refused()
    with pytest.raises(BankError, match=r"cannot write to the bank .*Read-only file system"):
        take(bank)
    assert main(["remove", "a", "--bank", str(bank.path)]) == 1
    assert "cannot write to the bank" in capsys.readouterr().err


def test_what_a_read_only_bank_holds_can_be_listed_whoever_read_it_before(
    bank: Bank, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bank is copied to such a disk with the leases of who had it open."""
    (bank.path / READERS / "1-0123456789abcdef").touch()
    request.getfixturevalue("read_only")
    assert Bank.open(bank.path).readers() in ([], [1])
    assert main(["info", str(bank.path)]) == 0
    assert "3 normal images" in capsys.readouterr().out


def test_a_disk_without_locks_can_be_read(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    assert_holds(Bank.open(bank.path), batch("a", "b"), batch("c"))


# ---- forks


def lease_after_fork(folder: str) -> tuple[list[int], list[int], list[int]]:
    """The readers that others see before a fork, after its child has let go of the bank, and after the parent has."""
    path = Path(folder)
    reader = Bank.open(path)
    watcher = Bank.open(path)
    before = watcher.readers()
    child = os.fork()
    if child == 0:
        try:
            reader._lease.end()
            del reader
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    during = watcher.readers()
    del reader
    gc.collect()
    return before, during, watcher.readers()


def write_after_fork(folder: str) -> tuple[str, str]:
    """What becomes of an append in the child of a process that is writing, and whether the parent still has the right."""
    path = Path(folder)
    bank = Bank.open(path)
    said, say = os.pipe()
    with bank.writing():
        child = os.fork()
        if child == 0:
            try:
                bank.append(batch("of the child"))
                os.write(say, b"written")
            except BaseException as error:
                os.write(say, f"{type(error).__name__}: {error}".encode()[:1000])
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        bank.append(batch("of the parent"))
        try:
            Bank.open(path).append(batch("of a third"))
            third = "written"
        except BankError as error:
            third = str(error)
    os.close(say)
    with os.fdopen(said) as answer:
        return answer.read(), third


def leave_after_fork(folder: str) -> tuple[str, bool]:
    """What a third is told after a child has left its parent's block, and whether the parent's name is still there."""
    path = Path(folder)
    bank = Bank.open(path)
    child = -1
    try:
        with bank.writing():
            child = os.fork()
            if child == 0:
                raise KeyboardInterrupt
            os.waitpid(child, 0)
            try:
                Bank.open(path).append(batch("of a third"))
                third = "written"
            except BankError as error:
                third = str(error)
            return third, (path / WRITER).exists()
    finally:
        if child == 0:
            os._exit(0)


@pytest.fixture(scope="module")
def single_threaded() -> Iterator[ProcessPoolExecutor]:
    """A fresh process, whose forks inherit no threads of ours."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@needs_fork
def test_a_fork_does_not_give_back_its_parents_lease(folder: Path, single_threaded: ProcessPoolExecutor) -> None:
    assert single_threaded.submit(lease_after_fork, str(folder)).result(60) == ([2], [2], [])


@needs_fork
def test_a_fork_does_not_inherit_the_right_to_write(folder: Path, single_threaded: ProcessPoolExecutor) -> None:
    """It would commit beside its parent, which would commit over it."""
    child, third = single_threaded.submit(write_after_fork, str(folder)).result(60)
    assert child.startswith("BusyError: "), child
    assert "another process is writing" in third
    assert_holds(Bank.open(folder), batch("a", "b"), batch("c"), batch("of the parent"))


@needs_fork
def test_a_fork_does_not_give_back_its_parents_right_to_write(folder: Path, single_threaded: ProcessPoolExecutor) -> None:
    third, named = single_threaded.submit(leave_after_fork, str(folder)).result(60)
    assert "another process is writing" in third
    assert named
    assert_holds(Bank.open(folder), batch("a", "b"), batch("c"))


def kill_again_and_again(folder: str, seed: int, kills: int) -> list[list[str]]:
    """Kill a process that adds, removes, restores and compacts; the ids of the bank after each kill."""
    import random
    import time

    rng = random.Random(seed)
    path = Path(folder)
    found = []
    for _ in range(kills):
        before = (path / "manifest.json").stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            try:
                bank, inner = Bank.open(path), random.Random(rng.random())
                while True:
                    action = inner.choice(["append", "remove", "restore", "compact"])
                    if action == "append":
                        bank.append(batch(f"image {time.monotonic_ns()}"))
                    elif action == "remove" and len(bank) > 3:
                        bank.remove([inner.choice(bank.ids[3:])])
                    elif action == "restore" and bank.removed:
                        bank.restore([inner.choice(sorted(bank.removed))])
                    elif action == "compact":
                        bank.compact(target_bytes=inner.choice([2, 40_000, 1 << 20]))
            finally:
                os._exit(1)
        # At least one commit, so that the kill hits a writer at work.
        deadline = time.monotonic() + 10
        while (path / "manifest.json").stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        bank = Bank.open(path)
        assert_holds(bank, *(batch(name) for name in bank.ids))
        for row in range(len(bank.with_removed())):
            name = bank.with_removed().ids[row]
            np.testing.assert_array_equal(
                bank.with_removed().level_map(FINE.name, row), batch(name).levels[FINE.name][0].astype("float32")
            )
        assert verify(path, deep=True).problems == ()
        with bank.writing():
            assert not list(path.rglob(TEMPORARY_PATTERN))
        found.append(bank.ids)
        del bank
    return found


@needs_fork
def test_killed_again_and_again_the_bank_is_always_one_of_its_states(
    folder: Path, single_threaded: ProcessPoolExecutor
) -> None:
    found = single_threaded.submit(kill_again_and_again, str(folder), 3, 20).result(120)
    assert all(ids[:3] == ["a", "b", "c"] for ids in found)
    assert len({tuple(ids) for ids in found}) > 3, "something was done"
    bank = Bank.open(folder)
    bank.compact()
    assert {path.name for path in (folder / "features").iterdir()} == {shard.file for shard in bank.manifest.shards}
