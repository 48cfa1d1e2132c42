"""Indexes follow their bank: whatever was added, removed, brought back or compacted, a search finds what one in a bank built
afresh from the same images finds."""

from __future__ import annotations

import gc
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from spade_faiss import Bank, Detector, Scores, update_indexes
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Method
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import Built, build_index
from spade_faiss.index.built_index import index_folder, read_built
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.image_index import ImageIndex, ImageIndexManifest
from spade_faiss.index.staleness import IndexedShard, Staleness, staleness, why_train_anew
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe
from tests.support.oracle import Features, bank_of, batch_of, levels_of, names, product

SHAPES = {"fine": (5, 6, 8), "coarse": (3, 4, 8)}
INPUT = (20, 24)
DIM = 8
COUNT = 14

EXACT = Recipe(name="exact")
LOCATION = Recipe(name="location", build=Build(gallery="location"), query=Query(settings={"radius": 1}))
# All lists and the whole graph are searched: what is left to differ is which images are known.
HNSW = Recipe(name="hnsw", build=Build(image="HNSW8"), query=Query(image="efSearch=512"))
LISTS = Recipe(name="lists", build=Build(image="IVF2,Flat"), query=Query(image="nprobe=2"))
IVF = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2}), query=Query(settings={"nprobe": 2}))
COMPACT = Recipe(name="compact", build=Build(gallery="compact", settings={"dims": 4}), query=Query(settings={"rerank": 8}))
HISTORY = Recipe(name="history", build=Build(gallery="history", settings={"lists": 2}), query=Query(settings={"nprobe": 2}))
BOTH = Recipe(
    name="both",
    build=Build(image="HNSW8", gallery="ivf", settings={"lists": 2}),
    query=Query(image="efSearch=512", settings={"nprobe": 2}),
)
IMAGE = [HNSW, LISTS]
GALLERY = [IVF, COMPACT, HISTORY]

by_name: dict[str, Any] = {"ids": lambda recipe: recipe.name}


def features_of(seed: int, n: int, *, defect: bool = False) -> Features:
    """Maps of one product; embeddings without the product's structure, so that few of them tell how far all of them spread."""
    features = product(seed, n, SHAPES, DIM, defect=defect)
    features.embedding[:] = np.random.default_rng(seed).normal(size=(n, DIM))
    for copy, original in ((2, 1), (4, 3)):  # near each other, and the same
        if copy < n:
            features.embedding[copy] = features.embedding[original] * (1 + 1e-3 * (copy == 2))
    return features


NORMALS = features_of(1, COUNT)
QUERIES = features_of(2, 3, defect=True)


def fresh(path: Path, rows: list[int], features: Features = NORMALS) -> Bank:
    """A bank of some of the images, in one shard."""
    bank = Bank.create(path, Layout(levels=tuple(levels_of(features)), embedding_dim=DIM, input_size=INPUT, dtype="float32"))
    bank.append(batch_of(features[rows], [names(COUNT)[row] for row in rows]))
    return bank


def append(bank: Bank, rows: list[int]) -> None:
    bank.append(batch_of(NORMALS[rows], [names(COUNT)[row] for row in rows]))


def scores(bank: Bank, recipe: Recipe, k: int = 3) -> Scores:
    return Detector.open(bank.path, recipe=recipe, method=Method(k_image=k, k_gallery=k)).score_features(batch_of(QUERIES))


def assert_equal(one: Scores, other: Scores) -> None:
    """Bit for bit."""
    assert one.neighbor_ids.tolist() == other.neighbor_ids.tolist()
    np.testing.assert_array_equal(one.neighbor_dist, other.neighbor_dist)
    np.testing.assert_array_equal(one.image_score, other.image_score)
    np.testing.assert_array_equal(one.maps, other.maps)
    for level, dist in one.level_dist.items():
        np.testing.assert_array_equal(dist, other.level_dist[level])
        np.testing.assert_array_equal(one.nearest[level], other.nearest[level])


def build(bank: Bank, recipe: Recipe) -> Built:
    built = build_index(Bank.open(bank.path), recipe)
    assert built is not None
    return built


