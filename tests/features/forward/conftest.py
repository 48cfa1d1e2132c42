"""Exported networks."""

from __future__ import annotations

import pytest

from spade_faiss.features.backbone import Backbone
from tests.support.backbones import tiny_backbone


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="session")
def graph(tiny: Backbone) -> bytes:
    return tiny.export()
