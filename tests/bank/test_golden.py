"""A golden bank: what an earlier version wrote is read by this one, and refused if it is damaged."""

from __future__ import annotations

import gc
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.origin import Origin
from spade_faiss.core.errors import SpadeError
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout
from tests.support.banks import (
    SOURCE,
    assert_holds,
    events,
    part_of,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "bank_v3"


def golden_batches() -> list[FeatureBatch]:
    """What the golden bank was filled with: numbers that can be told from their place, and are exact in float16."""

    def part(names: list[str], first: int, root: str) -> FeatureBatch:
        n = len(names)

        def numbers(*shape: int) -> npt.NDArray[np.float32]:
            values = (first + np.arange(n * int(np.prod(shape)))) / 8
            return values.astype(np.float32).reshape(n, *shape)

        valid = np.ones((n, 5, 7), np.bool_)
        for image in range(n):
            valid[image, : image + 1, first % 7 :] = False
        return FeatureBatch(
            names,
            numbers(3) + np.float32(1e-4),
            {"layer1": numbers(2, 3, 4), "layer2": -numbers(1, 2, 5)},
            SOURCE,
            valid=valid,
            paths=[f"good/{name}" for name in names],
            sha256=[f"{name} digest" for name in names],
            root=root,
        )

    return [part(["000.png", 'ü "1"\n.png', "../002.png"], 0, "/data/parts"), part(["日本.png"], 100, "/data/2026")]


def write_golden_bank() -> None:
    """Make the golden bank of schema 3, once:

    python -c "from tests.bank.test_golden import write_golden_bank; write_golden_bank()"
    """
    levels = [
        Level("layer1", channels=4, stride=4, height=2, width=3),
        Level("layer2", channels=5, stride=8, height=1, width=2),
    ]
    bank = Bank.create(
        GOLDEN, Layout(levels=tuple(levels), embedding_dim=3, input_size=(5, 7)), Origin(source=SOURCE, weights_file="/w.pth")
    )
    for part in golden_batches():
        bank.append(part)
    bank.remove(["000.png", "日本.png"])
    bank.restore(["日本.png"])
    del bank
    gc.collect()
    shutil.rmtree(GOLDEN / ".readers", ignore_errors=True)
    (GOLDEN / ".lock").unlink(missing_ok=True)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """Version control keeps no modification times: a copy is read in full."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden", copy_function=shutil.copyfile))


def test_a_bank_of_schema_3_opens(golden: Path) -> None:
    first, second = golden_batches()
    bank = Bank.open(golden)
    assert '"schema": 3' in (golden / "manifest.json").read_text()
    assert_holds(bank, part_of(first, 1, 2), second, dtype="float16")
    assert bank.removed == {"000.png": ((0, 0),)}
    assert bank.manifest.source == SOURCE
    assert bank.manifest.weights_file == "/w.pth"
    assert (bank.layout.input_size, bank.layout.dtype) == ((5, 7), "float16")
    assert events(bank) == [(1, "add", 3), (2, "add", 1), (3, "remove", 2), (4, "restore", 1)]
    read = bank.read(np.arange(3))
    assert read.valid is not None
    np.testing.assert_array_equal(read.valid[:2], first.valid[1:])  # type: ignore[index]
    np.testing.assert_array_equal(read.valid[2:], second.valid)
    # A few of the numbers, by themselves.
    assert bank.level_map("layer1", 0)[1, 2, 3] == 47 / 8
    assert bank.level_map("layer2", 2)[0, 1, 0] == -105 / 8
    assert read.valid.sum(axis=(1, 2)).tolist() == [21, 14, 30]
    assert bank.image_path('ü "1"\n.png') == Path('/data/parts/good/ü "1"\n.png')
    assert bank.image_path("日本.png") == Path("/data/2026/good/日本.png")
    assert bank.sha256_of["../002.png"] == "../002.png digest"


def test_a_bank_of_schema_3_can_be_kept_up(golden: Path) -> None:
    first, second = golden_batches()
    bank = Bank.open(golden)
    bank.restore(["000.png"])
    assert_holds(bank, first, second, dtype="float16")
    bank.remove(["../002.png"])
    new = replace(first, ids=["new 1", "new 2", "new 3"])
    bank.append(new)
    bank.compact()
    assert_holds(Bank.open(golden), part_of(first, 0, 1), second, new, dtype="float16")


@pytest.mark.parametrize("name", ["manifest.json", "features/000001.h5", "features/000002.h5"])
def test_a_damaged_golden_bank_is_refused(golden: Path, name: str) -> None:
    rng, data = random.Random(name), (golden / name).read_bytes()
    for number in range(12):
        place = rng.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        (golden / name).write_bytes(data[:place] if number % 2 else flipped)
        with pytest.raises(SpadeError, match=Path(name).name):
            Bank.open(golden)
    (golden / name).write_bytes(data)
    assert len(Bank.open(golden)) == 3