def done(bank: Bank, recipe: Recipe) -> str:
    """What building says it did, of the one thing that the recipe needs."""
    (words,) = build(bank, recipe).done.values()
    return words


def standing(bank: Bank, recipe: Recipe) -> Staleness:
    """How the recipe's index stands to its bank."""
    bank = Bank.open(bank.path)
    built = [*read_built(ImageIndexManifest, bank), *read_built(GalleryIndexManifest, bank)]
    (found,) = [index for index in built if index.recipe == recipe.name]
    return staleness(bank, found.shards)


# ---- any search equals one in a bank built afresh


class Model:
    """A bank, and what it must hold: the images in the order of their rows, and those of them that are removed."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bank = fresh(path, [0, 1, 2, 3, 4, 5])
        self.rows = [0, 1, 2, 3, 4, 5]
        self.removed: set[int] = set()
        self.done: list[str] = []

    @property
    def live(self) -> list[int]:
        return [row for row in self.rows if row not in self.removed]

    def append(self) -> None:
        if new := [row for row in range(COUNT) if row not in self.rows]:
            chosen = self.rng.sample(new, min(len(new), self.rng.randint(1, 3)))
            append(self.bank, chosen)
            self.rows += chosen

    def remove(self) -> None:
        most = min(3, len(self.live) - 4)
        if most > 0:
            chosen = self.rng.sample(self.live, self.rng.randint(1, most))
            assert self.bank.remove([names(COUNT)[row] for row in chosen]) == len(chosen)
            self.removed.update(chosen)

    def restore(self) -> None:
        if self.removed:
            chosen = self.rng.sample(sorted(self.removed), self.rng.randint(1, len(self.removed)))
            assert self.bank.restore([names(COUNT)[row] for row in chosen]) == len(chosen)
            self.removed.difference_update(chosen)

    def compact(self) -> None:
        self.bank.compact(target_bytes=self.rng.choice([2, 20_000, 1 << 20]))
        self.rows, self.removed = self.live, set()

    def index(self) -> None:
        build_index(self.bank, self.rng.choice([HNSW, LISTS, IVF, BOTH]), rebuild=self.rng.random() < 0.2)

    def update(self) -> None:
        update_indexes(self.bank)

    def reopen(self) -> None:
        self.bank = Bank.open(self.bank.path)

    def step(self) -> None:
        steps: list[Callable[[], None]] = [self.append, self.remove, self.remove, self.restore, self.compact]
        step = self.rng.choice([*steps, self.index, self.update, self.reopen])
        step()
        self.done.append(step.__name__)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_was_done_a_search_equals_one_in_a_bank_built_afresh(tmp_path: Path, seed: int) -> None:
    model = Model(tmp_path / "bank", seed)
    for recipe in (HNSW, LISTS, IVF, BOTH):
        build_index(model.bank, recipe)
    for number in range(12):
        model.step()
        bank = Bank.open(model.bank.path)
        assert bank.ids == [names(COUNT)[row] for row in model.live], model.done
        assert sorted(bank.removed) == sorted(names(COUNT)[row] for row in model.removed), model.done
        twin = fresh(tmp_path / f"fresh {number}", model.live)
        expected = scores(twin, EXACT)
        for row in range(len(bank)):
            np.testing.assert_array_equal(bank.level_map("fine", row), NORMALS.levels["fine"][model.live[row]])
        for recipe in (EXACT, HNSW, LISTS):
            assert_equal(scores(bank, recipe), expected)
        # Lists of maps, searched in full: the same distances, up to rounding.
        for recipe in (IVF, BOTH):
            found = scores(bank, recipe)
            assert found.neighbor_ids.tolist() == expected.neighbor_ids.tolist(), model.done
            np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-4)
        if number % 4 == 0:
            assert_equal(scores(bank, LOCATION), scores(twin, LOCATION))


@pytest.mark.parametrize("recipe", [EXACT, *IMAGE, *GALLERY, BOTH], ids=lambda recipe: recipe.name)
def test_a_folded_in_index_finds_what_a_bank_built_afresh_finds(tmp_path: Path, recipe: Recipe) -> None:
    bank = fresh(tmp_path / "bank", list(range(10)))
    build_index(bank, recipe)
    append(bank, [10, 11, 12, 13])
    bank.remove(["image 3", "image 11"])
    bank.compact(target_bytes=2)
    update_indexes(bank)
    assert bank.ids == [f"image {row}" for row in range(14) if row not in (3, 11)]
    twin = fresh(tmp_path / "fresh", [row for row in range(14) if row not in (3, 11)])
    build_index(twin, recipe)
    found, expected = scores(bank, recipe), scores(twin, recipe)
    assert found.neighbor_ids.tolist() == expected.neighbor_ids.tolist()
    np.testing.assert_array_equal(found.image_score, expected.image_score)
    if recipe in (EXACT, *IMAGE):
        assert_equal(found, expected)
    elif recipe is not COMPACT:
        np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-4)
    else:  # approximate: never below the true distances, and as near to them
        true = scores(twin, EXACT).level_dist["fine"]
        near = [np.mean(one.level_dist["fine"] <= 1.05 * true + 1e-3) for one in (found, expected)]
        assert (found.level_dist["fine"] >= true - 1e-4).all()
        assert near[0] > near[1] - 0.1


# ---- the index over embeddings


@pytest.mark.parametrize("recipe", IMAGE, **by_name)
def test_removed_images_are_not_found_and_as_many_as_asked_for_are(tmp_path: Path, recipe: Recipe) -> None:
    """Also where nearly all entries of the index are of removed images, and those are the nearest of all."""
    rng = np.random.default_rng(5)
    features = product(1, 60, {"fine": (1, 1, 1)}, DIM)
    features.embedding[:] = rng.normal(size=(60, DIM))
    features.embedding[:56] *= 0.01  # in the way of every search
    bank = bank_of(tmp_path / "bank", features, input_size=(1, 1), shards=[20, 20])
    build_index(bank, recipe)
    bank.remove(names(60)[:54])
    index = ImageIndex.open(Bank.open(bank.path), recipe)
    assert (len(bank), index.indexed) == (6, 6)
    xq = np.zeros((3, DIM), np.float32)
    for k in (1, 3, 6):
        _, rows = index.search(xq, k)
        assert rows.shape == (3, k)
        assert all(len(set(line)) == k for line in rows.tolist())
        assert rows.min() >= 0
        assert rows.max() < 6
    D, rows = index.search(xq, 6)
    np.testing.assert_allclose(D[0], np.sort(np.square(features.embedding[54:]).sum(axis=1)), rtol=1e-5)
    bank.restore(["image 2"])
    D, rows = ImageIndex.open(Bank.open(bank.path), recipe).search(features.embedding[2:3], 1)
    assert Bank.open(bank.path).ids[rows[0, 0]] == "image 2"
    assert D[0, 0] == 0


@pytest.mark.parametrize("recipe", IMAGE, **by_name)
def test_each_entry_is_still_that_of_its_image_where_others_were_removed(tmp_path: Path, recipe: Recipe) -> None:
    """Few candidates of many: one that is taken for another image is not put right by looking at all of them."""
    features = product(1, 60, {"fine": (1, 1, 1)}, DIM)
    features.embedding[:] = np.random.default_rng(6).normal(size=(60, DIM))
    bank = bank_of(tmp_path / "bank", features, input_size=(1, 1), shards=[25, 20])
    build_index(bank, recipe)
    bank.remove(names(60)[::3])
    bank.append(batch_of(features[[0]], ["late"]))
    bank.restore(["image 30"])
    bank = Bank.open(bank.path)
    xq = bank.embedding(np.arange(len(bank))) + np.float32(1e-4)
    D, rows = ImageIndex.open(bank, recipe).search(xq, 1)
    assert rows[:, 0].tolist() == list(range(len(bank)))
    assert D.max() < 1e-6


@pytest.mark.parametrize("recipe", IMAGE, **by_name)
def test_an_index_counts_what_it_does_not_hold(tmp_path: Path, recipe: Recipe) -> None:
    bank = fresh(tmp_path / "bank", list(range(8)))
    build_index(bank, recipe)
    assert standing(bank, recipe) == Staleness(indexed=8, unindexed=0, tombstones=0)
    append(bank, [8, 9])
    bank.remove(["image 1", "image 8"])
    assert standing(bank, recipe) == Staleness(indexed=7, unindexed=1, tombstones=1)
    assert ImageIndex.open(Bank.open(bank.path), recipe).indexed == 7
    assert str(standing(bank, recipe)) == ("7 images indexed, 1 not indexed yet, 1 tombstones of removed images")
    assert done(bank, recipe) == "added 2 images to it"
    # The removed ones of a shard too, so that they may come back.
    assert standing(bank, recipe) == Staleness(indexed=8, unindexed=0, tombstones=2)
    bank.restore(["image 1", "image 8"])
    assert standing(bank, recipe) == Staleness(indexed=10, unindexed=0, tombstones=0)
    assert str(standing(bank, recipe)) == "10 images indexed"
    assert_equal(scores(bank, recipe), scores(fresh(tmp_path / "fresh", list(range(10))), EXACT))


@pytest.mark.parametrize("recipe", IMAGE, **by_name)
def test_an_image_index_says_what_was_done_to_it_and_why(tmp_path: Path, recipe: Recipe) -> None:
    bank = fresh(tmp_path / "bank", list(range(8)))
    assert done(bank, recipe) == "built"
    before = sorted(index_folder(bank, recipe).glob("*.faiss"))
    assert done(bank, recipe) == "is up to date"
    assert sorted(index_folder(bank, recipe).glob("*.faiss")) == before
    append(bank, [8, 9, 10])
    assert done(bank, recipe) == "added 3 images to it"
    bank.remove(["image 9"])
    assert done(bank, recipe) == "is up to date"
    # They may come back; until the bank is compacted, an index that was built anew would hold them as well.
    bank.remove(["image 0", "image 5"])
    assert done(bank, recipe) == "is up to date"
    bank.compact()
    assert done(bank, recipe) == "built anew: 11 of its 11 entries are of images that are gone"
    (words,) = [item.done["image"] for item in update_indexes(Bank.open(bank.path), rebuild=True)]
    assert words == "built anew: asked for"
    other = Recipe(name=recipe.name, build=Build(image="HNSW4"), query=Query(image="efSearch=512"))
    assert done(bank, other) == f"built anew: it was built with factory '{recipe.build.image}', the recipe says 'HNSW4'"
    (file,) = index_folder(bank, recipe).glob("*.faiss")
    file.write_bytes(file.read_bytes()[:-1])
    append(bank, [11])
    words = done(bank, other)
    assert words.startswith("built anew: ")
    assert file.name in words
    assert_equal(scores(bank, other), scores(fresh(tmp_path / "fresh", [1, 2, 3, 4, 6, 7, 8, 10, 11]), EXACT))


def test_an_index_whose_file_is_damaged_is_made_again_though_nothing_was_added(tmp_path: Path) -> None:
    bank = fresh(tmp_path / "bank", list(range(8)))
    build_index(bank, HNSW)
    (file,) = index_folder(bank, HNSW).glob("*.faiss")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BankError, match=r"image-000000\.faiss has sha256 .*, expected .*; rebuild it with: spade-faiss index"):
        scores(bank, HNSW)
    assert done(bank, HNSW).startswith("built anew: ")
    assert_equal(scores(bank, HNSW), scores(bank, EXACT))


def test_removed_images_that_an_index_keeps_do_not_make_every_update_build_it_anew(tmp_path: Path) -> None:
    """Entries of removed images go only with the bank's compaction: until then, building anew would change nothing."""
    bank = fresh(tmp_path / "bank", list(range(12)))
    build_index(bank, HNSW)
    bank.remove(names(4))
    build(bank, HNSW)
    assert done(bank, HNSW) == "is up to date"


