"""The detector's memory budget: what fits follows from it, results do not depend on it, and the process stays within it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Backbone, Bank, Detector, FeatureBatch, Level, Scores, score_folder
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import BATCH_SIZE, parse_bytes
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.scoring.memory import working_bytes
from spade_faiss.search.distances import _BLAS_BYTES
from spade_faiss.search.engines.faiss import FaissSearch
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.protocol import Hits
from spade_faiss.search.recipe import load_recipe
from tests.support.detectors import open_detector
from tests.support.oracle import bank_of, batch_of, product
from tests.support.product_banks import bank_of_products

# What `exact` searches with on this machine.
SEARCH = NativeSearch if usable_simd_level() else FaissSearch
SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
INPUT = (40, 43)
DIM = 16
GALLERY = 5 * 30  # vectors of the coarsest level in five normal images

needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of 12 normals in three shards, half precision, so that there is something to decode and to keep."""
    path = tmp_path_factory.mktemp("memory") / "bank"
    bank_of(path, product(1, 12, SHAPES, DIM), input_size=INPUT, shards=[5, 3], dtype="float16")
    return path


def queries(n: int) -> FeatureBatch:
    return batch_of(product(2, n, SHAPES, DIM, defect=True))


def arrays(scores: Scores) -> dict[str, npt.NDArray[Any]]:
    found = {name: getattr(scores, name) for name in ("image_score", "maps", "neighbor_ids", "neighbor_dist")}
    return {
        **found,
        **{f"{field}.{x}": getattr(scores, field)[x] for field in ("level_dist", "nearest") for x in scores.level_dist},
    }


def equal(a: Scores, b: Scores) -> None:
    assert list(a.ids) == list(b.ids)
    assert arrays(a).keys() == arrays(b).keys()
    for name, values in arrays(a).items():
        np.testing.assert_array_equal(values, arrays(b)[name], err_msg=name)


def least_memory(opens: Callable[[int], object]) -> int:
    """The fewest bytes that a detector opens with."""
    low, high = 0, 1 << 40  # the one is refused, the other is not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            opens(middle)
        except InputError:
            low = middle
        else:
            high = middle
    return high


def test_the_image_index_is_part_of_the_budget(tmp_path: Path) -> None:
    """The embeddings that are searched flat, a built index, and those of each product beside the index of all of them."""
    embeddings = 4 * DIM * 12

    def taken(bank: Bank, recipe: str, **options: Any) -> int:
        build_index(bank, load_recipe(recipe))
        detector = Detector.open(bank, recipe=recipe, method=Method(k_image=2, k_gallery=2), **options)
        assert detector.plan.working_bytes + detector.plan.cache_bytes + detector.decode_bytes == parse_bytes("2GiB")
        searches = detector._searches.values()
        return detector.plan.working_bytes - working_bytes(
            detector.plan.batch,
            detector.bank.layout,
            [search.level for search in searches],
            max(search.working_bytes(detector.plan.batch) for search in searches),
            forward=False,
        )

    bank = bank_of(tmp_path / "one", product(1, 12, SHAPES, DIM), input_size=INPUT, dtype="float16")
    assert taken(bank, "exact") == embeddings
    assert taken(bank, "hnsw") == next((tmp_path / "one").rglob("*.faiss")).stat().st_size > embeddings
    several = bank_of_products(tmp_path / "several", {"cap": 7, "pen": 5})
    each = 4 * several.layout.embedding_dim
    assert taken(several, "exact") == 2 * 12 * each
    assert taken(several, "exact", product="cap") == 7 * each
    method = Method(k_image=2, k_gallery=2)
    whole = Detector.open(several, recipe="exact", method=method)
    assert [whole.of_product(name)._index_bytes for name in ("cap", "pen")] == 2 * [2 * 12 * each]


def for_images(detector: Detector, images: int) -> int:
    """The budget that so many images at a time need."""
    return detector._working_bytes(images)


@pytest.mark.parametrize("setting", [{}, {"kappa": GALLERY}, {"fusion": "concat"}, {"k_gallery": 12}, {"recipe": "location"}])
def test_too_little_memory_names_a_size_that_works(folder: Path, setting: dict[str, Any]) -> None:
    least = least_memory(lambda memory: open_detector(folder, memory=memory, **setting))
    assert least > 1000
    assert open_detector(folder, memory=least, **setting).plan.batch == 1
    with pytest.raises(InputError, match="is too small") as caught:
        open_detector(folder, memory=least - 1, **setting)
    named = re.search(r"takes ([^;]*);", str(caught.value))
    assert named is not None
    assert parse_bytes(named[1]) >= least
    detector = open_detector(folder, memory=named[1], **setting)
    equal(detector.score_features(queries(2)), open_detector(folder, **setting).score_features(queries(2)))


def test_more_neighbors_and_candidates_need_more(folder: Path) -> None:
    def least(**setting: Any) -> int:
        return least_memory(lambda memory: open_detector(folder, memory=memory, **setting))

    by_faiss = load_recipe("exact").with_query({"engine": "faiss"})
    assert least(recipe=by_faiss, k_gallery=12) > least(recipe=by_faiss, k_gallery=5) > least(recipe=by_faiss, k_gallery=1)
    assert least(kappa=GALLERY) > least(kappa=20) > least(kappa=1)


@pytest.mark.parametrize("memory", ["", "some", "-1", "2 G", "1e9"])
def test_what_is_no_size_is_refused(folder: Path, memory: str) -> None:
    with pytest.raises(InputError, match=f"memory='{memory}' is not a size"):
        Detector.open(folder, run=Run(memory=memory))


def test_the_batch_follows_from_the_budget(folder: Path) -> None:
    usual = Detector.open(folder)
    assert usual.plan.batch == BATCH_SIZE
    # All decoded maps of the bank fit into the default: each normal image is decoded once.
    assert usual.plan.cache_bytes == 12 * 4 * sum(h * w * c for h, w, c in SHAPES.values())
    for images in (1, 2, 5, BATCH_SIZE):
        planned = Detector.open(folder, run=Run(memory=for_images(usual, images))).plan
        assert (planned.batch, planned.working_bytes, planned.cache_bytes) == (images, for_images(usual, images), 0)
        assert Detector.open(folder, run=Run(memory=for_images(usual, images) - 1 + (images == 1))).plan.batch == max(
            images - 1, 1
        )


@pytest.mark.parametrize(
    "setting",
    [{}, {"kappa": 3}, {"kappa": GALLERY}, {"fusion": "concat", "kappa": 2}, {"k_gallery": 12, "distance": "squared_l2"}],
)
def test_forty_images_under_a_small_budget_equal_them_one_by_one(folder: Path, setting: dict[str, Any]) -> None:
    """Neither the budget nor the batch changes a bit of any result: not the cache, not the order of the decoding."""
    query, usual = queries(40), open_detector(folder, **setting)
    expected = usual.score_features(query)
    assert len(expected) == 40
    for images in (1, 3, 7):
        small = open_detector(folder, memory=for_images(usual, images), **setting)
        assert small.plan.batch == images
        equal(small.score_features(query), expected)
    alone = open_detector(folder, memory=for_images(usual, 1), **setting)
    for i in range(40):
        one, all_of_them = arrays(alone.score_features(query[i : i + 1])), arrays(expected)
        for name, values in one.items():
            np.testing.assert_array_equal(values, all_of_them[name][i : i + 1], err_msg=f"{name} of image {i}")


def test_masked_maps_are_cut_with_their_images(folder: Path) -> None:
    valid = np.random.default_rng(0).random((7, *INPUT)) < 0.7
    query = batch_of(product(2, 7, SHAPES, DIM, defect=True), valid=valid)
    usual = Detector.open(folder)
    small = Detector.open(folder, run=Run(memory=for_images(usual, 2))).score_features(query)
    equal(small, usual.score_features(query))
    np.testing.assert_array_equal(small.maps != 0, valid)


@pytest.mark.parametrize("images", [1, 4])
def test_no_search_is_given_more_images_than_were_planned(folder: Path, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    call = SEARCH.__call__

    def counted(self: Any, xq: npt.NDArray[np.float32], neighbors: npt.NDArray[np.int64], kappa: int) -> Hits:
        searched.append(len(xq))
        return call(self, xq, neighbors, kappa)

    monkeypatch.setattr(SEARCH, "__call__", counted)
    memory = for_images(Detector.open(folder), images)
    Detector.open(folder, run=Run(memory=memory)).score_features(queries(10))
    assert max(searched) == images
    assert sum(searched) == 10 * len(SHAPES)


@pytest.mark.parametrize("recipe", ["exact", "location", "ivf", "compact", "history"])
def test_no_recipe_gives_other_numbers_in_other_batches_or_with_another_cache(recipe: str, tmp_path: Path) -> None:
    shapes = {"fine": (8, 9, 80), "coarse": (4, 5, 6)}  # wide enough for compact to leave something out
    bank = bank_of(tmp_path / "b", product(1, 14, shapes, DIM), input_size=INPUT, shards=[9], dtype="float16")
    build_index(bank, load_recipe(recipe))
    query = batch_of(product(2, 11, shapes, DIM, defect=True))
    usual = Detector.open(tmp_path / "b", recipe=recipe, method=Method(k_gallery=14))
    expected = usual.score_features(query)
    for images in (1, 4):
        small = Detector.open(
            tmp_path / "b", recipe=recipe, method=Method(k_gallery=14), run=Run(memory=for_images(usual, images))
        )
        assert small.plan.batch == images
        equal(small.score_features(query), expected)


def test_images_are_decoded_and_computed_in_planned_batches(
    dataset_folder: Path, fitted_bank: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Detector.open(fitted_bank, backbone=backbone)
    expected = usual.score(dataset_folder / "test")
    forwarded: list[int] = []
    call = Backbone.__call__

    def counted(self: Backbone, images: npt.NDArray[np.float32]) -> Any:
        forwarded.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Backbone, "__call__", counted)
    small = Detector.open(fitted_bank, backbone=backbone, run=Run(memory=for_images(usual, 2)))
    scores = small.score(dataset_folder / "test")
    assert max(forwarded) == 2
    assert sum(forwarded) == len(scores) == 11
    # The network's own numbers depend on its batch, a little.
    np.testing.assert_allclose(scores.maps, expected.maps, rtol=1e-3, atol=1e-3)
    forwarded.clear()
    score_folder(dataset_folder / "test", bank=small, out=tmp_path)
    assert max(forwarded) == 2
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["memory"] == {"batch": 2, "working_bytes": for_images(usual, 2), "cache_bytes": 0}


# What the process takes


@pytest.mark.parametrize(
    ("recipe", "kappa"), [("exact", 1), ("exact", 100), ("location", 1), ("location", 49), ("ivf", 100), ("compact", 20)]
)
def test_arrays_of_a_call_stay_within_the_plan(recipe: str, kappa: int, tmp_path: Path) -> None:
    """Also where lists of candidates are by far the most of it."""
    shapes = {"fine": (16, 16, 72)}
    bank = bank_of(tmp_path / "b", product(1, 20, shapes, DIM), input_size=INPUT)  # float32: nothing is decoded or cached
    build_index(bank, load_recipe(recipe))
    detector = Detector.open(tmp_path / "b", recipe=recipe, method=Method(k_gallery=20, kappa=kappa), run=Run(memory="64GiB"))
    query = batch_of(product(2, detector.plan.batch, shapes, DIM, defect=True))
    tracemalloc.start()
    try:
        detector.score_features(query)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Where a product is planned for, BLAS has its share of the plan, which Python does not see.
    without = recipe == "location" or any(isinstance(level.search, NativeSearch) for level in detector._searches.values())
    by_blas = 0 if without else detector._workers.threads * _BLAS_BYTES
    assert peak <= detector.plan.working_bytes - by_blas


LEVELS = [Level("fine", 64, 4, 32, 32), Level("coarse", 128, 8, 16, 16)]

MEASURE = """
import json, os, sys
import numpy as np
from spade_faiss import Detector, FeatureBatch, Method, Run
from tests.support.memory import watched

folder, recipe, memory, images = sys.argv[1], sys.argv[2], sys.argv[3] or "2GiB", int(sys.argv[4])
rng = np.random.default_rng(0)
shapes = {"fine": (32, 32, 64), "coarse": (16, 16, 128)}
maps = {name: rng.standard_normal((images, *shape), dtype=np.float32) for name, shape in shapes.items()}
batch = FeatureBatch([str(i) for i in range(images)], rng.standard_normal((images, 32), dtype=np.float32), maps)

detector = Detector.open(folder, recipe=recipe, method=Method(k_gallery=50), run=Run(memory=memory))
with watched() as growth:
    detector.score_features(batch)
mapped, of_bank = 0, False
with open("/proc/self/smaps") as file:
    for line in file:
        first, *rest = line.split()
        if not first.endswith(":"):
            of_bank = bool(rest) and rest[-1].startswith(os.path.realpath(folder))
        elif first == "Rss:" and of_bank:
            mapped += 1024 * int(rest[0])
plan = detector.plan
print(json.dumps({"growth": growth.most, "mapped": mapped, "batch": plan.batch, "cache": plan.cache_bytes}))
"""


def big_bank(path: Path, images: int, dtype: str = "float16") -> Bank:
    """Noise in shards of 20 images: 192 KiB an image in half precision, twice as much decoded."""
    bank = Bank.create(path, Layout(levels=tuple(LEVELS), embedding_dim=32, dtype=dtype, input_size=(128, 128)))
    rng = np.random.default_rng(1)
    for start in range(0, images, 20):
        maps = {level.name: rng.standard_normal((20, *level.shape), dtype=np.float32) for level in LEVELS}
        embedding = rng.standard_normal((20, 32), dtype=np.float32)
        bank.append(FeatureBatch([f"normal {start + i}" for i in range(20)], embedding, maps))
    return bank


def measure(folder: Path, recipe: str, memory: str, images: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE, str(folder), recipe, memory, str(images)],
        # What scoring takes depends on the number of threads.
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@needs_proc
def test_scoring_a_bank_larger_than_the_budget_stays_within_it(tmp_path: Path) -> None:
    bank = big_bank(tmp_path / "b", 240)
    budget = 24 << 20
    found = measure(tmp_path / "b", "exact", "24MiB", 20)
    # Most of the bank is read; it would not fit into memory, neither as stored nor, at twice the size, decoded.
    assert bank.bytes_on_disk > 1.1 * budget
    assert 1 < found["batch"] < BATCH_SIZE
    assert found["growth"] < budget


@needs_proc
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("exact", "float32"), *((name, "float16") for name in ("exact", "location", "ivf", "compact", "history"))],
)
def test_the_bank_and_its_indexes_do_not_stay_mapped(recipe: str, dtype: str, tmp_path: Path) -> None:
    """Mapped memory would grow with the bank. (The cache of the operating system may hold the files as long as there is room.)

    A page fault may map a whole large page of the file, 2 MiB, and with it parts that were released before.
    """
    bank = big_bank(tmp_path / "b", 120, dtype)
    built = build_index(bank, load_recipe(recipe))
    found = measure(tmp_path / "b", recipe, "", 6)
    # A worker may map such a page again just after another let go of it: a few may remain, whatever the bank's size.
    assert found["mapped"] < 0.1 * (bank.bytes_on_disk + (built.bytes if built else 0)) + (4 << 20)
