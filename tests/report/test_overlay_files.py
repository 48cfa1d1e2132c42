"""Overlays get files of their own, whatever their images are called."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.text import printable
from spade_faiss.report.overlay_files import OverlayFiles
from spade_faiss.report.pictures import Picture, write_png

LONG = "long name " * 25  # 250 bytes: with .png it is as long as a name may be


def picture(number: int) -> Picture:
    return np.full((4, 4, 3), number, np.uint8)


def written(folder: Path, ids: list[str]) -> list[str]:
    """Write the overlays of images; returns their names after all were found to hold their own picture."""
    files = OverlayFiles(folder)
    names = [files.write(image, picture(number)) for number, image in enumerate(ids)]
    for number, name in enumerate(names):
        with Image.open(folder / name) as image:
            assert np.asarray(image).max() == number, name
    assert len({*names}) == len(ids)
    return names


def test_ordinary_names_are_those_of_the_images(tmp_path: Path) -> None:
    ids = ["spot/000.png", "good/000.png", "a b.jpg", "日本/ä ö.png", "=1+1.png"]
    assert written(tmp_path / "overlays", ids) == [f"{image}.png" for image in ids]


def test_long_names_are_shortened_and_told_apart(tmp_path: Path) -> None:
    """Fault: `[Errno 36]`, and the remaining overlays were missing."""
    ids = [f"{LONG}{number}.png" for number in range(3)] + [
        "ä" * 126 + ".png",
        "spot/" + "x" * 255,
        f"{LONG[:246]}.png",
        "last.png",
    ]
    names = written(tmp_path / "overlays", ids)
    assert names[-1] == "last.png.png"
    assert names[0].startswith("long name long name")
    assert names[4].startswith("spot/xxx")
    assert all(len(part.encode()) <= 255 for name in names for part in name.split("/"))
    assert hashlib.sha256(ids[0].encode()).hexdigest()[:16] in names[0]


def test_paths_longer_than_the_system_takes(tmp_path: Path) -> None:
    deep = "/".join(["d" * 200] * 18)
    (name,) = written(tmp_path / "overlays", [f"{deep}/{'x' * 240}.png"])
    assert "/" not in name


def test_names_that_are_one_for_some_disks_are_told_apart(tmp_path: Path) -> None:
    ids = [
        "a.png",
        "A.png",
        "caf\u00e9.png",
        "cafe\u0301.png",
        "b.png",
        "b.png.png/c.png",
        "d/e.png.png/f",
        "d/e.png",
        "D/E.png.png/G",
    ]
    names = written(tmp_path / "overlays", ids)
    folded = {name.casefold() for name in names}
    assert len(folded) == len(ids)


def test_names_that_lead_elsewhere_stay_inside(tmp_path: Path) -> None:
    ids = ["../../up.png", "/etc/passwd", "a/../../b", "..", ".", "", "a//b"]
    names = written(tmp_path / "overlays", ids)
    assert all((tmp_path / "overlays" / name).resolve().is_relative_to(tmp_path / "overlays") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["overlays"]


def test_names_give_no_orders_to_what_lists_the_folder(tmp_path: Path) -> None:
    ids = ["two\nlines.png", "bell\x1b[31m.png", "\u202ertl.png", "a\x07/b.png"]
    names = written(tmp_path / "overlays", ids)
    assert all(printable(name) == name for name in names)
    assert names[0].startswith("two\\nlines.png-")


def test_names_that_the_disk_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(path: Path, data: Picture) -> None:
        if ":" in path.name:
            raise OSError(22, "Invalid argument", str(path))
        write_png(path, data)

    monkeypatch.setattr("spade_faiss.report.overlay_files.write_png", picky)
    names = written(tmp_path / "overlays", ["10:30.png", "10.30.png", "10:30.jpg"])
    assert names[1] == "10.30.png.png"
    assert names[0] == hashlib.sha256(b"10:30.png").hexdigest() + ".png"
