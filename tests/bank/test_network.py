"""The network that a bank carries: written with evidence, opened by any engine, refused where anything is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss.bank import backbone as bank_backbone
from spade_faiss.bank.backbone import backbone_of
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.facts import facts_of
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.forward import choice
from spade_faiss.features.network import Network
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.extract import add, extract
from spade_faiss.workflows.verify import verify
from tests.support.backbones import tiny_backbone
from tests.support.image_files import noise, save
from tests.support.manifests import edit_manifest

ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "good"
    for number in range(8):
        save(noise(24, 24, number), folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that was made with a module of the user's own, and carries it."""
    path = tmp_path_factory.mktemp("bank") / "bank"
    done = extract(good, bank=path, preset="spade", extraction=Extraction(backbone=tiny_backbone()))
    assert done.no_network == ""
    return path


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bank"))


def network_file(bank: Path, kind: str) -> Path:
    (found,) = (bank / "network").glob(f"*.{kind}")
    return found


def test_a_bank_carries_its_network_with_evidence(made: Path) -> None:
    manifest = Bank.open(made).manifest
    assert manifest.source is not None
    assert manifest.network is not None
    assert manifest.source.engine == "torch"  # a module of the user's own is run by what it was written for
    assert manifest.network.graph.file == f"{manifest.source.weights_sha256}.onnx"
    assert set(manifest.network.differences) == set(ENGINES)
    assert all(0 <= apart < 1e-5 for apart in manifest.network.differences.values())
    assert 1e-5 <= manifest.network.limit < 1e-4
    assert facts_of(Bank.open(made))["network"]["limit"] == manifest.network.limit


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_every_engine_opens_it_without_the_module(bank: Path, good: Path, engine: str) -> None:
    expected = Detector.open(bank, backbone=tiny_backbone()).score(good)
    found = Detector.open(bank, run=Run(engine=engine)).score(good)
    np.testing.assert_allclose(found.image_score, expected.image_score, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-4)


def test_torch_still_needs_the_module(bank: Path, good: Path) -> None:
    with pytest.raises(InputError, match="was made with your own backbone 'tiny'; pass it as backbone="):
        Detector.open(bank, run=Run(engine="torch")).score(good)


def test_a_backbone_that_is_passed_has_its_own_engine(bank: Path) -> None:
    with pytest.raises(InputError, match="weights and engine belong to a backbone that is given by name"):
        Detector.open(bank, backbone=tiny_backbone(), run=Run(engine="openvino"))


def test_images_are_added_by_another_engine(bank: Path, tmp_path: Path) -> None:
    save(noise(24, 24, 77), tmp_path / "more" / "more.png")
    done = add(tmp_path / "more", bank=bank, run=Run(engine="openvino"))
    assert done.added == 1
    opened = Bank.open(bank)
    assert opened.manifest.network is not None
    found = opened.read(np.array([opened.ids.index("more.png")]))
    by_torch = tmp_path / "by torch"
    extract(tmp_path / "more", bank=by_torch, preset="spade", extraction=Extraction(backbone=tiny_backbone(), network=False))
    expected = Bank.open(by_torch).read(np.array([0]))
    np.testing.assert_allclose(found.embedding, expected.embedding, rtol=1e-4, atol=1e-6)
    for level, maps in expected.levels.items():
        # Stored as float16: one unit in the last place.
        np.testing.assert_allclose(found.levels[level].astype(np.float64), maps.astype(np.float64), rtol=1e-3, atol=1e-4)


def test_a_bank_without_a_network_is_loaded_by_name(good: Path, tmp_path: Path) -> None:
    extract(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=tiny_backbone(), network=False))
    assert Bank.open(tmp_path / "bank").manifest.network is None
    assert not (tmp_path / "bank" / "network").exists()
    with pytest.raises(InputError, match="your own backbone"):
        Detector.open(tmp_path / "bank").score(good)


def test_a_network_that_cannot_be_exported_is_left_out_and_said(good: Path, tmp_path: Path) -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, 4)

    module = Branches()

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        maps = module.conv(torch.from_numpy(x.cpu().numpy().copy()))  # leaves torch, so that a trace loses it
        return maps.mean((2, 3)), {"only": maps}

    backbone = Backbone(Network("branches", module, forward), preprocess=tiny_backbone().source.preprocess)
    done = extract(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone))
    assert done.added == 8
    assert done.no_network.startswith("the bank carries no network:")
    assert Bank.open(tmp_path / "bank").manifest.network is None


