"""Finding, decoding and resize_mode images: hand-known pixels, torchvision's geometry, masks that stay on their pictures."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torchvision import transforms

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.settings import RESIZE_MODES, Preprocess
from spade_faiss.features.images import (
    MAX_PIXELS,
    ImageRecord,
    Placement,
    Skipped,
    check_skipped,
    find_images,
    load,
    load_dataset,
    place,
    read_image,
    to_input,
    to_mask,
    to_picture,
)

SIZES = [(200, 200), (400, 200), (120, 360), (301, 199), (97, 331), (1001, 333)]
LOSSLESS = ["png", "tif", "bmp", "webp"]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def png(width: int, height: int, depth: int, color: int, rows: Sequence[bytes]) -> bytes:
    """A PNG file made by hand, for what Pillow cannot write: color type 0 is gray, 2 RGB, 4 gray with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\x00" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def pixels(path: Path) -> list[Any]:
    image = read_image(path)
    assert image.mode == "RGB"
    values: list[Any] = np.asarray(image).tolist()
    return values


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Finding


def test_a_list_keeps_its_order_and_its_folders_are_sorted(tmp_path: Path) -> None:
    for name in ("z.png", "folder/b.png", "folder/a.png", "y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    _, records = find_images([tmp_path / "z.png", tmp_path / "folder", tmp_path / "y.png"])
    assert [record.id for record in records] == ["z.png", "folder/a.png", "folder/b.png", "y.png"]


def test_folder_is_searched_at_any_depth_in_the_order_of_ids(tmp_path: Path) -> None:
    names = ["b.png", "a/z.JPG", "a/y.jpeg", "a/b/c.Tif", "d.tiff", "e.bmp", "f.webp", "a-.png"]
    touch(*(tmp_path / name for name in names))
    touch(*(tmp_path / name for name in ["notes.txt", ".hidden.png", ".git/x.png", "a/.cache/y.png", "png", "x.png.part"]))
    root, records = find_images(tmp_path)
    assert root == tmp_path.resolve()
    assert [record.id for record in records] == sorted(names)
    assert all(record.path == root / record.id for record in records)
    assert all(record.kind is None and record.mask is None and record.defective is None for record in records)


def test_root_is_absolute_whatever_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "set/a.png")
    monkeypatch.chdir(tmp_path)
    root, records = find_images("set/../set")
    assert root == (tmp_path / "set").resolve()
    assert records == [ImageRecord("a.png", root / "a.png")]


def test_single_file_has_its_folder_as_root(tmp_path: Path) -> None:
    touch(tmp_path / "set/a.PNG", tmp_path / "set/b.png")
    root, records = find_images(str(tmp_path / "set/a.PNG"))
    assert (root, [record.id for record in records]) == ((tmp_path / "set").resolve(), ["a.PNG"])


@pytest.mark.parametrize(
    ("listed", "root", "ids"),
    [
        (["a/x.png", "b"], "", ["a/x.png", "b/c/x.png", "b/y.png"]),
        (["b/c/x.png", "b/y.png"], "b", ["c/x.png", "y.png"]),
        (["b"], "b", ["c/x.png", "y.png"]),
        (["b/y.png"], "b", ["y.png"]),
    ],
)
def test_list_has_its_common_parent_as_root(tmp_path: Path, listed: list[str], root: str, ids: list[str]) -> None:
    touch(tmp_path / "a/x.png", tmp_path / "b/y.png", tmp_path / "b/c/x.png")
    found_root, records = find_images([tmp_path / name for name in listed])
    assert (found_root, [record.id for record in records]) == ((tmp_path / root).resolve(), ids)


@pytest.mark.parametrize(
    "name", ["line\nbreak.png", "q'uo\"te.png", "日本 ü.png", "back\\slash.png", " ; $(x).png", "%s{}.png"]
)
def test_unusual_names_are_found_read_and_named_on_one_line(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / name, "PNG")
    _, [record] = find_images(tmp_path)
    assert record.id == name
    assert pixels(record.path) == [[[1, 2, 3]]]
    record.path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        read_image(record.path)
    assert repr(str(record.path)) in str(error.value)
    assert "\n" not in str(error.value)


