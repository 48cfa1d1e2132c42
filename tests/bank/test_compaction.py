"""Compaction: what is left keeps its order and its content, and shards that somebody reads stay."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss import Detector
from spade_faiss.bank import bank as bank_module
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.compaction import plan_compaction
from spade_faiss.bank.shards import ShardEntry
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.core.settings import Method
from spade_faiss.features.batch import FeatureBatch
from tests.support.banks import (
    ABC,
    DE,
    INPUT,
    F,
    PowerCutError,
    assert_holds,
    batch,
    fail,
    fail_on_call,
    files,
    forget_mappings,
    make_bank,
    part_of,
    shard_files,
    three_shards,
)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Six images in three shards."""
    return three_shards(tmp_path / "bank")


def test_compacting_keeps_the_order_and_drops_what_was_removed(bank: Bank) -> None:
    bank.remove(["b", "d"])
    kept, old = [part_of(ABC, 0, 2), part_of(DE, 1), F], shard_files(bank)
    done = bank.compact()
    assert (done.dropped, done.bytes_after) == (2, bank.bytes_on_disk)
    assert done.bytes_written == done.bytes_after < done.bytes_before
    for state in (bank, Bank.open(bank.path)):
        assert_holds(state, *kept)
        assert [shard.count for shard in state.manifest.shards] == [4]
        assert state.removed == {}
    # The only one who has the bank open is the one who compacts.
    assert shard_files(bank) == [bank.manifest.shards[0].file]
    assert not set(shard_files(bank)) & set(old)


def test_compacting_again_writes_nothing(bank: Bank) -> None:
    bank.remove(["b"])
    bank.compact()
    before, generation = files(bank.path), bank.generation
    done = bank.compact()
    assert (done.dropped, done.bytes_written) == (0, 0)
    assert done.bytes_before == done.bytes_after
    assert bank.generation == generation
    assert files(bank.path) == before


def test_shards_that_are_large_enough_are_not_written_again(bank: Bank) -> None:
    size = bank.manifest.shards[0].bytes
    bank.append(batch("g"))
    first, _, _, last = bank.manifest.shards
    done = bank.compact(target_bytes=2 * size)
    assert [bank.manifest.shards[0], bank.manifest.shards[2]] == [first, last]
    assert done.bytes_written == bank.manifest.shards[1].bytes < done.bytes_after
    assert_holds(Bank.open(bank.path), ABC, DE, F, batch("g"))
    bank.remove(["b"])
    untouched = bank.manifest.shards[1:]
    bank.compact(target_bytes=2)
    assert bank.manifest.shards[1:] == untouched
    assert_holds(Bank.open(bank.path), part_of(ABC, 0, 2), DE, F, batch("g"))


def test_who_opened_the_bank_before_can_read_every_map_afterwards(bank: Bank) -> None:
    old = shard_files(bank)
    reader = Bank.open(bank.path)
    detector = Detector.open(bank.path, method=Method(k_image=6, k_gallery=6))
    shown = detector.score_features(batch("query"))
    bank.remove(["b", "f"])
    bank.compact()
    forget_mappings()
    assert_holds(reader, ABC, DE, F)
    assert reader.read(np.arange(6)).ids == list("abcdef")
    again = detector.score_features(batch("query"))
    np.testing.assert_array_equal(again.maps, shown.maps)
    assert set(old) < set(shard_files(bank))
    assert_holds(Bank.open(bank.path), part_of(ABC, 0, 2), DE)
    # One of two is gone: the other still reads.
    del reader
    gc.collect()
    bank.compact()
    assert set(old) < set(shard_files(bank))
    # The lease was that of the bank, which the detector holds.
    del detector
    gc.collect()
    assert bank.readers() == []
    bank.compact()
    assert shard_files(bank) == [bank.manifest.shards[0].file]
    assert_holds(Bank.open(bank.path), part_of(ABC, 0, 2), DE)


def test_who_reads_the_newest_state_keeps_nothing_old(bank: Bank) -> None:
    bank.remove(["b"])
    bank.compact()
    bank.append(batch("g"))
    reader = Bank.open(bank.path)
    (bank.path / "features" / "999999.h5").touch()  # nobody's
    bank.compact(target_bytes=2)
    assert bank.generation == reader.generation
    assert shard_files(bank) == sorted(shard.file for shard in bank.manifest.shards)
    assert_holds(reader, part_of(ABC, 0, 2), DE, F, batch("g"))


def with_files(part: FeatureBatch, root: str, folder: str) -> FeatureBatch:
    """The same images from files below a root."""
    return replace(
        part,
        paths=[f"{folder}/{name}.png" for name in part.ids],
        sha256=[f"digest of {name}" for name in part.ids],
        root=root,
    )


def valid_of(part: FeatureBatch) -> npt.NDArray[np.bool_]:
    """Masks that differ from image to image; a size that no byte divides."""
    return np.stack([np.random.default_rng([*name.encode()]).random(INPUT) < 0.6 for name in part.ids])