def test_an_engine_that_computes_something_else_is_refused(bank: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = choice.open_forward

    def wrong(engine: str, *arguments: Any) -> Any:
        forward = real(engine, *arguments)
        if engine != "onnxruntime":
            return forward

        class Off:
            engine = "onnxruntime"

            def __call__(self, inputs: Any) -> Any:
                embedding, maps = forward(inputs)
                return embedding, {level: found * np.float32(1.001) for level, found in maps.items()}

        return Off()

    monkeypatch.setattr("spade_faiss.bank.network.open_forward", wrong)
    with pytest.raises(InputError, match=r"engine='onnxruntime' computes features here that differ by 1\.0e-03 from those of"):
        Detector.open(bank, run=Run(engine="onnxruntime")).score(good)
    # Where any engine will do, the next one is taken.
    assert Detector.open(bank).backbone.engine == "openvino"


def test_torch_is_compared_with_the_probe_too(resnet_bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backbone_of(Bank.open(resnet_bank), None, Run(engine="torch")).engine == "torch"
    seen: list[Backbone] = []
    monkeypatch.setattr(bank_backbone, "check_features", lambda folder, entry, layout, backbone: seen.append(backbone))
    backbone_of(Bank.open(resnet_bank), None, Run(engine="torch"))
    assert [backbone.engine for backbone in seen] == ["torch"]


@pytest.fixture(scope="module")
def resnet_bank(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from spade_faiss.core.extraction import Preprocess

    path = tmp_path_factory.mktemp("lite0") / "bank"
    extract(
        good,
        bank=path,
        preset="spade",
        extraction=Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=64, size=64)),
    )
    return path


def test_a_name_is_run_by_the_fastest_engine(resnet_bank: Path) -> None:
    source = Bank.open(resnet_bank).manifest.source
    assert source is not None
    assert source.engine == "onnxruntime"
    assert Detector.open(resnet_bank).backbone.engine == "onnxruntime"


def test_the_same_command_goes_on_with_the_network_of_the_bank(resnet_bank: Path, good: Path) -> None:
    from spade_faiss.core.extraction import Preprocess

    before = Bank.open(resnet_bank).manifest
    extraction = Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=64, size=64))
    done = extract(good, bank=resnet_bank, preset="spade", extraction=extraction, run=Run(engine="openvino"))
    assert (done.added, done.present) == (0, 8)
    assert Bank.open(resnet_bank).manifest == before


# ---- damage


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["onnx", "probe"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, "has changed since it was written"),
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
    ],
)
def test_damage_is_found(bank: Path, good: Path, kind: str, damage: Callable[[Path], object], message: str) -> None:
    damage(network_file(bank, kind))
    with pytest.raises(BankError, match=message):
        Detector.open(bank).score(good)
    assert any(f".{kind}" in problem for problem in verify(bank).problems)


def test_a_whole_network_verifies(made: Path) -> None:
    assert verify(made, deep=True).problems == ()


def replaced(bank: Path, kind: str, data: bytes) -> None:
    """Put another file in the place of one, and sign the manifest as its author would."""
    from spade_faiss.core.files import FileEntry, hash_file

    path = network_file(bank, kind)
    path.write_bytes(data)
    entry = vars(FileEntry.of(path, hash_file(path)))
    name = {"onnx": "graph", "probe": "probe"}[kind]
    edit_manifest(bank / "manifest.json", lambda content: content["network"].update({name: entry}))


def test_the_network_of_a_stranger_runs_no_code(bank: Path, good: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(network_file(bank, "onnx"))
    model.graph.node[0].domain = "evil"
    replaced(bank, "onnx", model.SerializeToString())
    with pytest.raises(BankError, match="uses operators of 'evil', not of the ONNX standard"):
        Detector.open(bank).score(good)


def test_the_network_of_another_bank_is_refused(bank: Path, good: Path) -> None:
    replaced(bank, "onnx", tiny_backbone(seed=1).export())
    with pytest.raises(InputError, match="computes features here that differ by"):
        Detector.open(bank, run=Run(engine="onnxruntime")).score(good)


@pytest.mark.parametrize("size", [-4, 4, 1 << 20])
def test_a_probe_of_another_size_is_refused(bank: Path, good: Path, size: int) -> None:
    data = network_file(bank, "probe").read_bytes()
    replaced(bank, "probe", data[:size] if size < 0 else data + bytes(size))
    with pytest.raises(BankError, match=r"expected|more than the"):
        Detector.open(bank).score(good)


@pytest.mark.parametrize(
    "change",
    [{"limit": 1.5}, {"limit": 0.0}, {"limit": -1e-5}, {"differences": {"torch": -1.0}}],
    ids=["wide", "zero", "negative", "difference"],
)
def test_limits_that_no_bank_has_are_refused(bank: Path, change: dict[str, Any]) -> None:
    edit_manifest(bank / "manifest.json", lambda content: content["network"].update(change))
    with pytest.raises(BankError, match="cannot be those of a network"):
        Bank.open(bank)


def test_banks_from_before_are_read(bank: Path, good: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        del content["network"]
        del content["source"]["engine"]

    edit_manifest(bank / "manifest.json", older)
    opened = Bank.open(bank)
    assert opened.manifest.source is not None
    assert (opened.manifest.network, opened.manifest.source.engine) == (None, "torch")
    assert "network" in json.loads(json.dumps(facts_of(opened)))
    assert len(Detector.open(bank, backbone=tiny_backbone()).score(good).ids) == 8
