"""Conversion of banks, and banks that are made with codes: what they keep, and that an interrupted one goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Bank, Detector, Extraction, FeatureBatch, InputError, Layout, Level, convert, extract, fit
from spade_faiss.bank import bank as bank_module
from spade_faiss.bank.origin import Origin
from spade_faiss.bank.shards import write_shard
from spade_faiss.cli import main
from spade_faiss.core.declaring import ALL
from spade_faiss.core.grouping import Grouping
from spade_faiss.core.presets import load_preset
from spade_faiss.core.settings import Method, Run
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.features.codes import learning_bytes
from spade_faiss.workflows import convert as convert_module
from spade_faiss.workflows.verify import verify
from tests.support.backbones import tiny_backbone
from tests.support.banks import COARSE, DIM, FINE, INPUT, PowerCutError, fail_on_call, files
from tests.support.image_files import noise, save
from tests.support.product_banks import LAYOUT, shots


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "good"
    for number in range(12):
        save(noise(24, 24, number), folder / f"lot{number % 4}" / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def bank(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of ten pictures that carries its network, and belongs to lots; two were removed. Do not change it."""
    path = tmp_path_factory.mktemp("bank") / "bank"
    extraction = Extraction(backbone=tiny_backbone(), group_by="folder")
    extract(good, bank=path, preset="spade", extraction=extraction)
    Bank.open(path).remove(["lot0/04.png", "lot3/11.png"])
    return path


def test_a_converted_bank_is_the_bank_but_for_its_maps(bank: Path, good: Path, tmp_path: Path) -> None:
    before = files(bank)
    done = convert(bank, tmp_path / "small", store="pca3-int8")
    assert files(bank) == before
    source, made = Bank.open(bank), Bank.open(tmp_path / "small")
    assert (len(made), made.ids, made.group_of) == (10, source.ids, source.group_of)
    assert {name: made.image_path(name) for name in made.ids} == {name: source.image_path(name) for name in source.ids}
    assert (made.manifest.source, made.manifest.grouping) == (source.manifest.source, source.manifest.grouping)
    assert (made.usual, made.sha256_of) == (source.usual, source.sha256_of)
    assert not made.removed
    rows = np.arange(10)
    np.testing.assert_array_equal(made.embedding(rows), source.embedding(rows))
    assert str(made.layout.store) == "pca3-int8"
    assert done.bytes_before == source.bytes_on_disk
    assert verify(made.path, deep=True).problems == ()
    # It has a calibration, and is used without the module that made it, as the bank is: by the network that it carries.
    assert done.calibration is not None
    assert stored_calibrations(made) == [done.calibration]
    found = Detector.open(made, run=Run(engine="openvino")).score(good)
    np.testing.assert_array_equal(found.neighbor_dist[:, 0] < 1e-3, [name in made.ids for name in found.ids])
    # The codes were learned from pictures of the whole bank.
    assert made.manifest.codes is not None
    assert made.manifest.codes.pictures == 10
    direct = tmp_path / "direct"
    extract(good, bank=direct, preset="spade", extraction=Extraction(backbone=tiny_backbone(), store="pca3-int8"))
    assert Bank.open(direct).layout == made.layout


@pytest.mark.parametrize("store", ["float32", "float16", "int8"])
def test_numbers_stay_what_they_were_as_far_as_the_store_goes(bank: Path, tmp_path: Path, store: str) -> None:
    made = convert(bank, tmp_path / "made", store=store, calibrate=False).bank
    ours, theirs = made.read(np.arange(10)), Bank.open(bank).read(np.arange(10))
    for name, maps in theirs.levels.items():
        if store == "int8":
            codes = made.codes_of(name)
            assert codes is not None
            assert (np.abs(ours.levels[name] + codes.center - maps) <= 0.501 * codes.scale).all()
        else:
            np.testing.assert_array_equal(ours.levels[name], maps.astype(np.float32))


