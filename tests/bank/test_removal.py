"""Removing and restoring images: whoever opens the bank sees it at once, whoever had it open goes on with what it had."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Detector
from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from spade_faiss.search.recipe import Recipe
from tests.support.banks import (
    ABC,
    DE,
    FINE,
    F,
    assert_holds,
    batch,
    events,
    files,
    part_of,
    shard_files,
    three_shards,
)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Six images in three shards."""
    return three_shards(tmp_path / "bank")


def test_removed_images_are_gone_for_all_who_open_the_bank_from_now_on(bank: Bank) -> None:
    before, detector = Bank.open(bank.path), Detector.open(bank.path, method=Method(k_image=6, k_gallery=6))
    shown = detector.score_features(batch("query"))
    assert bank.remove(["b", "f"]) == 2
    left = [part_of(ABC, 0, 2), DE]
    for state in (bank, Bank.open(bank.path)):
        assert_holds(state, *left)
        assert sorted(state.removed) == ["b", "f"]
        assert state.generation == 4
    # Who had opened it before goes on with what it had.
    assert_holds(before, ABC, DE, F)
    again = detector.score_features(batch("query"))
    np.testing.assert_array_equal(again.maps, shown.maps)
    assert again.neighbor_ids.tolist() == shown.neighbor_ids.tolist()
    found = Detector.open(bank.path, method=Method(k_image=4, k_gallery=4)).score_features(batch("query"))
    assert sorted(found.neighbor_ids[0]) == ["a", "c", "d", "e"]
    with pytest.raises(InputError, match="k_image=5 is larger than the number of normal images, 4"):
        Detector.open(bank.path, method=Method(k_gallery=4))


def test_a_detector_keeps_its_state_whatever_is_done_through_its_own_bank(bank: Bank) -> None:
    """What it found when it was opened goes by row numbers, which must not come to mean other images."""
    detector = Detector(bank, Recipe(name="exact"), Method(k_image=2, k_gallery=2))
    shown = detector.score_features(batch("query"))
    bank.remove(["a", "d"])
    again = detector.score_features(batch("query"))
    assert again.neighbor_ids.tolist() == shown.neighbor_ids.tolist()
    np.testing.assert_array_equal(again.neighbor_dist, shown.neighbor_dist)
    np.testing.assert_array_equal(again.maps, shown.maps)


def test_removing_writes_the_manifest_and_nothing_else(bank: Bank) -> None:
    before = files(bank.path)
    bank.remove(["a"])
    after = files(bank.path)
    assert before.pop("manifest.json") != after.pop("manifest.json")
    assert after == before


def test_every_row_is_found_where_images_before_it_were_removed(bank: Bank) -> None:
    bank.remove(["a", "d", "f"])
    left = Bank.open(bank.path)
    assert_holds(left, part_of(ABC, 1, 2), part_of(DE, 1))
    assert [left.rows_of_shard(index).tolist() for index in range(3)] == [[-1, 0, 1], [-1, 2], [-1]]
    np.testing.assert_array_equal(left.embeddings_of_shard(0), ABC.embedding[1:])
    assert left.embeddings_of_shard(2).shape == (0, ABC.embedding.shape[1])
    read = left.read(np.array([2, 0]))
    assert read.ids == ["e", "b"]
    np.testing.assert_array_equal(read.levels[FINE.name][0], DE.levels[FINE.name][1])
    with pytest.raises(IndexError, match="row 3 of a bank of 3 rows"):
        left.level_map(FINE.name, 3)
    whole = left.with_removed()
    assert whole.ids == list("abcdef")
    assert len(whole) == 6


def test_restored_images_come_back_to_the_rows_they_had(bank: Bank) -> None:
    bank.remove(["e", "a", "f", "c"])
    assert_holds(Bank.open(bank.path), part_of(ABC, 1), part_of(DE, 0))
    assert bank.restore(["c", "e"]) == 2
    assert_holds(Bank.open(bank.path), part_of(ABC, 1, 2), DE)
    assert bank.restore(["f", "a"]) == 2
    for state in (bank, Bank.open(bank.path)):
        assert_holds(state, ABC, DE, F)
        assert state.removed == {}


