"""On a cluster, pictures, banks and results may be at URLs: each node has its own cache, and workers store what they make."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cluster import plan
from spade_faiss.cluster.session import connect
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.settings import Run
from spade_faiss.report.output_url import KEPT_PARTS
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.detector import Detector
from spade_faiss.storage.cache import FOLDER_VARIABLE
from spade_faiss.workflows import score as workflow
from spade_faiss.workflows import score_pieces
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.evaluate import evaluate
from spade_faiss.workflows.fit import fit
from spade_faiss.workflows.score import score_folder
from tests.storage.test_commands import upload
from tests.support.object_storage import Server

SMALL = Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=72, size=64))
THERE = Run(cluster="local:2")
# Enough for a few images at a time.
LITTLE = "83MB"


@pytest.fixture(scope="module")
def workers(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two workers, which find the server by their environment; returns their cache, which this process does not use."""
    cache = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**server.environment, FOLDER_VARIABLE: str(cache)}.items():
            patch.setenv(name, value)
        with connect("local:2"):
            yield cache


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 4 images, for all workers."""
    monkeypatch.setattr(plan, "_LEAST_BYTES", 0)
    monkeypatch.setattr(score_pieces, "_MOST_IMAGES", 4)


@pytest.fixture(scope="module")
def weave(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labeled set, of which a test image cannot be read, and one is in the bank."""
    folder = Path(shutil.copytree(dataset_folder, tmp_path_factory.mktemp("set") / "weave"))
    (folder / "test" / "good" / "broken.png").write_bytes(b"no picture")
    shutil.copy(folder / "train" / "good" / "003.png", folder / "test" / "good" / "known.png")
    return folder


@pytest.fixture(scope="module")
def local(weave: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank that one process makes."""
    bank = tmp_path_factory.mktemp("local") / "weave.bank"
    fit(weave / "train" / "good", bank=bank, extraction=SMALL)
    return bank


def same_scores(one: Path, objects: dict[str, bytes], folder: Path) -> None:
    """The results of one process in a folder, and those of a cluster at a URL."""
    for name, content in objects.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with ScoreFile.open(one / "scores.h5") as alone, ScoreParts.open(sorted(folder.rglob("scores.h5"))) as joined:
        assert joined.ids == alone.ids
        for name in ("image_score", "map_score", "top_score", "peak", "neighbor_ids", "neighbor_dist"):
            np.testing.assert_array_equal(getattr(joined, name), getattr(alone, name))
        assert all(np.array_equal(*maps) for maps in zip(joined.maps(), alone.maps(), strict=True))


@pytest.mark.slow
def test_pictures_banks_and_results_at_urls(
    bucket: str, server: Server, workers: Path, weave: Path, local: Path, tmp_path: Path
) -> None:
    upload(weave, f"{bucket}/weave", server)
    url = f"{bucket}/weave.bank"
    fit(f"{bucket}/weave/train/good", bank=url, extraction=SMALL, run=THERE)
    ours, theirs = Bank.open(local), Bank.open(url)
    assert theirs.ids == ours.ids
    rows = np.arange(len(ours))
    np.testing.assert_array_equal(theirs.embedding(rows), ours.embedding(rows))
    for level in ours.layout.levels:
        for row in rows.tolist():
            np.testing.assert_array_equal(theirs.level_map(level.name, row), ours.level_map(level.name, row))
    assert str(theirs.image_path(theirs.ids[0])) == str(Path(f"{bucket}/weave/train/good/{theirs.ids[0]}"))
    alone, many = Detector.open(local), Detector.open(url, run=THERE)
    holdout = [f"{bucket}/weave/test/good/000.png", f"{bucket}/weave/test/good/001.png"]
    here = [weave / "test" / "good" / "000.png", weave / "test" / "good" / "001.png"]
    assert calibrate(many, holdout=holdout, alpha=0.4).image_score == calibrate(alone, holdout=here, alpha=0.4).image_score
    calibrate(many)
    calibrate(alone)

    expected = evaluate(weave, bank=alone, out=tmp_path / "one")
    found = evaluate(f"{bucket}/weave", bank=many, out=f"{bucket}/results")
    assert (found.images, found.visible) == (expected.images, expected.visible)
    assert [item.id for item in found.skipped] == [item.id for item in expected.skipped]
    assert f"{bucket}/weave/test/good/broken.png" in found.skipped[0].reason
    objects = server.objects(f"{bucket}/results").contents()
    assert [name for name in objects if "score-parts" not in name] == ["report.html", "report.json"]
    same_scores(tmp_path / "one", objects, tmp_path / "many")
    numbers = json.loads(objects["report.json"])
    assert numbers["metrics"] == json.loads((tmp_path / "one" / "report.json").read_bytes())["metrics"]
    assert objects["report.html"].count(b"data:image") >= found.images  # read again by the command
    for name, content in objects.items():
        for folder in (tmp_path, workers):
            assert str(folder).encode() not in content, name  # no folder of a cache is told to anybody
    # Pictures went to the cache of the workers as well, and no part in hand stayed there.
    assert list(workers.rglob("broken.png"))
    assert not list((workers / "parts").iterdir())


@pytest.mark.slow
def test_a_lost_command_goes_on_with_what_it_stored(
    bucket: str,
    server: Server,
    workers: Path,
    weave: Path,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also with a picture that has changed meanwhile: its part is scored again, and no other."""
    upload(weave / "test", f"{bucket}/new", server)
    detector, out = Detector.open(local, run=replace(THERE, memory=LITTLE)), f"{bucket}/results"

    def lose(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workflow, "write_html", lose)
        score_folder(f"{bucket}/new", bank=detector, out=out)
    names = server.objects(out).names()
    assert names
    assert all(name.startswith(KEPT_PARTS) for name in names)
    records = [name for name in names if name.endswith("part.json")]
    changed = sorted(path.relative_to(weave / "test").as_posix() for path in (weave / "test").rglob("*.png"))[0]
    server.objects(f"{bucket}/new")[changed] = (weave / "train" / "good" / "007.png").read_bytes()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        results = score_folder(f"{bucket}/new", bank=detector, out=out)
    count = results.images
    kept = count - detector.images_at_a_time  # all but the part with the changed one
    assert f"{kept} of {count + 1} images had been scored by a run that was lost" in caplog.text
    assert len(records) > 2
    new = Path(shutil.copytree(weave / "test", tmp_path / "new"))
    shutil.copy(weave / "train" / "good" / "007.png", new / changed)
    score_folder(new, bank=Detector.open(local, run=Run(memory=LITTLE)), out=tmp_path / "one")
    objects = server.objects(out).contents()
    assert not [name for name in objects if name.startswith(".")]
    same_scores(tmp_path / "one", objects, tmp_path / "many")