def test_after_a_compaction_an_index_knows_only_what_was_left_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bank = bank_of(tmp_path / "bank", NORMALS, input_size=INPUT, shards=[5, 4])
    build_index(bank, HNSW)
    build_index(bank, IVF)
    bank.remove(["image 6"])
    bank.compact(target_bytes=2)
    for recipe in (HNSW, IVF):
        assert standing(bank, recipe) == Staleness(indexed=10, unindexed=3, tombstones=4)
        assert done(bank, recipe).startswith(("added 3 images to it", "built anew: 4 of its 14 entries"))
    assert done(bank, HNSW) == "is up to date"
    assert done(bank, IVF) == "is up to date"
    with caplog.at_level(logging.WARNING, "spade_faiss"):
        Detector.open(bank.path, recipe=HNSW)
    assert not caplog.records
    bank.compact()
    assert len(bank.manifest.shards) == 1
    expected = scores(fresh(tmp_path / "fresh", [row for row in range(14) if row != 6]), EXACT)
    assert_equal(scores(bank, HNSW), expected)
    assert "holds no image of the bank, so all are searched without it; bring it up to date: spade-faiss index" in caplog.text


@pytest.mark.parametrize("recipe", [LISTS, IVF, COMPACT], **by_name)
def test_an_index_is_trained_anew_when_the_bank_has_outgrown_it(tmp_path: Path, recipe: Recipe) -> None:
    many = features_of(1, 26)
    bank = bank_of(tmp_path / "bank", many[:6], input_size=INPUT)
    build_index(bank, recipe)
    for start, end, words in [
        (6, 12, "added 6 images to it"),
        (12, 24, "added 12 images to it"),  # four times as many, not more
        (24, 26, "built anew: it was trained on 6 images, the bank holds 26"),
    ]:
        bank.append(batch_of(many[start:end], names(26)[start:end]))
        assert done(bank, recipe) == words
    assert done(bank, recipe) == "is up to date"