@pytest.mark.parametrize("ids", [["x"], ["a", "x"], ["x", "b"], [""], ["../manifest.json"], ["a "]])
def test_an_id_that_the_bank_does_not_hold_is_named_and_nothing_changes(bank: Bank, ids: list[str]) -> None:
    bank.remove(["b"])
    before, generation = files(bank.path), bank.generation
    unknown = next(name for name in ids if name not in "ab" or not name)
    for refuse, what in ((bank.remove, "removed"), (bank.restore, "restored")):
        with pytest.raises(InputError) as caught:
            refuse(ids)
        assert f"does not hold 1 of these images{' (any more)' if what == 'restored' else ''}, the first is {unknown!r}" in str(
            caught.value
        )
        assert f"nothing was {what}" in str(caught.value)
        assert files(bank.path) == before
        assert bank.generation == generation
        assert sorted(bank.removed) == ["b"]


def test_what_is_done_already_is_left_as_it_is(bank: Bank) -> None:
    assert bank.remove(["a", "d"]) == 2
    before = files(bank.path)
    assert bank.remove(["d", "a"]) == 0
    assert bank.restore(["b", "c"]) == 0
    assert bank.remove([]) == 0
    assert bank.restore([]) == 0
    assert files(bank.path) == before
    assert bank.remove(["a", "b", "b"]) == 1
    assert bank.restore(["a", "a", "f"]) == 1
    assert Bank.open(bank.path).ids == ["a", "c", "e", "f"]


def test_removing_goes_by_the_newest_state(bank: Bank) -> None:
    other = Bank.open(bank.path)
    other.append(batch("g"))
    other.remove(["a"])
    assert bank.remove(["a", "g", "b"]) == 2
    assert Bank.open(bank.path).ids == ["c", "d", "e", "f"]
    other.restore(["g"])
    assert other.ids == ["c", "d", "e", "f", "g"]


def test_a_removed_id_is_not_given_again_until_it_is_forgotten(bank: Bank) -> None:
    bank.remove(["b", "f"])
    before = files(bank.path)
    for state in (bank, Bank.open(bank.path)):
        with pytest.raises(InputError, match=r"the first is 'b' \(it was removed: restore it, or compact the bank first\)"):
            state.append(batch("b", seed=1))
        with pytest.raises(InputError, match=r"the first is 'a'$"):
            state.append(batch("a", seed=1))
    assert files(bank.path) == before
    bank.compact()
    with pytest.raises(InputError, match=r"\(any more\), the first is 'f'"):
        bank.restore(["f"])
    new = batch("f", "b", seed=1)
    bank.append(new)
    assert_holds(Bank.open(bank.path), part_of(ABC, 0, 2), DE, new)


def test_all_images_can_be_removed_and_others_added(bank: Bank) -> None:
    bank.remove(list("abcdef"))
    assert len(Bank.open(bank.path)) == 0
    with pytest.raises(InputError, match="is empty; add normal images: spade-faiss add IMAGES --bank"):
        Detector.open(bank.path)
    bank.append(batch("g"))
    assert_holds(Bank.open(bank.path), batch("g"))
    assert bank.compact().dropped == 6
    assert_holds(Bank.open(bank.path), batch("g"))
    bank.remove(["g"])
    bank.compact()
    empty = Bank.open(bank.path)
    assert_holds(empty)
    assert shard_files(empty) == []
    empty.append(ABC)
    assert_holds(Bank.open(bank.path), ABC)


def test_the_history_says_what_was_done(bank: Bank) -> None:
    assert events(bank) == [(1, "add", 3), (2, "add", 2), (3, "add", 1)]
    bank.remove(["a", "d"])
    bank.restore(["d"])
    bank.compact()
    with bank.writing():  # one command, however many commits
        bank.append(batch("g"))
        bank.append(batch("h", "i"))
        bank.remove(["g"])
        bank.append(batch("j"))
    made = [(4, "remove", 2), (5, "restore", 1), (6, "compact", 1), (8, "add", 3), (9, "remove", 1), (10, "add", 1)]
    for state in (bank, Bank.open(bank.path)):
        assert events(state)[3:] == made
        assert state.generation == 10
    bank.append(batch("k"))
    assert events(bank)[-2:] == [(10, "add", 1), (11, "add", 1)]
    assert all(event.time.endswith("+00:00") for event in bank.manifest.history)


def test_a_detector_that_is_gone_reads_no_more(bank: Bank) -> None:
    """At once, without the collector of cycles: what it held would stay on disk until then."""
    gc.disable()
    try:
        detector = Detector.open(bank.path, method=Method(k_image=2, k_gallery=2))
        detector.score_features(batch("query"))
        assert len(bank.readers()) == 1
        del detector
        assert bank.readers() == []
    finally:
        gc.enable()
