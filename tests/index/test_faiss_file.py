"""FAISS index files that may come from anybody: what the recipe does not make is refused, before FAISS interprets it.

Fault "an HNSW or IVF index replaced by one with on-disk inverted lists, checksums made right again".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.index.build import build_index, update_indexes
from spade_faiss.index.faiss_file import check_factory_string, check_stored_factory, read_index
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.search.recipe import Build, Recipe
from spade_faiss.workflows.verify import verify
from tests.support.attacks import INDEXES, mutated, record
from tests.support.banks import batch, make_bank

D = 16
FACTORIES = [
    *("Flat", "HNSW8", "HNSW8,SQ8", "HNSW8,PQ4x4np", "IVF4,Flat", "IVF4,PQ4x4", "IVF4,SQ8", "IVF4_HNSW4,Flat", "IVF4,PQ4x4fs"),
    *(
        "PCA8,Flat",
        "OPQ4_8,IVF4,PQ4x4",
        "PQ4x4",
        "PQ4x4fs",
        "SQ8",
        "SQfp16",
        "LSH",
        "PCAR8,HNSW8",
        "IVF4,Flat,RFlat",
        "NSG8,Flat",
    ),
    *("ITQ8,LSH", "RR8,Flat", "L2norm,Flat", "Pad32,Flat", "IVF4,RaBitQ", "RaBitQ", "IMI2x2,Flat", "RQ2x4", "PQ4x4,RFlat"),
    *("IVF4(RCQ1x2),Flat", "IVF4,RaBitQfs", "IVF4,FlatPanorama4"),
]


@pytest.fixture(scope="module")
def xb() -> FloatArray:
    return np.random.default_rng(0).standard_normal((300, D)).astype(np.float32)


def made(factory: str, xb: FloatArray) -> Any:
    index = faiss.index_factory(xb.shape[1], factory, faiss.METRIC_L2)
    index.train(xb)
    index.add(xb)
    return index


@pytest.mark.parametrize("factory", FACTORIES)
def test_what_the_factory_makes_is_read_and_searches_alike(tmp_path: Path, xb: FloatArray, factory: str) -> None:
    index = made(factory, xb)
    faiss.write_index(index, str(tmp_path / "i"))
    found = read_index(tmp_path / "i", D, factory)
    for one, other in zip(index.search(xb[:20], 5), found.search(xb[:20], 5), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("factory", FACTORIES)
def test_what_another_factory_makes_is_refused(tmp_path: Path, xb: FloatArray, factory: str) -> None:
    faiss.write_index(made(factory, xb), str(tmp_path / "i"))
    for other in ("HNSW16", "IVF5,Flat", "PQ8x4", "Flat"):
        if other != factory:
            with pytest.raises(BankError):
                read_index(tmp_path / "i", D, other)


def test_a_file_that_goes_on_after_the_index_is_refused(tmp_path: Path, xb: FloatArray) -> None:
    faiss.write_index(made("HNSW8", xb), str(tmp_path / "i"))
    with (tmp_path / "i").open("ab") as file:
        file.write(b"more")
    with pytest.raises(BankError, match="something follows the index"):
        read_index(tmp_path / "i", D, "HNSW8")


def test_faiss_does_not_open_a_file_that_the_index_names(tmp_path: Path, xb: FloatArray) -> None:
    """The same type, lists and length: only where the lists are differs."""
    index = made("IVF4,Flat", xb)
    lists = faiss.OnDiskInvertedLists(4, index.code_size, str(tmp_path / "lists"))
    lists.merge_from_1(index.invlists)
    index.replace_invlists(lists, False)
    faiss.write_index(index, str(tmp_path / "i"))
    (tmp_path / "lists").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BankError, match="holds 'ilod', which the recipe's index does not have"):
        read_index(tmp_path / "i", D, "IVF4,Flat")
    assert sorted(tmp_path.iterdir()) == before


def test_no_vector_may_be_longer_than_the_file(tmp_path: Path, xb: FloatArray) -> None:
    """FAISS would take a terabyte before it notices that the file ends."""
    faiss.write_index(made("HNSW8", xb), str(tmp_path / "i"))
    data = (tmp_path / "i").read_bytes()
    place = data.index((300).to_bytes(8, "little"), 60)  # the number of levels
    (tmp_path / "i").write_bytes(data[:place] + (1 << 36).to_bytes(8, "little") + data[place + 8 :])
    before = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(BankError, match="is damaged"):
        read_index(tmp_path / "i", D, "HNSW8")
    assert faiss.get_deserialization_vector_byte_limit() == before  # the limit is that of the process


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "IVF4,PQ4x4", "PCA8,Flat"])
def test_no_mutant_ends_the_process(tmp_path: Path, xb: FloatArray, factory: str) -> None:
    path, rng = tmp_path / "i", random.Random(5)
    faiss.write_index(made(factory, xb[:60]), str(path))
    data = path.read_bytes()
    for _ in range(150):
        path.write_bytes(mutated(data, rng))
        try:
            found = read_index(path, D, factory)
        except BankError as error:
            assert "\n" not in str(error)  # noqa: PT017  # some mutants are refused
        else:
            found.search(xb[:3], 4)


# ---- factory strings of a bank


@pytest.mark.parametrize(
    "factory",
    [
        "HNSW9999999",
        "PQ8x24",
        "IMI2x14,Flat",
        "IVF9999999,Flat",
        "Pad999999999,Flat",
        "RR999999,Flat",
        "LSH999999",
        "IMI3x10,Flat",
        "x" * 101,
        "ü",
    ],
)
def test_a_factory_string_that_takes_memory_by_itself_is_refused(factory: str) -> None:
    with pytest.raises(InputError, match="factory string"):
        check_factory_string(factory, D)


@pytest.mark.parametrize("factory", ["HNSW0", "HNSW1,SQ8", "IVF4_HNSW1,Flat", "NSG0", "NSG3,Flat", "IVF0,Flat", "PQ4x0"])
def test_a_factory_string_that_ends_or_stops_the_process_is_refused(factory: str) -> None:
    """FAISS aborts, or builds for ever."""
    with pytest.raises(InputError, match="expected"):
        check_factory_string(factory, D)


@pytest.mark.parametrize(
    ("d", "factory"),
    [
        (1 << 17, "HNSW32"),
        (4096, "LSHrt"),
        (65536, "PCA8,Flat"),
        (2048, "LSH8192rt"),
        (65536, "PQ8x12"),
        (65536, "IMI2x9,Flat"),
    ],
)
def test_what_is_small_for_short_vectors_is_refused_for_long_ones(d: int, factory: str) -> None:
    """Rotations take the square of d, and their making the cube; codebooks take a multiple of d."""
    with pytest.raises(InputError, match="factory string"):
        check_factory_string(factory, d)


@pytest.mark.parametrize(
    "factory", ["HNSW32", "IVF65536_HNSW32,PQ64x8", "OPQ64_256,IVF4096,PQ64", "PCAR64,Flat", "IMI2x8,PQ16"]
)
def test_what_people_use_is_not_refused(factory: str) -> None:
    check_factory_string(factory, 1024)


def test_a_bank_does_not_choose_a_build_that_takes_long() -> None:
    for factory in ("LSQ8x8", "OPQ8,PQ8", "RQ8x8", "IVF4(RCQ2x4),Flat", "ITQ8,LSH", "PQ8", "HNSW32_PQ8", "IVF4,PQ8", "NSG32"):
        with pytest.raises(InputError, match=r"takes long to build.*; do this"):
            check_stored_factory(factory, D, "do this")
    for factory in ("IVF64,PQ8x8np", "HNSW32_PQ8np", "PQ8np", "PQ8x4fs", "HNSW32"):
        check_stored_factory(factory, D, "do this")


def test_an_update_adds_to_an_index_that_takes_long_to_build(tmp_path: Path) -> None:
    """What is built can be added to, whatever its factory string; building it anew is for the user to ask for."""
    recipe = Recipe(name="slow", build=Build(image="PQ2x2"))
    bank = make_bank(tmp_path / "bank")
    bank.append(batch(*(f"{number}" for number in range(40))))
    build_index(bank, recipe)
    bank.append(batch("new"))
    (built,) = update_indexes(bank)
    assert built.image is not None
    assert built.image.count == 41
    with pytest.raises(InputError, match=r"takes long to build.*--recipe FILE\.yaml"):
        update_indexes(bank, rebuild=True)
    assert build_index(bank, recipe, rebuild=True) is not None


# ---- in a bank


RECIPE = Recipe(name="hnsw", build=Build(image="HNSW32"))


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    made_bank = make_bank(tmp_path / "bank")
    made_bank.append(batch(*(f"{number}" for number in range(60))))
    build_index(made_bank, RECIPE)
    return made_bank.path


def replaced(bank: Path, outside: Path, make_index: Callable[..., Any]) -> None:
    (file,) = (bank / "indexes" / "hnsw").glob("*.faiss")
    index = make_index(bank, outside, faiss.read_index(str(file)))
    file.unlink()
    faiss.write_index(index, str(file))
    record(bank, file)


@pytest.mark.parametrize("what", INDEXES)
def test_a_foreign_index_is_refused_and_named_by_verify(bank: Path, tmp_path: Path, what: str) -> None:
    from spade_faiss.bank.bank import Bank

    outside = tmp_path / "outside"
    outside.mkdir()
    replaced(bank, outside, INDEXES[what])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in outside.iterdir()}
    with pytest.raises(BankError, match=r"spade-faiss index .* --recipe hnsw --rebuild"):
        ImageIndex.open(Bank.open(bank), RECIPE)
    (problem,) = verify(bank, deep=True).problems
    assert "hnsw" in problem
    opened = Bank.open(bank)
    opened.append(batch("new"))
    update_indexes(opened)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in outside.iterdir()} == before
    assert verify(bank, deep=True).problems == ()


def test_a_graph_that_leads_nowhere_for_some_is_found_by_verify(bank: Path, tmp_path: Path) -> None:
    """Fault "45 of 320 HNSW mutants silently scored otherwise": an index that misses most of what it holds is named."""
    replaced(bank, tmp_path, INDEXES["no neighbors"])
    (problem,) = verify(bank, deep=True).problems
    assert "does not find 59 of 60 of its entries by their own vectors" in problem