@pytest.mark.parametrize("recipe", [LISTS, IVF, COMPACT], **by_name)
def test_an_index_is_trained_anew_when_new_images_lie_elsewhere(tmp_path: Path, recipe: Recipe) -> None:
    many = features_of(1, 42)
    many.embedding[32:] += 10  # 28 from the others, whose distance to their mean is about 3
    parts = [batch_of(many[start:end], names(42)[start:end]) for start, end in [(20, 32), (32, 39), (39, 42)]]
    bank, other = (bank_of(tmp_path / name, many[:20], input_size=INPUT) for name in ("bank", "other"))
    for one in (bank, other):
        build_index(one, recipe)
        one.append(parts[0])
        assert done(one, recipe) == "added 12 images to it"
        one.append(parts[1])
        assert done(one, recipe) == "added 7 images to it", "few images do not tell how far they spread"
        one.append(parts[2])
    words = done(bank, recipe)
    assert words.startswith("built anew: images added since lie ")
    assert words.endswith(" times as far from the mean as those it was trained on")
    assert done(bank, recipe) == "is up to date"
    # Images that were removed are no reason.
    other.remove(names(42)[34:])
    assert done(other, recipe) == "added 3 images to it"


@pytest.mark.parametrize("recipe", [LISTS, IVF], **by_name)
def test_an_index_that_was_trained_on_images_that_are_gone_is_trained_anew(tmp_path: Path, recipe: Recipe) -> None:
    bank = fresh(tmp_path / "bank", list(range(6)))
    build_index(bank, recipe)
    append(bank, list(range(6, 14)))
    bank.remove(names(6))
    assert "gone" in done(bank, recipe)


