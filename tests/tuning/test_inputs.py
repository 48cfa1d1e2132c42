"""Inputs that are compared: the same spoilt copies in each of them, and a choice that is paired, limited and resumable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.settings import Run, Tuning
from spade_faiss.features import placement
from spade_faiss.features.datasets import ImageRecord, survey
from spade_faiss.features.placement import place
from spade_faiss.tuning import inputs, search
from spade_faiss.tuning.feature_files import load_features
from spade_faiss.tuning.inputs import Input, search_inputs
from spade_faiss.tuning.picture_grid import SIDE
from spade_faiss.tuning.samples import Copies, make_samples
from spade_faiss.tuning.search import Cost, Question, TooFewPicturesError
from tests.support.backbones import tiny_backbone
from tests.support.pictures import save_png

CROP = Preprocess(size=32)
LETTERBOX = Preprocess(resize_mode="letterbox", size=32)
LARGE = Preprocess(resize_mode="letterbox", size=(48, 64))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes whose edges are half a picture. Do not change them."""
    folder = tmp_path_factory.mktemp("inputs") / "good"
    for number in range(12):
        rng = np.random.default_rng(number)
        rows = np.full((60, 90, 3), 90.0) + 40 * (np.arange(90) // 6 % 2)[:, None] + rng.normal(0, 2, (60, 90, 3))
        save_png(rows.clip(0, 255).astype(np.uint8), folder / f"{number:02}.png")
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MOST_SPOILT", 8)
    monkeypatch.setattr(inputs, "_COPIES", 40)


def inputs_of(work: Path, records: Sequence[ImageRecord], preprocesses: Sequence[Preprocess]) -> list[Input]:
    return [
        Input(
            backbone=tiny_backbone(number // 3, f"tiny{number // 3}", each),
            folder=work / str(number),
            question=Question(records=records),
        )
        for number, each in enumerate(preprocesses)
    ]


def test_copies_are_the_same_pixels_in_every_input(good: Path, tmp_path: Path) -> None:
    records, several = survey(good).records, (LETTERBOX, LARGE, CROP)
    made = [
        make_samples(
            tmp_path / str(n) / "s", tiny_backbone(0, "t", each), records, Copies(pictures=6, each=4, seed=3), Run(), several
        )
        for n, each in enumerate(several)
    ]
    *others, (first, _) = made
    assert first.in_picture is not None
    assert first.in_picture.masks is not None
    assert first.in_picture.masks.shape == (len(first.spoilt), SIDE, SIDE)
    assert first.in_picture.spoilt_sizes == [(90, 60)] * len(first.spoilt)
    for samples, _ in others:
        assert samples.in_picture is not None
        assert samples.in_picture.masks is not None
        assert samples.spoils == first.spoils
        assert samples.spoilt.ids == first.spoilt.ids
        np.testing.assert_array_equal(samples.rows, first.rows)
        np.testing.assert_array_equal(samples.owner, first.owner)
        np.testing.assert_array_equal(samples.in_picture.masks, first.in_picture.masks)
    hidden = ~first.seen
    assert 0 < hidden.sum() < len(hidden) / 2, "some lie where the crop does not look"
    assert others[0][0].seen.all()
    # And a defect that the crop shows lies where it lies in the picture.
    where = place(90, 60, CROP)
    columns = (np.arange(SIDE) + 0.5) * where.resized[0] / SIDE + where.offset[0]
    shown = (columns >= 0) & (columns < 32)
    for own, grid in zip(first.masks if first.masks is not None else [], first.in_picture.masks, strict=True):
        assert own.any() == (grid[:, shown].any() and own.any())


def test_alone_an_input_is_spoilt_where_it_looks(good: Path, tmp_path: Path) -> None:
    records = survey(good).records
    samples, _ = make_samples(tmp_path / "s", tiny_backbone(0, "t", CROP), records, Copies(pictures=6, each=4, seed=3), Run())
    assert samples.seen.all()
    assert samples.in_picture is None


def test_what_shows_more_of_a_picture_is_chosen_and_again_without_work(
    good: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the pictures lies beside the crop: that the letterbox sees it is sure. Told again from what was kept."""
    monkeypatch.setattr(inputs, "_COPIES", 160)
    monkeypatch.setattr(inputs, "_MOST_EACH", 20)
    whole = Preprocess(resize_mode="letterbox", size=(60, 90))
    several = inputs_of(tmp_path, survey(good).records, (Preprocess(size=60, resize=60), whole))
    found = search_inputs(several, Tuning(), Run())
    assert found is not None
    assert found.names == ["tiny0; crop 60 of 60", "tiny0; letterbox 60x90"]
    assert found.table.seen is not None
    assert 0.5 < found.table.seen[0].mean() < 0.95
    assert found.table.seen[1].all()
    assert (found.table.areas[0][~found.table.seen[0]] == 0).all(), "what is hidden is not found"
    assert found.input is several[1]
    assert found.image.sure[1] or found.maps.sure[1]
    assert found.chosen.reason.startswith("tiny0; letterbox 60x90 ")
    assert all(ms > 0 for ms in found.forward_ms)
    monkeypatch.setattr(inputs, "forward_ms", lambda kept, *_: 1.0 if kept.exists() else None)
    monkeypatch.setattr("spade_faiss.tuning.picture_stream.FeatureStream", None)
    monkeypatch.setattr("spade_faiss.tuning.trials._try", None)
    again = search_inputs(several, Tuning(), Run())
    assert again is not None
    assert again.chosen == found.chosen
    np.testing.assert_array_equal(again.table.areas, found.table.areas)


def test_limits_count_the_network_and_what_a_picture_takes(good: Path, tmp_path: Path, few: None) -> None:
    several = inputs_of(tmp_path, survey(good).records, (CROP, LETTERBOX, LARGE))
    found = search_inputs(several, Tuning(), Run())
    assert found is not None
    sizes = [trial.bytes for trial in found.trials]
    assert sizes[2] > sizes[0]
    small = search_inputs(several, Tuning(max_bytes=(sizes[1] + sizes[2]) / 2), Run())
    assert small is not None
    assert small.allowed.tolist() == [True, True, False]
    least = min(found.forward_ms)
    none = search_inputs(several, Tuning(max_ms=least), Run())
    assert none is not None
    assert not none.allowed.any(), "the search comes on top of the network"
    assert none.chosen.option == 0
    assert "max_ms=" in none.chosen.reason


def test_the_network_counts_beside_the_search() -> None:
    cost = Cost(forward_ms=5, search_ms=1, bytes=10)
    assert cost.beyond(Tuning(max_ms=6, max_bytes=10)) == ""
    assert cost.beyond(Tuning(max_ms=5.5)) == "6.0 ms an image (max_ms=5.5)"
    assert cost.beyond(Tuning(max_ms=5.5, max_bytes=9)) == "6.0 ms an image (max_ms=5.5) and 10 bytes an image (max_bytes=9)"


def test_networks_whose_levels_have_other_sizes_are_compared(good: Path, tmp_path: Path, few: None) -> None:
    several = inputs_of(tmp_path, survey(good).records, (CROP, LARGE))
    several = [several[0], replace(several[1], backbone=tiny_backbone(1, "other", LARGE))]
    found = search_inputs(several, Tuning(seed=2), Run())
    assert found is not None
    assert found.names == ["tiny0; crop 32", "other; letterbox 48x64"]
    assert found.table.areas.shape[0] == 2


def test_the_budget_leaves_out_what_it_has_no_time_for(good: Path, tmp_path: Path, few: None) -> None:
    several = inputs_of(tmp_path, survey(good).records, (CROP, LETTERBOX, LARGE))
    assert search_inputs(several, Tuning(), Run(), deadline=time.monotonic()) is None
    assert search_inputs(several[:1], Tuning(), Run()) is None


def test_pictures_that_cannot_be_read_are_skipped_in_all_inputs_alike(good: Path, tmp_path: Path, few: None) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "03.png").write_bytes(b"no picture")
    several = inputs_of(tmp_path / "work", survey(folder).records, (CROP, LETTERBOX))
    found = search_inputs(several, Tuning(), Run(max_skipped=1))
    assert found is not None
    assert found.table.normal.shape[1] == 8
    with pytest.raises(InputError, match=r"1 images were skipped, at most 0 may be: '03\.png'"):
        search_inputs(inputs_of(tmp_path / "none", survey(folder).records, (CROP, LETTERBOX)), Tuning(), Run(max_skipped=0))
    for name in ("04.png", "05.png"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(TooFewPicturesError, match="9 normal pictures are too few"):
        search_inputs(inputs_of(tmp_path / "few", survey(folder).records, (CROP, LETTERBOX)), Tuning(), Run())
    assert search.LEAST_PICTURES == 10


def test_a_picture_that_one_input_cannot_take_is_left_out_of_all(
    good: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too thin to be cropped, but a letterbox shows it."""
    monkeypatch.setattr(placement, "MAX_PIXELS", 100_000)
    folder = tmp_path / "good"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_png(np.zeros((1, 1000, 3), np.uint8), folder / "thin.png")
    with pytest.raises(InputError, match="too thin"):
        place(1000, 1, CROP)
    several = inputs_of(tmp_path / "work", survey(folder).records, (LETTERBOX, CROP))
    found = search_inputs(several, Tuning(), Run(max_skipped=1))
    assert found is not None
    assert [len(batch) for batch in map(load_features, sorted((tmp_path / "work").glob("*/references-1024")))] == [13, 12]
