"""Masks are found whatever their suffix and ending; what is ambiguous or missing is refused in plain words."""

from __future__ import annotations

from pathlib import Path

import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.features.datasets import load_dataset
from tests.support.image_files import touch


def labeled(root: Path, *masks: str, image: str = "000.png") -> Path:
    touch(root / "test/good/0.png", root / f"test/bent/{image}", *(root / f"ground_truth/{name}" for name in masks))
    return root


@pytest.mark.parametrize(
    "name",
    [
        *("000.png", "000.PNG", "000.tif", "000_mask.png", "000_mask.PNG", "000_mask.bmp", "000_mask.TIFF", "000_MASK.Png"),
        *("000_label.png", "000_label.PNG", "000_labels.tif", "000_gt.png", "000_GT.pgm", "000-mask.png", "000.mask.png"),
        *("000_ground_truth.webp", "000_groundtruth.jpg", "000_seg.png", "000_segmentation.png", "000 mask.jpeg"),
    ],
)
def test_a_mask_is_found_whatever_its_suffix_and_ending(tmp_path: Path, name: str) -> None:
    dataset = load_dataset(labeled(tmp_path, f"bent/{name}", "bent/._000_mask.png", "bent/000_mask.txt"))
    assert [record.mask for record in dataset.test] == [tmp_path.resolve() / "ground_truth/bent" / name, None]


@pytest.mark.parametrize("image", ["a_mask.png", "part_gt.jpg", "x.y.png", "_mask.png"])
def test_an_image_may_be_called_as_masks_are(tmp_path: Path, image: str) -> None:
    stem = Path(image).stem
    assert load_dataset(labeled(tmp_path / "same", f"bent/{image}", image=image)).test[0].mask is not None
    assert load_dataset(labeled(tmp_path / "ending", f"bent/{stem}_mask.png", image=image)).test[0].mask is not None


@pytest.mark.parametrize(
    "names", [("000.png", "000_mask.png"), ("000_mask.png", "000_mask.tif"), ("000_label.png", "000_mask.png", "000.bmp")]
)
def test_two_candidates_for_one_picture_are_an_error(tmp_path: Path, names: tuple[str, ...]) -> None:
    labeled(tmp_path, *(f"bent/{name}" for name in names))
    with pytest.raises(InputError, match=rf"{len(names)} files could be the mask of test/bent/000\.png: .*keep one") as error:
        load_dataset(tmp_path)
    assert all(f"ground_truth/bent/{name}" in str(error.value) for name in names)


def test_one_mask_for_two_pictures_is_an_error(tmp_path: Path) -> None:
    labeled(tmp_path, "bent/000_mask.png")
    touch(tmp_path / "test/bent/000.jpg")
    with pytest.raises(InputError, match=r"000_mask\.png could be the mask of test/bent/000\.jpg and of test/bent/000\.png"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("masks", "there"),
    [
        (("bent/mask_000.png", "bent/1.png"), r"ground_truth/bent holds 1\.png, mask_000\.png"),
        (("bent/000/000.png",), r"ground_truth/bent holds 000/"),
        (("Bent/000_mask.png",), r"ground_truth holds Bent/"),
        (("000_mask.png",), r"ground_truth holds 000_mask\.png"),
        ((".gitkeep",), r"ground_truth holds nothing"),
    ],
)
def test_an_error_says_what_lies_there_and_how_to_name_it(tmp_path: Path, masks: tuple[str, ...], there: str) -> None:
    labeled(tmp_path, *masks)
    with pytest.raises(InputError, match=rf"1 defective images .* no mask: test/bent/000\.png; .*{there} \(") as error:
        load_dataset(tmp_path)
    assert "expected ground_truth/<kind>/<stem>_mask.png (or _label, _gt, _seg" in str(error.value)


def test_masks_of_normal_images_are_not_used(tmp_path: Path) -> None:
    dataset = load_dataset(labeled(tmp_path, "bent/000.png", "good/0.png", "good/0_mask.png"))
    assert [record.mask is None for record in dataset.test] == [False, True]