def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(InputError, match=r"'\\udcff.png' is not valid UTF-8"):
        find_images(tmp_path)


def test_links_to_folders_and_pipes_are_left_alone_and_broken_links_reported(tmp_path: Path) -> None:
    touch(tmp_path / "real/a.png")
    (tmp_path / "real/loop").symlink_to(tmp_path)
    (tmp_path / "linked.png").symlink_to(tmp_path / "real/a.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    _, records = find_images(tmp_path)
    assert [record.id for record in records] == ["broken.png", "linked.png", "real/a.png"]
    with pytest.raises(InputError, match=r"broken\.png.*No such file"):
        read_image(records[0].path)


def test_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    touch(tmp_path / "a.png")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot list .*Permission denied"):
        find_images(tmp_path)


@pytest.mark.parametrize("listed", [["a/x.png", "a/x.png"], ["a/x.png", "a/../a/x.png"], ["a", "a/x.png"], ["a", "."]])
def test_image_listed_twice_is_named(tmp_path: Path, listed: list[str]) -> None:
    touch(tmp_path / "a/x.png")
    with pytest.raises(InputError, match=r"listed twice.*x\.png"):
        find_images([tmp_path / name for name in listed])


@pytest.mark.parametrize("as_list", [False, True])
def test_sources_without_images_are_refused(tmp_path: Path, as_list: bool) -> None:
    def find(path: Path) -> None:
        find_images([path] if as_list else path)

    touch(tmp_path / "empty/.hidden.png", tmp_path / "notes.txt", tmp_path / "a.png")
    with pytest.raises(InputError, match=r"no image in .*empty.*\.png \.jpg \.jpeg \.bmp \.tif \.tiff \.webp"):
        find(tmp_path / "empty")
    with pytest.raises(InputError, match=r"no image in .*notes\.txt.*\.png \.jpg"):
        find(tmp_path / "notes.txt")
    with pytest.raises(NotFoundError, match=r"missing.*does not exist"):
        find(tmp_path / "missing")
    with pytest.raises(InputError, match=r"the list of images is empty.*\.png \.jpg"):
        find_images([])


# Labeled sets


def labeled(root: Path, *, truth: Sequence[str]) -> Path:
    touch(*(root / f"train/good/{name}" for name in ("001.png", "000.png")))
    touch(*(root / f"test/{name}" for name in ("good/000.png", "crack/000.png", "crack/deep/001.jpg", "dent/000.png")))
    touch(root / "train/crack/002.png")  # no normal image, and so not one to learn from
    touch(*(root / f"ground_truth/{name}" for name in truth), root / "readme.txt", root / "test/.DS_Store.png")
    return root


FULL_TRUTH = ("crack/000_mask.png", "crack/deep/001_mask.png", "dent/000.png")


def test_mvtec_layout_gives_kinds_and_masks(tmp_path: Path) -> None:
    dataset = load_dataset(labeled(tmp_path, truth=(*FULL_TRUTH, "crack/000.png", "good/000_mask.png")))
    root = tmp_path.resolve()
    assert dataset.root == root
    assert dataset.has_masks
    assert [(record.id, record.kind, record.defective) for record in dataset.train] == [
        ("train/good/000.png", "good", False),
        ("train/good/001.png", "good", False),
    ]
    assert [(record.id, record.kind, record.defective) for record in dataset.test] == [
        ("test/crack/000.png", "crack", True),
        ("test/crack/deep/001.jpg", "crack", True),
        ("test/dent/000.png", "dent", True),
        ("test/good/000.png", "good", False),
    ]
    truth = [root / "ground_truth" / name for name in FULL_TRUTH]
    assert [record.mask for record in dataset.test] == [*truth, None]
    assert all(record.path == root / record.id for record in dataset.train + dataset.test)


def test_set_without_masks_or_training_images_is_fine(tmp_path: Path) -> None:
    touch(tmp_path / "test/crack/000.png")
    dataset = load_dataset(str(tmp_path))
    assert dataset.train == []
    assert [record.mask for record in dataset.test] == [None]
    assert not dataset.has_masks


def test_kind_folder_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/000.png", tmp_path / "set/test/good/000.png")
    (tmp_path / "set/test/crack").symlink_to(tmp_path / "elsewhere")
    assert [record.id for record in load_dataset(tmp_path / "set").test] == ["test/crack/000.png", "test/good/000.png"]


def test_missing_masks_are_counted_and_named(tmp_path: Path) -> None:
    labeled(tmp_path, truth=["crack/000_mask.png"])
    with pytest.raises(
        InputError, match=r"2 defective images .* no mask: test/crack/deep/001\.jpg, test/dent/000\.png; expected"
    ):
        load_dataset(tmp_path)
    touch(*(tmp_path / f"test/dent/{number:03}.png" for number in range(1, 5)))
    with pytest.raises(
        InputError, match=r"6 defective .*001\.jpg, test/dent/000\.png, test/dent/001\.png and 3 more; expected"
    ):
        load_dataset(tmp_path)


@pytest.mark.parametrize("names", [[], ["train/good/000.png"], ["test/good/notes.txt"], ["test/000.png", "test/good/000.png"]])
def test_other_layouts_show_the_expected_one(tmp_path: Path, names: list[str]) -> None:
    touch(*(tmp_path / name for name in names))
    with pytest.raises(InputError, match=r"expected ROOT/train/good/\*, ROOT/test/<kind>/\*"):
        load_dataset(tmp_path)
    with pytest.raises(NotFoundError, match=r"nowhere.*expected ROOT/train/good"):
        load_dataset(tmp_path / "nowhere")


# Decoding


def palette(transparency: bytes | int | None) -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 2])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def row(mode: str, *values: Any) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


