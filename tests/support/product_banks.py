"""Banks of several products, of generated features: each product has a place of its own, and some scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss import Bank, FeatureBatch, Layout
from spade_faiss.bank.origin import Origin
from spade_faiss.core.grouping import Grouping
from tests.support.banks import COARSE, DIM, FINE, INPUT

# Where the features of each product lie, and how much they scatter: `loose` as much as the others are apart.
PLACES = {"cap": (-2.0, 0.1), "pen": (0.0, 0.1), "loose": (3.0, 0.6), "none of them": (40.0, 0.1)}
LAYOUT = Layout(levels=(FINE, COARSE), embedding_dim=DIM, input_size=INPUT, dtype="float32")


def shots(product: str, names: Sequence[str], seed: int = 0, **extra: Any) -> FeatureBatch:
    """Features of normal pictures of a product."""
    place, scatter = PLACES[product]
    rng = np.random.default_rng([seed, *product.encode()])

    def around(*shape: int) -> Any:
        return (place + scatter * rng.standard_normal((len(names), *shape))).astype(np.float32)

    return FeatureBatch(list(names), around(DIM), {level.name: around(*level.shape) for level in (FINE, COARSE)}, **extra)


def numbered(product: str, count: int) -> list[str]:
    """The names of a product's pictures."""
    return [f"{product}/{number:03d}" for number in range(count)]


def bank_of_products(path: Path, counts: Mapping[str, int]) -> Bank:
    """A bank of some products, with so many pictures each."""
    bank = Bank.create(path, LAYOUT, Origin(products=Grouping(by="table")))
    for product, count in counts.items():
        bank.append(shots(product, numbered(product, count)), product=product)
    return bank


def bank_of_one(path: Path, product: str, count: int) -> Bank:
    """A bank of one product alone, with the same pictures."""
    bank = Bank.create(path, LAYOUT)
    bank.append(shots(product, numbered(product, count)))
    return bank