def test_an_index_without_training_is_never_trained_anew(tmp_path: Path) -> None:
    bank = fresh(tmp_path / "bank", [0, 1])
    shards = [IndexedShard(sha256=shard.sha256, count=shard.count) for shard in bank.manifest.shards]
    append(bank, list(range(2, 14)))
    assert why_train_anew(bank, shards, 0) is None
    assert why_train_anew(bank, shards, 1) == "it was trained on 2 images, the bank holds 14"


# ---- the indexes over maps


@pytest.mark.parametrize("recipe", GALLERY, **by_name)
def test_removed_images_are_never_matched_and_restored_ones_are_without_a_build(tmp_path: Path, recipe: Recipe) -> None:
    bank = bank_of(tmp_path / "bank", NORMALS, input_size=INPUT, shards=[5, 4])
    build_index(bank, recipe)
    query = batch_of(NORMALS[[6]], ["query"])

    def matched() -> tuple[set[str], float]:
        detector = Detector.open(bank.path, recipe=recipe, method=Method(k_image=2, k_gallery=2))
        found = detector.score_features(query)
        rows = found.nearest["fine"]["row"]
        return {detector.bank.ids[row] for row in np.unique(rows[rows >= 0])}, float(found.maps.max())

    before = sorted(path.name for path in index_folder(bank, recipe).rglob("*"))
    _, most = matched()
    assert most < 1e-2
    bank.remove(["image 6"])
    among, most_without = matched()
    assert among
    assert "image 6" not in among
    assert most_without > 10 * most
    bank.restore(["image 6"])
    among, most_again = matched()
    assert "image 6" in among
    assert most_again == most
    assert sorted(path.name for path in index_folder(bank, recipe).rglob("*")) == before


