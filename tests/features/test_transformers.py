"""Transformers of timm: their blocks are levels, equal to what timm itself gives, by every engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess, Source
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import Level
from spade_faiss.features.forward.choice import open_forward
from spade_faiss.features.forward.graph import check_graph
from spade_faiss.features.forward.probe import difference
from spade_faiss.features.loading import load_backbone
from spade_faiss.features.network import Network, default_blocks
from spade_faiss.features.proof import prove
from tests.support.networks import SMALL, inputs

TINY = {"depth": 3, "embed_dim": 64, "num_heads": 2}
# Each kind of transformer: its settings, the side of its patches, and where its embedding comes from.
KINDS: dict[str, tuple[dict[str, int], int, str]] = {
    "test_vit": ({}, 16, "class"),
    "test_vit2": ({}, 16, "mean"),
    "test_vit3": ({}, 16, "mean"),
    "test_vit4": ({}, 16, "mean"),
    "vit_small_patch14_reg4_dinov2": (TINY, 14, "class"),
    "vit_small_patch16_dinov3": (TINY, 16, "class"),
    "vit_base_patch16_siglip_224": (TINY, 16, "mean"),
    "vit_base_patch16_clip_224": (TINY, 16, "class"),
    "deit_tiny_distilled_patch16_224": (TINY, 16, "class"),
    "beit_base_patch16_224": (TINY, 16, "class"),
    "samvit_base_patch16_224": (TINY, 16, "mean"),
}


def made(name: str, **settings: Any) -> Any:
    """A transformer with random weights, none of which leave out what they weigh: timm starts with zeros and ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **settings).eval()
    for weight in model.parameters():
        if weight.ndim < 2 or not weight.std():
            nn.init.normal_(weight, std=0.3)
    return model


def timms_own(model: Any, x: FloatArray, blocks: list[int]) -> list[FloatArray]:
    """The tokens of blocks after the final norm, prefix tokens left out: (n, H, W, C)."""
    with torch.inference_mode():
        found = model.forward_intermediates(torch.from_numpy(x), indices=blocks, norm=True, intermediates_only=True)
    return [m.permute(0, 2, 3, 1).numpy() for m in found]


def assert_equal(found: FloatArray, expected: FloatArray) -> None:
    assert found.shape == expected.shape
    assert found.std() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", KINDS)
def test_levels_and_embedding_are_those_of_timm_by_every_engine(name: str) -> None:
    settings, patch, pooled = KINDS[name]
    side = 4 * patch
    model = made(name, img_size=side, **settings)
    x = inputs(3, side)
    depth = len(model.blocks)
    expected = timms_own(model, x, list(default_blocks(depth)))
    with torch.inference_mode():
        tokens = model.forward_features(torch.from_numpy(x)).numpy()
    backbone = Backbone(Network.from_timm(model, name), preprocess=Preprocess(resize=side, size=side))
    names = [f"blocks.{block}" for block in default_blocks(depth)]
    assert backbone.levels == tuple(
        Level(level, channels=m.shape[3], stride=patch, height=4, width=4) for level, m in zip(names, expected, strict=True)
    )
    assert backbone.source.blocks == default_blocks(depth)
    embedding, maps = backbone(x)
    assert list(maps) == names
    for level, m in zip(names, expected, strict=True):
        assert_equal(maps[level], m)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if tokens.ndim == 4:
        tokens = tokens.reshape(*tokens.shape[:2], -1).transpose(0, 2, 1)
    token = tokens[:, 0] if pooled == "class" else tokens[:, prefix:].mean(1)
    if (norm := getattr(model, "fc_norm", None)) is not None:
        with torch.inference_mode():
            token = norm(torch.from_numpy(token)).numpy()
    assert_equal(embedding, token)
    proven = prove(backbone, x, "onnxruntime")
    assert set(proven.differences) == {"onnxruntime", "openvino"}
    assert max(proven.differences.values()) < 1e-5
    assert difference(proven.open("openvino")(x[:1]), backbone(x[:1])) < 1e-5


def test_default_blocks_are_those_of_rad_as_deep_in_others() -> None:
    assert default_blocks(12) == (3, 6, 9, 11)
    assert default_blocks(24) == (6, 13, 19, 23)
    assert default_blocks(6) == (1, 3, 4, 5)
    assert default_blocks(3) == (1, 2)
    assert default_blocks(1) == (0,)


