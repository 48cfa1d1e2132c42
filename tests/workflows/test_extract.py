"""Images to bank: what is in the bank is what the network says, once each, however often it was interrupted."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image

import spade_faiss.workflows.extract as extract
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.files import hash_file
from spade_faiss.core.presets import load_preset
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features import stream
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import ImageRecord, find_images
from spade_faiss.features.layout import Layout, prepare
from spade_faiss.features.loading import load_backbone
from spade_faiss.features.pictures import LoadedImage, load_views, to_input, to_picture
from spade_faiss.features.placement import place
from spade_faiss.features.stream import FeatureStream
from spade_faiss.features.views import View
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.search.recipe import load_recipe
from spade_faiss.workflows.fit import Fit, fit
from tests.support.pictures import HEIGHT, NORMALS, WIDTH, save_png


@pytest.fixture
def good(dataset_folder: Path, tmp_path: Path) -> Path:
    """A copy of the 24 normals that a test may change."""
    return Path(shutil.copytree(dataset_folder / "train" / "good", tmp_path / "good"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 5, the last of them short, each of them a shard."""
    monkeypatch.setattr(extract, "BATCH_SIZE", 5)
    monkeypatch.setattr(extract, "SHARD_BYTES", 1)


class Forwarded:
    """Counts the images that go through the network, and may interrupt it."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.interrupt_at: int | None = None

    @property
    def images(self) -> int:
        return sum(self.batches)


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> Forwarded:
    counter = Forwarded()
    call = Backbone.__call__

    def counted(self: Backbone, x: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        if len(counter.batches) + 1 == counter.interrupt_at:
            counter.interrupt_at = None
            raise KeyboardInterrupt
        counter.batches.append(len(x))
        return call(self, x)

    monkeypatch.setattr(Backbone, "__call__", counted)
    return counter


def directly(backbone: Backbone, paths: list[Path], layout: Layout) -> FeatureBatch:
    """The features of image files, step by step and all at once."""
    preprocess = backbone.source.preprocess
    images = [Image.open(path).convert("RGB") for path in paths]
    pictures = [to_picture(image, place(*image.size, preprocess)) for image in images]
    embedding, levels = backbone(np.stack([to_input(picture, preprocess) for picture in pictures]))
    return prepare(FeatureBatch([path.name for path in paths], embedding, levels), layout)


def assert_same_features(one: Bank, other: Bank) -> None:
    """Equal features by id, up to what the network's own batch size changes; the order of rows is left open."""
    assert sorted(one.ids) == sorted(other.ids)
    rows = np.array([other.ids.index(name) for name in one.ids])
    np.testing.assert_allclose(
        one.embedding(np.arange(len(one))), other.embedding(rows), rtol=1e-4, atol=1e-4 * float(one.embedding(rows).max())
    )
    for level in one.layout.levels:
        for row, twin in enumerate(rows):
            found, expected = one.level_map(level.name, row), other.level_map(level.name, int(twin))
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3 * float(expected.max()))


def test_the_bank_holds_the_features_of_every_image(fitted_bank: Path, dataset_folder: Path, backbone: Backbone) -> None:
    bank = Bank.open(fitted_bank)
    paths = sorted((dataset_folder / "train" / "good").iterdir())
    assert bank.ids == [path.name for path in paths]
    assert len(bank) == NORMALS
    assert bank.manifest.source == backbone.source
    assert bank.layout == Layout(levels=backbone.levels, embedding_dim=1280, input_size=(64, 64), dtype="float16")
    expected = directly(backbone, paths, bank.layout)
    for row, path in enumerate(paths):
        assert bank.image_path(path.name) == path.resolve()
        assert bank.sha256_of[path.name] == hash_file(path)
        for name, maps in expected.levels.items():
            found = bank.level_map(name, row)
            assert found.dtype == np.float16
            np.testing.assert_allclose(found, maps[row], rtol=2e-3, atol=1e-3 * float(maps.max()))
    np.testing.assert_allclose(bank.embedding(np.arange(NORMALS)), expected.embedding, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"store": "float32"}, {"normalize": "l2"}, {"pool": 3}])
def test_the_banks_settings_are_applied(good: Path, tmp_path: Path, backbone: Backbone, settings: dict[str, Any]) -> None:
    paths = sorted(good.iterdir())[:3]
    bank = fit(paths, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone, **settings)).bank
    for name, value in settings.items():
        assert str(getattr(bank.layout, name)) == str(value)
    expected = directly(backbone, paths, bank.layout)
    for row in range(3):
        for name, maps in expected.levels.items():
            assert bank.level_map(name, row).dtype == maps.dtype
            np.testing.assert_allclose(bank.level_map(name, row), maps[row], rtol=2e-3, atol=1e-3 * float(maps.max()))


