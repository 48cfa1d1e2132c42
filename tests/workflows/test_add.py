"""Adding images to a bank: each content once, with the bank's own extractor, and nothing that was removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.files import hash_file
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import Duplicate
from spade_faiss.features.layout import Layout
from spade_faiss.workflows import extract
from spade_faiss.workflows.extract import Added, add
from spade_faiss.workflows.fit import fit
from tests.support.backbones import tiny_backbone
from tests.support.banks import (
    assert_holds,
    batch,
    events,
    files,
    make_bank,
)
from tests.support.pictures import save_png


def save_images(folder: Path, *names: str, seed: int = 0) -> Path:
    """Pictures that are determined by the seed and their names."""
    for name in names:
        pixels = np.random.default_rng([seed, *name.encode()]).integers(0, 256, (26, 30, 3))
        save_png(pixels.astype(np.uint8), folder / name)
    return folder


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save_images(tmp_path / "good", "a.png", "b.png", "c.png")


@pytest.fixture
def fitted(good: Path, tmp_path: Path, tiny: Backbone) -> Bank:
    return fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=tiny)).bank


def numbers_of(done: Added) -> tuple[int, int, tuple[str, ...], int]:
    return done.added, done.present, done.removed, len(done.duplicates)


def test_added_images_are_in_the_bank(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    more = save_images(tmp_path / "more", "d.png", "e.png")
    done = add(more, bank=fitted.path, backbone=tiny)
    assert isinstance(done, Added)
    assert numbers_of(done) == (2, 0, (), 0)
    bank = Bank.open(fitted.path)
    assert bank.ids == done.bank.ids == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert bank.image_path("e.png") == more.resolve() / "e.png"
    assert bank.sha256_of["e.png"] == hash_file(more / "e.png")
    at_once = save_images(good, "d.png", "e.png")
    expected = fit(at_once, bank=tmp_path / "at once", preset="spade", extraction=Extraction(backbone=tiny)).bank
    np.testing.assert_allclose(bank.embedding(np.arange(5)), expected.embedding(np.arange(5)), rtol=1e-5, atol=1e-6)
    for level in ("fine", "coarse"):
        for row in range(5):
            np.testing.assert_allclose(bank.level_map(level, row), expected.level_map(level, row), rtol=2e-3, atol=1e-3)
    assert events(bank) == [(1, "add", 3), (2, "add", 2)]


def test_images_that_the_bank_holds_are_left_out(fitted: Bank, good: Path, tiny: Backbone) -> None:
    before = files(fitted.path)
    assert numbers_of(add(good, bank=fitted.path, backbone=tiny)) == (0, 3, (), 0)
    assert files(fitted.path) == before
    save_images(good, "d.png")
    assert numbers_of(add(good, bank=fitted.path, backbone=tiny)) == (1, 3, (), 0)


def test_the_same_content_is_taken_once_and_said(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    more = save_images(tmp_path / "more", "d.png")
    shutil.copy(good / "b.png", more / "0 copy of b.png")
    shutil.copy(more / "d.png", more / "z copy of d.png")
    done = add(more, bank=fitted.path, backbone=tiny)
    assert done.duplicates == (Duplicate("0 copy of b.png", "b.png"), Duplicate("z copy of d.png", "d.png"))
    assert numbers_of(done) == (1, 0, (), 2)
    assert Bank.open(fitted.path).ids == ["a.png", "b.png", "c.png", "d.png"]
    again = add(more, bank=fitted.path, backbone=tiny)
    assert again.duplicates == done.duplicates
    assert numbers_of(again) == (0, 1, (), 2)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_same_content_is_taken_once_over_batches_and_in_a_new_bank(
    tmp_path: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(extract, "BATCH_SIZE", batch_size)
    monkeypatch.setattr(extract, "SHARD_BYTES", 1)
    folder = save_images(tmp_path / "good", "a.png", "d.png")
    for name in ("b.png", "c.png", "e.png"):
        shutil.copy(folder / "a.png", folder / name)
    done = fit(folder, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=tiny))
    assert done.bank.ids == ["a.png", "d.png"]
    assert done.duplicates == tuple(Duplicate(name, "a.png") for name in ("b.png", "c.png", "e.png"))
    assert numbers_of(fit(folder, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=tiny))) == (
        0,
        2,
        (),
        3,
    )


def test_what_was_removed_is_not_taken_in_again(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    """By its name, or by its content under another one: a bad part must not slip in twice."""
    fitted.remove(["b.png"])
    before = files(fitted.path)
    done = add(good, bank=fitted.path, backbone=tiny)
    assert numbers_of(done) == (0, 2, ("b.png",), 0)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(good / "b.png", other / "renamed.png")
    done = add(other, bank=fitted.path, backbone=tiny)
    assert done.duplicates == (Duplicate("renamed.png", "b.png"),)
    assert files(fitted.path) == before
    assert Bank.open(fitted.path).ids == ["a.png", "c.png"]
    fitted.compact()
    assert numbers_of(add(good, bank=fitted.path, backbone=tiny)) == (1, 2, (), 0)
    assert Bank.open(fitted.path).ids == ["a.png", "c.png", "b.png"]


def test_other_content_of_the_same_name_is_refused(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    before = files(fitted.path)
    elsewhere = save_images(tmp_path / "elsewhere", "b.png", "d.png", seed=1)
    with pytest.raises(
        InputError, match=r"holds another image named 'b\.png', from .*good/b\.png; rename this one, .*elsewhere/b"
    ):
        add(elsewhere, bank=fitted.path, backbone=tiny)
    digest = hash_file(good / "b.png")
    save_images(good, "b.png", seed=2)
    with pytest.raises(InputError, match=rf"b\.png has changed since the bank .* took it \(sha256 {digest}, now "):
        add(good, bank=fitted.path, backbone=tiny)
    fitted.remove(["b.png"])
    with pytest.raises(InputError, match="it was removed: compact the bank to forget it"):
        add(good, bank=fitted.path, backbone=tiny)
    fitted.restore(["b.png"])
    assert {name: content for name, content in files(fitted.path).items() if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }


def test_only_the_banks_own_extractor_adds_to_it(fitted: Bank, good: Path, tmp_path: Path) -> None:
    before = files(fitted.path)
    more = save_images(tmp_path / "more", "d.png")
    with pytest.raises(InputError, match="was made with your own backbone 'tiny'; pass it as backbone="):
        add(more, bank=fitted.path, run=Run(engine="torch"))
    with pytest.raises(InputError, match="was extracted with backbone='tiny', these features with 'other'"):
        add(more, bank=fitted.path, backbone=tiny_backbone(name="other"))
    with pytest.raises(InputError, match=r"was extracted with weights_sha256='.*', these features with '"):
        add(more, bank=fitted.path, backbone=tiny_backbone(seed=1))
    assert files(fitted.path) == before
    foreign = make_bank(tmp_path / "foreign")
    foreign.append(batch("x"))
    with pytest.raises(InputError, match="was made by another extractor; hand it features, or pass a Backbone"):
        add(more, bank=foreign.path)
    with pytest.raises(NotFoundError, match="there is no bank at"):
        add(more, bank=tmp_path / "none", backbone=tiny_backbone())
    assert not (tmp_path / "none").exists()
    assert_holds(Bank.open(foreign.path), batch("x"))


def test_features_of_another_extractors_bank_are_not_mixed_with_a_backbones(tmp_path: Path, tiny: Backbone) -> None:
    """Of a bank that nobody knows the maker of, nothing tells that a backbone's features can be compared with it."""
    bank = Bank.create(
        tmp_path / "bank",
        Layout(levels=tiny.levels, embedding_dim=tiny.embedding_dim, input_size=tiny.input_size, dtype="float32"),
    )
    levels = {level.name: np.ones((1, *level.shape), np.float32) for level in tiny.levels}
    bank.append(FeatureBatch(["x"], np.ones((1, tiny.embedding_dim), np.float32), levels))
    images = save_images(tmp_path / "good", "a.png")
    with pytest.raises(InputError, match="holds the features of another extractor, not of 'tiny'"):
        fit(images, bank=bank.path, preset="spade", extraction=Extraction(backbone=tiny))
    assert Bank.open(bank.path).ids == ["x"]


