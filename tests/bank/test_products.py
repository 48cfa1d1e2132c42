"""Several products in one bank: each shard is of one, and what is done to one says nothing about the others."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, BankError, InputError
from spade_faiss.core.products import product_folder
from tests.support.banks import ABC, make_bank
from tests.support.manifests import edit_manifest
from tests.support.product_banks import bank_of_products, numbered, shots


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Two products that came in turns: cap, pen, cap."""
    made = bank_of_products(tmp_path / "bank", {"cap": 4, "pen": 3})
    made.append(shots("cap", ["late"], seed=1), product="cap")
    return made


def test_a_part_is_the_images_of_one_product(bank: Bank) -> None:
    for state in (bank, Bank.open(bank.path)):
        assert state.products == ("cap", "pen")
        cap = state.part("cap")
        assert cap.ids == [*numbered("cap", 4), "late"]
        assert (cap.product, cap.products, cap.is_of_products, state.is_of_products) == ("cap", ("cap",), False, True)
        rows = state.rows_of("cap")
        assert rows.tolist() == [0, 1, 2, 3, 7]
        np.testing.assert_array_equal(cap.embedding(np.arange(5)), state.embedding(rows))
        assert state.products_at(np.array([[0, 4], [7, 6]])).tolist() == [[0, 1], [0, 1]]
        assert [state.images_of(name) for name in state.products] == [5, 3]


def test_a_part_can_be_pickled(bank: Bank) -> None:
    again = pickle.loads(pickle.dumps(bank.part("pen")))
    assert (again.product, again.ids) == ("pen", numbered("pen", 3))


def test_a_batch_says_of_which_product_it_is(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say of which one"):
        bank.append(shots("pen", ["x"]))
    with pytest.raises(InputError, match="must be the name of a product"):
        bank.append(shots("pen", ["x"]), product="a\nb")
    plain = make_bank(tmp_path / "plain")
    with pytest.raises(InputError, match="was made without products"):
        plain.append(ABC, product="cap")
    with pytest.raises(InputError, match="was made without products"):
        plain.part("cap")
    with pytest.raises(InputError, match="its products: cap, pen"):
        bank.part("cup")
    assert len(bank) == 8


def test_a_product_is_removed_and_restored(bank: Bank) -> None:
    before = bank.part("cap").manifest.shards
    assert bank.remove(bank.part("pen").pictures.ids) == 3
    assert bank.products == ("cap",)
    assert bank.part("cap").manifest.shards == before
    bank.restore(bank.with_removed().part("pen").pictures.ids)
    assert bank.part("pen").ids == numbered("pen", 3)


def test_compaction_joins_the_shards_of_a_product_and_no_others(bank: Bank) -> None:
    order = {name: bank.part(name).ids for name in bank.products}
    bank.compact()
    assert [shard.product for shard in bank.manifest.shards] == ["cap", "pen"]
    assert {name: bank.part(name).ids for name in bank.products} == order
    assert Bank.open(bank.path).ids == bank.ids


def test_what_was_built_of_a_product_goes_with_it(bank: Bank) -> None:
    folders = {name: bank.path.joinpath(*bank.part(name).place) for name in bank.products}
    for folder in folders.values():
        (folder / "calibration").mkdir(parents=True)
    bank.remove(numbered("pen", 3))
    bank.compact()
    assert folders["cap"].is_dir()
    assert not folders["pen"].exists()


def test_what_else_lies_in_a_folder_of_that_name_stays(bank: Bank, tmp_path: Path) -> None:
    plain = make_bank(tmp_path / "plain")
    plain.append(ABC)
    for path in (plain.path, bank.path):
        (path / "products" / "2026-export").mkdir(parents=True)
        (path / "products" / "2026-export" / "list.csv").write_text("mine")
        (path / "products" / ".DS_Store").write_text("a system's")
    plain.remove([plain.ids[0]])
    plain.compact()
    bank.remove(numbered("pen", 3))
    bank.compact()
    for path in (plain.path, bank.path):
        assert (path / "products" / "2026-export" / "list.csv").read_text() == "mine"
        assert (path / "products" / ".DS_Store").exists()


def test_folders_of_products_differ(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a b", "ä", "x" * 200, "x" * 199]
    assert len({product_folder(name) for name in names}) == len(names)
    assert all(len(product_folder(name)) < 64 and "/" not in product_folder(name) for name in names)


def test_a_bank_without_products_is_written_as_versions_before_write_it(bank: Bank, tmp_path: Path) -> None:
    plain = make_bank(tmp_path / "plain")
    plain.append(ABC)
    content = json.loads((plain.path / "manifest.json").read_text())
    assert "products" not in json.dumps(content)
    assert "product" not in content["shards"][0]
    assert json.loads((bank.path / "manifest.json").read_text())["shards"][0]["product"] == "cap"


@pytest.mark.parametrize("product", ["", " cap", "a\u202eb", 7, None])
def test_a_manifest_that_says_otherwise_is_damaged(bank: Bank, product: object) -> None:
    def change(content: dict[str, object]) -> None:
        content["shards"][0]["product"] = product  # type: ignore[index]

    edit_manifest(bank.path / "manifest.json", change)
    with pytest.raises(BankError):
        Bank.open(bank.path)
