"""Files and folders that may come from anybody: links, pipes, sockets and devices are refused by name, and nothing waits."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spade_faiss.core.errors import AccessError, BankError, SpadeError
from spade_faiss.core.files import hash_file
from spade_faiss.core.inside import cannot_open, check_inside, check_tree, files_in, is_regular, open_regular, read_regular

PUT: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "link": (lambda path, other: path.symlink_to(other), "is a link"),
    "link to nothing": (lambda path, other: path.symlink_to(other / "nothing"), "is a link"),
    "pipe": (lambda path, _: os.mkfifo(path), "is a pipe"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "real" / "folder").mkdir(parents=True)
    (tmp_path / "real" / "folder" / "file").write_text("content")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    return tmp_path / "root"  # the bank's own path may be a link


def test_files_and_folders_are_taken_and_the_root_may_be_a_link(root: Path) -> None:
    assert check_inside(root, "folder", "file") == root / "folder" / "file"
    assert check_inside(root, "folder") == root / "folder"
    assert check_inside(root, "none", "file") == root / "none" / "file"
    assert read_regular(root / "folder" / "file", 7) == b"content"
    assert is_regular(root / "folder" / "file")
    assert not is_regular(root / "folder")
    assert not is_regular(root / "none")
    check_tree(root, ["folder", "none"], 3)


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize("place", ["folder", "folder/file", "folder/inner/file"])
def test_anything_else_is_refused_by_name_at_each_place(root: Path, tmp_path: Path, kind: str, place: str) -> None:
    put, said = PUT[kind]
    path = root / place
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        (path / "file").unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    put(path, tmp_path)
    for look in (
        lambda: check_inside(root, *place.split("/")),
        lambda: check_inside(root, *place.split("/"), "more"),
        lambda: check_tree(root, ["folder"], 3),
        lambda: is_regular(path),
        lambda: open_regular(path),
        lambda: read_regular(path, 100),
    ):
        with pytest.raises(BankError, match=f"{place} {said}"):
            look()


def test_a_file_where_a_folder_should_be_is_named(root: Path) -> None:
    with pytest.raises(BankError, match="folder/file is a file, expected a folder"):
        check_inside(root, "folder", "file", "more")


def test_a_file_that_is_too_long_is_not_read(root: Path) -> None:
    with pytest.raises(BankError, match="is of 7 bytes, more than the 6 "):
        read_regular(root / "folder" / "file", 6)


def test_a_pipe_or_a_device_is_not_hashed(tmp_path: Path) -> None:
    """A pipe would keep the process waiting, and /dev/zero would never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(BankError, match=r"is a (pipe|device), expected a file"):
            hash_file(path)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), before[1]))  # noqa: PTH208
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_too_many_open_files_are_said_as_such(root: Path, few_descriptors: None) -> None:
    opened: list[int] = []
    with pytest.raises(AccessError, match=r"too many files are open; .* ulimit -n 4096"):
        while True:
            opened.append(open_regular(root / "folder" / "file"))
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.EMFILE, AccessError, "too many files are open"),
        (errno.ENFILE, AccessError, "too many files are open"),
        (errno.EACCES, AccessError, "permission denied"),
        (errno.EPERM, AccessError, "permission denied"),
        (errno.ENOMEM, AccessError, "no memory left"),
        (errno.EIO, AccessError, "cannot read"),
        (errno.ELOOP, BankError, "is a link"),
    ],
)
def test_what_the_system_says_is_named_for_what_it_is(number: int, kind: type[SpadeError], said: str) -> None:
    error = cannot_open(Path("bank/x.h5"), OSError(number, os.strerror(number)))
    assert isinstance(error, kind)
    assert said in str(error)
    assert "bank/x.h5" in str(error)
    assert "damaged" not in str(error)


def test_what_the_last_part_is_can_be_asked_for(root: Path) -> None:
    assert check_inside(root, "folder", "file", kind="file") == root / "folder" / "file"
    assert check_inside(root, "folder", "none", kind="file") == root / "folder" / "none"
    with pytest.raises(BankError, match="folder is a folder, expected a file; remove it"):
        check_inside(root, "folder", kind="file")
    with pytest.raises(BankError, match="file is a file, expected a folder; remove it"):
        check_inside(root, "folder", "file", kind="folder")


def test_files_of_a_pattern_are_listed_without_folders_and_links_are_refused(root: Path) -> None:
    for name in ("b.h5", "a.h5", "c.txt"):
        (root / name).touch()
    (root / "d.h5").mkdir()
    assert files_in(root, "*.h5") == [root / "a.h5", root / "b.h5"]
    assert files_in(root / "none", "*.h5") == []
    (root / "e.h5").symlink_to(root / "a.h5")
    with pytest.raises(BankError, match=r"e\.h5 is a link"):
        files_in(root, "*.h5")