def test_a_fit_that_stored_nothing_binds_nobody(
    good: Path, tmp_path: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: Callable[..., Any] = Backbone.__call__

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Backbone, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=tiny, store="float32", normalize="l2"))
    monkeypatch.setattr(Backbone, "__call__", call)
    assert len(Bank.open(tmp_path / "bank")) == 0
    other = tiny_backbone(seed=1, name="other")
    done = fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=other, pool=3))
    assert done.added == 3
    bank = Bank.open(tmp_path / "bank")
    assert bank.manifest.source == other.source
    assert (bank.layout.dtype, bank.layout.normalize, bank.layout.pool) == ("float16", "none", 3)
    # Now it is bound.
    with pytest.raises(InputError, match="backbone='other', these features with 'tiny'"):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=tiny))
    bank.remove(bank.ids)
    with pytest.raises(InputError, match="backbone='other', these features with 'tiny'"):
        fit(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=tiny))


def test_what_cannot_be_read_is_left_out_of_an_addition(fitted: Bank, tmp_path: Path, tiny: Backbone) -> None:
    more = save_images(tmp_path / "more", "d.png")
    (more / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (more / "broken too.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(InputError):
        add(more, bank=fitted.path, backbone=tiny, run=Run(max_skipped=1))
    done = add(more, bank=fitted.path, backbone=tiny)
    assert [item.id for item in done.skipped] == ["broken too.png", "broken.png"]
    assert "d.png" in Bank.open(fitted.path).ids