COLORS = [[[0, 0, 0], [10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (row("1", 0, 255), "a.png", [[[0, 0, 0], [255, 255, 255]]]),
        (row("1", 0, 255), "a.tif", [[[0, 0, 0], [255, 255, 255]]]),
        (row("L", 0, 7, 255), "a.bmp", [[[0, 0, 0], [7, 7, 7], [255, 255, 255]]]),
        (row("LA", (100, 0), (7, 255)), "a.png", [[[100, 100, 100], [7, 7, 7]]]),
        (row("RGB", (10, 20, 30)), "a.tiff", [[[10, 20, 30]]]),
        (row("RGBA", (10, 20, 30, 0), (1, 2, 3, 128)), "a.png", [[[10, 20, 30], [1, 2, 3]]]),
        (palette(None), "a.png", COLORS),
        (palette(bytes([0, 128, 255])), "a.png", COLORS),
        (palette(1), "a.png", COLORS),
        (row("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)), "a.tif", [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]),
        (row("YCbCr", (128, 128, 128), (255, 128, 128)), "a.tif", [[[128, 128, 128], [255, 255, 255]]]),
        (row("I", 0, 255, 256, 65535), "a.tif", [[[0] * 3, [0] * 3, [1] * 3, [255] * 3]]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, name: str, expected: list[Any]) -> None:
    assert pixels(save(image, tmp_path / name)) == expected


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpeg_modes(tmp_path: Path, mode: str) -> None:
    color: Any = {"CMYK": (0, 255, 0, 0), "L": 90, "RGB": (200, 100, 50)}[mode]
    expected = {"CMYK": (255, 0, 255), "L": (90, 90, 90), "RGB": (200, 100, 50)}[mode]
    path = save(Image.new(mode, (16, 16), color), tmp_path / "a.jpg", quality=100)
    assert np.abs(np.array(pixels(path)) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["png", "tif", "big endian tif", "hand-made png"])
def test_sixteen_bits_are_scaled_by_the_same_factor_in_every_image(tmp_path: Path, kind: str) -> None:
    values = [0, 255, 256, 1000, 128 * 257, 65535]
    for shown in (values, values[:4]):  # the second without its brightest pixels: the others must not change
        path = tmp_path / f"a.{kind[-3:]}"
        if kind == "hand-made png":
            path.write_bytes(png(len(shown), 1, 16, 0, [struct.pack(f">{len(shown)}H", *shown)]))
        else:
            save(Image.fromarray(np.array([shown], dtype=">u2" if "big" in kind else "<u2")), path)
        assert [pixel[0] for pixel in pixels(path)[0]] == [0, 0, 1, 3, 128, 255][: len(shown)]


def test_sixteen_bit_color_has_the_scale_of_sixteen_bit_gray(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, [struct.pack(">3H", 255, 1000, 65535)]))
    assert pixels(tmp_path / "a.png") == [[[0, 3, 255]]]
    (tmp_path / "b.png").write_bytes(png(1, 1, 16, 4, [struct.pack(">2H", 1000, 0)]))
    assert pixels(tmp_path / "b.png") == [[[3, 3, 3]]]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (row("F", 0.5), "floating point.*save it with 8 or 16 bits"),
        (row("I", 0, 70000), "values run from 0 to 70000, expected 0 to 65535"),
        (row("I", -1, 5), "values run from -1 to 5, expected 0 to 65535"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, image: Image.Image, reason: str) -> None:
    with pytest.raises(InputError, match=rf"a\.tif.*{reason}"):
        read_image(save(image, tmp_path / "a.tif"))


# The six pixels
#   1 2 3
#   4 5 6
# are stored; the tag says how a viewer has to turn them.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("suffix", "dtype"), [("png", "u1"), ("tif", "u1"), ("webp", "u1"), ("png", "u2"), ("tif", "u2")])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str, dtype: str) -> None:
    values = np.array(UPRIGHT[1], dtype=dtype) * (256 if dtype == "u2" else 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    path = save(Image.fromarray(values), tmp_path / f"a.{suffix}", exif=exif, **options)
    assert np.asarray(read_image(path))[:, :, 0].tolist() == UPRIGHT[orientation]


def test_exif_orientation_is_applied_to_jpeg_sizes_and_masks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("L", (32, 16)), tmp_path / "a.jpg", exif=exif)
    loaded = load(ImageRecord("a.jpg", path), Preprocess())
    assert loaded.placement.original == (16, 32)
    assert to_mask(path, place(*loaded.placement.original, Preprocess())).shape == (224, 224)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = save(noise(40, 30), tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], whole[:4], whole[:1], b"GIF89a" + whole[6:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"cannot use '.*a\.{suffix}': \w+"):
            read_image(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"GIF89a....", "not a PNG, JPEG, BMP, TIFF or WebP file: it starts with b'GIF89a"),
        (b"<html></html>", "not a PNG"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", r"\w+Error: \w"),
        (png(1, 2, 8, 0, [b"\x01", b"\x02"])[:-24], "truncated"),
        (png(0, 3, 8, 0, []), "not identified"),
    ],
    ids=["empty", "gif", "html", "wav", "truncated", "no columns"],
)
def test_files_that_are_no_images_say_why(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"cannot use '.*a\.png': .*{reason}") as error:
        read_image(tmp_path / "a.png")
    assert "InputError" not in str(error.value)


def test_file_is_read_by_its_content_whatever_its_suffix(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.jpg", "PNG")
    assert pixels(tmp_path / "a.jpg") == [[[1, 2, 3]]]


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(10_001, 10_000, 1, 0, []))  # a header without pixels: decoding would call it truncated
    with pytest.raises(InputError, match=rf"a\.png.*10001 x 10000 pixels are more than the {MAX_PIXELS} allowed"):
        read_image(path)
    path.write_bytes(png(10_000, 10_000, 1, 0, []))
    with pytest.raises(InputError, match="truncated"):
        read_image(path)


def test_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    record = ImageRecord("a.png", save(noise(6, 5), tmp_path / "a.png"))
    assert read_image(record.path, max_pixels=30).size == (6, 5)
    assert load(record, Preprocess(), max_pixels=30).placement.original == (6, 5)
    for read in (lambda: read_image(record.path, max_pixels=29), lambda: load(record, Preprocess(), max_pixels=29)):
        with pytest.raises(InputError, match="6 x 5 pixels are more than the 29 allowed"):
            read()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_pillows_own_limit_never_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = save(noise(4, 4), tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow warns above it (an error in these tests), and fails above 20
    if suffix == "tif":
        with pytest.raises(InputError, match="4 x 4 pixels are more than the 10 allowed"):
            read_image(path)
    else:
        assert read_image(path).size == (4, 4)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_many_threads_read_the_same_as_one(tmp_path: Path) -> None:
    suffixes = [*LOSSLESS, "jpg"]
    paths = [save(noise(64, 48, seed), tmp_path / f"{seed}.{suffixes[seed % 5]}") for seed in range(20)]
    paths.append(tmp_path / "broken.png")
    paths[-1].write_bytes(paths[0].read_bytes()[:500])

    def digest(path: Path) -> str:
        try:
            return hashlib.sha256(read_image(path).tobytes()).hexdigest()
        except InputError as error:
            return str(error)

    alone = [digest(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(digest, paths * 5)) == alone * 5


def test_load_reads_picture_size_and_hash(tmp_path: Path) -> None:
    path = save(noise(300, 200), tmp_path / "a.png")
    loaded = load(ImageRecord("a.png", path), Preprocess())
    assert loaded.placement.original == (300, 200)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(loaded.picture, to_picture(read_image(path), loaded.placement))
    with pytest.raises(InputError, match=r"gone\.png.*No such file"):
        load(ImageRecord("gone.png", tmp_path / "gone.png"), Preprocess())


def test_load_names_an_image_too_thin_to_be_cropped(tmp_path: Path) -> None:
    record = ImageRecord("a.png", save(Image.new("L", (2000, 1)), tmp_path / "a.png"))
    with pytest.raises(InputError, match=r"a\.png.*2000 x 1 pixels are too thin.*512000 x 256.*letterbox or stretch"):
        load(record, Preprocess())
    for resize_mode in ("letterbox", "stretch"):
        assert load(record, Preprocess(resize_mode=resize_mode)).picture.shape == (224, 224, 3)


# Placing


@pytest.mark.parametrize("size", [*SIZES, (256, 256), (257, 255), (103, 222), (632, 403), (31, 47), (1, 3), (224, 224)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (65, 32), (33, 33)])
def test_crop_is_torchvisions(size: tuple[int, int], resize: int, crop: int) -> None:
    image = noise(*size)
    resized = transforms.Resize(resize, interpolation=transforms.InterpolationMode.LANCZOS)(image)
    expected = np.asarray(transforms.CenterCrop(crop)(resized))
    preprocess = Preprocess(resize=resize, crop=crop)
    assert place(*size, preprocess).resized == resized.size
    np.testing.assert_array_equal(to_picture(image, place(*image.size, preprocess)), expected)


def test_placements_worked_out_by_hand() -> None:
    assert place(301, 200, Preprocess()) == Placement(
        (301, 200), (385, 256), (-80, -16), 224
    )  # 385.28; (385 - 224) / 2 = 80.5, to even
    letterbox = Preprocess(resize_mode="letterbox", crop=9)
    assert place(20, 10, letterbox) == Placement((20, 10), (9, 4), (0, 2), 9)
    assert place(20, 10, letterbox).padding == ((2, 3), (0, 0))
    assert place(10, 20, letterbox).visible == (0, 0, 4, 9)
    assert place(1, 10_000, letterbox).resized == (1, 9)
    assert place(301, 200, Preprocess(resize_mode="stretch")) == Placement((301, 200), (224, 224), (0, 0), 224)
    assert place(385, 256, Preprocess()).visible == (80, 16, 304, 240)


def test_stretch_resizes_the_whole_image() -> None:
    image = noise(60, 30)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(to_picture(image, place(*image.size, Preprocess(resize_mode="stretch", crop=32))), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_letterbox_repeats_the_border(turned: bool) -> None:
    image = noise(16, 8)
    expected = np.pad(np.asarray(image), ((4, 4), (0, 0), (0, 0)), mode="edge")
    assert expected[0].tolist() == np.asarray(image)[0].tolist()
    if turned:
        image, expected = image.transpose(Image.Transpose.TRANSPOSE), expected.transpose(1, 0, 2)
    np.testing.assert_array_equal(to_picture(image, place(*image.size, Preprocess(resize_mode="letterbox", crop=16))), expected)


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    crop=st.integers(1, 300),
    more=st.integers(0, 99),
    resize_mode=st.sampled_from(RESIZE_MODES),
)
def test_a_placement_always_fills_the_input(width: int, height: int, crop: int, more: int, resize_mode: str) -> None:
    preprocess = Preprocess(resize_mode=resize_mode, crop=crop, resize=crop + more)
    shorter, longer = sorted((width, height))
    if resize_mode == "crop" and preprocess.resize * (preprocess.resize * longer // shorter) > MAX_PIXELS:
        with pytest.raises(InputError, match="too thin"):
            place(width, height, preprocess)
        return
    placement = place(width, height, preprocess)
    left, top, right, bottom = placement.visible
    (above, below), (before, after) = placement.padding
    assert 0 <= left < right <= placement.resized[0]
    assert 0 <= top < bottom <= placement.resized[1]
    assert min(above, below, before, after) >= 0
    assert above + (bottom - top) + below == before + (right - left) + after == crop
    assert max(abs(above - below), abs(before - after)) <= 1
    assert abs(left - (placement.resized[0] - right)) <= 1
    assert abs(top - (placement.resized[1] - bottom)) <= 1
    valid = place(width, height, preprocess).valid
    assert valid.shape == (crop, crop)
    assert valid.sum() == (right - left) * (bottom - top)
    if resize_mode == "letterbox":
        assert max(placement.resized) == crop
        assert valid[above, before]
        assert valid[crop - below - 1, crop - after - 1]
    else:
        assert valid.all()


def test_valid_region_by_hand() -> None:
    valid = place(400, 200, Preprocess(resize_mode="letterbox")).valid
    assert valid[56:168].all()
    assert not valid[:56].any()
    assert not valid[168:].any()


def test_bad_sizes_and_modes_are_refused() -> None:
    with pytest.raises(InputError, match="width=0 must be an integer of at least 1"):
        place(0, 5, Preprocess())
    with pytest.raises(InputError, match="expected an RGB image, got mode L"):
        to_picture(Image.new("L", (5, 5)), place(5, 5, Preprocess()))


# Normalizing


def test_input_is_what_torchvision_computes() -> None:
    picture = to_picture(noise(300, 200), place(300, 200, Preprocess()))
    before = picture.copy()
    values = to_input(picture, Preprocess())
    normalize = transforms.Normalize(Preprocess().mean, Preprocess().std)
    expected = normalize(transforms.ToTensor()(Image.fromarray(picture))).numpy()
    assert values.dtype == np.float32
    assert values.shape == (3, 224, 224)
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(picture, before)


def test_input_by_hand() -> None:
    picture = np.array([[[0, 255, 51]]], dtype=np.uint8)
    values = to_input(picture, Preprocess(mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 0.1)))
    np.testing.assert_allclose(values.ravel(), [-1, 2, 2], rtol=1e-6)


# Masks


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("size", SIZES)
def test_mask_lies_where_the_defect_is(tmp_path: Path, resize_mode: str, size: tuple[int, int]) -> None:
    """The same shape in the picture and the mask: NEAREST moves an edge by half a pixel, a shifted frame by one."""
    (width, height), short = size, min(size)
    left, top = width // 2 - round(0.3 * short), height // 2 - round(0.2 * short)
    shape = Image.new("L", size)
    ImageDraw.Draw(shape).rectangle((left, top, left + round(0.45 * short), top + round(0.5 * short)), fill=255)
    preprocess = Preprocess(resize_mode=resize_mode)
    picture = to_picture(shape.convert("RGB"), place(*size, preprocess))[:, :, 0].astype(float)
    mask = to_mask(save(shape, tmp_path / "mask.png"), place(*size, preprocess))

    def center(weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.array([np.average(axis, weights=weights) for axis in np.indices(weights.shape)])

    assert mask.shape == picture.shape
    np.testing.assert_allclose(center(mask), center(picture), atol=0.45)
    # Where the picture is plain, the mask agrees exactly; they may differ only along the resampled outline.
    assert (mask != (picture > 127)).sum() <= 0.05 * mask.sum()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_margins_are_never_defective(tmp_path: Path, resize_mode: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess(resize_mode=resize_mode)
    mask = to_mask(save(Image.new("L", size, 255), tmp_path / "mask.png"), place(*size, preprocess))
    np.testing.assert_array_equal(mask, place(*size, preprocess).valid)


def palette_mask(color: tuple[int, int, int]) -> Callable[[npt.NDArray[np.uint8]], Image.Image]:
    def make(defect: npt.NDArray[np.uint8]) -> Image.Image:
        image = Image.fromarray(defect).convert("P")
        image.putdata(defect.ravel().tolist())
        image.putpalette([0, 0, 0, *color])
        return image

    return make


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(lambda defect: Image.fromarray(defect * 255), id="0 and 255"),
        pytest.param(lambda defect: Image.fromarray(defect * 127 + 1), id="1 and 128"),
        pytest.param(lambda defect: Image.fromarray(defect), id="0 and 1"),
        pytest.param(lambda defect: Image.fromarray(defect * np.arange(1, 17, dtype=np.uint8)), id="class numbers"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(bool)), id="1 bit"),
        pytest.param(lambda defect: Image.fromarray(defect * 255).convert("RGB"), id="RGB"),
        pytest.param(lambda defect: Image.fromarray(defect * 255).convert("LA"), id="LA"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(np.uint16)), id="16 bit, 0 and 1"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(np.uint16) * 255), id="16 bit, 0 and 255"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(np.uint16) * 65535), id="16 bit, 0 and 65535"),
        pytest.param(palette_mask((255, 255, 255)), id="white palette"),
        pytest.param(palette_mask((0, 0, 200)), id="blue palette"),
        pytest.param(palette_mask((1, 0, 0)), id="dark palette"),
    ],
)
def test_masks_may_be_stored_in_many_ways(tmp_path: Path, store: Callable[[npt.NDArray[np.uint8]], Image.Image]) -> None:
    defect = np.random.default_rng(0).integers(0, 2, (16, 16), dtype=np.uint8)
    path = save(store(defect), tmp_path / "mask.png")
    mask = to_mask(path, place(16, 16, Preprocess(resize_mode="stretch", crop=16)))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, defect == 1)


