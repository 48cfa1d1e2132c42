"""A bank over the years: what is taken out, brought back, compacted and added is in the bank, the rest is as it was."""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss import Detector
from spade_faiss.bank import bank as bank_module
from spade_faiss.bank import shards
from spade_faiss.bank.bank import Bank, plan_compaction
from spade_faiss.bank.shards import ShardEntry
from spade_faiss.core import arrays
from spade_faiss.core.errors import InputError, NotFoundError, SpadeError
from spade_faiss.core.files import TEMPORARY_PATTERN, hash_file
from spade_faiss.core.settings import Extraction, Method, Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.datasets import Duplicate
from spade_faiss.features.layout import Layout
from spade_faiss.search.recipe import Recipe
from spade_faiss.workflows import extract
from spade_faiss.workflows.extract import Added, add
from spade_faiss.workflows.fit import fit
from tests.support.backbones import tiny_backbone
from tests.support.banks import FINE, SOURCE, PowerCutError, assert_holds, batch, fail, fail_on_call, files, make_bank
from tests.support.pictures import save_png

GOLDEN = Path(__file__).parents[1] / "golden" / "bank_v3"

INPUT = (20, 28)  # of `make_bank`


def part_of(part: FeatureBatch, *positions: int) -> FeatureBatch:
    """Some of a batch's images."""
    return FeatureBatch(
        [part.ids[position] for position in positions],
        part.embedding[list(positions)],
        {name: maps[list(positions)] for name, maps in part.levels.items()},
        part.source,
        valid=None if part.valid is None else part.valid[list(positions)],
        paths=[part.paths[position] for position in positions if part.paths],
        sha256=[part.sha256[position] for position in positions if part.sha256],
        root=part.root,
    )


def forget_mappings() -> None:
    """What is read from now on is opened again."""
    arrays.map_arrays.cache_clear()
    shards.map_shard.cache_clear()
    gc.collect()


def shard_files(bank: Bank) -> list[str]:
    return sorted(path.name for path in (bank.path / "features").glob("*.h5"))


def events(bank: Bank) -> list[tuple[int, str, int]]:
    return [(event.generation, event.action, event.images) for event in bank.manifest.history]


