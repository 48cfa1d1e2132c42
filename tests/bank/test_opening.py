"""Opening a bank: a manifest or a shard that is missing, damaged, changed or from another version is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core import files as files_module
from spade_faiss.core.errors import BankError, NotFoundError
from spade_faiss.core.files import hash_file
from tests.support.banks import SOURCE, assert_holds, batch, make_bank


def shard_path(bank: Bank, index: int) -> Path:
    return bank.path / "features" / bank.manifest.shards[index].file


def test_there_is_no_bank(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.txt").touch()
    for path in (tmp_path / "nothing", tmp_path / "folder", tmp_path / "folder" / "x.txt"):
        with pytest.raises(NotFoundError, match=r"there is no bank at .* make one with: spade-faiss fit IMAGES --bank "):
            Bank.open(path)
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def two_shards(tmp_path: Path) -> Bank:
    bank = make_bank(tmp_path / "bank", source=SOURCE)
    bank.append(batch("a", "ü\n", source=SOURCE, paths=["a", "b"], sha256=["1", "2"], root="/r"))
    bank.append(batch("c", source=SOURCE))
    return bank


def rewrite(bank: Bank, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = bank.path / "manifest.json"
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("schema", [0, 2, 4, "3", None, [3]])
def test_another_schema_is_refused_with_both_values(two_shards: Bank, schema: object) -> None:
    rewrite(two_shards, lambda content: content.update(schema=schema))
    with pytest.raises(BankError) as caught:
        Bank.open(two_shards.path)
    assert f"has schema {schema!r}, this version reads 3" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format="something else"),
        lambda content: content.pop("format"),
        lambda content: content.pop("schema"),
        lambda content: content.pop("sha256"),
        lambda content: content.pop("layout"),
        lambda content: content.update(extra=1),
        lambda content: content["shards"].pop(),
        lambda content: content["shards"].reverse(),
        lambda content: content["shards"][0].update(count=1),
        lambda content: content["layout"].update(pool=3),
        lambda content: content.update(source=None),
    ],
)
def test_a_manifest_that_was_edited_is_refused(two_shards: Bank, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(two_shards, change)
    with pytest.raises(BankError, match=r"manifest\.json is damaged"):
        Bank.open(two_shards.path)
    with pytest.raises(BankError, match=r"manifest\.json is damaged"):
        two_shards.append(batch("d"))


def test_a_manifest_that_was_reformatted_is_the_same_manifest(two_shards: Bank) -> None:
    rewrite(two_shards, lambda content: None)
    assert Bank.open(two_shards.path).manifest == two_shards.manifest


def test_every_changed_character_of_a_manifest_is_noticed(two_shards: Bank) -> None:
    """A random character at each of 60 places: an error of ours, or (white space) the very same content."""
    manifest = two_shards.path / "manifest.json"
    text = manifest.read_text()
    rng = random.Random(3)
    opened = 0
    for place in sorted(rng.sample(range(len(text)), 60)):
        character = rng.choice("0123456789abcdefxyz\"'{}[]:,. \n\\-é\0")
        manifest.write_text(text[:place] + character + text[place + 1 :])
        try:
            bank = Bank.open(two_shards.path)
        except BankError:
            continue
        opened += 1
        assert bank.manifest == two_shards.manifest
    assert opened < 30
    manifest.write_text(text)
    assert Bank.open(two_shards.path).manifest == two_shards.manifest


def test_every_truncated_manifest_is_refused(two_shards: Bank) -> None:
    manifest = two_shards.path / "manifest.json"
    data = manifest.read_bytes().rstrip()
    for length in [0, 1, 2, *range(3, len(data) - 1, 97), len(data) - 1]:
        manifest.write_bytes(data[:length])
        with pytest.raises(BankError, match=r"manifest\.json is damaged"):
            Bank.open(two_shards.path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[]", b"3", b"null", b'"x"', b"[" * 100_000, b"9" * 10_000, b"\0" * 64])
def test_a_manifest_of_something_else_is_refused(two_shards: Bank, content: bytes) -> None:
    (two_shards.path / "manifest.json").write_bytes(content)
    with pytest.raises(BankError, match=r"manifest\.json is damaged"):
        Bank.open(two_shards.path)


def test_a_missing_shard_is_named(two_shards: Bank) -> None:
    shard_path(two_shards, 1).unlink()
    with pytest.raises(BankError, match=r"shard .*000002\.h5, which the manifest names, is missing"):
        Bank.open(two_shards.path)


def test_a_truncated_shard_is_refused_with_both_sizes(two_shards: Bank) -> None:
    path = shard_path(two_shards, 0)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(BankError, match=rf"000001\.h5 has changed .*: {size - 1} bytes, the manifest says {size} bytes"):
        Bank.open(two_shards.path)


def test_any_flipped_byte_of_a_shard_is_noticed(two_shards: Bank) -> None:
    path = shard_path(two_shards, 1)
    data = path.read_bytes()
    rng = random.Random(5)
    for place in [0, len(data) - 1, *rng.sample(range(len(data)), 8)]:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        for _ in range(2):  # the first refusal must not make the second opening believe it
            with pytest.raises(BankError, match=r"000002\.h5 has changed since it was written: sha256 .* says sha256 "):
                Bank.open(two_shards.path)
    path.write_bytes(data)
    assert_holds(Bank.open(two_shards.path), batch("a", "ü\n"), batch("c"))


def test_a_shard_of_another_bank_is_refused(two_shards: Bank, tmp_path: Path) -> None:
    other = make_bank(tmp_path / "other")
    for part in (batch("a", "ü\n", seed=1, paths=["a", "b"], sha256=["1", "2"], root="/r"), batch("c", seed=1)):
        other.append(part)
    assert shard_path(other, 0).stat().st_size == shard_path(two_shards, 0).stat().st_size
    shutil.copy(shard_path(other, 0), shard_path(two_shards, 0))
    with pytest.raises(BankError, match=r"000001\.h5 has changed since it was written: sha256"):
        Bank.open(two_shards.path)


def test_a_copied_bank_opens_and_is_read_in_full_only_once(
    two_shards: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(two_shards.path, copied, copy_function=shutil.copyfile)
    os.utime(copied / "features" / "000001.h5", ns=(1, 1))
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(files_module, "hash_file", counted)
    assert_holds(Bank.open(copied), batch("a", "ü\n"), batch("c"))
    assert hashed == ["000001.h5", "000002.h5"]
    recorded = [shard.mtime_ns for shard in two_shards.manifest.shards]
    assert [path.stat().st_mtime_ns for path in sorted((copied / "features").iterdir())] == recorded
    Bank.open(copied)
    Bank.open(two_shards.path)
    assert len(hashed) == 2


def test_a_copied_bank_that_may_not_be_touched_opens_too(
    two_shards: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(two_shards.path, copied, copy_function=shutil.copyfile)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    assert_holds(Bank.open(copied), batch("a", "ü\n"), batch("c"))
