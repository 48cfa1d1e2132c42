"""Few file descriptors, no permission, files that become shorter: said as what they are, and worked around where possible."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Detector
from spade_faiss.bank.bank import Bank
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import AccessError, BankError
from spade_faiss.core.settings import Method
from spade_faiss.index.build import build_index, update_indexes
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.recipe import Build, Recipe
from tests.support.banks import COARSE, FINE, batch, forget_mappings, make_bank
from tests.support.damage import HNSW, IVF, bank_with_indexes
from tests.support.recipes import CLUSTERS

SHARDS = 200

# All that reads and writes a bank, with less descriptors than it has files.
FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import numpy as np
from spade_faiss import Detector, verify
from spade_faiss.bank.bank import Bank
from spade_faiss.core.settings import Method
from spade_faiss.search.recipe import Build, Recipe
from tests.support.banks import batch
path = sys.argv[1]
recipe = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2}))
method = Method(k_image=200, k_gallery=200)
exact, lists = (Detector.open(path, recipe=of, method=method) for of in ("exact", recipe))
for detector in (exact, lists):
    print(float(detector.score_features(batch("q")).maps.sum()))
assert verify(path, deep=True).problems == ()
bank = Bank.open(path)
bank.remove(["3"])
bank.append(batch("new"))
bank.compact()
assert len(bank) == 200
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_two_hundred_shards_and_their_index_work_with_256_descriptors(tmp_path: Path) -> None:
    """Fault "200 shards, `ulimit -n 256`": "damaged ... restore it from a backup"."""
    bank = make_bank(tmp_path / "bank")
    for number in range(SHARDS):
        bank.append(batch(str(number)))
    build_index(bank, Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2})))
    expected = Detector.open(bank.path, method=Method(k_image=SHARDS, k_gallery=SHARDS)).score_features(batch("q")).maps.sum()
    del bank
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FEW, str(tmp_path / "bank")],
        capture_output=True,
        text=True,
        check=False,
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) == pytest.approx(float(expected))


@pytest.mark.parametrize(("number", "said"), [(errno.EMFILE, "too many files are open"), (errno.EACCES, "permission denied")])
def test_a_shard_that_cannot_be_opened_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    """Fault "EMFILE and EACCES named as what they are"."""
    bank = make_bank(tmp_path / "bank")
    bank.append(batch("a"))
    forget_mappings()
    opened = Bank.open(bank.path)
    really = os.open

    def refuse(path: Any, *arguments: int, **options: int) -> int:
        if str(path).endswith("000001.h5"):
            raise OSError(number, os.strerror(number), str(path))
        return really(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessError, match=rf"cannot open .*000001\.h5: {said}") as caught:
        _ = opened.ids
    assert "damaged" not in str(caught.value)
    assert "backup" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".faiss", "index.json", "trained-000.h5"])
def test_an_index_that_cannot_be_opened_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = bank_with_indexes(tmp_path / "bank")
    folder = path / "indexes" / ("ivf" if suffix == "trained-000.h5" else "hnsw")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    forget_mappings()
    really = os.open

    def refuse(name: Any, *arguments: int, **options: int) -> int:
        if str(name).endswith(suffix):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return really(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    bank = Bank.open(path)
    bank.append(batch("new"))
    with pytest.raises(AccessError, match="permission denied"):
        update_indexes(bank)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in before} == before
    update_indexes(Bank.open(path))


def test_reads_go_on_where_no_more_files_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mapped needs no descriptor: it only spares page faults."""
    bank = make_bank(tmp_path / "bank")
    bank.append(batch("a", "b"))
    bank.embeddings_of_shard(0)  # maps the shard
    out, expected = np.empty(FINE.shape, np.float32), batch("a", "b").levels[FINE.name][1]

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    bank.read_map(FINE.name, 1, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("recipe", ["exact", "location", IVF, HNSW])
def test_a_shard_that_became_shorter_under_an_open_detector_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, recipe: str | Recipe
) -> None:
    """Fault "a shard truncated under an open Detector": SIGBUS."""
    bank = make_bank(tmp_path / "bank", dtype=dtype)
    bank.append(batch("a", "b", "c"))
    if isinstance(recipe, Recipe):
        build_index(bank, recipe)
    forget_mappings()
    detector = Detector.open(tmp_path / "bank", recipe=recipe, method=Method(k_image=2, k_gallery=3))
    _ = detector.bank.ids
    os.truncate(tmp_path / "bank" / "features" / "000001.h5", 4096)
    with caplog.at_level(logging.WARNING), pytest.raises(BankError, match=r"000001\.h5 is shorter than when it was opened"):
        detector.score_features(batch("q"))


def test_the_embeddings_texts_and_maps_of_a_shard_that_became_shorter_are_errors(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank")
    bank.append(batch("a", "b", paths=["a", "b"], sha256=["0" * 64, "1" * 64], root="/r"))
    bank.embeddings_of_shard(0)  # maps the shard
    os.truncate(tmp_path / "bank" / "features" / "000001.h5", 4096)
    for look in (
        lambda: bank.embeddings_of_shard(0),
        lambda: bank.embedding(np.array([1])),
        lambda: bank.image_path("a"),
        lambda: bank.level_map(COARSE.name, 1),
        lambda: bank.read(np.array([0])),
        lambda: bank.check_texts(0),
    ):
        with pytest.raises(BankError, match="is shorter than when it was opened"):
            look()


def test_a_shard_that_became_shorter_before_it_was_mapped_is_an_error(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank")
    bank.append(batch("a", "b"))
    os.truncate(tmp_path / "bank" / "features" / "000001.h5", 4096)
    with pytest.raises(BankError, match=r"000001\.h5 is damaged \(it is cut off.*restore it from a backup"):
        bank.embeddings_of_shard(0)


def test_the_oldest_events_of_a_long_history_are_dropped(tmp_path: Path) -> None:
    """A manifest stays short enough to be read, however long the bank is in use."""
    manifest = make_bank(tmp_path / "bank").manifest
    event = manifest.next("add", 1, ()).history[0]
    following = replace(manifest, history=(event,) * 10_000).next("remove", 1, ())
    assert len(following.history) == 10_000
    assert following.history[-1].action == "remove"


@pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")
def test_a_shard_that_became_shorter_between_two_searches_of_the_whole_bank_is_an_error(tmp_path: Path) -> None:
    """The kernel keeps the addresses of all maps from search to search."""
    bank = make_bank(tmp_path / "bank", dtype="float16")
    bank.append(batch("a", "b", "c"))
    build_index(bank, CLUSTERS)
    detector = Detector.open(tmp_path / "bank", recipe=CLUSTERS, method=Method(k_image=2, k_gallery=ALL))
    detector.score_features(batch("q"))
    os.truncate(tmp_path / "bank" / "features" / "000001.h5", 4096)
    with pytest.raises(BankError, match=r"000001\.h5 is shorter than when it was opened"):
        detector.score_features(batch("q"))