class Encoded(NamedTuple):
    """How often a method's `encode` was called."""

    calls: list[int]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    counter = Encoded([])
    for recipe in (IVF, COMPACT):
        method = resolve_recipe(recipe).method
        encode: Callable[..., Any] | None = method.encode
        assert encode is not None

        def counted(*arguments: Any, encode: Callable[..., Any] = encode) -> Any:
            counter.calls.append(1)
            return encode(*arguments)

        monkeypatch.setitem(vars(method), "encode", counted)
    return counter


@pytest.mark.parametrize("recipe", [IVF, COMPACT], **by_name)
def test_added_images_are_encoded_when_they_are_met_until_they_are_folded_in(
    tmp_path: Path, recipe: Recipe, encoded: Encoded
) -> None:
    bank = fresh(tmp_path / "bank", list(range(9)))
    build_index(bank, recipe)
    append(bank, [9, 10])
    query = batch_of(NORMALS[[9, 10]], ["q 1", "q 2"])

    def found() -> Scores:
        return Detector.open(bank.path, recipe=recipe, method=Method(k_image=2, k_gallery=2)).score_features(query)

    encoded.calls.clear()
    beside = found()
    assert encoded.calls
    assert (beside.neighbor_ids[:, 0] == ["image 9", "image 10"]).all()
    # The images themselves are among the neighbors: nothing is far.
    assert beside.maps.max() < 1e-2
    encoded.calls.clear()
    assert done(bank, recipe) == "added 2 images to it"
    assert len(encoded.calls) == 2 * len(SHAPES)
    encoded.calls.clear()
    folded = found()
    assert not encoded.calls
    np.testing.assert_array_equal(folded.maps, beside.maps)
    assert folded.neighbor_ids.tolist() == beside.neighbor_ids.tolist()


def test_a_gallery_says_what_was_done_to_it_and_why(tmp_path: Path) -> None:
    bank = fresh(tmp_path / "bank", list(range(8)))
    assert done(bank, IVF) == "built"
    assert done(bank, IVF) == "is up to date"
    append(bank, [8, 9, 10])
    bank.remove(["image 8"])
    assert standing(bank, IVF) == Staleness(indexed=7 + 1, unindexed=2, tombstones=0)
    assert done(bank, IVF) == "added 3 images to it"
    assert standing(bank, IVF) == Staleness(indexed=10, unindexed=0, tombstones=1)
    bank.restore(["image 8"])
    assert standing(bank, IVF) == Staleness(indexed=11, unindexed=0, tombstones=0)
    other = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 3}))
    was, now = ({"lists": lists, "train_vectors": 50000} for lists in (2, 3))
    assert done(bank, other) == f"built anew: it was built with settings {was}, the recipe says {now}"
    with pytest.raises(BankError, match=re.escape(f"was built with settings {now}, the recipe says {was}; run: spade-faiss")):
        scores(bank, IVF)
    (updated,) = update_indexes(Bank.open(bank.path), rebuild=True)
    assert updated.done == {"gallery": "built anew: asked for"}