def test_blocks_can_be_chosen() -> None:
    model = made("test_vit", img_size=64)
    x = inputs(2, 64)
    expected = timms_own(model, x, [0, 4])
    backbone = Backbone(Network.from_timm(model, "vit", blocks=(0, 4)), preprocess=SMALL)
    assert backbone.source.blocks == (0, 4)
    _, maps = backbone(x)
    assert list(maps) == ["blocks.0", "blocks.4"]
    for m, own in zip(maps.values(), expected, strict=True):
        assert_equal(m, own)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((2, 6), r"blocks=\(2, 6\): backbone 'vit' has the blocks 0 to 5"),
        ((2, 2), r"blocks=\(2, 2\) must name each block once, counted from 0 and in ascending order"),
        ((3, 1), r"blocks=\(3, 1\) must name each block once"),
        ((-1,), r"blocks=\(-1,\) must name each block once"),
        ((1.0,), r"blocks=\(1\.0,\) must be a tuple of whole numbers"),
        ((True,), r"blocks=\(True,\) must be a tuple of whole numbers"),
        ([1, 2], r"blocks=\[1, 2\] must be a tuple of whole numbers"),
    ],
)
def test_blocks_that_there_are_not_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Network.from_timm(made("test_vit", img_size=64), "vit", blocks=blocks)


def test_only_transformers_have_blocks() -> None:
    for name in ("resnet18", "efficientnet_lite0"):
        with pytest.raises(InputError, match=rf"blocks=\(2,\): backbone '{name}' is no transformer.*leave out --blocks"):
            load_backbone(name, blocks=(2,), preprocess=SMALL)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", (64, 96)),
        ("test_vit3", (96, 96)),
        ("vit_small_patch14_reg4_dinov2", (56, 84)),
        ("vit_small_patch16_dinov3", (96, 64)),
    ],
)
def test_positions_are_interpolated_for_the_input(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Weights of the native size, read from a file: equal to timm's own interpolation, which it does as it runs."""
    model = made(name, dynamic_img_size=True)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    backbone = load_backbone(f"timm:{name}", weights=tmp_path / "w.pt", preprocess=Preprocess(size=size))
    x = inputs(2, max(size))[:, :, : size[0], : size[1]].copy()
    _, maps = backbone(x)
    expected = timms_own(model, x, list(default_blocks(len(model.blocks))))
    for m, own in zip(maps.values(), expected, strict=True):
        assert_equal(m, own)
    config = model.pretrained_cfg
    assert (backbone.source.preprocess.mean, backbone.source.preprocess.std) == (tuple(config["mean"]), tuple(config["std"]))


def test_published_weights_are_asked_for_at_the_size_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def record(name: str, *, pretrained: bool, **settings: Any) -> Any:
        asked.append({"pretrained": pretrained, **settings})
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", record)
    assert load_backbone("timm:test_vit", preprocess=SMALL).input_size == (64, 64)
    assert asked == [{"pretrained": False}, {"pretrained": True, "img_size": (64, 64)}]


def test_an_input_that_is_no_multiple_of_the_patch_names_the_nearest() -> None:
    with pytest.raises(
        InputError,
        match=r"timm:vit_small_patch14_dinov2 cuts its input into patches of 14 x 14 pixels, and 256 x 256 is no multiple of "
        r"that; the nearest are 252 x 252 and 266 x 266",
    ):
        load_backbone("timm:vit_small_patch14_dinov2", preprocess=Preprocess(size=256))
    with pytest.raises(InputError, match="and 320 x 644 is no multiple of that; the nearest are 308 x 644 and 322 x 644"):
        load_backbone("timm:vit_small_patch14_dinov2", preprocess=Preprocess(size=(320, 644)))
    with pytest.raises(InputError, match=r"backbone 'vit' does not take inputs of 64 x 64 pixels: Input height"):
        Backbone(Network.from_timm(made("vit_base_patch16_clip_224", **TINY), "vit"), preprocess=SMALL)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(made("test_vit3").state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="the weights do not fit timm:test_vit"):
        load_backbone("timm:test_vit", weights=tmp_path / "w.pt", preprocess=SMALL)


def test_blocks_are_part_of_what_made_the_features() -> None:
    source = Source(backbone="vit", weights_sha256="0", preprocess=SMALL, blocks=(1, 2))
    assert source.comparable() != Source(backbone="vit", weights_sha256="0", preprocess=SMALL, blocks=(1, 3)).comparable()
    with pytest.raises(InputError, match="must name each block once"):
        Source(backbone="vit", weights_sha256="0", preprocess=SMALL, blocks=(2, 1))


def given(graph: bytes) -> bytes:
    return graph


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_export_does_not_depend_on_the_batch(engine: str) -> None:
    """The trace is of two images; their number must be left open in the tokens, too."""
    backbone = Backbone(Network.from_timm(made("vit_small_patch16_dinov3", img_size=64, **TINY), "vit"), preprocess=SMALL)
    graph, names = backbone.export(), [level.name for level in backbone.levels]
    check_graph(graph, names)
    forward = open_forward(engine, partial(given, graph), names, "float32", (64, 64))
    for count in (1, 3, 5):
        x = inputs(count, 64, seed=count)
        assert difference(forward(x), backbone(x)) < 1e-5
