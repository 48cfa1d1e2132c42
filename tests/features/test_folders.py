"""What lies in folders beside images: it is counted and named, and linked folders are entered once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.features.datasets import Survey, find_images, load_dataset, survey
from spade_faiss.features.folders import LeftOut
from tests.support.image_files import touch


def ids(found: Survey) -> list[str]:
    return [record.id for record in found.records]


def test_files_that_are_no_images_are_counted_by_suffix(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.png", "b.PGM", "c.jfif", "d.ppm", "deep/e.pbm", "f.JPE", "g.pnm")))
    touch(*(tmp_path / name for name in ("n.txt", "deep/m.TXT", "x.raw", "README", ".hidden.txt")))
    found = survey(tmp_path)
    assert ids(found) == ["a.png", "b.PGM", "c.jfif", "d.ppm", "deep/e.pbm", "f.JPE", "g.pnm"]
    assert found.left_out == LeftOut({".txt": 2, "": 1, ".raw": 1})
    assert list(found.left_out.files) == [".txt", "", ".raw"]
    assert found.left_out.notices() == [
        "left out 4 files: 2 .txt, 1 without suffix, 1 .raw; save pictures as PNG or TIFF to have them read"
    ]
    assert found.left_out.numbers() == {"files": {".txt": 2, "": 1, ".raw": 1}, "hidden": [], "links": []}


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "._a.png", tmp_path / ".DS_Store", tmp_path / ".git/config")
    assert survey(tmp_path).left_out.notices() == []


def test_many_suffixes_make_one_line() -> None:
    files = {f".{number:04}": 1 for number in range(40)}
    (notice,) = LeftOut({".txt": 9, **files}).notices()
    assert notice == "left out 49 files: 9 .txt, 1 .0000, 1 .0001, 1 .0002, 1 .0003, 1 .0004, 35 of other suffixes"


def test_hidden_images_are_said_and_not_counted(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.png", ".b.png", ".cache/deep/c.jpg", ".cache/notes.txt", "d/.e.tif", "d/f.png")))
    found = survey(tmp_path)
    assert ids(found) == ["a.png", "d/f.png"]
    assert found.left_out == LeftOut({}, hidden=(".b.png", ".cache/deep/c.jpg", "d/.e.tif"))
    assert found.left_out.notices() == ["left out 3 hidden images: .b.png, .cache/deep/c.jpg, d/.e.tif"]


def test_a_pipe_named_as_an_image_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert survey(tmp_path).left_out.notices() == ["left out 1 file: 1 pipe"]


def test_suffixes_and_names_are_printable(tmp_path: Path) -> None:
    touch(
        tmp_path / "a.png",
        tmp_path / "b.t\x1b[31m\n",
        tmp_path / ".\n.png",
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/c.\xff")),
    )
    left_out = survey(tmp_path).left_out
    assert left_out.files == {".t\\x1b[31m\\n": 1, ".\\udcff": 1}
    assert left_out.hidden == (".\\n.png",)


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    touch(tmp_path / "set/a.png", tmp_path / "elsewhere/d.png", tmp_path / "elsewhere/deep/e.png", tmp_path / "elsewhere/n.txt")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    found = survey(tmp_path / "set")
    root = (tmp_path / "set").resolve()
    assert found.root == root
    assert ids(found) == ["a.png", "linked/d.png", "linked/deep/e.png"]
    assert [record.path for record in found.records] == [root / name for name in ids(found)]
    assert found.left_out == LeftOut({".txt": 1})
    assert (tmp_path / "elsewhere/deep").resolve() in found.entered


def test_each_folder_is_entered_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    touch(tmp_path / "set/real/a.png", tmp_path / "out/b.png", tmp_path / "out/deep/c.png")
    for name, target in (
        ("set/0-inside", "set/real"),  # before `real` in the alphabet, and yet `real` goes by its own name
        ("set/1-deep", "out/deep"),
        ("set/2-out", "out"),
        ("set/3-again", "out"),
        ("set/real/chain", "set/2-out"),
        ("out/back", "set"),
        ("out/deep/up", "out"),
    ):
        (tmp_path / name).symlink_to(tmp_path / target)
    found = survey(tmp_path / "set")
    assert ids(found) == ["1-deep/c.png", "2-out/b.png", "real/a.png"]
    assert found.left_out == LeftOut()


def test_a_link_into_a_folder_of_the_same_list_is_not_counted_twice(tmp_path: Path) -> None:
    touch(tmp_path / "one/a.png", tmp_path / "two/b.png")
    (tmp_path / "one/linked").symlink_to(tmp_path / "two")
    assert ids(survey([tmp_path / "one", tmp_path / "two"])) == ["one/a.png", "two/b.png"]


def test_links_that_lead_out_and_around_or_nowhere_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "set/a.png", tmp_path / "other.png")
    (tmp_path / "set/around").symlink_to(tmp_path)  # it holds the set, and more
    (tmp_path / "set/inner").symlink_to(tmp_path / "set")  # it holds nothing that is not found without it
    (tmp_path / "set/unmounted").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set/itself").symlink_to(tmp_path / "set/itself")
    found = survey(tmp_path / "set")
    assert ids(found) == ["a.png"]
    assert found.left_out == LeftOut({}, links=("around", "itself", "unmounted"))
    assert found.left_out.notices() == [
        "left out 3 links that lead nowhere or back to a folder around them: around, itself, unmounted"
    ]


def test_a_linked_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "set/a.png", tmp_path / "closed/b.png")
    (tmp_path / "set/linked").symlink_to(tmp_path / "closed")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "linked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot list .*linked.*Permission denied"):
        survey(tmp_path / "set")


def test_a_caller_without_a_report_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "a.png", tmp_path / "b.gif")
    with caplog.at_level(logging.WARNING):
        find_images(tmp_path)
    assert "left out 1 file: 1 .gif; save pictures as PNG or TIFF" in caplog.text


def test_a_labeled_set_says_what_its_test_images_leave_out(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("train/good/x.txt", "test/good/a.png", "test/bent/b.png", "test/bent/c.gif")))
    touch(tmp_path / "test/notes.txt", tmp_path / "test/good/.d.png", tmp_path / "elsewhere/e.png", tmp_path / "readme.txt")
    (tmp_path / "test/bent/linked").symlink_to(tmp_path / "elsewhere")
    dataset = load_dataset(tmp_path)
    assert [(record.id, record.kind) for record in dataset.test] == [
        ("test/bent/b.png", "bent"),
        ("test/bent/linked/e.png", "bent"),
        ("test/good/a.png", "good"),
    ]
    assert dataset.found.left_out == LeftOut({".gif": 1, ".txt": 1}, hidden=("test/good/.d.png",))