@pytest.mark.parametrize("recipe", [IVF, COMPACT], **by_name)
def test_files_of_shards_that_are_gone_are_deleted_when_nobody_reads_them(tmp_path: Path, recipe: Recipe) -> None:
    bank = bank_of(tmp_path / "bank", NORMALS, input_size=INPUT, shards=[5, 4])
    build_index(bank, recipe)
    folder = index_folder(bank, recipe) / "gallery"
    assert len(list(folder.glob("*.h5"))) == 4
    reader = Detector.open(bank.path, recipe=recipe)
    shown = reader.score_features(batch_of(QUERIES))
    bank.remove(["image 0"])
    bank.compact()
    build_index(bank, recipe)
    again = reader.score_features(batch_of(QUERIES))
    np.testing.assert_array_equal(again.maps, shown.maps)
    # All that it was trained on was written again: trained anew, and the four files of before.
    assert len(list(folder.glob("*.h5"))) == 6
    del reader
    gc.collect()
    append(bank, [0])
    build_index(bank, recipe)
    assert len(list(folder.glob("*.h5"))) == 3


# ---- all of them


def test_update_folds_into_everything_that_was_built(tmp_path: Path) -> None:
    bank = fresh(tmp_path / "bank", list(range(8)))
    assert update_indexes(bank) == []
    for recipe in (HNSW, LISTS, IVF, BOTH):
        build_index(bank, recipe)
    append(bank, [8, 9])
    bank = Bank.open(bank.path)
    found = update_indexes(bank)
    assert [item.recipe for item in found] == ["both", "hnsw", "ivf", "lists"]
    words = "added 2 images to it"
    assert [item.done for item in found] == [
        {"image": words, "gallery": words},
        {"image": words},
        {"gallery": words},
        {"image": words},
    ]
    assert all(part.generation == 2 for item in found for part in (item.image, item.gallery) if part)
    again = update_indexes(bank)
    assert {words for item in again for words in item.done.values()} == {"is up to date"}
    for item in found:
        assert item.total_s >= 0
        assert item.bytes_before > 0


def test_update_of_a_bank_without_images_is_refused(tmp_path: Path) -> None:
    bank = fresh(tmp_path / "bank", [0, 1, 2])
    build_index(bank, HNSW)
    bank.remove(bank.ids)
    with pytest.raises(InputError, match="is empty; extract images first"):
        update_indexes(bank)


def test_an_index_of_another_bank_does_not_pass_for_this_banks(tmp_path: Path) -> None:
    """Rows are told by the content of their shard: of an index that was copied here, nothing is believed."""
    bank = fresh(tmp_path / "bank", list(range(8)))
    other = bank_of(tmp_path / "other", product(3, 8, SHAPES, DIM), input_size=INPUT)
    for recipe in (HNSW, IVF):
        build_index(other, recipe)
        folder = index_folder(bank, recipe)
        folder.parent.mkdir(exist_ok=True)
        index_folder(other, recipe).rename(folder)
        assert standing(bank, recipe) == Staleness(indexed=0, unindexed=8, tombstones=8)
    assert_equal(scores(bank, HNSW), scores(bank, EXACT))
    found, expected = scores(bank, IVF), scores(bank, EXACT)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-4)
    assert done(bank, HNSW) == "built anew: 8 of its 8 entries are of images that are gone"
    assert done(bank, IVF).startswith("built anew: ")


def test_a_manifest_that_counts_a_shards_images_otherwise_is_refused(tmp_path: Path) -> None:
    from spade_faiss.core.signed_json import hash_json

    bank = fresh(tmp_path / "bank", list(range(8)))
    for recipe, name in ((HNSW, "index.json"), (IVF, "gallery.json")):
        build_index(bank, recipe)
        path = index_folder(bank, recipe) / name
        content = json.loads(path.read_text())
        del content["sha256"]
        content["shards"][0]["count"] = 7
        path.write_text(json.dumps({**content, "sha256": hash_json(content)}))
        with pytest.raises(BankError):
            scores(bank, recipe)
