"""Networks of one's own: levels and embedding are read from the modules that are named."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import Level
from spade_faiss.features.network import Network
from tests.support.networks import assert_close, by_hooks, inputs


class Custom(nn.Module):
    """Two convolutions and a pool; the second halves its input, rounding down."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 5, padding=2)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.second(torch.relu(self.first(x)))
        result: Tensor = self.unused(self.pool(maps).flatten(1))
        return result


def custom(module: nn.Module | None = None, **changes: Any) -> Backbone:
    settings: dict[str, Any] = {"name": "mine", "taps": {"fine": "first", "coarse": "second"}, "embedding": "pool"}
    network = Network.from_module(module or Custom(), **{**settings, **changes})
    return Backbone(network, preprocess=Preprocess(resize=21, size=21))


def test_any_module_with_taps() -> None:
    torch.manual_seed(0)
    module = Custom()
    network = custom(module)
    assert network.levels == (
        Level("fine", channels=4, stride=1, height=21, width=21),
        Level("coarse", channels=6, stride=2, height=10, width=10),
    )
    assert (network.embedding_dim, network.source.backbone) == (6, "mine")
    x = inputs(2, 21)
    embedding, maps = network(x)
    first, second, pooled = by_hooks(module, ["first", "second", "pool"], x)
    assert_close(maps["fine"], first.transpose(0, 2, 3, 1))
    assert_close(maps["coarse"], second.transpose(0, 2, 3, 1))
    assert_close(embedding, pooled[:, :, 0, 0])


def test_maps_are_contiguous_whatever_layout_the_network_puts_out() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(1), nn.Unflatten(1, (4, 8, 8)), nn.AdaptiveAvgPool2d(1))
    network = Network.from_module(module, name="mine", taps={"x": "2"}, embedding="3")
    _, maps = Backbone(network, preprocess=Preprocess(resize=8, size=8))(inputs(2, 8))
    assert maps["x"].flags.c_contiguous
    assert_close(maps["x"], by_hooks(module, ["0"], inputs(2, 8))[0].transpose(0, 2, 3, 1))


def test_the_hash_covers_names_shapes_and_values_of_what_is_used() -> None:
    """Written out once more, so that no later version computes another hash and refuses every bank there is."""
    torch.manual_seed(0)
    module = Custom()
    digest = hashlib.sha256()
    for name in ("first.bias", "first.weight", "second.bias", "second.weight"):
        tensor = module.get_parameter(name)
        digest.update(f"{name} {tuple(tensor.shape)} torch.float32".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    assert custom(module).source.weights_sha256 == digest.hexdigest()


def test_taps_that_do_not_exist_or_give_no_map_are_refused() -> None:
    with pytest.raises(InputError, match=r"backbone 'mine': .*third"):
        custom(taps={"fine": "third"})
    with pytest.raises(InputError, match=r"backbone 'mine': level 'flat' gives 2 dimensions, expected \(n, C, H, W\)"):
        custom(taps={"flat": "unused"})
    for node in ("first", "pool"):
        with pytest.raises(InputError, match="each level and the embedding need a module of their own"):
            custom(taps={"a": "first", "b": node})
