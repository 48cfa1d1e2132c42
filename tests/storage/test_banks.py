"""A bank at a URL is what it would be in a folder, to the bit, for whoever opens it."""

from __future__ import annotations

import gc
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core.copies import let_go
from spade_faiss.core.errors import BankError, BusyError, InputError, NotFoundError, StorageError
from spade_faiss.core.settings import Caching, Method
from spade_faiss.core.signed_json import hash_json
from spade_faiss.index.build import build_index
from spade_faiss.scoring.detector import Detector
from spade_faiss.storage import cloud, copy
from spade_faiss.storage.cache import open_cache, use_cache
from spade_faiss.storage.cloud import CloudStore
from spade_faiss.storage.names import PROBES
from spade_faiss.storage.objects import NoConditions
from spade_faiss.workflows.verify import verify
from tests.support.banks import assert_holds, batch, make_bank
from tests.support.damage import HNSW, IVF
from tests.support.object_storage import Server


def test_a_bank_is_made_added_to_and_read_elsewhere(bucket: str, another_machine: Callable[[], None]) -> None:
    url = f"{bucket}/line 3/parts.bank"
    first, second, third = batch("a", "b"), batch("c"), batch("d", "e")
    bank = make_bank(url)
    for part in (first, second, third):
        bank.append(part)
    assert bank.name == url
    another_machine()
    found = Bank.open(url)
    assert_holds(found, first, second, third)
    found.remove(["c"])
    assert found.compact().dropped == 1
    another_machine()
    assert_holds(Bank.open(url), first, third)


def test_objects_are_called_as_files_are(bucket: str, server: Server, tmp_path: Path) -> None:
    bank = make_bank(f"{bucket}/parts.bank")
    bank.append(batch("a", "b"))
    assert server.objects(bucket).names() == [
        f"parts.bank/features/{bank.manifest.shards[0].file}",
        "parts.bank/manifest.json",
    ]
    # What is at the URL is a bank in a folder, too.
    for name, content in server.objects(f"{bucket}/parts.bank").contents().items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(content)
    assert_holds(Bank.open(tmp_path / "here"), batch("a", "b"))


def test_a_folder_that_was_uploaded_is_a_bank(bucket: str, server: Server, tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "here")
    bank.append(batch("a", "b"))
    objects = server.objects(f"{bucket}/parts.bank")
    for name in ("manifest.json", f"features/{bank.manifest.shards[0].file}"):
        objects[name] = (tmp_path / "here" / name).read_bytes()
    found = Bank.open(f"{bucket}/parts.bank")
    assert_holds(found, batch("a", "b"))
    found.append(batch("c"))
    assert_holds(Bank.open(f"{bucket}/parts.bank"), batch("a", "b"), batch("c"))


def test_of_two_writers_one_is_told_that_it_came_too_late(
    bucket: str, another_machine: Callable[[], None], server: Server
) -> None:
    url = f"{bucket}/parts.bank"
    one = make_bank(url)
    one.append(batch("a"))
    another_machine()
    other = Bank.open(url)
    with one.writing(), other.writing():  # both have read the same state
        other.append(batch("b"))
        with pytest.raises(BusyError, match=r"somebody else has changed s3://.*/manifest.json .* Run the same command"):
            one.append(batch("c"))
    assert_holds(Bank.open(url), batch("a"), batch("b"))
    one.append(batch("c"))  # the same again: it begins with what is there now
    another_machine()
    assert_holds(Bank.open(url), batch("a"), batch("b"), batch("c"))
    assert_holds(other, batch("a"), batch("b"))  # what was opened stays what it was
    # What the loser had stored is at the URL, and named by nobody.
    assert len([name for name in server.objects(url).names() if name.startswith("features/")]) == 4


def test_of_two_who_make_a_bank_one_is_told(bucket: str, another_machine: Callable[[], None]) -> None:
    url = f"{bucket}/parts.bank"
    make_bank(url)
    another_machine()
    with pytest.raises(InputError, match="already holds a bank"):
        make_bank(url)


