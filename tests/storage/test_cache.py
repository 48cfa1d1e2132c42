"""The cache that many threads and processes share: what one of them writes, another that looks for room leaves alone."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.storage.cache import Cache, CachePlace
from spade_faiss.storage.url import parse_url


class User:
    """Something that uses a file of the cache as long as it lives."""


def a_place(cache: Cache, name: str = "bank") -> CachePlace:
    return cache.place(parse_url(f"s3://bucket/{name}"))


def hold(place: CachePlace, name: str, content: bytes, user: object | None) -> Path:
    path = place.folder / name
    place.hold(path, hashlib.sha256(content).hexdigest(), len(content), lambda to: write(to, content), user)
    return path


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def test_a_record_that_is_half_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, looked = a_place(Cache(tmp_path, 1)), list[str]()

    def look_for_room_first(path: Path, text: str) -> int:
        with path.open("w") as file:
            Cache(tmp_path, 1).make_room(1)
            looked.append(path.name)
            return file.write(text)

    monkeypatch.setattr(Path, "write_text", look_for_room_first)
    user = User()
    assert hold(place, "one", b"one", user).read_bytes() == b"one"
    assert len(looked) == 1


def test_threads_that_fetch_beside_one_that_deletes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1)
    place = a_place(cache)

    def work(number: int) -> bool:
        content, user = b"%d" % number, User()
        return hold(place, str(number), content, user).read_bytes() == content

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, [number % 50 for number in range(1000)]))
    Cache(tmp_path, 1).make_room(1)
    assert sum(path.is_file() for path in place.folder.iterdir()) == 0


def test_the_record_of_a_file_that_is_replaced_stays_while_somebody_uses_it(tmp_path: Path) -> None:
    place, user = a_place(Cache(tmp_path, 10)), User()
    sha256 = hashlib.sha256(b"one").hexdigest()
    path = hold(place, "one", b"one", user)
    path.unlink()
    Cache(tmp_path, 1).make_room(1)
    (record,) = (path.parent.parent / "kept").iterdir()
    assert record.name == sha256
    assert not place.is_kept(path, sha256)
    del user
    Cache(tmp_path, 1).make_room(1)
    assert not record.exists()


def test_what_a_killed_process_had_begun_is_deleted_after_an_hour(tmp_path: Path) -> None:
    place = a_place(Cache(tmp_path, 1))
    old, new = (place.folder / TEMPORARY_PATTERN.replace("*", name) for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 3600,) * 2)
    Cache(tmp_path, 1).make_room(1)
    assert not old.exists()
    assert new.exists()
