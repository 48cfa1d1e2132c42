"""An image index on a card: what goes there, how often, and with which options. FAISS's GPU functions are stand-ins here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss import Bank
from spade_faiss.core.device import CPU, Device
from spade_faiss.index.gpu import CardIndex, to_card
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe
from tests.support.oracle import bank_of, product

faiss = import_faiss()
CARD = Device("cuda", 1)


class Cards:
    """FAISS's functions for cards, as far as we call them; an index stays where it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int = 1 << 33, count: int = 2) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.temporary: list[int] = []
        fakes = {
            "get_num_gpus": lambda: count,
            "isGpuIndexImplemented": lambda index: not isinstance(index, faiss.IndexHNSW),
            "StandardGpuResources": lambda: SimpleNamespace(setTempMemory=self.temporary.append),
            "GpuClonerOptions": SimpleNamespace,
            "index_cpu_to_gpu": self._copy,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(faiss, name, fake, raising=False)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))

    def _copy(self, resources: Any, card: int, index: Any, options: Any) -> Any:
        self.calls.append((index.ntotal, card, options.use_cuvs))
        return index


def flat(n: int = 9) -> Any:
    index = faiss.IndexFlatL2(4)
    index.add(np.zeros((n, 4), np.float32))
    return index


def test_what_is_for_the_cpu_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    index = flat()
    assert to_card(index, CARD) is index  # faiss-cpu: whatever torch can do
    cards = Cards(monkeypatch)
    empty, graph = faiss.IndexFlatL2(4), faiss.IndexHNSWFlat(4, 8)
    graph.add(np.zeros((3, 4), np.float32))
    for stays, device in ((index, CPU), (empty, CARD), (graph, CARD)):
        assert to_card(stays, device) is stays
    Cards(monkeypatch, free=0)
    assert to_card(index, CARD) is index
    Cards(monkeypatch, count=0)
    assert to_card(index, CARD) is index
    assert not cards.calls


def test_one_card_takes_an_index_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    found = to_card(flat(), CARD)
    assert isinstance(found, CardIndex)
    assert found.ntotal == 9
    assert cards.calls == [(9, 1, False)]
    assert cards.temporary == [256 << 20]


@pytest.mark.parametrize("recipe", ["exact", "hnsw", "lists"])
def test_an_image_index_on_a_card_finds_the_same(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"level": (3, 3, 4)}
    folder = tmp_path / "bank"
    bank = bank_of(folder, product(1, 60, shapes, 16), input_size=(12, 12), shards=[40])
    lists = Recipe(name="lists", build=Build(image="IVF2,Flat"), query=Query(image="nprobe=2"))
    chosen = lists if recipe == "lists" else load_recipe(recipe)
    if chosen.needs_image_index:
        from spade_faiss.index.image_index import build_image_index

        build_image_index(Bank.open(folder), chosen)
    xq = product(2, 5, shapes, 16).embedding
    expected = ImageIndex.open(bank, chosen).search(xq, 7)
    cards = Cards(monkeypatch)
    found = ImageIndex.open(bank, chosen, CARD).search(xq, 7)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    # A flat index is filled here and copied once; a graph cannot go to a card.
    assert cards.calls == ([] if recipe == "hnsw" else [(60, 1, False)])