def test_many_writers_at_once_lose_nothing(bucket: str, another_machine: Callable[[], None]) -> None:
    url = f"{bucket}/parts.bank"
    make_bank(url)
    banks = []
    for _ in range(4):
        another_machine()
        banks.append(Bank.open(url))

    def write(number: int) -> int:
        refused = 0
        for name in range(3):
            while True:
                try:
                    banks[number].append(batch(f"{number}-{name}"))
                    break
                except BusyError:
                    refused += 1
        return refused

    with ThreadPoolExecutor(len(banks)) as pool:
        refused = sum(pool.map(write, range(len(banks))))
    another_machine()
    found = Bank.open(url)
    assert sorted(found.ids) == sorted(f"{number}-{name}" for number in range(4) for name in range(3))
    assert found.generation == 12
    assert refused > 0


def test_an_answer_that_is_lost_is_no_lost_race(
    bucket: str, another_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library asks again where a connection breaks; the storage may have done then what it was asked for."""
    bank = make_bank(f"{bucket}/parts.bank")
    put = CloudStore._put

    def twice(store: CloudStore, name: str, content: bytes | Path, mode: object) -> str:
        if not name.startswith(PROBES):
            put(store, name, content, mode)
        return put(store, name, content, mode)

    with monkeypatch.context() as patched:
        patched.setattr(CloudStore, "_put", twice)
        bank.append(batch("a"))
    another_machine()
    assert_holds(Bank.open(f"{bucket}/parts.bank"), batch("a"))


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + b"x", lambda content: content[:-9]])
def test_an_object_that_has_changed_is_refused(
    bucket: str, server: Server, another_machine: Callable[[], None], damage: Callable[[bytes], bytes]
) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    bank.append(batch("a"))
    name = f"features/{bank.manifest.shards[0].file}"
    objects = server.objects(url)
    objects[name] = damage(objects[name])
    another_machine()
    found = Bank.open(url)
    with pytest.raises(BankError, match=rf"{url}/{name} is not what was written: it has sha256 \w+, expected \w+; restore it"):
        _ = found.ids
    problems = verify(url).problems
    assert len(problems) == 1
    assert f"shard {url}/{name} has sha256" in problems[0]


def test_a_missing_object_is_named(bucket: str, server: Server, another_machine: Callable[[], None]) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    bank.append(batch("a"))
    name = f"features/{bank.manifest.shards[0].file}"
    del server.objects(url)[name]
    another_machine()
    with pytest.raises(BankError, match=f"{url}/{name} is missing"):
        _ = Bank.open(url).ids
    assert verify(url).problems[0].startswith(f"shard {url}/{name} is missing")


def test_a_stale_copy_is_not_taken_for_a_new_file(bucket: str, server: Server, tmp_path: Path) -> None:
    """Another bank at the same URL, whose files have the same names, sizes and times."""
    url = f"{bucket}/parts.bank"
    objects = server.objects(url)
    for seed in (1, 2):
        bank = make_bank(tmp_path / f"bank-{seed}")
        bank.append(batch("a", seed=seed))
        (shard,) = bank.manifest.shards
        objects[f"features/{shard.file}"] = (bank.path / "features" / shard.file).read_bytes()
        objects["manifest.json"] = (bank.path / "manifest.json").read_bytes()
        assert_holds(Bank.open(url), batch("a", seed=seed))


def test_files_are_evicted_while_a_bank_is_searched(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, parts = f"{bucket}/parts.bank", [batch(*(f"{n}-{i}" for i in range(9))) for n in range(12)]
    bank = make_bank(url, dtype="float16")
    for part in parts:
        bank.append(part)
    size = max(shard.bytes for shard in bank.manifest.shards)
    method = Method(k_image=4, k_gallery=4)
    queries = batch("q", "r", "s", "t", seed=5)
    whole = Detector.open(Bank.open(url), method=method).score_features(queries)
    monkeypatch.setattr(copy, "_OPEN", {})
    use_cache(Caching(cache=str(tmp_path / "small"), cache_bytes=str(3 * size)))
    small = Bank.open(url)
    assert not list((tmp_path / "small").rglob("*.h5"))  # nothing is fetched before it is needed
    detector = Detector.open(small, method=method)
    for _ in range(2):
        found = detector.score_features(queries)
        np.testing.assert_array_equal(found.maps, whole.maps)
        for name, scores in whole.image_scores.items():
            np.testing.assert_array_equal(found.image_scores[name], scores)
    assert_holds(small, *parts, dtype="float16")
    del detector
    open_cache().trim()
    there = [path.stat().st_size for path in (tmp_path / "small").rglob("*.h5")]
    assert 0 < sum(there) <= 3 * size


def test_a_file_that_is_mapped_is_not_evicted(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    for name in "abcd":
        bank.append(batch(name))
    monkeypatch.setattr(copy, "_OPEN", {})
    use_cache(Caching(cache=str(tmp_path / "small"), cache_bytes="1"))
    small = Bank.open(url)
    views = [small.level_map(level.name, row) for row in range(3) for level in small.layout.levels]
    for row in range(3):
        assert (small.path / "features" / small.manifest.shards[row].file).exists()
    del views
    gc.collect()
    let_go()
    _ = small.level_map("blocks.1", 3)
    there = [path.name for path in (small.path / "features").iterdir()]
    assert there == [small.manifest.shards[3].file]


def test_what_nobody_names_is_swept_after_a_day(
    bucket: str, server: Server, another_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    for name in "abc":
        bank.append(batch(name))
    old = [shard.file for shard in bank.manifest.shards]
    objects = server.objects(url)
    objects["notes.txt"] = b"not ours"
    another_machine()
    reader = Bank.open(url)  # which has fetched nothing yet
    bank.compact()
    assert {f"features/{name}" for name in old} <= {*objects.names()}
    assert_holds(reader, batch("a"), batch("b"), batch("c"))
    bank.compact()
    assert {f"features/{name}" for name in old} <= {*objects.names()}
    monkeypatch.setattr(copy, "GRACE_S", 0.0)
    bank.compact()
    assert [name for name in objects.names() if not name.startswith(".")] == [
        f"features/{bank.manifest.shards[0].file}",
        "manifest.json",
        "notes.txt",
    ]
    assert [name for name in objects.names() if name.startswith(".")] == []
    another_machine()
    assert_holds(Bank.open(url), batch("a"), batch("b"), batch("c"))


def test_indexes_are_kept_by_a_sweep(bucket: str, another_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    bank.append(batch(*map(str, range(40))))
    for recipe in (HNSW, IVF):
        build_index(bank, recipe)
        build_index(bank, recipe, rebuild=True)
    monkeypatch.setattr(copy, "GRACE_S", 0.0)
    bank.compact()
    bank.compact()
    another_machine()
    found = verify(url, deep=True)
    assert (found.problems, found.indexes) == ((), 2)


def test_an_index_is_added_to_without_fetching_all_of_it(bucket: str, another_machine: Callable[[], None]) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    bank.append(batch(*map(str, range(40))))
    build_index(bank, IVF)
    another_machine()
    other = Bank.open(url)
    other.append(batch("more"))
    built = build_index(other, IVF)
    assert built is not None
    assert built.done["gallery"] == "added 1 images to it"
    encoded = [path.name for path in (other.path / "indexes" / "ivf" / "gallery").iterdir()]
    assert len(encoded) == 2  # what was trained, and what was encoded here
    another_machine()
    assert verify(url, deep=True).problems == ()


class Careless(CloudStore):
    """Storage that answers as if it had heard of conditions."""

    def create(self, name: str, content: bytes | Path) -> str:
        self.put(name, content)
        found = self.find(name)
        assert found is not None
        return found.version

    def replace(self, name: str, content: bytes, version: str) -> str:
        return self.create(name, content)


class Plain(CloudStore):
    """Storage that says that it knows no conditions."""

    def create(self, name: str, content: bytes | Path) -> str:
        raise NoConditions("501 Not Implemented")


@pytest.mark.parametrize("kind", [Careless, Plain])
def test_storage_without_conditional_writes_is_refused(
    bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch, kind: type[CloudStore]
) -> None:
    url = f"{bucket}/parts.bank"
    make_bank(url).append(batch("a"))
    before = server.objects(bucket).contents()
    monkeypatch.setattr(copy, "_OPEN", {})
    monkeypatch.setattr(copy, "open_store", kind)
    found = Bank.open(url)
    assert_holds(found, batch("a"))
    with pytest.raises(InputError, match=r"its storage has no conditional writes .* can be read; write one in"):
        found.append(batch("b"))
    with pytest.raises(InputError, match="no conditional writes"):
        make_bank(f"{bucket}/other.bank")
    assert server.objects(bucket).contents() == before


def test_other_urls_are_read_by_fsspec(bucket: str, server: Server, tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "here")
    bank.append(batch("a", "b"))
    bank.remove(["a"])
    files = fsspec.filesystem("memory")
    for name in ("manifest.json", f"features/{bank.manifest.shards[0].file}"):
        files.pipe_file(f"/shelf/parts.bank/{name}", (bank.path / name).read_bytes())
    found = Bank.open("memory://shelf/parts.bank")
    assert_holds(found, batch("b"))
    with pytest.raises(InputError, match=r"memory://shelf/parts.bank cannot be written to"):
        found.append(batch("c"))
    with pytest.raises(NotFoundError, match="there is no bank at memory://shelf/nothing"):
        Bank.open("memory://shelf/nothing")


def test_a_copied_bank_is_the_same_state_elsewhere(bucket: str, another_machine: Callable[[], None]) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    bank.append(batch("a"))
    state = pickle.dumps(bank.snapshot())
    bank.append(batch("b"))
    another_machine()
    assert_holds(pickle.loads(state), batch("a"))


def test_storage_that_cannot_be_reached_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/parts.bank cannot be listed: .*NoSuchBucket"):
        Bank.open("s3://no-such-bucket/parts.bank")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(cloud, "_TRIES", 0)
    with pytest.raises(StorageError, match=r"cannot be listed: .*; check the URL, AWS_ENDPOINT_URL and the network") as raised:
        Bank.open(f"{bucket}/elsewhere.bank")
    assert "whose-key-nobody-may-see" not in str(raised.value)


def test_a_bank_that_is_not_there(bucket: str) -> None:
    with pytest.raises(NotFoundError, match=rf"there is no bank at {bucket}/x .*fit IMAGES --bank {bucket}/x"):
        Bank.open(f"{bucket}/x")


def test_what_is_no_bank_is_left_alone(bucket: str, server: Server) -> None:
    server.objects(bucket)["x/features/000001.h5"] = b"of another bank"
    with pytest.raises(InputError, match=r"holds features/000001.h5 but no manifest.json"):
        make_bank(f"{bucket}/x")
    assert server.objects(bucket).names() == ["x/features/000001.h5"]


def test_a_bank_that_was_deleted_leaves_nothing_to_the_next(bucket: str, server: Server) -> None:
    url = f"{bucket}/parts.bank"
    make_bank(url).append(batch("a"))
    objects = server.objects(url)
    for name in objects.names():
        del objects[name]
    again = make_bank(url)
    again.append(batch("b"))
    assert_holds(Bank.open(url), batch("b"))
    assert len(objects.names()) == 2


@pytest.mark.parametrize("name", ["../../escaped.h5", "/etc/passwd", ".hidden.h5", "a/b.h5"])
def test_names_of_a_foreign_bank_lead_nowhere(
    bucket: str, server: Server, tmp_path: Path, another_machine: Callable[[], None], name: str
) -> None:
    url = f"{bucket}/parts.bank"
    bank = make_bank(url)
    bank.append(batch("a"))
    objects = server.objects(url)
    content = json.loads(objects["manifest.json"])
    content["shards"][0]["file"] = name
    del content["sha256"]
    content["sha256"] = hash_json(content)
    objects["manifest.json"] = json.dumps(content).encode()
    another_machine()
    with pytest.raises(BankError, match="cannot be the record of a file"):
        Bank.open(url)


def test_objects_of_other_names_are_not_fetched(bucket: str, server: Server, another_machine: Callable[[], None]) -> None:
    url = f"{bucket}/parts.bank"
    make_bank(url).append(batch("a"))
    objects = server.objects(url)
    for name in ("indexes/.x/index.json", "indexes/a/b/index.json", "calibration/.json", ".writer.json", "evil.json"):
        objects[name] = b"{}"
    another_machine()
    found = Bank.open(url)
    documents = {path.relative_to(found.path).as_posix() for path in found.path.rglob("*.json")}
    assert documents == {"manifest.json"}


def test_a_fork_is_told_that_it_cannot_fetch(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's threads are not in a fork: it would wait for ever."""
    bank = make_bank(f"{bucket}/parts.bank")
    bank.append(batch("a"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(StorageError, match="was opened by the parent of this process; open it in each process"):
        Bank.open(f"{bucket}/parts.bank")
