"""The pictures of a piece on a worker: those at URLs are fetched into the cache of its node, for as long as it needs them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from spade_faiss.core.copies import Use, url_of
from spade_faiss.features.pages import file_of
from spade_faiss.features.records import ImageRecord
from spade_faiss.features.video import Video
from spade_faiss.features.video_frames import VideoFrame
from spade_faiss.storage.pictures import fetch_pictures


class _At(NamedTuple):
    """Where a file lies of which the command has a copy: the URL, the folder of the copy, and its name below both."""

    url: str
    folder: Path
    name: str


class PieceOfPictures(NamedTuple):
    """Images of a job as they travel to a worker.

    Attributes:
        records: the images, as the command found them.
        files: where the file of each of them lies; None for one in a folder that all nodes share. Empty if all are.
    """

    records: Sequence[ImageRecord]
    files: Sequence[_At | None]

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> PieceOfPictures:
        """What travels of some images that this process found."""
        files = [_find(record) for record in records]
        return cls(records, files if any(files) else ())

    @contextmanager
    def here(self, root: Path) -> Iterator[tuple[Path, Sequence[ImageRecord]]]:
        """The images with paths that this process can read; the cache keeps what was fetched until the block ends.

        Args:
            root: the folder that their ids start from, of the process that found them.

        Yields:
            The folder that the ids start from here, and the images.

        Raises:
            InputError: for a picture that is at its URL no more.
            StorageError: if a URL cannot be reached.
        """
        use = Use()  # it lives as long as the block
        names = defaultdict[tuple[str, Path], set[str]](set)
        for at in self.files:
            if at is not None:
                names[at.url, at.folder].add(at.name)
        moves = {folder: fetch_pictures(url, sorted(found), use) for (url, folder), found in names.items()}
        start = next((_moved(root, folder, to) for folder, to in moves.items() if root.is_relative_to(folder)), root)
        videos: dict[Path, Video] = {}
        placed = [
            record if at is None else _placed(record, _moved(record.path, at.folder, moves[at.folder]), videos)
            for record, at in zip(self.records, self.files or [None] * len(self.records), strict=True)
        ]
        yield start, placed


def _find(record: ImageRecord) -> _At | None:
    if (found := url_of(record.path)) is None:
        return None
    folder, url = found
    return _At(url, folder, file_of(record.path).relative_to(folder).as_posix())


def _moved(path: Path, folder: Path, to: Path) -> Path:
    return to / path.relative_to(folder)


def _placed(record: ImageRecord, path: Path, videos: dict[Path, Video]) -> ImageRecord:
    """An image whose file lies elsewhere; frames of a video share it."""
    if not isinstance(record, VideoFrame):
        return replace(record, path=path)
    file = file_of(path)
    return replace(record, path=path, video=videos.setdefault(file, record.video.at(file)))
