"""Normal and defective images are not mistaken for each other, in a labeled set and where a bank is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.features.datasets import load_dataset, survey
from spade_faiss.features.kinds import check_normals
from tests.support.image_files import touch


@pytest.mark.parametrize("kind", ["ok", "OK", "Good", "normal", "Normal", "i.O.", "non_defective", "defect-free", "good2"])
def test_a_kind_that_is_normal_by_its_name_is_not_called_defective(tmp_path: Path, kind: str) -> None:
    touch(tmp_path / f"test/{kind}/0.png", tmp_path / "test/bent/1.png", tmp_path / "ground_truth/bent/1.png")
    with pytest.raises(InputError, match="the normal kind is called 'good'") as error:
        load_dataset(tmp_path)
    assert f"rename test/{kind} to test/good, or say what it is called: --normal-kind {kind}" in str(error.value)
    dataset = load_dataset(tmp_path, normal_kind=kind)
    assert {record.kind: record.defective for record in dataset.test} == {kind: False, "bent": True}
    assert {record.kind: record.mask is None for record in dataset.test} == {kind: True, "bent": False}


@pytest.mark.parametrize(("normal_kind", "other"), [("good", "ok"), ("good", "Good"), ("ok", "good")])
def test_two_normal_kinds_are_an_error(tmp_path: Path, normal_kind: str, other: str) -> None:
    touch(tmp_path / "test/good/0.png", tmp_path / f"test/{other}/0.png", tmp_path / f"test/{normal_kind}/0.png")
    with pytest.raises(InputError, match=rf"test/{other} would count as defective: .*'{normal_kind}'; move normal images into"):
        load_dataset(tmp_path, normal_kind=normal_kind)


@pytest.mark.parametrize("target", ["test/good", "test/good/deep", "test"])
def test_a_link_makes_no_second_kind_of_the_same_images(tmp_path: Path, target: str) -> None:
    touch(tmp_path / "test/good/deep/0.png", tmp_path / "test/bent/1.png")
    (tmp_path / "test/linked").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=r"test/linked is a link to the images of .*test/(good|bent), which would be of two"):
        load_dataset(tmp_path)


def test_normal_training_images_go_by_the_same_name(tmp_path: Path) -> None:
    touch(tmp_path / "train/ok/0.png", tmp_path / "test/ok/1.png", tmp_path / "test/bent/2.png")
    dataset = load_dataset(tmp_path, normal_kind="ok")
    assert [(record.id, record.defective) for record in dataset.train] == [("train/ok/0.png", False)]


def check(*sources: Path) -> None:
    found = survey(list(sources))
    check_normals(found.sources, [record.path for record in found.records])


MVTEC = ("train/good/0.png", "test/good/1.png", "test/bent/2.png", "ground_truth/bent/2_mask.png")


@pytest.mark.parametrize(
    ("names", "given", "instead"),
    [
        (MVTEC, "", "set/train/good"),
        (MVTEC, "..", "set/train/good"),
        (MVTEC, "test", "set/test/good"),
        (MVTEC, "ground_truth", "set/train/good"),
        (("train/0.png", "Test/1.png"), "", "set/train"),
        (("train/0.png", "ground_truth/1.png"), "", "set/train"),
        (("train/OK/0.png", "GroundTruth/1.png"), "", "set/train/OK"),
        (("good/0.png", "ground_truth/1.png"), "", "usually train/good"),
        (("test/good/0.png", "ground_truth/bent/1.png"), "", "usually train/good"),
        (("images/0.png", "masks/0.png"), "", "usually train/good"),
        (("ok/0.png", "ko/0.png"), "", "set/ok"),
        (("Images/Normal/0.png", "Images/Anomaly/0.png"), "", "set/Images/Normal"),
        (("train/good/0.png", "train/bent/0.png"), "train", "set/train/good"),
    ],
)
def test_a_labeled_set_is_not_taken_for_normal_images(tmp_path: Path, names: tuple[str, ...], given: str, instead: str) -> None:
    touch(*(tmp_path / "set" / name for name in names))
    with pytest.raises(InputError, match="normal images") as error:
        check(tmp_path / "set" / given)
    assert instead in str(error.value)


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (MVTEC, ["train/good"]),
        (MVTEC, ["train"]),
        (MVTEC, ["train/good", "test/good"]),
        (("good/0.png", "good2/1.png", "line3/2.png"), [""]),
        (("train/0.png",), [""]),
        (("masks/0.png", "labels/1.png", "broken/2.png"), ["masks", "labels", "broken"]),
        (("line1/ok/0.png", "line2/ok/1.png"), [""]),
    ],
)
def test_folders_of_normal_images_are_taken(tmp_path: Path, names: tuple[str, ...], given: list[str]) -> None:
    touch(*(tmp_path / name for name in names))
    check(*(tmp_path / name for name in given))