def test_an_interrupted_conversion_goes_on(bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "shards"
    one = Bank.open(bank)
    several = Bank.create(shards, replace(one.layout))
    for start in range(0, 10, 3):
        several.append_prepared(replace(one.read(np.arange(start, min(10, start + 3))), source=None))
    # Batches of one shard each.
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(bank_module, "write_shard", fail_on_call(write_shard, 3))
        with pytest.raises(PowerCutError):
            convert(shards, tmp_path / "made", store="int8", calibrate=False)
    held = Bank.open(tmp_path / "made")
    assert len(held) == 6
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 1 << 30)  # other batches: a part of one is there already
    made = convert(shards, tmp_path / "made", store="int8", calibrate=False).bank
    assert made.ids == several.ids
    assert made.manifest.codes == held.manifest.codes
    assert convert(shards, tmp_path / "made", store="int8", calibrate=False).bank.generation == made.generation


def test_what_cannot_be_converted_is_refused(bank: Path, tmp_path: Path) -> None:
    small = convert(bank, tmp_path / "small", store="int8", calibrate=False).bank.path
    with pytest.raises(
        InputError, match="stores int8, and what its codes left out is gone; convert the bank that it was made of"
    ):
        convert(small, tmp_path / "more", store="float16")
    with pytest.raises(InputError, match="is the bank itself; name a new folder"):
        convert(bank, bank, store="int8")
    with pytest.raises(InputError, match="has store='int8', asked for 'pca3-int8'"):
        convert(bank, small, store="pca3-int8")
    with pytest.raises(InputError, match="store='int7' is not one of float16"):
        convert(bank, tmp_path / "more", store="int7")
    other = Bank.open(small)
    other.remove([other.ids[0]])
    other.compact()
    with pytest.raises(InputError, match=r"holds other pictures than .* begins with; name a new folder"):
        convert(bank, small, store="int8")
    empty = Bank.create(tmp_path / "empty", Bank.open(bank).layout)
    with pytest.raises(InputError, match="is empty; add pictures to it first"):
        convert(empty.path, tmp_path / "more", store="int8")
    assert not (tmp_path / "more").exists()


def test_numbers_beyond_a_store_are_refused(bank: Path, tmp_path: Path) -> None:
    one = Bank.open(bank)
    large = Bank.create(tmp_path / "large", replace(one.layout, dtype="float32"))
    batch = one.read(np.arange(3))
    large.append_prepared(
        replace(batch, source=None, levels={name: maps.astype(np.float32) * 1e6 for name, maps in batch.levels.items()})
    )
    with pytest.raises(InputError, match="holds numbers beyond float16; convert to another store"):
        convert(large.path, tmp_path / "half", store="float16")


