"""Backbones: features equal those of the plain network, and levels are read off it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import Level
from spade_faiss.features.loading import load_backbone
from spade_faiss.features.network import Network
from tests.support.networks import ODD, SMALL, assert_close, by_hooks, inputs


def test_levels_are_read_off_the_network(resnet18_file: Path, odd: Backbone) -> None:
    small = load_backbone("resnet18", weights=resnet18_file, preprocess=SMALL)
    assert small.levels == (
        Level("layer1", channels=64, stride=4, height=16, width=16),
        Level("layer2", channels=128, stride=8, height=8, width=8),
        Level("layer3", channels=256, stride=16, height=4, width=4),
    )
    # 72 / 16 is rounded up to 5 locations; they still are 16 pixels apart.
    assert odd.levels == (
        Level("layer1", channels=64, stride=4, height=18, width=18),
        Level("layer2", channels=128, stride=8, height=9, width=9),
        Level("layer3", channels=256, stride=16, height=5, width=5),
    )
    assert (small.embedding_dim, small.input_size) == (512, (64, 64))
    assert (odd.embedding_dim, odd.input_size) == (512, (72, 72))
    assert small.source.weights_sha256 == odd.source.weights_sha256


def test_features_are_those_of_the_plain_network(resnet18: nn.Module, odd: Backbone) -> None:
    x = inputs(3, 72)
    before = x.copy()
    embedding, maps = odd(x)
    *levels, pooled = by_hooks(resnet18, ["layer1", "layer2", "layer3", "avgpool"], x)
    assert list(maps) == ["layer1", "layer2", "layer3"]
    for found, expected in zip(maps.values(), levels, strict=True):
        assert_close(found, expected.transpose(0, 2, 3, 1))
        assert found.min() >= 0 < found.std()  # after the last ReLU of the stage
    assert_close(embedding, pooled[:, :, 0, 0])
    np.testing.assert_array_equal(x, before)


def test_features_do_not_depend_on_the_batch_and_are_contiguous(odd: Backbone) -> None:
    x = inputs(5, 72)
    embedding, maps = odd(x)
    for row in (0, 4):
        single_embedding, single_maps = odd(x[row : row + 1])
        assert_close(single_embedding, embedding[row : row + 1])
        for name in maps:
            assert_close(single_maps[name], maps[name][row : row + 1])
            assert single_maps[name].flags.c_contiguous
    assert all(array.flags.c_contiguous for array in (embedding, *maps.values()))


def test_the_network_runs_channels_last_and_remembers_nothing(odd: Backbone) -> None:
    network = odd._own_network().module
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())


def test_bfloat16_is_close_to_float32_and_not_the_same(resnet18_file: Path, odd: Backbone) -> None:
    x = inputs(2, 72)
    rough = load_backbone("resnet18", weights=resnet18_file, preprocess=ODD, precision="bfloat16")
    assert rough.source.precision == "bfloat16"
    assert rough.source.weights_sha256 == odd.source.weights_sha256
    exact_embedding, exact = odd(x)
    embedding, maps = rough(x)
    for found, expected in ((embedding, exact_embedding), *((maps[name], exact[name]) for name in maps)):
        assert found.dtype == np.float32
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        assert 1e-4 < error < 0.02
    with pytest.raises(InputError, match="precision='float16' is not one of float32, bfloat16"):
        load_backbone("resnet18", weights=resnet18_file, preprocess=SMALL, precision="float16")


@pytest.mark.parametrize(("side", "stride", "size"), [(224, 16, 14), (225, 16, 15), (65, 16, 5), (224, 14, 16), (64, 4, 16)])
def test_the_stride_does_not_depend_on_what_the_input_leaves_over(side: int, stride: int, size: int) -> None:
    patch = nn.Sequential(
        nn.Conv2d(3, 2, stride, stride=stride, padding=0 if side % stride == 0 else stride // 2), nn.Flatten(2)
    )
    network = Network.from_module(patch, name="patch", taps={"x": "0"}, embedding="1")
    (level,) = Backbone(network, preprocess=Preprocess(resize=side, size=side)).levels
    assert (level.stride, level.height) == (stride, size)
