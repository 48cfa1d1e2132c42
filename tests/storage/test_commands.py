"""Commands do at URLs what they do in folders: the same bank and the same scores, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.storage import copy
from spade_faiss.workflows.fit import fit
from tests.support.banks import batch, make_bank
from tests.support.object_storage import Server

SMALL = Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=72, size=64))


def upload(folder: Path, url: str, server: Server) -> None:
    objects = server.objects(url)
    for path in folder.rglob("*"):
        if path.is_file():
            objects[path.relative_to(folder).as_posix()] = path.read_bytes()


def run(*words: str) -> None:
    assert main([*words, "--quiet"]) == 0


def scores_of(content: Path | bytes, tmp_path: Path) -> dict[str, np.ndarray]:
    path = content if isinstance(content, Path) else tmp_path / "downloaded.h5"
    if isinstance(content, bytes):
        path.write_bytes(content)
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def maintain(bank: str, pictures: str, more: str, ids: list[str]) -> None:
    """Everything that writes to a bank but `fit`."""
    run("add", more, "--bank", bank)
    run("remove", *ids, "--bank", bank)
    run("restore", ids[0], "--bank", bank)
    run("compact", bank)
    run("index", bank, "--recipe", "ivf")
    run("index", bank, "--recipe", "compact")
    run("calibrate", bank, "--recipe", "compact")


@pytest.mark.slow
def test_all_commands_do_what_they_do_in_folders(
    bucket: str,
    server: Server,
    tmp_path: Path,
    dataset_folder: Path,
    another_machine: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "weave"
    shutil.copytree(dataset_folder, here)
    good = here / "train" / "good"
    names = sorted(path.name for path in good.iterdir())
    more = here / "more"
    more.mkdir()
    for name in names[-3:]:
        (good / name).rename(more / f"more-{name}")
    upload(here, f"{bucket}/weave", server)
    local, remote = str(tmp_path / "weave.bank"), f"{bucket}/banks/weave.bank"

    fit(good, bank=local, extraction=SMALL)
    fit(f"{bucket}/weave/train/good", bank=remote, extraction=SMALL)
    maintain(local, str(good), str(more), names[:2])
    another_machine()
    maintain(remote, f"{bucket}/weave/train/good", f"{bucket}/weave/more", names[:2])
    another_machine()

    ours, theirs = Bank.open(local), Bank.open(remote)
    assert theirs.ids == ours.ids
    rows = np.arange(len(ours))
    expected, found = ours.read(rows), theirs.read(rows)
    np.testing.assert_array_equal(found.embedding, expected.embedding)
    for level, maps in expected.levels.items():
        np.testing.assert_array_equal(found.levels[level], maps)
    assert theirs.sha256_of == ours.sha256_of
    capsys.readouterr()
    run("verify", remote, "--deep")
    assert "nothing is wrong" in capsys.readouterr().out

    recipe = ["--recipe", "compact"]
    run("evaluate", str(here), "--bank", local, "--out", str(tmp_path / "results"), *recipe)
    another_machine()
    run("evaluate", f"{bucket}/weave", "--bank", remote, "--out", f"{bucket}/results", *recipe)
    said = capsys.readouterr().out
    assert f"look at {bucket}/results/report.html" in said
    objects = server.objects(f"{bucket}/results")
    assert objects.names() == sorted(path.name for path in (tmp_path / "results").iterdir())
    written = scores_of(tmp_path / "results" / "scores.h5", tmp_path)
    stored = scores_of(objects["scores.h5"], tmp_path)
    assert written.keys() == stored.keys()
    for name, values in written.items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    numbers, expected_numbers = (
        json.loads(text) for text in (objects["report.json"], (tmp_path / "results" / "report.json").read_bytes())
    )
    assert numbers["bank"]["path"] == remote
    assert numbers["metrics"] == expected_numbers["metrics"]
    for name, content in objects.contents().items():
        assert str(tmp_path).encode() not in content, name  # no folder of the cache is told to anybody
        assert b"whose-key-nobody-may-see" not in content


def test_the_cache_is_chosen_by_options(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = make_bank(f"{bucket}/parts.bank")
    bank.append(batch("a", "b"))
    monkeypatch.setattr(copy, "_OPEN", {})
    capsys.readouterr()
    run("info", f"{bucket}/parts.bank", "--json", "--cache", str(tmp_path / "chosen"), "--cache-bytes", "1GB")
    assert json.loads(capsys.readouterr().out)["path"] == f"{bucket}/parts.bank"
    (shard,) = (tmp_path / "chosen").rglob("*.h5")
    assert shard.name == bank.manifest.shards[0].file
    assert main(["info", f"{bucket}/parts.bank", "--quiet", "--cache-bytes", "much"]) == 1
    assert "cache_bytes='much' is not a size; write for example" in capsys.readouterr().err


def test_a_server_takes_folders_and_says_so(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_bank(f"{bucket}/x")
    assert main(["serve", f"{bucket}/x"]) == 1
    assert "is a URL, and a folder or a file of this machine is needed here" in capsys.readouterr().err