def test_the_commands(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(bank), str(tmp_path / "small"), "--store", "pca3-int8", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["store"], found["images"]) == ("pca3-int8", 10)
    assert found["bytes"] < found["bytes_before"]
    assert len(found["losses"]) == len(Bank.open(bank).layout.levels)
    assert found["calibration"] is not None
    assert main(["info", str(tmp_path / "small")]) == 0
    text = capsys.readouterr().out
    assert "features   pca3-int8, normalize none, pool 1" in text
    assert "stored as 3 numbers" in text
    assert "of the vectors that are found are as near, or nearly so" in text
    assert main(["info", str(tmp_path / "small"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["codes"]["losses"] == found["losses"]


def test_fit_and_add_with_codes(good: Path, tmp_path: Path) -> None:
    """What is searched is joined, and indexed."""
    network, path = tiny_backbone(), tmp_path / "bank"
    preset = replace(
        load_preset("default"),
        recipe="global",
        method=Method(levels=("#2+#3",), k_gallery=ALL, score="top", image_scores=("top",)),
    )
    lots = sorted(good.glob("lot[012]/*"))
    done = fit(lots, bank=path, preset=preset, extraction=Extraction(backbone=network, store="pca3-int8"))
    assert done.index is not None
    learned = done.bank.manifest.codes
    assert learned is not None
    assert learned.pictures == 9
    # The bank's own setting is taken, and what is added is encoded by the same codes.
    more = fit(sorted(good.glob("lot3/*")), bank=path, extraction=Extraction(backbone=network))
    assert (more.added, more.bank.manifest.codes) == (3, learned)
    scores = Detector.open(path, backbone=network).score(good)
    assert (scores.neighbor_dist[:, 0] < 1e-3).all()
    exact = Detector.open(path, backbone=network, recipe="exact", method=Method(k_gallery=5)).score(sorted(good.glob("lot0/*")))
    assert not exact.maps.any()


def test_a_bank_of_several_products_keeps_them(tmp_path: Path) -> None:
    path, out = tmp_path / "bank", tmp_path / "out"
    bank = Bank.create(path, LAYOUT, Origin(products=Grouping(by="table")))
    for first in (0, 12):  # their shards take turns
        for product in ("cap", "pen"):
            names = [f"{product}/{number:03d}" for number in range(first, first + 12)]
            bank.append(shots(product, names, seed=first), product=product)
    done = convert(path, out, store="int8", run=Run(progress=False))
    assert done.calibration is None
    assert {name: len(made) for name, made in done.products.items() if not isinstance(made, str)} == {"cap": 24, "pen": 24}
    for product in ("cap", "pen"):
        assert done.bank.part(product).ids == bank.part(product).ids
        np.testing.assert_array_equal(
            done.bank.part(product).read(np.arange(24)).embedding, bank.part(product).read(np.arange(24)).embedding
        )
    assert not verify(out, deep=True).problems
    scores = Detector.open(out).score_features(shots("pen", ["new"], seed=1))
    assert scores.routes is not None
    assert scores.routes.product.tolist() == ["pen"]


def test_codes_are_not_learned_from_the_first_of_several_products(good: Path, tmp_path: Path) -> None:
    extraction = Extraction(backbone=tiny_backbone(), products="folder", store="int8")
    for _ in range(2):
        with pytest.raises(InputError, match="store=float16, and then: spade-faiss convert"):
            fit(good, bank=tmp_path / "bank", extraction=extraction)
        Bank.open_or_create(tmp_path / "bank", Layout(levels=(FINE, COARSE), embedding_dim=DIM, input_size=INPUT))  # only begun


def test_codes_are_learned_within_the_memory(tmp_path: Path) -> None:
    """From fewer pictures where it is short; too few of them say nothing of the bank."""
    level = Level("wide", channels=48, stride=4, height=16, width=16)
    layout = Layout(levels=(level,), embedding_dim=DIM, input_size=(64, 64), dtype="float32")
    source, rng = Bank.create(tmp_path / "source", layout), np.random.default_rng(0)
    source.append(
        FeatureBatch(
            [f"{number:02d}" for number in range(60)],
            rng.random((60, DIM), np.float32),
            {"wide": rng.standard_normal((60, 16, 16, 48), np.float32)},
        )
    )
    packed = replace(layout, dtype="int8", bits=4)

    def taken(pictures: int) -> int:
        return pictures * layout.image_bytes + learning_bytes(packed, pictures)

    def learned(memory: int) -> int:
        made = convert(source.path, tmp_path / str(memory), store="int4", calibrate=False, run=Run(memory=memory)).bank
        assert made.manifest.codes is not None
        return made.manifest.codes.pictures

    assert [learned(memory) for memory in (2 << 30, taken(60), taken(60) - 1, taken(25), taken(16))] == [60, 60, 59, 25, 16]
    with pytest.raises(InputError, match=r"is too small: learning codes of int4 takes .*; allow at least that, or convert to"):
        learned(taken(16) - 1)
    assert not Bank.open(tmp_path / str(taken(16) - 1)).manifest.shards