def test_what_fit_reports(good: Path, tmp_path: Path, backbone: Backbone) -> None:
    (good / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    result = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert isinstance(result, Fit)
    assert (result.added, result.present, result.index) == (NORMALS, 0, None)
    assert [item.id for item in result.skipped] == ["broken.png"]
    assert result.bank.ids == Bank.open(tmp_path / "bank").ids
    assert {"check", "decode", "forward", "prepare", "write"} <= set(result.timing_s)
    assert all(seconds >= 0 for seconds in result.timing_s.values())
    assert result.timing_s["forward"] < result.total_s


@pytest.mark.usefixtures("small_batches")
def test_images_come_in_batches_and_shards_with_a_short_last_one(
    good: Path, tmp_path: Path, backbone: Backbone, forwarded: Forwarded
) -> None:
    bank = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone)).bank
    assert forwarded.batches == [5, 5, 5, 5, 4]
    assert [shard.count for shard in bank.manifest.shards] == [5, 5, 5, 5, 4]
    assert bank.ids == sorted(path.name for path in good.iterdir())


def test_small_batches_are_gathered_into_one_shard(
    good: Path, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, fitted_bank: Path
) -> None:
    monkeypatch.setattr(extract, "BATCH_SIZE", 7)
    bank = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone)).bank
    assert [shard.count for shard in bank.manifest.shards] == [NORMALS]
    assert_same_features(bank, Bank.open(fitted_bank))


# ---- again and again


def test_a_second_run_extracts_nothing(
    fitted_bank: Path, good: Path, tmp_path: Path, backbone: Backbone, forwarded: Forwarded
) -> None:
    path = Path(shutil.copytree(fitted_bank, tmp_path / "bank"))
    result = fit(good, bank=path, preset="spade", extraction=Extraction(backbone=backbone))
    assert (result.added, result.present, result.skipped) == (0, NORMALS, ())
    assert forwarded.images == 0
    assert result.bank.manifest == Bank.open(fitted_bank).manifest


def test_images_that_are_new_are_added(
    fitted_bank: Path, dataset_folder: Path, good: Path, tmp_path: Path, backbone: Backbone, forwarded: Forwarded
) -> None:
    path = Path(shutil.copytree(fitted_bank, tmp_path / "bank"))
    for image in (dataset_folder / "test" / "good").iterdir():
        shutil.copy(image, good / f"a-{image.name}")
    result = fit(good, bank=path, preset="spade", extraction=Extraction(backbone=backbone))
    assert (result.added, result.present) == (6, NORMALS)
    assert forwarded.images == 6
    assert result.bank.ids[:NORMALS] == Bank.open(fitted_bank).ids
    assert result.bank.ids[NORMALS:] == [f"a-{n:03d}.png" for n in range(6)]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_an_interrupted_run_goes_on_where_it_stopped(
    good: Path, tmp_path: Path, backbone: Backbone, forwarded: Forwarded, fitted_bank: Path, batch: int
) -> None:
    forwarded.interrupt_at = batch
    with pytest.raises(KeyboardInterrupt):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    # What was computed before is committed, not lost.
    assert len(Bank.open(tmp_path / "bank")) == forwarded.images == 5 * (batch - 1)
    result = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert forwarded.images == NORMALS
    assert (result.added, result.present) == (NORMALS - 5 * (batch - 1), 5 * (batch - 1))
    assert_same_features(result.bank, Bank.open(fitted_bank))
    fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert forwarded.images == NORMALS


@pytest.mark.usefixtures("small_batches")
def test_a_shard_that_cannot_be_written_ends_the_run_and_is_made_up_for(
    good: Path, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = Bank.append_prepared, []

    def failing(self: Bank, batch: FeatureBatch, *, product: str = "") -> None:
        calls.append(len(batch))
        if len(calls) == 2:
            raise OSError("no space left on device")
        append(self, batch, product=product)

    monkeypatch.setattr(Bank, "append_prepared", failing)
    with pytest.raises(OSError, match="no space left"):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    held = Bank.open(tmp_path / "bank").ids
    assert 5 <= len(held) < NORMALS
    assert "005.png" not in held
    result = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert sorted(result.bank.ids) == sorted(path.name for path in good.iterdir())


def test_another_image_of_a_name_that_is_taken_is_an_error(
    fitted_bank: Path, good: Path, tmp_path: Path, backbone: Backbone
) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "bank")
    shutil.copy(good / "004.png", good / "003.png")
    with pytest.raises(InputError, match=r"holds another image named '003\.png', from .*weave/train/good/003\.png; rename"):
        fit(good, bank=bank, preset="spade", extraction=Extraction(backbone=backbone))


