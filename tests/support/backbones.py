"""A backbone that takes no time to run."""

from __future__ import annotations

import torch

from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.network import Network


def tiny_backbone(seed: int = 0, name: str = "tiny", preprocess: Preprocess | None = None) -> Backbone:
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 4), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3, 2), torch.nn.AdaptiveAvgPool2d(1)
    )
    network = Network.from_module(module, name=name, taps={"fine": "0", "coarse": "2"}, embedding="3")
    return Backbone(network, preprocess=preprocess or Preprocess(resize_mode="stretch", size=24))
