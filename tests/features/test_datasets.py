"""Finding images: folders, lists and labeled sets on disk become records, and everything else is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.features.datasets import ImageRecord, Skipped, check_skipped, find_images, load_dataset
from spade_faiss.features.decoding import read_image
from tests.support.image_files import pixels, touch


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


def test_loops_and_pipes_are_left_alone_and_broken_links_reported(tmp_path: Path) -> None:
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
    touch(*(tmp_path / "others" / name for name in ("a.HEIC", "b.heic", "c.txt")))
    with pytest.raises(InputError, match=r"no image in .*others.*; it holds 2 \.heic, 1 \.txt$"):
        find(tmp_path / "others")
    with pytest.raises(InputError, match=r"no image in .*notes\.txt.*\.png \.jpg"):
        find(tmp_path / "notes.txt")
    with pytest.raises(NotFoundError, match=r"missing.*does not exist"):
        find(tmp_path / "missing")
    with pytest.raises(InputError, match=r"the list of images is empty.*\.png \.jpg"):
        find_images([])


def labeled(root: Path, *, truth: Sequence[str]) -> Path:
    touch(*(root / f"train/good/{name}" for name in ("001.png", "000.png")))
    touch(*(root / f"test/{name}" for name in ("good/000.png", "crack/000.png", "crack/deep/001.jpg", "dent/000.png")))
    touch(root / "train/crack/002.png")  # no normal image, and so not one to learn from
    touch(*(root / f"ground_truth/{name}" for name in truth), root / "readme.txt", root / "test/.DS_Store.png")
    return root


FULL_TRUTH = ("crack/000_mask.png", "crack/deep/001_mask.png", "dent/000.png")


def test_mvtec_layout_gives_kinds_and_masks(tmp_path: Path) -> None:
    dataset = load_dataset(labeled(tmp_path, truth=(*FULL_TRUTH, "good/000_mask.png")))
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
