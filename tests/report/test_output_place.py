"""Where results must not go: into images and banks. Fault: `evaluate ds --out ds/test/results`, `--out` = the bank's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spade_faiss import Bank, FeatureBatch
from spade_faiss.core.errors import InputError
from spade_faiss.report.output_place import check_place
from tests.support.banks import batch, make_bank


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    made = make_bank(tmp_path / "parts.bank")
    made.append(batch("a", "b"))
    return made


def test_banks_are_no_place_for_results(tmp_path: Path, bank: Bank) -> None:
    other = shutil.copytree(bank.path, tmp_path / "other.bank")
    (tmp_path / "link").symlink_to(bank.path)
    for out in (
        bank.path,
        bank.path / "results",
        bank.path / "indexes" / "x",
        other,
        other / "deep" / "er",
        tmp_path / "link" / "x",
    ):
        with pytest.raises(InputError, match="lies inside of the bank"):
            check_place(out, bank=bank)
        assert not (tmp_path / "parts.bank" / "results").exists()
    with pytest.raises(InputError, match="holds the bank"):
        check_place(tmp_path, bank=bank)
    check_place(tmp_path / "results", bank=bank)
    check_place(tmp_path / "parts.bank.results", bank=bank)


def test_what_is_scored_is_no_place_for_results(tmp_path: Path, bank: Bank) -> None:
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for out in ("new", "new/results", "new/deep/results", "link/results", "other/../new/x"):
        with pytest.raises(InputError, match="its pictures would be scored the next time"):
            check_place(tmp_path / out, bank=bank, images=[tmp_path / "more", tmp_path / "new"])
    (tmp_path / "new" / "a.png").touch()
    check_place(tmp_path / "new" / "results", bank=bank, images=[tmp_path / "new" / "a.png"])
    with pytest.raises(InputError, match=r"holds .*a.png, which is read"):
        check_place(tmp_path / "new", bank=bank, images=[tmp_path / "new" / "a.png"])
    with pytest.raises(InputError, match=r"holds .*new, which is read"):
        check_place(tmp_path, bank=bank, images=[tmp_path / "new"])


@pytest.mark.parametrize("inside", ["train/good/results", "test/results", "test/good", "ground_truth/x/y"])
def test_a_labeled_set_is_no_place_for_results(tmp_path: Path, bank: Bank, inside: str) -> None:
    (tmp_path / "ds" / "train" / "good").mkdir(parents=True)
    with pytest.raises(InputError, match=r"lies inside of the data set .*ds"):
        check_place(tmp_path / "ds" / inside, bank=bank)
    check_place(tmp_path / "ds" / "results", bank=bank)
    with pytest.raises(InputError, match="holds other files"):
        check_place(tmp_path / "ds", bank=bank)


def test_the_normal_images_are_no_place_for_results(tmp_path: Path) -> None:
    good = tmp_path / "data" / "good"
    good.mkdir(parents=True)

    def features(*names: str) -> FeatureBatch:
        made = batch(*names)
        return FeatureBatch(made.ids, made.embedding, made.levels, paths=[str(good / name) for name in names])

    away = make_bank(tmp_path / "away.bank")
    away.append(features("a.png"))
    for out in (good, good / "results", good / "deep" / "results"):
        with pytest.raises(InputError, match=r"where normal images of the bank are"):
            check_place(out, bank=away)
    check_place(tmp_path / "data" / "results", bank=away)
    # Someone who keeps everything in one folder knows it as the folder of his work.
    beside = make_bank(good / "beside.bank")
    beside.append(features("a.png"))
    check_place(good / "results", bank=beside)
