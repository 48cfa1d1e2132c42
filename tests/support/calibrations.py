"""A bank to calibrate, features of other images, and the file of its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spade_faiss import Bank, FeatureBatch
from tests.support.oracle import bank_of, batch_of, product

SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
INPUT = (40, 43)
DIM = 16
N = 24


def make_bank(path: Path) -> Bank:
    """A bank of N images in three shards."""
    return bank_of(path, product(1, N, SHAPES, DIM), input_size=INPUT, shards=[5, 3])


def others(n: int, seed: int = 2, **more: Any) -> FeatureBatch:
    """Features of images that are not in the bank."""
    return batch_of(product(seed, n, SHAPES, DIM, **more), [f"other {row}" for row in range(n)])


def file_of(bank: Path) -> Path:
    """The file of a bank's only calibration."""
    (path,) = (bank / "calibration").iterdir()
    return path