def test_an_image_that_has_changed_since_is_an_error(good: Path, tmp_path: Path, backbone: Backbone) -> None:
    path = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone)).bank.path
    before, held = hash_file(good / "003.png"), Bank.open(path).manifest
    shutil.copy(good / "004.png", good / "003.png")
    with pytest.raises(
        InputError, match=rf"003\.png has changed since .* \(sha256 {before}, now {hash_file(good / '003.png')}\)"
    ):
        fit(good, bank=path, preset="spade", extraction=Extraction(backbone=backbone))
    assert Bank.open(path).manifest == held


def test_other_settings_on_a_bank_are_refused_with_both_values(
    fitted_bank: Path, good: Path, tmp_path: Path, backbone: Backbone
) -> None:
    path = Path(shutil.copytree(fitted_bank, tmp_path / "bank"))
    wanted: list[tuple[dict[str, Any], str]] = [
        ({"store": "float32"}, "has store='float16', asked for 'float32'"),
        ({"normalize": "l2"}, "has normalize='none', asked for 'l2'"),
        ({"pool": 3}, "has pool=1, asked for 3"),
    ]
    for settings, message in wanted:
        with pytest.raises(InputError, match=message):
            fit(good, bank=path, preset="spade", extraction=Extraction(backbone=backbone, **settings))
    other = load_backbone("efficientnet_lite0", preprocess=Preprocess(resize_mode="stretch", resize=72, size=64))
    with pytest.raises(InputError, match=r"preprocess\.resize_mode='crop', these features with 'stretch'"):
        fit(good, bank=path, preset="spade", extraction=Extraction(backbone=other))
    assert Bank.open(path).manifest == Bank.open(fitted_bank).manifest


def test_a_name_with_weights_and_settings_of_its_own(good: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "w.pt")
    bank = fit(
        [good / "000.png"],
        bank=tmp_path / "bank",
        preset="spade",
        extraction=Extraction(
            backbone="timm:test_resnet", precision="bfloat16", preprocess=Preprocess(resize_mode="stretch", resize=64, size=64)
        ),
        run=Run(weights=tmp_path / "w.pt"),
    ).bank
    source = bank.manifest.source
    assert source is not None
    assert (source.backbone, source.precision, source.preprocess.resize_mode) == ("timm:test_resnet", "bfloat16", "stretch")
    # Where a query loads them from; a path that does not depend on the current folder.
    assert bank.manifest.weights_file == str((tmp_path / "w.pt").resolve())
    with pytest.raises(NotFoundError, match=r"no weights file at .*missing\.pt"):
        fit(
            good,
            bank=tmp_path / "other",
            preset="spade",
            extraction=Extraction(backbone="timm:test_resnet"),
            run=Run(weights=tmp_path / "missing.pt"),
        )
    assert not (tmp_path / "other").exists()


def test_the_recipes_index_is_built(good: Path, tmp_path: Path, backbone: Backbone) -> None:
    result = fit(
        sorted(good.iterdir())[:5],
        bank=tmp_path / "bank",
        preset=replace(load_preset("spade"), recipe="hnsw"),
        extraction=Extraction(backbone=backbone),
    )
    assert result.index is not None
    assert result.index.image is not None
    assert result.index.gallery is None
    assert (result.index.recipe, result.index.image.count) == ("hnsw", 5)
    assert ImageIndex.open(Bank.open(tmp_path / "bank"), load_recipe("hnsw")).indexed == 5
    with pytest.raises(NotFoundError, match="no recipe 'nothing'"):
        fit(
            good,
            bank=tmp_path / "other",
            preset=replace(load_preset("spade"), recipe="nothing"),
            extraction=Extraction(backbone=backbone),
        )
    assert not (tmp_path / "other").exists()


# ---- images that cannot be read


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])


