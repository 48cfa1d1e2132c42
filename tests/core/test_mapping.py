"""Mappings without a descriptor of their own, and the few descriptors that all share."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.arrays import map_arrays, write_arrays
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import hash_file
from spade_faiss.core.mapping import Descriptors, FileIdentity

OPEN = Path("/proc/self/fd")


class Owner:
    """Something that reads a file."""


def identity(path: Path) -> FileIdentity:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return FileIdentity.of(path, descriptor)
    finally:
        os.close(descriptor)


def written(path: Path, number: int = 0) -> Path:
    write_arrays(path, {"a": np.full((5, 7), number, np.float32)}, attributes={"x": 1})
    return path


@pytest.mark.skipif(not OPEN.exists(), reason="counts open files by /proc")
def test_a_mapping_keeps_no_descriptor(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{number}.h5", number) for number in range(20)]
    before = len(list(OPEN.iterdir()))
    mapped = [map_arrays(path, hash_file(path)) for path in files]
    assert len(list(OPEN.iterdir())) == before
    for number, item in enumerate(mapped):
        assert (item.arrays["a"] == number).all()
        with pytest.raises(ValueError, match="read-only"):
            item.arrays["a"][0, 0] = 1


def test_views_outlive_the_cache_and_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", 3)
    view = map_arrays(path, hash_file(path)).arrays["a"][1:]
    map_arrays.cache_clear()
    path.unlink()
    gc.collect()
    assert (view == 3).all()


def test_no_more_descriptors_stay_open_than_were_asked_for(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{number}.h5", number) for number in range(6)]
    descriptors, owners = Descriptors(most=2), [Owner() for _ in files]
    keys = [descriptors.register(owner) for owner in owners]
    for key, path in list(zip(keys, files, strict=True)) * 2:
        with descriptors.of(key, identity(path)) as descriptor:
            assert descriptor is not None
            assert os.pread(descriptor, 8, 0) == b"\x89HDF\r\n\x1a\n"
        assert len(descriptors) <= 2
    owners.clear()
    gc.collect()
    assert len(descriptors) == 0


def test_a_descriptor_is_not_closed_while_a_thread_reads_from_it(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{number}.h5", number) for number in range(8)]
    descriptors, owner = Descriptors(most=1), Owner()
    keys = [descriptors.register(owner) for _ in files]
    together = threading.Barrier(4)

    def read(number: int) -> bytes:
        with descriptors.of(keys[number], identity(files[number])) as descriptor:
            assert descriptor is not None
            together.wait(10)
            return os.pread(descriptor, 8, 0)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, [0, 1, 2, 3, 4, 5, 6, 7])) == {b"\x89HDF\r\n\x1a\n"}
    assert len(descriptors) == 1


def test_another_file_of_the_same_name_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", 1)
    mapped = map_arrays(path, hash_file(path))
    other = written(tmp_path / "b.h5", 2)
    os.replace(other, path)  # noqa: PTH105
    out = np.empty(7, np.float32)
    mapped.read("a", 0, out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    "look", [lambda mapped: mapped.check_length(), lambda mapped: mapped.read("a", 4, np.empty(7, np.float32))]
)
@pytest.mark.parametrize("read_before", [False, True])
def test_a_file_that_became_shorter_is_an_error(tmp_path: Path, look: Callable[..., object], read_before: bool) -> None:
    """Fault "a shard truncated under an open Detector": it ended the process by SIGBUS."""
    path = written(tmp_path / "a.h5")
    mapped = map_arrays(path, hash_file(path))
    if read_before:
        mapped.read("a", 0, np.empty(7, np.float32))
    os.truncate(path, 100)
    with pytest.raises(BankError, match=r"a\.h5 is shorter than when it was opened; restore it from a backup"):
        look(mapped)


def test_a_child_reads_with_the_descriptors_of_its_parent(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", 5)
    mapped, out = map_arrays(path, hash_file(path)), np.empty(7, np.float32)
    mapped.read("a", 0, out)
    held = mapped._descriptors._lock
    held.acquire()  # by a thread that the child does not have
    try:
        child = os.fork()
        if child == 0:
            mapped.read("a", 1, out)
            os._exit(0 if (out == 5).all() else 1)
    finally:
        held.release()
    assert os.waitpid(child, 0)[1] == 0