def test_paths_checksums_and_masks_survive_a_join_of_shards_with_other_roots(tmp_path: Path) -> None:
    parts = [
        with_files(ABC, "/data/2024", "good"),
        with_files(DE, "/data/2025/line 3", "a/b"),
        with_files(F, "/elsewhere", "."),
        with_files(batch("ü\n"), "/", "data"),
    ]
    bank = make_bank(tmp_path / "bank")
    for part in parts:
        bank.append(replace(part, valid=valid_of(part)))
    ids = bank.ids
    paths = {name: bank.image_path(name) for name in ids}
    assert paths["e"] == Path("/data/2025/line 3/a/b/e.png")
    digests, masks = bank.sha256_of, bank.read(np.arange(7)).valid
    bank.remove(["b"])
    bank.compact()
    bank = Bank.open(bank.path)
    assert len(bank.manifest.shards) == 1
    left = [name for name in ids if name != "b"]
    assert bank.ids == left
    for name in left:
        found, expected = bank.image_path(name), paths[name]
        assert found is not None
        assert expected is not None
        assert os.path.normpath(found) == os.path.normpath(expected)
    assert bank.sha256_of == {name: digests[name] for name in left}
    kept = bank.read(np.arange(6)).valid
    assert masks is not None
    assert kept is not None
    np.testing.assert_array_equal(kept, np.delete(masks, 1, axis=0))


def test_images_with_files_and_images_without_are_compacted_into_one_bank(tmp_path: Path) -> None:
    """A bank may hold both: of another extractor and of files, of a time when masks were not kept and of today."""
    bank = make_bank(tmp_path / "bank")
    bank.append(ABC)
    bank.append(replace(with_files(DE, "/r", "x"), valid=valid_of(DE)))
    bank.append(F)
    bank.remove(["a"])
    bank.compact()
    bank = Bank.open(bank.path)
    assert_holds(bank, part_of(ABC, 1, 2), DE, F)
    assert [bank.image_path(name) for name in bank.ids] == [None, None, Path("/r/x/d.png"), Path("/r/x/e.png"), None]
    assert {name: digest for name, digest in bank.sha256_of.items() if digest} == {"d": "digest of d", "e": "digest of e"}
    for row, name in enumerate(bank.ids):
        valid = bank.read(np.array([row])).valid
        if name in "de":
            assert valid is not None
            np.testing.assert_array_equal(valid[0], valid_of(DE)["de".index(name)])
        else:
            assert valid is None or valid.all()


def test_a_compaction_that_fails_leaves_the_bank_as_it_was(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.remove(["b"])
    before = files(bank.path)
    for owner, name, call in [(bank_module, "write_shard", 1), (Path, "replace", 1), (os, "fsync", 1)]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail_on_call(getattr(owner, name), call))
            with pytest.raises(PowerCutError):
                bank.compact()
        assert files(bank.path) == before
    with monkeypatch.context() as patch:
        patch.setattr(bank_module, "write_manifest", fail)
        with pytest.raises(PowerCutError):
            bank.compact()
    assert not list(bank.path.rglob(TEMPORARY_PATTERN))
    for state in (bank, Bank.open(bank.path)):
        assert_holds(state, part_of(ABC, 0, 2), DE, F)
        assert sorted(state.removed) == ["b"]
    del state
    # The shard that nobody names does no harm, whatever comes next, and goes with the next compaction.
    bank.append(batch("g"))
    bank.restore(["b"])
    bank.compact()
    assert_holds(Bank.open(bank.path), ABC, DE, F, batch("g"))
    assert shard_files(bank) == [bank.manifest.shards[0].file]


def entry(size: int, count: int = 1, removed: Sequence[int] = ()) -> ShardEntry:
    return ShardEntry(file=f"{size}.h5", bytes=size, mtime_ns=0, sha256="", count=count, removed=tuple(removed))


@st.composite
def any_shards(draw: st.DrawFn) -> list[ShardEntry]:
    def one() -> ShardEntry:
        count = draw(st.integers(1, 6))
        positions = st.integers(0, count - 1)
        removed = draw(st.just(set[int]()) | st.sets(positions))
        return entry(count * draw(st.integers(1, 40)), count, sorted(removed))

    return [one() for _ in range(draw(st.integers(0, 12)))]


def live_bytes(shard: ShardEntry) -> int:
    return shard.bytes * shard.live_count // shard.count


@given(any_shards(), st.integers(2, 120))
def test_a_plan_of_compaction(entries: list[ShardEntry], target: int) -> None:
    groups = plan_compaction(entries, target)
    assert [index for group in groups for index in group] == list(range(len(entries))), "consecutive, and all of them"
    for group in groups:
        assert len(group) == 1 or sum(live_bytes(entries[index]) for index in group) <= target
        if len(group) > 1:
            large = [index for index in group if not entries[index].removed and entries[index].bytes >= target // 2]
            assert not large, "what is large enough is not written again"
    sizes = [sum(live_bytes(entries[index]) for index in group) for group in groups]
    assert all(
        size + live_bytes(entries[after[0]]) > target
        for size, after in zip(sizes, groups[1:], strict=False)
        if 0 < size < target // 2 and live_bytes(entries[after[0]]) < target // 2
    ), "small neighbors are joined"
    # What came of it stays as it is.
    made = [entry(size) for size in sizes if size]
    assert plan_compaction(made, target) == [[index] for index in range(len(made))]


def test_a_plan_of_compaction_by_hand() -> None:
    assert plan_compaction([], 100) == []
    assert plan_compaction([entry(30), entry(40), entry(30), entry(20)], 100) == [[0, 1, 2], [3]]
    assert plan_compaction([entry(30), entry(50), entry(30), entry(30)], 100) == [[0], [1], [2, 3]]
    assert plan_compaction([entry(30), entry(90, 3, [1]), entry(20)], 100) == [[0, 1], [2]]
    assert plan_compaction([entry(40), entry(90, 3, [0, 1, 2]), entry(20)], 100) == [[0, 1, 2]]