@pytest.mark.usefixtures("small_batches")
def test_corrupt_images_are_left_out_counted_and_named(
    good: Path, tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    broken = ["005.png", "006.png", "007.png", "008.png", "009.png", "023.png"]  # a whole batch, and the last image
    spoil(good, *broken)
    with caplog.at_level(logging.WARNING, logger="spade_faiss"):
        result = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert [item.id for item in result.skipped] == broken
    for item in result.skipped:
        assert str(good / item.id) in item.reason
        assert any(item.id in record.getMessage() for record in caplog.records)
    assert result.added == NORMALS - len(broken)
    assert result.bank.ids == sorted({path.name for path in good.iterdir()} - set(broken))


def test_more_corrupt_images_than_allowed_end_the_run(good: Path, tmp_path: Path, backbone: Backbone) -> None:
    spoil(good, "001.png", "011.png", "021.png")
    with pytest.raises(InputError, match=r"3 images were skipped, at most 2 may be: '001\.png' .*--max-skipped 3"):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone), run=Run(max_skipped=2))
    # What came before is kept; with a higher limit the same run goes on.
    assert len(Bank.open(tmp_path / "bank")) == 14
    result = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone), run=Run(max_skipped=3))
    assert (result.present, result.added, len(result.skipped)) == (14, 7, 3)


def test_a_second_run_over_corrupt_images_is_no_error(good: Path, tmp_path: Path, backbone: Backbone) -> None:
    """All that is left to extract is what cannot be read: the command that worked once must work again."""
    spoil(good, "002.png", "004.png")
    first = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    second = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert (second.added, second.present) == (0, NORMALS - 2)
    assert second.skipped == first.skipped
    with pytest.raises(InputError, match="2 images were skipped, at most 1 may be"):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone), run=Run(max_skipped=1))


def test_nothing_but_corrupt_images_is_an_error(good: Path, tmp_path: Path, backbone: Backbone) -> None:
    paths = [good / "000.png", good / "001.png"]
    spoil(good, "000.png", "001.png")
    with pytest.raises(InputError, match=r"none of the 2 images could be read; the first: cannot use .*000\.png"):
        fit(paths, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    for path in good.iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="11 images were skipped, at most 10 may be"):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))


