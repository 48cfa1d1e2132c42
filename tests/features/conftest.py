"""Networks with random weights, and files that hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from spade_faiss.features.backbone import Backbone
from spade_faiss.features.loading import load_backbone
from tests.support.networks import ODD, seeded, tiny_state


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return seeded(models.resnet18(weights=None), 0)


@pytest.fixture(scope="module")
def resnet18_file(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def odd(resnet18_file: Path) -> Backbone:
    """resnet18 at an input of 72 x 72, which 16 does not divide."""
    return load_backbone("resnet18", weights=resnet18_file, preprocess=ODD)


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pth"
    torch.save(tiny_state(), path)
    return path
