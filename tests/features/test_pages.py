"""Files of several pages: every page is an image of its own, with its own name, hash and pixels."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from spade_faiss import Backbone, Detector, Extraction, fit, score_folder
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.datasets import ImageRecord, find_images, load_dataset
from spade_faiss.features.decoding import read_image
from spade_faiss.features.pages import hash_image, list_pages, split_page
from spade_faiss.features.pictures import load_image
from tests.support.image_files import noise, save
from tests.support.pictures import write_dataset

FRAMES = [noise(40, 30, seed) for seed in range(3)]


def write_pages(path: Path, count: int = 3, **options: Any) -> Path:
    return save(FRAMES[0], path, save_all=True, append_images=FRAMES[1:count], **options)


ANIMATED = {"webp": {"lossless": True, "duration": 100}, "png": {"duration": 100}, "tif": {}}


@pytest.mark.parametrize("suffix", ANIMATED)
def test_every_page_is_an_image_of_its_own(tmp_path: Path, suffix: str) -> None:
    """The list of faults: page 1 was scored, page 2 with the defect was not mentioned."""
    path = write_pages(tmp_path / f"a.{suffix}", **ANIMATED[suffix])
    save(noise(40, 30, 9), tmp_path / "b.png")
    _, records = find_images(tmp_path)
    assert [record.id for record in records] == [f"a.{suffix}#1", f"a.{suffix}#2", f"a.{suffix}#3", "b.png"]
    found = [load_image(record, Preprocess()) for record in records]
    for frame, record in zip(FRAMES, records, strict=False):
        np.testing.assert_array_equal(np.asarray(read_image(record.path)), np.asarray(frame))
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [item.sha256 for item in found[:3]] == [hashlib.sha256(f"{whole}#{i}".encode()).hexdigest() for i in (1, 2, 3)]
    assert [hash_image(record.path) for record in records] == [item.sha256 for item in found]
    assert found[3].sha256 == hashlib.sha256((tmp_path / "b.png").read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", ANIMATED)
def test_a_second_decoder_sees_the_same_pages(tmp_path: Path, suffix: str) -> None:
    path = write_pages(tmp_path / f"a.{suffix}", **ANIMATED[suffix])
    data = path.read_bytes()
    if suffix == "tif":
        other = [page.asarray() for page in tifffile.TiffFile(BytesIO(data)).pages]
    elif suffix == "png":
        other = list(imagecodecs.apng_decode(data))
    else:
        other = [imagecodecs.webp_decode(data, index=i) for i in range(3)]
    for page, expected in zip(list_pages(path), other, strict=True):
        np.testing.assert_array_equal(np.asarray(read_image(page)), np.asarray(expected)[..., :3])


def test_files_of_one_page_keep_their_names(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        path = save(FRAMES[0], tmp_path / f"a.{suffix}")
        assert list_pages(path) == [path]
    for name, data in (("broken.tif", b"II*\0\xff\xff\xff\x7f"), ("empty.png", b""), ("text.webp", b"RIFF....WEBPxx")):
        (tmp_path / name).write_bytes(data)
        assert list_pages(tmp_path / name) == [tmp_path / name]
    assert list_pages(tmp_path / "gone.tif") == [tmp_path / "gone.tif"]


def test_thumbnails_and_smaller_copies_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((4, 4), np.uint8), subfiletype=1)
        file.write(np.full((8, 8), 7, np.uint8))
        file.write(np.zeros((2, 2), np.uint8), subfiletype=1)
    assert list_pages(tmp_path / "a.tif") == [tmp_path / "a.tif"]
    assert np.asarray(read_image(tmp_path / "a.tif"))[..., 0].tolist() == [[7] * 8] * 8


def test_pages_of_mixed_layouts(tmp_path: Path) -> None:
    """One page that Pillow does not read does not keep it from the others."""
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 65536, (3, 9, 8), dtype=np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(rng.random((9, 8)).astype(np.float32), photometric="minisblack")
        file.write(planes, photometric="rgb", planarconfig="separate")
        file.write(np.full((9, 8), 7, np.uint8))
    first, *rest = list_pages(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif#1': its pixels are floating point numbers"):
        read_image(first)
    assert np.asarray(read_image(rest[0])).tolist() == np.moveaxis(planes >> 8, 0, -1).tolist()
    assert np.asarray(read_image(rest[1])).max() == 7


def test_page_names(tmp_path: Path) -> None:
    path = write_pages(tmp_path / "a.tif", 2)
    assert split_page(tmp_path / "a.tif#2") == (path, 2)
    for name in ("a.tif", "a.tif#", "a.tif#0", "a.tif#x", "#3"):
        assert split_page(tmp_path / name) == (tmp_path / name, None)
    with pytest.raises(InputError, match=r"a\.tif#3': it has 2 pages, there is no page 3"):
        read_image(tmp_path / "a.tif#3")
    save(FRAMES[2], tmp_path / "b.png").rename(tmp_path / "a.tif#2")  # a file that is named so
    assert split_page(tmp_path / "a.tif#2") == (tmp_path / "a.tif#2", None)
    assert np.asarray(read_image(tmp_path / "a.tif#2")).tolist() == np.asarray(FRAMES[2]).tolist()


def test_an_animation_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 65536, (2, 9, 8), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.apng_encode(frames))
    pages = list_pages(tmp_path / "a.png")
    assert len(pages) == 2
    with pytest.raises(InputError, match=r"a\.png#1': it is animated, with 16 bits a channel; save each frame as a file"):
        read_image(pages[0])


@pytest.mark.parametrize("pages", [2, 1])
def test_masks_have_as_many_pages_as_their_images(tmp_path: Path, pages: int) -> None:
    save(FRAMES[0], tmp_path / "test" / "good" / "0.png")
    write_pages(tmp_path / "test" / "bent" / "0.tif", 2)
    mask = [Image.new("L", (40, 30), 255 * i) for i in range(pages)]
    mask[0].save(_folder(tmp_path / "ground_truth" / "bent") / "0_mask.tif", save_all=True, append_images=mask[1:])
    (tmp_path / "ground_truth" / "bent" / "0_mask.tif").rename(tmp_path / "ground_truth" / "bent" / "0_mask.png")
    if pages == 1:
        with pytest.raises(InputError, match=r"0_mask\.png' has 1 pages, its image '0\.tif' has 2; they must have as many"):
            load_dataset(tmp_path)
        return
    found = load_dataset(tmp_path).test
    assert [(item.path.name, item.mask and item.mask.name) for item in found] == [
        ("0.tif#1", "0_mask.png#1"),
        ("0.tif#2", "0_mask.png#2"),
        ("0.png", None),
    ]


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_pages_go_through_a_bank_and_into_a_report(tmp_path: Path, backbone: Backbone) -> None:
    write_dataset(tmp_path / "set")
    good = sorted((tmp_path / "set" / "train" / "good").iterdir())[:8]
    first, *others = [Image.open(path).convert("RGB") for path in good]
    save(first, tmp_path / "good" / "all.tif", save_all=True, append_images=others)
    bank = fit(
        tmp_path / "good", bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone), calibrate=False
    ).bank
    assert bank.ids == [f"all.tif#{i}" for i in range(1, 9)]
    again = fit(
        tmp_path / "good", bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone), calibrate=False
    )
    assert (again.present, again.added) == (8, 0)
    alone = save(others[2], tmp_path / "alone.png")
    detector = Detector.open(tmp_path / "bank", backbone=backbone)
    paged = detector.score(tmp_path / "good")
    np.testing.assert_allclose(paged.image_score[3], detector.score(alone).image_score[0], rtol=1e-4, atol=1e-4)
    score_folder(tmp_path / "good", bank=detector, out=tmp_path / "out")
    assert "all.tif#3" in (tmp_path / "out" / "scores.csv").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "all.tif#3" in page
    assert "has changed since" not in page
    assert "No such file" not in page
    assert ImageRecord("all.tif#3", bank.image_path("all.tif#3") or Path()).path == tmp_path / "good" / "all.tif#3"
