"""Pictures at a URL are found, named and read as those of a folder are."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest

from spade_faiss.core.copies import named
from spade_faiss.core.errors import InputError, NotFoundError, StorageError
from spade_faiss.core.settings import Caching
from spade_faiss.features.datasets import survey
from spade_faiss.features.decoding import read_image
from spade_faiss.storage import pictures as pictures_module
from spade_faiss.storage.cache import use_cache
from spade_faiss.storage.cloud import CloudStore
from spade_faiss.storage.objects import Stored
from tests.support.object_storage import Server
from tests.support.pictures import save_png


def a_picture(path: Path, value: int = 0) -> bytes:
    save_png(np.full((4, 4, 3), value, np.uint8), path)
    return path.read_bytes()


def test_pictures_are_found_as_in_a_folder(bucket: str, server: Server, tmp_path: Path) -> None:
    here, objects = tmp_path / "good", server.objects(f"{bucket}/good")
    names = ["b.png", "a/ü #1%.png", "a/b.png", ".hidden.png", "notes.txt", "a/c.tar", "Z.PNG"]
    for number, name in enumerate(names):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        content = a_picture(tmp_path / "one.png", number) if name.lower().endswith(".png") else b"some text"
        (here / name).write_bytes(content)
        objects[name] = content
    found, expected = survey(f"{bucket}/good"), survey(here)
    assert [record.id for record in found.records] == [record.id for record in expected.records]
    assert (found.left_out.files, found.left_out.hidden) == (expected.left_out.files, expected.left_out.hidden)
    for ours, theirs in zip(found.records, expected.records, strict=True):
        assert ours.path.read_bytes() == theirs.path.read_bytes()
    assert named(str(found.records[0].path)) == f"{bucket}/good/{found.records[0].id}"
    # What is not read is not fetched.
    assert (found.root / "notes.txt").stat().st_size == 0


def test_one_picture_and_a_list(bucket: str, server: Server, tmp_path: Path) -> None:
    content = a_picture(tmp_path / "here.png")
    server.objects(bucket)["new/0001.png"] = content
    server.objects(bucket)["new/0002.png"] = content
    (record,) = survey(f"{bucket}/new/0001.png").records
    assert (record.id, record.path.read_bytes()) == ("0001.png", content)
    found = survey([tmp_path / "here.png", f"{bucket}/new/0001.png"]).records
    assert [record.path.name for record in found] == ["here.png", "0001.png"]


def test_pictures_that_change_are_fetched_again(
    bucket: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = server.objects(f"{bucket}/new")
    for name in ("a.png", "b.png", "c.png"):
        objects[name] = a_picture(tmp_path / "one.png", 1)
    survey(f"{bucket}/new")
    objects["b.png"] = a_picture(tmp_path / "one.png", 2)
    del objects["c.png"]
    fetched, download = list[str](), CloudStore.download

    def counted(store: CloudStore, name: str, path: Path) -> None:
        fetched.append(name)
        download(store, name, path)

    monkeypatch.setattr(CloudStore, "download", counted)
    found = survey(f"{bucket}/new").records
    assert [record.id for record in found] == ["a.png", "b.png"]
    assert read_image(found[1].path).getpixel((0, 0)) == (2, 2, 2)
    assert fetched == ["b.png"]


def test_a_picture_that_cannot_be_read_is_named_by_its_url(bucket: str, server: Server) -> None:
    server.objects(bucket)["new/broken.png"] = b"no picture"
    (record,) = survey(f"{bucket}/new").records
    with pytest.raises(InputError, match=f"{bucket}/new/broken.png"):
        read_image(record.path)


def test_nothing_at_a_url(bucket: str) -> None:
    with pytest.raises(NotFoundError, match=f"there is nothing at {bucket}/nowhere"):
        survey(f"{bucket}/nowhere")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket cannot be listed"):
        survey("s3://no-such-bucket")


def test_pictures_are_read_by_fsspec(bucket: str, tmp_path: Path) -> None:
    content = a_picture(tmp_path / "one.png")
    fsspec.filesystem("memory").pipe_file("/album/b/1.png", content)
    fsspec.filesystem("memory").pipe_file("/album/a.png", content)
    found = survey("memory://album").records
    assert [record.id for record in found] == ["a.png", "b/1.png"]
    assert found[1].path.read_bytes() == content


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/a.png", "a//b.png", "a/./b.png", f"{'x' * 300}.png", "a\0.png"]
)
def test_names_of_pictures_lead_nowhere(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Foreign:
        def __init__(self, url: object) -> None:
            self.url = url

        def list(self) -> list[Stored]:
            return [Stored(name, 1, "1", 0.0)]

    monkeypatch.setattr(pictures_module, "open_store", Foreign)
    with pytest.raises(InputError, match="cannot be the name of a file here; rename it"):
        survey(f"{bucket}/new")


def test_pictures_that_this_process_uses_are_not_evicted(bucket: str, server: Server, tmp_path: Path) -> None:
    content = a_picture(tmp_path / "one.png")
    for folder in ("one", "two"):
        for number in range(3):
            server.objects(bucket)[f"{folder}/{number}.png"] = content + bytes([number])
    use_cache(Caching(cache=str(tmp_path / "small"), cache_bytes="1"))
    one, two = (survey(f"{bucket}/{folder}").records for folder in ("one", "two"))
    assert all(record.path.stat().st_size for record in (*one, *two))


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://bucket/../x", "s3://bucket/a//b", "s3://bucket/x?y=1", "s3://key:secret@bucket/x"]
)
def test_urls_that_name_no_place(url: str) -> None:
    with pytest.raises(InputError) as raised:
        survey(url)
    assert "secret@" not in str(raised.value)


def test_a_url_that_was_made_a_path(bucket: str) -> None:
    with pytest.raises(InputError, match=r"was a URL before Path\(\) took a slash of it; give the URL as text"):
        survey(Path(f"{bucket}/new"))


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    a_picture(tmp_path / "one.png")
    assert [record.id for record in survey(f"file://{tmp_path}").records] == ["one.png"]
