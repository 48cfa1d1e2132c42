"""Walks folders for image files, and says what lies there and is left out.

Each folder is entered once, however many links lead to it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spade_faiss.core.errors import InputError
from spade_faiss.features.video_names import INSTALL, can_read_videos, is_video

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pbm", ".pnm", ".jfif", ".jpe")

# Pictures all the same, though none that is read here.
_OTHER_PICTURES = re.compile(
    r"\.(apng|arw|avif|cr2|cr3|dcm|dib|dng|exr|gif|hdr|hei[cf]|j2k|jp2|jpx|jxl|nef|orf|pam|pcx|pfm|psd|raf|raw|rw2|svg|tga|xcf)"
)
_SUFFIXES_NAMED = 6


@dataclass(frozen=True)
class LeftOut:
    """What lies in folders of images and is not read.

    Args:
        files: the number of files that are no images, by suffix in lower case; `""` stands for none, and pipes and devices
            count as `pipe`, whatever their suffix.
        hidden: images that are hidden or lie in a hidden folder.
        links: links that lead nowhere, or back to a folder around them.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    def notices(self) -> list[str]:
        """What is left out, a sentence without its period for each kind of it; empty if that is nothing."""
        said = []
        if self.files:
            remedy = (
                "; save pictures as PNG or TIFF to have them read" if any(map(_OTHER_PICTURES.fullmatch, self.files)) else ""
            )
            if any(map(is_video, (f"video{suffix}" for suffix in self.files))):
                remedy += f"; to have videos read: {INSTALL}"
            said.append(f"left out {count_of(sum(self.files.values()), 'file')}: {name_suffixes(self.files)}{remedy}")
        if self.hidden:
            said.append(f"left out {count_of(len(self.hidden), 'hidden image')}: {name_some(self.hidden)}")
        if self.links:
            where = "that leads nowhere or back to a folder around it" if len(self.links) == 1 else ""
            where = where or "that lead nowhere or back to a folder around them"
            said.append(f"left out {count_of(len(self.links), 'link')} {where}: {name_some(self.links)}")
        return said

    def numbers(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"files": dict(self.files), "hidden": list(self.hidden), "links": list(self.links)}


class Walk:
    """Finds the image files of folders, and counts what is left out of them.

    Links to folders are followed after all folders were walked, so that a folder goes by its own name if it has one here.
    """

    def __init__(self) -> None:
        self._files: Counter[str] = Counter()
        self._hidden: list[Path] = []
        self._links: list[Path] = []
        self._entered: set[str] = set()

    def __call__(self, folders: Sequence[Path]) -> list[list[Path]]:
        """The image files of each folder, at any depth, in no particular order.

        Raises:
            InputError: for a folder that cannot be listed.
        """
        links: list[list[Path]] = [[] for _ in folders]
        found = [self._descend(folder, pending) for folder, pending in zip(folders, links, strict=True)]
        for images, pending in zip(found, links, strict=True):
            while pending:
                pending.sort(key=os.fspath, reverse=True)
                images += self._follow(pending.pop(), pending)
        return found

    @property
    def entered(self) -> list[Path]:
        """The real paths of all folders that were walked."""
        return sorted(map(Path, self._entered))

    def left_out(self, root: Path) -> LeftOut:
        """What was left out; names start from `root`."""
        # Another link may have led to the same folder later.
        dead_ends = [link for link in self._links if os.path.realpath(link) not in self._entered]
        hidden, links = (
            tuple(sorted(_on_one_line(os.path.relpath(path, root)) for path in paths)) for paths in (self._hidden, dead_ends)
        )
        return LeftOut(dict(sorted(self._files.items(), key=lambda item: (-item[1], item[0]))), hidden, links)

    def count(self, path: Path) -> None:
        """Count a file that is no image."""
        self._files[_on_one_line(path.suffix.lower())] += 1

    def _follow(self, link: Path, pending: list[Path]) -> list[Path]:
        target = os.path.realpath(link)
        if target in self._entered:
            return []
        if Path(os.path.realpath(link.parent)).is_relative_to(target):
            self._links.append(link)
            return []
        return self._descend(link, pending, once=True)

    def _descend(self, top: Path, links: list[Path], *, once: bool = False) -> list[Path]:
        """The image files of a folder; links to folders are put aside. With `once`, what was walked is passed over."""
        found: list[Path] = []
        for parent, folders, names in os.walk(top, onerror=_refuse):
            real = os.path.realpath(parent)
            if once and real in self._entered:
                folders.clear()
                continue
            self._entered.add(real)
            here = Path(parent)
            self._hidden += (image for name in folders if name.startswith(".") for image in _images_inside(here / name))
            folders[:] = [name for name in folders if not name.startswith(".")]
            links += (here / name for name in folders if (here / name).is_symlink())
            found += (path for path in (here / name for name in names) if self._is_readable(path))
        return found

    def _is_readable(self, path: Path) -> bool:
        """Whether a file is an image to read; counts it if not.

        Pipes and devices are left out: reading one could block forever. A broken link that is named as an image is is reported
        when it is read; with another name, it may have been a folder.
        """
        if path.name.startswith("."):
            self._hidden += [path] if _is_hidden_image(path.name) else []
        elif not (is_image(path.name) or (is_video(path.name) and can_read_videos())):
            if os.path.exists(path):  # noqa: PTH110  # Path.exists raises where a link leads into a folder that is closed to us
                self.count(path)
            else:
                self._links.append(path)
        elif path.is_file() or not path.exists():
            return True
        else:
            self._files["pipe"] += 1
        return False


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def count_of(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def name_some(names: Sequence[str], count: int = 3) -> str:
    """The first few of many names."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def name_suffixes(files: Mapping[str, int]) -> str:
    """How many files have which suffix, the most frequent first."""
    most = sorted(files.items(), key=lambda item: (-item[1], item[0]))
    said = [f"{count} {suffix or 'without suffix'}" for suffix, count in most[:_SUFFIXES_NAMED]]
    if others := sum(count for _, count in most[_SUFFIXES_NAMED:]):
        said.append(f"{others} of other suffixes")
    return ", ".join(said)


def _images_inside(hidden: Path) -> Iterable[Path]:
    """The images in a hidden folder, as far as it can be listed."""
    if hidden.is_symlink():
        return
    for parent, _, names in os.walk(hidden):
        yield from (Path(parent, name) for name in names if _is_hidden_image(name))


def _is_hidden_image(name: str) -> bool:
    # A Mac puts "._a.png" beside a.png where it copies: what it knows of the file, not the picture again.
    return name.lower().endswith(SUFFIXES) and not name.startswith("._")


def _on_one_line(name: str) -> str:
    """A name that may be printed: control characters, and bytes that are no UTF-8, are escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot list {str(error.filename)!r}: {error.strerror}; make it readable, or move it elsewhere")
