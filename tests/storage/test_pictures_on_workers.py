"""Pictures of a piece on a worker: pages, frames and pictures at URLs are those that the command found, in another cache."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.settings import Caching
from spade_faiss.features.datasets import survey
from spade_faiss.features.pictures import load_image
from spade_faiss.features.video_frames import VideoFrame
from spade_faiss.storage.cache import open_cache, use_cache
from spade_faiss.workflows.pictures_on_workers import PieceOfPictures
from tests.support.image_files import noise, save
from tests.support.object_storage import Server
from tests.support.videos import numbered, write_video

SMALL = Preprocess(resize=24, size=24)


def write_pictures(folder: Path) -> None:
    """Two pictures, one with a number sign in its name, three pages and five frames."""
    save(noise(40, 30, 1), folder / "a.png")
    save(noise(40, 30, 2), folder / "b" / "c#1.png")
    pages = [noise(40, 30, seed) for seed in (3, 4, 5)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    write_video(folder / "clip.mkv", numbered(5))


def test_pictures_are_found_again_in_another_cache(
    bucket: str, server: Server, tmp_path: Path, another_machine: Callable[[], None]
) -> None:
    here = tmp_path / "pictures"
    write_pictures(here)
    for path in here.rglob("*.*"):
        server.objects(f"{bucket}/new")[path.relative_to(here).as_posix()] = path.read_bytes()
    found, expected = survey([f"{bucket}/new"]), survey(here).records
    assert len(expected) == 10
    sent = pickle.dumps(PieceOfPictures.of(found.records))
    another_machine()
    with pickle.loads(sent).here(found.root) as (root, records):
        assert root != found.root
        assert [record.id for record in records] == [record.id for record in expected]
        for record, other in zip(records, expected, strict=True):
            assert record.path.is_relative_to(root)
            read, wanted = load_image(record, SMALL), load_image(other, SMALL)
            np.testing.assert_array_equal(read.picture, wanted.picture)
            assert read.sha256 == wanted.sha256
        frames = [record for record in records if isinstance(record, VideoFrame)]
        assert len({id(frame.video) for frame in frames}) == 1  # it is decoded once


def test_pictures_in_a_folder_travel_as_they_are(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    found = survey(tmp_path / "pictures")
    piece = PieceOfPictures.of(found.records)
    assert piece.files == ()
    with piece.here(found.root) as (root, records):
        assert (root, list(records)) == (found.root, found.records)


def test_the_cache_lets_go_of_pictures_after_their_piece(bucket: str, server: Server, tmp_path: Path) -> None:
    """Also where a worker works on piece after piece for days."""
    for name in "abcd":
        server.objects(f"{bucket}/new")[f"{name}.png"] = save(noise(40, 30, ord(name)), tmp_path / "one.png").read_bytes()
    found = survey(f"{bucket}/new")
    pieces = [PieceOfPictures.of([record]) for record in found.records]
    use_cache(Caching(cache=str(tmp_path / "small"), cache_bytes="5KB"))  # one has more than 3
    for piece in pieces:
        with piece.here(found.root) as (_, (record,)):
            assert np.asarray(Image.open(record.path)).shape == (30, 40, 3)
            kept = sum(path.stat().st_size for path in (open_cache().folder / "copies").rglob("*.png"))
            assert 3000 < kept < 5000


def test_a_picture_that_is_gone_is_named(
    bucket: str, server: Server, tmp_path: Path, another_machine: Callable[[], None]
) -> None:
    objects = server.objects(f"{bucket}/new")
    objects["a.png"] = save(noise(40, 30), tmp_path / "a.png").read_bytes()
    found = survey(f"{bucket}/new")
    piece = PieceOfPictures.of(found.records)
    del objects["a.png"]
    another_machine()
    with pytest.raises(InputError, match=f"{bucket}/new/a.png was deleted while pictures were fetched"), piece.here(found.root):
        pass
