"""Small networks, and what their modules put out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.loading import load_backbone

SMALL = Preprocess(resize=72, size=64)
ODD = Preprocess(resize=72, size=72)

# A network of half a million weights, for what does not depend on the network.
TINY = "timm:test_resnet"


def inputs(n: int, side: int, *, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((n, 3, side, side), np.float32)


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, with normalization layers that do something."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def tiny_state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return seeded(timm.create_model("test_resnet", pretrained=False), seed).state_dict()


def load_tiny(weights: Path, **settings: Any) -> Backbone:
    return load_backbone(TINY, weights=weights, preprocess=SMALL, **settings)


def by_hooks(model: nn.Module, modules: list[str], x: FloatArray) -> list[FloatArray]:
    """What the named modules of the plain network put out, (n, C, H, W), in float32."""
    found: dict[str, FloatArray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            found[name] = output.numpy().copy()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    with torch.no_grad():
        model(torch.from_numpy(x))
    for handle in handles:
        handle.remove()
    return [found[name] for name in modules]


def assert_close(found: FloatArray, expected: FloatArray) -> None:
    """Equal up to the rounding of another order of summation."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))