def test_soft_outline_is_cut_in_the_middle(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[0, 127], [128, 255]], dtype=np.uint8)), tmp_path / "mask.png")
    assert to_mask(path, place(2, 2, Preprocess(resize_mode="stretch", crop=2))).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "I;16"])
def test_empty_mask_is_legal(tmp_path: Path, mode: str) -> None:
    assert not to_mask(save(Image.new(mode, (30, 20)), tmp_path / "mask.png"), place(30, 20, Preprocess())).any()


def test_mask_of_another_size_or_damaged_is_refused(tmp_path: Path) -> None:
    path = save(Image.new("L", (30, 20)), tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png.*the mask is 30 x 20 pixels, its image 20 x 30"):
        to_mask(path, place(20, 30, Preprocess()))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"cannot use '.*mask\.png'"):
        to_mask(path, place(30, 20, Preprocess()))


# Skipped images


def test_skipped_images_are_counted_and_named() -> None:
    skipped = [Skipped(f"{number}.png", "the file is empty") for number in range(5)]
    check_skipped(skipped, 5)
    check_skipped([], 0)
    with pytest.raises(InputError, match=r"5 images were skipped, at most 4 may be: '0\.png' \(the file is empty\), ") as error:
        check_skipped(skipped, 4)
    assert "'2.png' (the file is empty) and 2 more" in str(error.value)
    assert "--max-skipped 5" in str(error.value)
    with pytest.raises(InputError, match="max_skipped=-1 must be an integer of at least 0"):
        check_skipped([], -1)


def test_pictures_do_not_depend_on_the_file_format(tmp_path: Path) -> None:
    image = noise(50, 40)
    for suffix in LOSSLESS:
        path = save(image, tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
        np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(image))
