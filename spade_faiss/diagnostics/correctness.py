"""Checks that results are right on a device: every recipe against float64, and a network on a card against the CPU."""

from __future__ import annotations

import numpy as np

from spade_faiss.core.device import Device
from spade_faiss.core.extraction import Preprocess
from spade_faiss.diagnostics.checks import GREEN, RED, Check
from spade_faiss.diagnostics.self_test import TOLERANCE, SelfTest

# Features of a network may differ by this share of the largest: sums are in another order, over tens of layers.
_NETWORK_TOLERANCE = 1e-3


def check_recipe(tested: SelfTest) -> Check:
    """Make a check of what a self-test of a recipe gave."""
    numbers = {
        "error": tested.error,
        "locations_found": tested.locations_found,
        "images_found": tested.images_found,
    }
    name = f"recipe {tested.name}"
    if tested.problem:
        advice = f"do not use it here; compare with: spade-faiss doctor --device cpu, and report {tested.name!r} with this line"
        return Check(name=name, state=RED, result=f"failed: {tested.problem}", advice=advice, numbers=numbers)
    result = (
        f"distances are right to {tested.error:.1g}, "
        f"the nearest vector was found at {100 * tested.locations_found:.1f} % of the locations"
    )
    if not tested.passed:
        advice = f"results are wrong beyond {TOLERANCE:g}: do not use it on this device, and report it with these lines"
        return Check(name=name, state=RED, result=result, advice=advice, numbers=numbers)
    return Check(name=name, state=GREEN, result=result, numbers=numbers)


def check_network(device: Device) -> Check:
    """Compare the features of a small network on a device with those on the CPU."""
    import torch
    from torchvision import models

    from spade_faiss.features.backbone import Backbone
    from spade_faiss.features.network import Network

    taps = {"layer1": "layer1", "layer2": "layer2"}
    features = []
    for name in ("cpu", device.torch_name):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = models.get_model("resnet18", weights=None)
        network = Network.from_module(module, name="test", taps=taps, embedding="avgpool")
        backbone = Backbone(network, preprocess=Preprocess(resize=72, size=64), device=name)
        embedding, levels = backbone(np.random.default_rng(0).random((2, 3, 64, 64), np.float32))
        features.append([embedding, *levels.values()])
    error = max(float(np.abs(here - there).max() / np.abs(here).max()) for here, there in zip(*features, strict=True))
    is_right = error <= _NETWORK_TOLERANCE
    return Check(
        name="network",
        state=GREEN if is_right else RED,
        result=f"features differ from those on the CPU by at most {error:.1g} of the largest",
        advice="" if is_right else "do not extract here into a bank that is queried elsewhere, and report it",
        numbers={"error": error},
    )
