"""Banks of pictures and their views: what they hold, and that a picture's views are never its neighbors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector, Extraction, InputError, Method, Run, add, fit, score_folder
from spade_faiss.cli import main
from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.pictures import load_views, to_input
from spade_faiss.features.views import view_id
from spade_faiss.report.normals import NormalPictures
from spade_faiss.workflows import extract
from tests.support.backbones import tiny_backbone
from tests.support.pictures import save_png

AUGMENT = "rotate=3,flip,brightness=0.8:1.2"
VIEWS = 8
NAMES = ["a.png", "b.png", "c.png", "d.png"]


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures. Do not change them."""
    folder = tmp_path_factory.mktemp("views") / "good"
    for name in NAMES:
        pixels = np.random.default_rng([*name.encode()]).integers(0, 256, (26, 30, 3))
        save_png(pixels.astype(np.uint8), folder / name)
    return folder


def bank_of(folder: Path, paths: list[Path], tiny: Backbone, augment: str | None = AUGMENT) -> Bank:
    extraction = Extraction(backbone=tiny, augment=augment, store="float32")
    return fit(paths, bank=folder, preset="spade", extraction=extraction, calibrate=False).bank


def test_the_bank_holds_each_picture_and_its_views(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    paths = [good / name for name in NAMES]
    bank = bank_of(tmp_path / "bank", paths, tiny)
    assert (len(bank), len(bank.pictures), bank.pictures.largest) == (4 * VIEWS, 4, VIEWS)
    assert bank.pictures.ids == NAMES
    assert bank.pictures.originals.tolist() == [0, VIEWS, 2 * VIEWS, 3 * VIEWS]
    assert bank.manifest.augment == Augmentation.parse(AUGMENT)
    row = 0
    for name, path in zip(NAMES, paths, strict=True):
        loaded, views = load_views(ImageRecord(name, path), tiny.source.preprocess, Augmentation.parse(AUGMENT))
        for entry, picture in [(name, loaded.picture), *((view_id(name, view.name), view.picture) for view in views)]:
            assert bank.ids[row] == entry
            embedding, levels = tiny(to_input(picture, tiny.source.preprocess)[None])
            np.testing.assert_allclose(bank.embedding(np.array([row])), embedding, rtol=1e-4, atol=1e-6)
            for level, maps in levels.items():
                np.testing.assert_allclose(bank.level_map(level, row), maps[0], rtol=1e-4, atol=1e-5)
            row += 1
        assert bank.sha256_of[name] == loaded.sha256
        assert bank.image_path(name) == path


def test_a_picture_is_scored_as_against_a_bank_without_it(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    """Bit for bit, with all of its views gone: the nearest of them would be next to itself."""
    method = Method(k_image=3, k_gallery=4)
    bank = bank_of(tmp_path / "bank", [good / name for name in NAMES], tiny)
    detector = Detector.open(bank.path, method=method, backbone=tiny)
    found = detector.score_rows(bank.pictures.originals.tolist())
    assert found.ids == NAMES
    query = bank.read(bank.pictures.originals)
    for number, name in enumerate(NAMES):
        without = Bank.create(tmp_path / f"without {name}", bank.layout)
        others = np.flatnonzero(bank.pictures.of(np.arange(len(bank))) != number)
        without.append(replace(bank.read(others), source=None))
        one = replace(query[number : number + 1], source=None, pictures=())
        expected = Detector.open(without.path, method=method).score_features(one)
        np.testing.assert_array_equal(found.image_score[number], expected.image_score[0])
        np.testing.assert_array_equal(found.maps[number], expected.maps[0])
        assert found.neighbor_ids[number].tolist() == expected.neighbor_ids[0].tolist()
        assert name not in found.neighbor_ids[number]


def test_add_makes_the_views_that_the_bank_was_made_with(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    whole = bank_of(tmp_path / "whole", [good / name for name in NAMES], tiny)
    grown = bank_of(tmp_path / "grown", [good / name for name in NAMES[:2]], tiny)
    done = add([good / name for name in NAMES], bank=grown.path, backbone=tiny)
    assert (done.added, done.present) == (2, 2)
    assert done.bank.ids == whole.ids
    assert done.bank.pictures.names(np.arange(len(whole))) == whole.pictures.names(np.arange(len(whole)))
    for row in range(len(whole)):
        np.testing.assert_allclose(done.bank.level_map("fine", row), whole.level_map("fine", row), rtol=1e-4, atol=1e-5)
    for augment in (None, "flip"):
        with pytest.raises(InputError, match=f"has augment={AUGMENT}, asked for {augment or 'none'}"):
            bank_of(tmp_path / "whole", [good / NAMES[0]], tiny, augment)


@pytest.mark.parametrize("batch", [1, 5, 16, 100])
def test_views_of_a_picture_stay_together(
    good: Path, tmp_path: Path, tiny: Backbone, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few inputs the network takes at once, a shard holds whole pictures: an interruption leaves no half ones."""
    taken: list[int] = []
    call = Backbone.__call__

    def noted(self: Backbone, x: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        taken.append(len(x))
        return call(self, x)

    monkeypatch.setattr(extract, "BATCH_SIZE", batch)
    monkeypatch.setattr(extract, "SHARD_BYTES", 1)
    monkeypatch.setattr(Backbone, "__call__", noted)
    bank = bank_of(tmp_path / "bank", [good / name for name in NAMES], tiny)
    assert max(taken[-4:]) <= batch
    assert [shard.count % VIEWS for shard in bank.manifest.shards] == [0] * len(bank.manifest.shards)
    assert len(bank) == 4 * VIEWS


def test_views_take_room_in_the_memory_budget(tiny: Backbone) -> None:
    """As many as an image has are in memory at once."""
    budget = (64 << 20) + 16 * 25 * 24 * 24 * 3 * 4
    assert extract._batch_size(tiny, Run(memory=budget), views=16) == 16
    assert extract._batch_size(tiny, Run(memory=budget), views=17) == 1


def test_queries_have_no_views_and_results_name_pictures(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    bank = bank_of(tmp_path / "bank", [good / name for name in NAMES], tiny)
    method = Method(k_image=5, k_gallery=5)
    detector = Detector.open(bank.path, method=method, backbone=tiny)
    score_folder(good, bank=detector, out=tmp_path / "out")
    lines = (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert "//" not in "".join(lines)
    found = detector.score([good / "b.png"])
    assert found.ids == ["b.png"]
    assert found.neighbor_ids[0, 0] == "b.png"
    assert set(found.neighbor_ids[0]) <= set(NAMES)


def test_the_report_shows_the_view_that_was_matched(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    bank = bank_of(tmp_path / "bank", [good / "a.png"], tiny)
    shown = NormalPictures(bank)
    loaded, views = load_views(ImageRecord("a.png", good / "a.png"), tiny.source.preprocess, Augmentation.parse(AUGMENT))
    for row, picture in enumerate([loaded.picture, *(view.picture for view in views)]):
        np.testing.assert_array_equal(shown("a.png", row).picture, picture)
    np.testing.assert_array_equal(shown("a.png").picture, loaded.picture)


def test_a_picture_that_is_removed_takes_its_views_along(good: Path, tmp_path: Path, tiny: Backbone) -> None:
    bank = bank_of(tmp_path / "bank", [good / name for name in NAMES], tiny)
    assert bank.remove(["b.png"]) == 1
    assert len(bank) == 3 * VIEWS
    again = add([good / "b.png"], bank=bank.path, backbone=tiny)
    assert (again.added, again.removed) == (0, ("b.png",))
    bank.compact()
    assert add([good / "b.png"], bank=bank.path, backbone=tiny).added == 1


def test_info_counts_images_and_entries(good: Path, tmp_path: Path, tiny: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    bank = bank_of(tmp_path / "bank", [good / name for name in NAMES], tiny)
    assert main(["info", str(bank.path)]) == 0
    text = capsys.readouterr().out
    assert f"4 normal images ({4 * VIEWS} entries)" in text
    assert f"views      {AUGMENT}: {VIEWS} entries of each image" in text
    assert "add 4 images" in text
    assert main(["info", str(bank.path), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["images"], numbers["entries"]) == (4, 4 * VIEWS)
    assert numbers["augment"] == {"rotate": 3, "flip": True, "brightness": [0.8, 1.2]}


def test_the_command_line_names_what_is_wrong_with_an_augmentation(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", str(good), "--bank", str(tmp_path / "bank"), "--augment", "rotate=8,shear=2"]) != 0
    assert "'shear=2' is none of rotate=N, flip and brightness=A:B" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()
