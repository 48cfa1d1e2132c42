"""Pictures of which a bank holds several entries: they are removed, restored, counted and named as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, FeatureBatch, InputError
from spade_faiss.bank.facts import facts_of
from spade_faiss.features.batch import concatenate, originals
from spade_faiss.features.layout import prepare
from spade_faiss.workflows.verify import verify
from tests.support.banks import ABC, DE, F, assert_holds, batch, events, files, make_bank

# Pictures a and b with two entries each, whose order is mixed, and c with one; then a third entry of b, and d.
FIRST = batch("a", "b", "a//1", "c", "b//1", pictures=["a", "b", "a", "c", "b"])
SECOND = batch("b//2", "d", pictures=["b", "d"])


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    made = make_bank(tmp_path / "bank")
    made.append(FIRST)
    made.append(SECOND)
    return made


def test_entries_know_their_picture(bank: Bank) -> None:
    for state in (bank, Bank.open(bank.path)):
        assert_holds(state, FIRST, SECOND)
        pictures = state.pictures
        assert (len(state), len(pictures), pictures.largest) == (7, 4, 3)
        assert pictures.ids == list("abcd")
        assert pictures.of(np.arange(7)).tolist() == [0, 1, 0, 2, 1, 1, 3]
        assert pictures.of(np.array([[6], [4]])).tolist() == [[3], [1]]
        assert pictures.names(np.array([5, 0])) == ["b", "a"]
        assert [pictures.rows(number).tolist() for number in range(4)] == [[0, 2], [1, 4, 5], [3], [6]]
        assert (pictures.originals.tolist(), pictures.sizes.tolist()) == ([0, 1, 3, 6], [2, 3, 1, 1])
        assert [pictures.number(name) for name in ("d", "b//2", "x")] == [3, None, None]
        assert not pictures.are_rows
        assert facts_of(state)["images"] == 4
        assert facts_of(state)["entries"] == 7
        assert facts_of(state)["bytes_per_image"] == round(state.bytes_on_disk / 4)
        assert state.size_text == "4 normal images (7 entries)"
        assert state.read(np.array([5, 0])).pictures == ["b", "a"]
    assert events(bank) == [(1, "add", 3), (2, "add", 2)]
    assert verify(bank.path, deep=True).images == 4


def test_where_each_entry_is_a_picture_nothing_is_stored(tmp_path: Path) -> None:
    plain, named = make_bank(tmp_path / "plain"), make_bank(tmp_path / "named")
    plain.append(ABC)
    named.append(batch("a", "b", "c", pictures=["a", "b", "c"]))
    shards = [next(content for name, content in files(made.path).items() if name.endswith(".h5")) for made in (plain, named)]
    assert shards[0] == shards[1]
    assert b"picture" not in shards[0]
    pictures = plain.pictures
    assert pictures.are_rows
    assert (pictures.ids, len(pictures), pictures.largest) == (list("abc"), 3, 1)
    assert pictures.of(np.array([2, 0])).tolist() == [2, 0]
    assert (pictures.originals.tolist(), pictures.sizes.tolist(), pictures.rows(1).tolist()) == ([0, 1, 2], [1, 1, 1], [1])
    assert plain.size_text == "3 normal images"
    assert plain.read(np.array([1])).pictures == ()
    # A shard with pictures beside one without.
    plain.append(batch("c//1", pictures=["c"]))
    assert plain.pictures.names(np.arange(4)) == ["a", "b", "c", "c"]


def test_a_picture_is_removed_and_restored_with_all_of_its_entries(bank: Bank) -> None:
    assert bank.remove(["b", "d", "b"]) == 2
    for state in (bank, Bank.open(bank.path)):
        assert state.ids == ["a", "a//1", "c"]
        assert state.removed == {"b": ((0, 1), (0, 4), (1, 0)), "d": ((1, 1),)}
        assert (state.pictures.ids, state.pictures.sizes.tolist()) == (["a", "c"], [2, 1])
    assert bank.remove(["b"]) == 0
    assert bank.restore(["b", "a"]) == 1
    assert bank.ids == ["a", "b", "a//1", "c", "b//1", "b//2"]
    assert events(bank)[2:] == [(3, "remove", 2), (4, "restore", 1)]


def test_a_single_entry_cannot_be_removed(bank: Bank) -> None:
    before = files(bank.path)
    for change in (bank.remove, bank.restore):
        with pytest.raises(InputError, match=r"the first is 'b//1', an entry of 'b': name that image"):
            change(["a", "b//1"])
    assert files(bank.path) == before


def test_a_removed_picture_gets_no_more_entries(bank: Bank) -> None:
    bank.remove(["a"])
    with pytest.raises(InputError, match=r"'a//2' \(it was removed: restore it"):
        bank.append(batch("a//2", pictures=["a"]))
    bank.compact()
    bank.append(batch("a//2", pictures=["a"]))
    assert bank.pictures.ids == ["b", "c", "d", "a"]


def test_compaction_keeps_the_pictures(bank: Bank) -> None:
    bank.append(F)
    bank.remove(["a", "c"])
    assert bank.compact().dropped == 2
    for state in (bank, Bank.open(bank.path)):
        assert len(state.manifest.shards) == 1
        assert state.ids == ["b", "b//1", "b//2", "d", "f"]
        assert state.pictures.names(np.arange(5)) == ["b", "b", "b", "d", "f"]
        assert state.removed == {}


def test_all_pictures_may_be_removed(bank: Bank) -> None:
    bank.remove(list("abcd"))
    assert (len(bank), len(bank.pictures), bank.pictures.largest, bank.size_text) == (0, 0, 1, "0 normal images")
    bank.compact()
    assert (len(bank.pictures), bank.pictures.are_rows) == (0, True)


def test_files_belong_to_pictures(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank")
    paths, digests = ["a.png", "a.png", "b.png"], ["12", "12", "34"]
    bank.append(batch("a//0", "a//1", "b", pictures=["a", "a", "b"], paths=paths, sha256=digests, root="/data"))
    assert bank.sha256_of == {"a": "12", "b": "34"}
    assert bank.image_path("a") == Path("/data/a.png")
    with pytest.raises(KeyError):
        bank.image_path("a//1")


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (["a"], "a batch of 2 images has 1 pictures"),
        (["a", ""], "the id of a picture is empty"),
        (["a", "b\0"], "pictures 'b.x00' must be a string without NUL"),
    ],
)
def test_pictures_that_a_bank_cannot_hold_are_refused(bank: Bank, pictures: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bank.append(batch("x", "y", pictures=pictures))


def test_batches_are_joined_and_cut_with_their_pictures() -> None:
    joined = concatenate([DE, FIRST])
    assert joined.pictures == ["d", "e", "a", "b", "a", "c", "b"]
    assert joined[1:4].picture_ids == ["e", "a", "b"]
    assert concatenate([ABC, DE]).pictures == ()
    assert ABC.picture_ids == ABC.ids


def test_the_original_of_a_picture_is_its_first_entry(bank: Bank) -> None:
    given = batch("x//0", "y", "x//1", pictures=["x", "y", "x"])
    found: FeatureBatch = originals(given)
    assert (found.ids, found.pictures) == (["x", "y"], ())
    np.testing.assert_array_equal(found.embedding, given.embedding[:2])
    assert prepare(found, bank.layout).levels.keys() == given.levels.keys()
    assert originals(ABC) is ABC
