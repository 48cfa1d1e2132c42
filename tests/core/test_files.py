"""Atomic writes: the old file or the new one, and nothing else is left in the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.files import TEMPORARY_PATTERN, atomic_path, hash_file, write_bytes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"content")
        assert temporary.parent == tmp_path
        assert temporary.match(TEMPORARY_PATTERN)
        assert not target.exists()
    assert target.read_bytes() == b"content"
    assert names(tmp_path) == ["new.bin"]


def test_a_reader_sees_the_old_content_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")
    with target.open("rb") as reader, atomic_path(str(target)) as temporary:
        temporary.write_bytes(b"newer")
        assert target.read_bytes() == b"old"
        assert reader.read() == b"old"
    assert target.read_bytes() == b"newer"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file_and_no_temporary(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_failure_to_replace_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut: sync the file, rename it, sync the folder."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def recorded_sync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        sync(descriptor)

    def recorded_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    write_bytes(tmp_path / "f", b"x")
    assert events == ["file", "rename", "folder"]


def test_a_block_that_writes_nothing_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "f"):
        pass
    assert names(tmp_path) == []


def test_a_missing_folder_and_a_folder_in_the_way_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"cannot write .*f: the folder .*missing does not exist"):
        write_bytes(tmp_path / "missing" / "f", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder: it is a folder"):
        write_bytes(tmp_path / "folder", b"")
    assert names(tmp_path) == ["folder"]


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    write_bytes(target, b"x")
    assert target.read_bytes() == b"x"


def test_hash_file(tmp_path: Path) -> None:
    # The example of FIPS 180-2, appendix B.1.
    write_bytes(tmp_path / "f", b"abc")
    assert hash_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_has_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "f", b"")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode
