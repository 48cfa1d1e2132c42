"""A detector in other processes: in forks, and pickled. Scores are the same, bit by bit."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss import Backbone, Detector, InputError, Scores
from spade_faiss.core import device
from spade_faiss.core.device import CPU, Device, check_fork
from tests.support.backbones import tiny_backbone

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")

# They start processes, a second or more each.
pytestmark = pytest.mark.slow

# The thread that forks has used OpenMP, with more than one thread, in all libraries.
BEFORE = """
import multiprocessing, sys, threading
from pathlib import Path
import numpy as np
from spade_faiss import Bank, Detector, FeatureBatch, build_index, load_backbone, load_recipe

path, images, recipes = sys.argv[1], sorted(Path(sys.argv[2]).rglob("*.png")), sys.argv[3:]
bank = Bank.open(path)
detectors = []
for name, _, engine in (recipe.partition(":") for recipe in recipes):
    recipe = load_recipe(name).with_query({"engine": engine} if engine else {})
    build_index(bank, recipe)
    detectors.append(Detector.open(path, recipe=recipe))
rng = np.random.default_rng(5)

def noisy(array):
    return array.astype(np.float32) + rng.normal(0, 0.1, array.shape).astype(np.float32)

stored = bank.read(np.arange(16))
queries = FeatureBatch(
    [f"query {i}" for i in range(16)],
    noisy(stored.embedding), {name: noisy(maps) for name, maps in stored.levels.items()}, stored.source,
)

def parts(scores):
    return [scores.image_score, scores.maps, *scores.level_dist.values(), *scores.nearest.values(), scores.neighbor_dist]

def same(ours, theirs):
    return all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))

def by_features(number):
    return [part for detector in detectors for part in parts(detector.score_features(queries[number : number + 1]))]

def by_images(number):
    return [part for detector in detectors for part in parts(detector.score([images[number % len(images)]]))]

def in_forks(function, numbers):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        return pool.map_async(function, numbers, chunksize=1).get(timeout=60)
"""


def run(code: str, *words: object) -> None:
    done = subprocess.run(
        # Python warns of forks of processes with threads, and rightly so: nobody releases their locks.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEFORE + code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr


SCORE = """
for function in (by_features, by_images):
    before = [function(number) for number in range(16)]
    for ours, theirs in zip(before, in_forks(function, range(16)), strict=True):
        assert same(ours, theirs), function
    assert same(before[0], function(0))  # and the parent goes on
"""


@needs_fork
def test_forks_score_as_their_parent_does(fitted_bank: Path, dataset_folder: Path) -> None:
    """Row "a Detector used once, then os.fork(), used in the child": 16 queries through a Pool of 4, features and images."""
    run(SCORE, fitted_bank, dataset_folder / "test", "exact")


@needs_fork
@pytest.mark.slow
def test_forks_score_by_every_recipe_and_engine(fitted_bank: Path, dataset_folder: Path, tmp_path: Path) -> None:
    bank = copied(fitted_bank, tmp_path)
    recipes = ("exact:faiss", "exact:torch", "compact", "ivf", "location", "hnsw", "history")
    run(SCORE, bank, dataset_folder / "test", *recipes)


OPEN = """
by_images(0)

def anew(number):
    load_backbone("efficientnet_lite0")
    built = build_index(Bank.open(path), load_recipe("hnsw"), rebuild=True) if number == 0 else None
    detector = Detector.open(path)
    found = parts(detector.score([images[number]])), detector.score_rows([number]).image_score
    again = multiprocessing.get_context("fork").Process(target=detector.score, args=([images[number]],))
    multiprocessing.current_process()._config["daemon"] = False  # those of a Pool may have no forks, others may
    again.start()
    again.join(60)
    return *found, again.exitcode

expected = [(parts(detectors[0].score([images[n]])), detectors[0].score_rows([n]).image_score) for n in range(4)]
for ours, (maps, rows, exitcode) in zip(expected, in_forks(anew, range(4)), strict=True):
    assert same(ours[0], maps)
    assert ours[1] == rows
    assert exitcode == 0
"""


@needs_fork
def test_a_fork_opens_and_builds_what_it_needs_and_forks_again(fitted_bank: Path, dataset_folder: Path, tmp_path: Path) -> None:
    """Nothing of the parent's is used: the threads that are missing are those of its OpenMP."""
    run(OPEN, copied(fitted_bank, tmp_path), dataset_folder / "test", "exact")


LOCKS = """
from spade_faiss.core.once import Once, once
from spade_faiss.index import faiss_file
from spade_faiss.search import distances
from spade_faiss.search.cache import BlockCache

cache, started, stop = BlockCache(1000), threading.Event(), threading.Event()
cache.put(("kept", 0), np.zeros(3))

class Owner:
    @once
    def value(self):
        if threading.current_thread() is not threading.main_thread():
            started.set()
            stop.wait()
        return 7

owner = Owner()
made = Once(lambda: owner.value)

def hold():
    with cache._lock(), distances._threshold_lock(), bank._committing(), bank._lock._guard(), faiss_file._limits():
        made()

def use(number):
    cache.put(("more", number), np.zeros(3))
    with bank.writing(), bank._committing(), faiss_file._limited_to(1000):
        return made(), cache.get(("kept", 0)).shape, by_features(number)

expected = by_features(1)
holder = threading.Thread(target=hold)
holder.start()
started.wait()
try:
    [(value, shape, found)] = in_forks(use, [1])
finally:
    stop.set()
assert (value, shape) == (7, (3,))
assert same(found, expected)
"""


@needs_fork
def test_a_lock_that_another_thread_held_at_the_fork_is_free_in_it(
    fitted_bank: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    run(LOCKS, copied(fitted_bank, tmp_path), dataset_folder / "test", "exact:faiss")


def test_cuda_in_a_fork_of_a_process_that_used_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    check_fork(CPU)
    with pytest.raises(InputError, match=r"cuda:1 cannot be used in this process.*'spawn'"):
        check_fork(Device("cuda", 1))


def assert_same(ours: Scores, theirs: Scores) -> None:
    assert ours.ids == theirs.ids
    assert ours.image_score.tobytes() == theirs.image_score.tobytes()
    assert ours.maps.tobytes() == theirs.maps.tobytes()


@pytest.mark.parametrize("copied_by", [copy.copy, copy.deepcopy, lambda detector: pickle.loads(pickle.dumps(detector))])
def test_copies_of_a_detector_score_as_it_does(fitted_bank: Path, dataset_folder: Path, copied_by: Any) -> None:
    """Row "pickle / deepcopy of a Detector": it is opened again, with caches of its own."""
    detector = Detector.open(fitted_bank)
    other = copied_by(detector)
    assert (other.method, other.run, other.recipe) == (detector.method, detector.run, detector.recipe)
    assert other._cache is not detector._cache
    assert_same(other.score(dataset_folder / "test" / "spot"), detector.score(dataset_folder / "test" / "spot"))


TRAVELED = """
import pickle, sys
from pathlib import Path
detector, images, expected = pickle.loads(sys.stdin.buffer.read())
found = detector.score(images)
assert found.maps.tobytes() == expected.maps.tobytes()
assert found.image_score.tobytes() == expected.image_score.tobytes()
"""


def test_a_pickled_detector_scores_in_another_process(fitted_bank: Path, dataset_folder: Path) -> None:
    detector, images = Detector.open(fitted_bank), dataset_folder / "test" / "spot"
    sent = pickle.dumps((detector, images, detector.score(images)))
    done = subprocess.run([sys.executable, "-c", TRAVELED], input=sent, capture_output=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr.decode()


def test_a_backbone_of_ones_own_is_shared_by_copies_and_cannot_be_pickled(fitted_bank: Path, backbone: Backbone) -> None:
    detector = Detector.open(fitted_bank, backbone=backbone)
    assert copy.deepcopy(detector).backbone is backbone
    tiny = tiny_backbone()
    assert copy.copy(tiny) is tiny
    for thing in (detector, tiny):
        with pytest.raises(InputError, match=r"the backbone '\w+' cannot be pickled; load or make it in each process"):
            pickle.dumps(thing)


def copied(bank: Path, folder: Path) -> Path:
    """A bank of its own for a test that builds indexes."""
    from shutil import copytree

    return Path(copytree(bank, folder / "copied.bank"))


def test_scores_can_be_pickled(fitted_bank: Path, dataset_folder: Path) -> None:
    scores = Detector.open(fitted_bank).score(dataset_folder / "test" / "spot")
    again = pickle.loads(pickle.dumps(scores))
    assert_same(scores, again)
    assert np.array_equal(again.neighbor_ids, scores.neighbor_ids)