ABC, DE, F = batch("a", "b", "c"), batch("d", "e"), batch("f")


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Six images in three shards."""
    made = make_bank(tmp_path / "bank")
    for part in (ABC, DE, F):
        made.append(part)
    return made


# ---- remove and restore


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
    with pytest.raises(IndexError, match="row 3 of a bank of 3 images"):
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
    with pytest.raises(InputError, match="k_image=5 is larger than the number of normal images, 0"):
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


# ---- compact


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


# ---- yesterday's banks


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

    python -c "from tests.workflows.test_upkeep import write_golden_bank; write_golden_bank()"
    """
    levels = [
        Level("layer1", channels=4, stride=4, height=2, width=3),
        Level("layer2", channels=5, stride=8, height=1, width=2),
    ]
    bank = Bank.create(
        GOLDEN, Layout(levels=tuple(levels), embedding_dim=3, input_size=(5, 7)), source=SOURCE, weights_file="/w.pth"
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
    assert bank.removed == {"000.png": (0, 0)}
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


# ---- add images


def save_images(folder: Path, *names: str, seed: int = 0) -> Path:
    """Pictures that are determined by the seed and their names."""
    for name in names:
        pixels = np.random.default_rng([seed, *name.encode()]).integers(0, 256, (26, 30, 3))
        save_png(pixels.astype(np.uint8), folder / name)
    return folder


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save_images(tmp_path / "good", "a.png", "b.png", "c.png")


@pytest.fixture
def fitted(good: Path, tmp_path: Path, tiny: Backbone) -> Bank:
    return fit(good, bank=tmp_path / "bank", extraction=Extraction(backbone=tiny)).bank


def numbers_of(done: Added) -> tuple[int, int, tuple[str, ...], int]:
    return done.added, done.present, done.removed, len(done.duplicates)


def test_added_images_are_in_the_bank(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    more = save_images(tmp_path / "more", "d.png", "e.png")
    done = add(more, bank=fitted.path, backbone=tiny)
    assert isinstance(done, Added)
    assert numbers_of(done) == (2, 0, (), 0)
    bank = Bank.open(fitted.path)
    assert bank.ids == done.bank.ids == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert bank.image_path("e.png") == more.resolve() / "e.png"
    assert bank.sha256_of["e.png"] == hash_file(more / "e.png")
    at_once = save_images(good, "d.png", "e.png")
    expected = fit(at_once, bank=tmp_path / "at once", extraction=Extraction(backbone=tiny)).bank
    np.testing.assert_allclose(bank.embedding(np.arange(5)), expected.embedding(np.arange(5)), rtol=1e-5, atol=1e-6)
    for level in ("fine", "coarse"):
        for row in range(5):
            np.testing.assert_allclose(bank.level_map(level, row), expected.level_map(level, row), rtol=2e-3, atol=1e-3)
    assert events(bank) == [(1, "add", 3), (2, "add", 2)]


def test_images_that_the_bank_holds_are_left_out(fitted: Bank, good: Path, tiny: Backbone) -> None:
    before = files(fitted.path)
    assert numbers_of(add(good, bank=fitted.path, backbone=tiny)) == (0, 3, (), 0)
    assert files(fitted.path) == before
    save_images(good, "d.png")
    assert numbers_of(add(good, bank=fitted.path, backbone=tiny)) == (1, 3, (), 0)


def test_the_same_content_is_taken_once_and_said(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    more = save_images(tmp_path / "more", "d.png")
    shutil.copy(good / "b.png", more / "0 copy of b.png")
    shutil.copy(more / "d.png", more / "z copy of d.png")
    done = add(more, bank=fitted.path, backbone=tiny)
    assert done.duplicates == (Duplicate("0 copy of b.png", "b.png"), Duplicate("z copy of d.png", "d.png"))
    assert numbers_of(done) == (1, 0, (), 2)
    assert Bank.open(fitted.path).ids == ["a.png", "b.png", "c.png", "d.png"]
    again = add(more, bank=fitted.path, backbone=tiny)
    assert again.duplicates == done.duplicates
    assert numbers_of(again) == (0, 1, (), 2)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_same_content_is_taken_once_over_batches_and_in_a_new_bank(
    tmp_path: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(extract, "BATCH_SIZE", batch_size)
    monkeypatch.setattr(extract, "SHARD_BYTES", 1)
    folder = save_images(tmp_path / "good", "a.png", "d.png")
    for name in ("b.png", "c.png", "e.png"):
        shutil.copy(folder / "a.png", folder / name)
    done = fit(folder, bank=tmp_path / "bank", extraction=Extraction(backbone=tiny))
    assert done.bank.ids == ["a.png", "d.png"]
    assert done.duplicates == tuple(Duplicate(name, "a.png") for name in ("b.png", "c.png", "e.png"))
    assert numbers_of(fit(folder, bank=tmp_path / "bank", extraction=Extraction(backbone=tiny))) == (0, 2, (), 3)


def test_what_was_removed_is_not_taken_in_again(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    """By its name, or by its content under another one: a bad part must not slip in twice."""
    fitted.remove(["b.png"])
    before = files(fitted.path)
    done = add(good, bank=fitted.path, backbone=tiny)
    assert numbers_of(done) == (0, 2, ("b.png",), 0)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(good / "b.png", other / "renamed.png")
    done = add(other, bank=fitted.path, backbone=tiny)
    assert done.duplicates == (Duplicate("renamed.png", "b.png"),)
    assert files(fitted.path) == before
    assert Bank.open(fitted.path).ids == ["a.png", "c.png"]
    fitted.compact()
    assert numbers_of(add(good, bank=fitted.path, backbone=tiny)) == (1, 2, (), 0)
    assert Bank.open(fitted.path).ids == ["a.png", "c.png", "b.png"]


def test_other_content_of_the_same_name_is_refused(fitted: Bank, good: Path, tmp_path: Path, tiny: Backbone) -> None:
    before = files(fitted.path)
    elsewhere = save_images(tmp_path / "elsewhere", "b.png", "d.png", seed=1)
    with pytest.raises(
        InputError, match=r"holds another image named 'b\.png', from .*good/b\.png; rename this one, .*elsewhere/b"
    ):
        add(elsewhere, bank=fitted.path, backbone=tiny)
    digest = hash_file(good / "b.png")
    save_images(good, "b.png", seed=2)
    with pytest.raises(InputError, match=rf"b\.png has changed since the bank .* took it \(sha256 {digest}, now "):
        add(good, bank=fitted.path, backbone=tiny)
    fitted.remove(["b.png"])
    with pytest.raises(InputError, match="it was removed: compact the bank to forget it"):
        add(good, bank=fitted.path, backbone=tiny)
    fitted.restore(["b.png"])
    assert {name: content for name, content in files(fitted.path).items() if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }


def test_only_the_banks_own_extractor_adds_to_it(fitted: Bank, good: Path, tmp_path: Path) -> None:
    before = files(fitted.path)
    more = save_images(tmp_path / "more", "d.png")
    with pytest.raises(InputError, match="was made with your own backbone 'tiny'; pass it as backbone="):
        add(more, bank=fitted.path)
    with pytest.raises(InputError, match="was extracted with backbone='tiny', these features with 'other'"):
        add(more, bank=fitted.path, backbone=tiny_backbone(name="other"))
    with pytest.raises(InputError, match=r"was extracted with weights_sha256='.*', these features with '"):
        add(more, bank=fitted.path, backbone=tiny_backbone(seed=1))
    assert files(fitted.path) == before
    foreign = make_bank(tmp_path / "foreign")
    foreign.append(batch("x"))
    with pytest.raises(InputError, match="was made by another extractor; hand it features, or pass a Backbone"):
        add(more, bank=foreign.path)
    with pytest.raises(NotFoundError, match="there is no bank at"):
        add(more, bank=tmp_path / "none", backbone=tiny_backbone())
    assert not (tmp_path / "none").exists()
    assert_holds(Bank.open(foreign.path), batch("x"))


def test_features_of_another_extractors_bank_are_not_mixed_with_a_backbones(tmp_path: Path, tiny: Backbone) -> None:
    """Of a bank that nobody knows the maker of, nothing tells that a backbone's features can be compared with it."""
    bank = Bank.create(
        tmp_path / "bank",
        Layout(levels=tiny.levels, embedding_dim=tiny.embedding_dim, input_size=tiny.input_size, dtype="float32"),
    )
    levels = {level.name: np.ones((1, *level.shape), np.float32) for level in tiny.levels}
    bank.append(FeatureBatch(["x"], np.ones((1, tiny.embedding_dim), np.float32), levels))
    images = save_images(tmp_path / "good", "a.png")
    with pytest.raises(InputError, match="holds the features of another extractor, not of 'tiny'"):
        fit(images, bank=bank.path, extraction=Extraction(backbone=tiny))
    assert Bank.open(bank.path).ids == ["x"]


def test_a_fit_that_stored_nothing_binds_nobody(
    good: Path, tmp_path: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: Callable[..., Any] = Backbone.__call__

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Backbone, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(good, bank=tmp_path / "bank", extraction=Extraction(backbone=tiny, dtype="float32", normalize="l2"))
    monkeypatch.setattr(Backbone, "__call__", call)
    assert len(Bank.open(tmp_path / "bank")) == 0
    other = tiny_backbone(seed=1, name="other")
    done = fit(good, bank=tmp_path / "bank", extraction=Extraction(backbone=other, pool=3))
    assert done.added == 3
    bank = Bank.open(tmp_path / "bank")
    assert bank.manifest.source == other.source
    assert (bank.layout.dtype, bank.layout.normalize, bank.layout.pool) == ("float16", "none", 3)
    # Now it is bound.
    with pytest.raises(InputError, match="backbone='other', these features with 'tiny'"):
        fit(good, bank=tmp_path / "bank", extraction=Extraction(backbone=tiny))
    bank.remove(bank.ids)
    with pytest.raises(InputError, match="backbone='other', these features with 'tiny'"):
        fit(good, bank=tmp_path / "bank", extraction=Extraction(backbone=tiny))


def test_what_cannot_be_read_is_left_out_of_an_addition(fitted: Bank, tmp_path: Path, tiny: Backbone) -> None:
    more = save_images(tmp_path / "more", "d.png")
    (more / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (more / "broken too.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(InputError):
        add(more, bank=fitted.path, backbone=tiny, run=Run(max_skipped=1))
    done = add(more, bank=fitted.path, backbone=tiny)
    assert [item.id for item in done.skipped] == ["broken too.png", "broken.png"]
    assert "d.png" in Bank.open(fitted.path).ids


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