@pytest.mark.parametrize("content", [[], ["notes.txt"]])
def test_a_folder_without_images_writes_nothing(tmp_path: Path, backbone: Backbone, content: list[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in content:
        (folder / name).touch()
    with pytest.raises(InputError, match="no image in"):
        fit(folder, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    with pytest.raises(NotFoundError, match="does not exist"):
        fit(tmp_path / "missing", bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_images_of_every_kind_in_one_folder(tmp_path: Path, backbone: Backbone) -> None:
    """The same gray picture in eight ways to store it gives the same features."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    gray = (128 + 100 * np.sin(x / 5) * np.cos(y / 7)).astype(np.uint8)
    rgb = np.repeat(gray[..., None], 3, axis=2)
    folder = tmp_path / "mixed"
    save_png(gray, folder / "gray.png")
    save_png(rgb, folder / "rgb.png")
    save_png(np.dstack([rgb, np.full_like(gray, 255)]), folder / "rgba.png")
    save_png(gray.astype(np.uint16) * 257, folder / "deep.png")
    Image.fromarray(gray).convert("P").save(folder / "sub.palette.png")
    Image.fromarray(gray).save(folder / "gray.tif")
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "deep.tif")
    Image.fromarray(rgb).save(folder / "rgb.bmp")
    bank = fit(folder, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone, store="float32")).bank
    assert len(bank) == 8
    embedding = bank.embedding(np.arange(8))
    np.testing.assert_allclose(embedding, np.repeat(embedding[:1], 8, axis=0), rtol=1e-4, atol=1e-4)


# ---- the stream


def stream_of(folder: Path, backbone: Backbone, **settings: Any) -> tuple[FeatureStream, Generator[stream.Extracted]]:
    root, records = find_images(folder)
    run = Run(max_skipped=settings.pop("max_skipped", Run.max_skipped))
    stream = FeatureStream(backbone, run, timings=Timings(), batch_size=vars(extract)["BATCH_SIZE"], **settings)
    parts = stream(root, records, "extract")
    assert isinstance(parts, Generator)
    return stream, parts


def test_letterboxed_images_come_with_their_valid_region(tmp_path: Path) -> None:
    preprocess = Preprocess(resize_mode="letterbox", resize=64, size=64)
    backbone = load_backbone("efficientnet_lite0", preprocess=preprocess)
    rng = np.random.default_rng(0)
    sizes = {"flat.png": (90, 30), "high.png": (20, 60), "square.png": (50, 50)}
    for name, (width, height) in sizes.items():
        save_png(rng.integers(0, 255, (height, width, 3)).astype(np.uint8), tmp_path / name)
    (extracted,) = stream_of(tmp_path, backbone)[1]
    assert [item.placement.original for item in extracted.loaded] == list(sizes.values())
    valid = extracted.batch.valid
    assert valid is not None
    assert valid.shape == (3, 64, 64)
    for row, size in enumerate(sizes.values()):
        np.testing.assert_array_equal(valid[row], place(*size, backbone.source.preprocess).valid)
    # 64 x 21 pixels of 64 x 64, then 21 x 64, then all.
    assert valid.sum(axis=(1, 2)).tolist() == [64 * 21, 21 * 64, 64 * 64]


@pytest.mark.usefixtures("small_batches")
def test_letterboxed_images_go_into_a_bank_of_several_batches(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "SHARD_BYTES", 1 << 30)
    backbone = load_backbone("efficientnet_lite0", preprocess=Preprocess(resize_mode="letterbox", resize=64, size=64))
    bank = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone)).bank
    assert [shard.count for shard in bank.manifest.shards] == [NORMALS]


@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
def test_other_resize_modes_show_the_image_everywhere(dataset_folder: Path, resize_mode: str) -> None:
    backbone = load_backbone("efficientnet_lite0", preprocess=Preprocess(resize_mode=resize_mode, resize=72, size=64))
    (extracted,) = stream_of(dataset_folder / "test" / "good", backbone)[1]
    assert extracted.batch.valid is None
    assert len(extracted.batch) == len(extracted.records) == 6


@pytest.mark.usefixtures("small_batches")
def test_paths_are_relative_to_the_root(dataset_folder: Path, backbone: Backbone) -> None:
    for extracted in stream_of(dataset_folder / "test", backbone)[1]:
        batch = extracted.batch
        assert batch.root == str((dataset_folder / "test").resolve())
        assert list(batch.ids) == list(batch.paths) == [record.id for record in extracted.records]
        assert all("/" in name for name in batch.ids)
        assert batch.source == backbone.source


@pytest.mark.usefixtures("small_batches")
def test_decoding_runs_ahead_of_the_network_but_not_far(
    good: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches at most: a folder of ten million images must not end up in memory."""
    decoded: list[str] = []

    def noted(record: ImageRecord, *settings: Any, **limits: Any) -> tuple[LoadedImage, list[View]]:
        decoded.append(record.id)
        return load_views(record, *settings, **limits)

    monkeypatch.setattr(stream, "load_views", noted)
    _, parts = stream_of(good, backbone)
    first = next(parts)
    assert len(first.batch) == 5
    assert 5 <= len(decoded) <= 15
    assert sum(len(part.batch) for part in parts) == NORMALS - 5
    assert sorted(decoded) == sorted(path.name for path in good.iterdir())


def test_a_stream_that_is_left_early_ends_its_threads_and_decodes_no_more(
    good: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def slow(record: ImageRecord, *settings: Any, **limits: Any) -> tuple[LoadedImage, list[View]]:
        time.sleep(0.03)
        decoded.append(record.id)
        return load_views(record, *settings, **limits)

    monkeypatch.setattr(stream, "load_views", slow)
    monkeypatch.setattr(extract, "BATCH_SIZE", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    _, parts = stream_of(good, backbone)
    next(parts)
    parts.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    assert len(decoded) <= 9 < NORMALS  # three batches were waiting


def test_the_stream_allows_nothing_readable_only_where_told(tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 1 images could be read"):
        list(stream_of(tmp_path, backbone)[1])
    stream, parts = stream_of(tmp_path, backbone, allow_none=True)
    assert list(parts) == []
    assert [item.id for item in stream.skipped] == ["a.png"]


def test_the_callers_pictures_reach_the_network_as_they_are_resized(good: Path, backbone: Backbone) -> None:
    """A change in one corner of the crop changes that corner of the maps most: nothing is flipped or transposed."""
    picture = np.asarray(Image.open(good / "000.png").convert("RGB")).copy()
    changed: npt.NDArray[np.uint8] = picture.copy()
    changed[8:24, 72:84] = 255  # in the upper right corner of what the crop keeps
    preprocess = backbone.source.preprocess
    placement = place(picture.shape[1], picture.shape[0], preprocess)
    both = np.stack([to_input(to_picture(Image.fromarray(pixels), placement), preprocess) for pixels in (picture, changed)])
    _, maps = backbone(both)
    fine = maps["blocks.1"]
    y, x = np.unravel_index(np.abs(fine[1] - fine[0]).sum(axis=-1).argmax(), fine.shape[1:3])
    assert y < 6
    assert x > 10


@pytest.mark.parametrize(("memory", "size"), [("2GiB", 16), ("80MB", 10), ("69MB", 1), ("1MB", 1)])
def test_a_network_takes_as_many_images_at_once_as_fit(backbone: Backbone, memory: str, size: int) -> None:
    """64 MiB, and 25 times 64 * 64 * 3 * 4 bytes an image. Before, 16 images at once, of any size."""
    assert extract._batch_size(backbone, Run(memory=memory), views=1) == size
