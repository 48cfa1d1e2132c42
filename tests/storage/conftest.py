"""An S3-compatible server for all tests of the folder, a bucket and a cache for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spade_faiss.core import copies
from spade_faiss.core.settings import Caching
from spade_faiss.storage import cache, copy
from tests.support.object_storage import Server, run_server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with run_server() as running:
        yield running


@pytest.fixture
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket; the process finds it by its environment, and keeps copies in a new cache."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(copy, "_OPEN", {})
    monkeypatch.setattr(copies, "_COPIES", {})
    monkeypatch.setattr(cache, "_CHOSEN", {"now": Caching(cache=str(tmp_path / "cache"))})
    cache.open_cache.cache_clear()
    return server.make_bucket()


@pytest.fixture
def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Go to a machine that has nothing in its cache: each call to a new one."""
    count = iter(range(1, 100))

    def move() -> None:
        monkeypatch.setattr(copy, "_OPEN", {})
        cache.use_cache(Caching(cache=str(tmp_path / f"cache-{next(count)}")))

    return move
