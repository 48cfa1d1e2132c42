"""A run on a cluster whose command is lost: the same command goes on with the parts that are whole, another one begins anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.errors import BankError
from spade_faiss.core.settings import Decision, Run
from spade_faiss.core.timing import Timings
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features.datasets import find_images
from spade_faiss.report.exchange import PARTS, workspaces
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows import score as workflow
from spade_faiss.workflows import score_pieces
from spade_faiss.workflows.collected import Collected, collect
from spade_faiss.workflows.collected_file import read_collected, write_collected
from spade_faiss.workflows.score import score_folder
from tests.support.pictures import save_png


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 4 images."""
    monkeypatch.setattr(score_pieces, "_MOST_IMAGES", 4)


@pytest.fixture
def new(weave: Path, tmp_path: Path) -> Path:
    """Pictures to score, for five parts: one of them cannot be read, and some the bank holds."""
    folder = Path(shutil.copytree(weave / "test", tmp_path / "new"))
    (folder / "good" / "002.png").write_bytes(b"no picture")
    for number in range(8):
        shutil.copy(weave / "train" / "good" / f"{number:03d}.png", folder / "good" / f"known-{number}.png")
    return folder


@contextmanager
def lost_at(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Lose the command where it calls a function: nothing of it is done any more."""

    def lose(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workflow, name, lose)
        yield


def kept(out: Path) -> list[Path]:
    """The folders of the parts that were kept."""
    beside, _ = workspaces(out.resolve())
    return sorted(path.parent for path in beside.glob("parts/*/*/part.json"))


def said(caplog: pytest.LogCaptureFixture) -> str:
    """What was said since the last time, but for the picture that cannot be read."""
    found = "; ".join(record.getMessage() for record in caplog.records if not record.getMessage().startswith("skipped"))
    caplog.clear()
    return found


def assert_same(one: Path, parted: Path) -> None:
    files = sorted((parted / PARTS).glob("*/scores.h5"))
    with ScoreFile.open(one / "scores.h5") as scores, ScoreParts.open(files) as parts:
        assert scores.ids == parts.ids
        for name in ("image_score", "map_score", "top_score", "peak", "neighbor_ids", "neighbor_dist"):
            np.testing.assert_array_equal(getattr(scores, name), getattr(parts, name))
        assert all(np.array_equal(*maps) for maps in zip(scores.maps(), parts.maps(), strict=True))
        for group in ("verdict", "regions"):
            alone, table = scores.table(group), parts.table(group)
            assert alone.keys() == table.keys()
            for name, column in alone.items():
                np.testing.assert_array_equal(column, table[name])


@pytest.mark.slow
def test_the_same_command_goes_on(
    cluster: str, new: Path, whole_bank: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, out = Detector.open(whole_bank, run=Run(cluster=cluster, memory="83MB")), tmp_path / "out"
    alone = score_folder(new, bank=Detector.open(whole_bank, run=Run(memory="83MB")), out=tmp_path / "one")
    before = score_folder(new, bank=whole_bank, out=out, decision=Decision(alpha=0.2))
    assert before.images == alone.images
    page = (out / "report.html").read_bytes()
    caplog.clear()
    with lost_at(monkeypatch, "write_results"):  # all parts are whole, and say what was decided
        score_folder(new, bank=detector, out=out)
    parts = kept(out)
    assert len(parts) == 5
    assert (out / "report.html").read_bytes() == page, "the results before are as they were"
    assert said(caplog) == ""

    # One part is not whole, one is damaged, and a picture of another one has changed.
    (parts[0] / "part.json").unlink()
    damaged = (parts[1] / "scores.h5").read_bytes()
    (parts[1] / "scores.h5").write_bytes(damaged[: len(damaged) // 2])
    whole = {path.name: (path / "scores.h5").stat().st_ino for path in parts[2:]}
    names = [path.relative_to(new).as_posix() for path in sorted(new.rglob("*.png"))]
    save_png(np.full((96, 96, 3), 90, np.uint8), new / names[-1])
    whole.popitem()
    alone = score_folder(new, bank=Detector.open(whole_bank, run=Run(memory="83MB")), out=tmp_path / "one")
    caplog.clear()
    done = score_folder(new, bank=detector, out=out)
    words = said(caplog)
    assert "8 of 19 images had been scored by a run that was lost; their scores were kept" in words
    inodes = {path.parent.name: path.stat().st_ino for path in (out / PARTS).glob("*/scores.h5")}
    assert {name: inode for name, inode in inodes.items() if name in whole and inode == whole[name]} == whole
    assert (done.images, done.skipped, done.in_bank, done.visible) == (
        alone.images,
        alone.skipped,
        alone.in_bank,
        alone.visible,
    )
    assert_same(tmp_path / "one", out)
    assert kept(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one", "out"]


@pytest.mark.slow
def test_other_settings_or_another_list_begin_anew(
    cluster: str, new: Path, whole_bank: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, out = Detector.open(whole_bank, run=Run(cluster=cluster, memory="83MB")), tmp_path / "out"
    with lost_at(monkeypatch, "_decided_parts"):
        score_folder(new, bank=detector, out=out)
    count = len(kept(out))
    with lost_at(monkeypatch, "_decided_parts"):
        score_folder(new, bank=detector, out=out, decision=Decision(alpha=0.3))
    assert f"has left {count} parts of other images or settings: this run begins anew" in said(caplog)
    assert len(kept(out)) == 2 * count, "the first run can still go on"
    (new / "good" / "001.png").unlink()
    done = score_folder(new, bank=detector, out=out)
    assert "begins anew" in said(caplog)
    assert done.images == sum(1 for _ in new.rglob("*.png")) - 1
    assert kept(out) == []


def test_what_is_known_of_images_outlives_the_command(new: Path, whole_bank: Path, tmp_path: Path) -> None:
    detector = Detector.open(whole_bank, run=Run(memory="83MB"))
    rules, _ = DecisionRules.of(detector, Decision())
    root, records = find_images(new)
    pictures = score_pieces.NoPictures()
    collected = collect((detector, rules), (root, records), lambda scores: None, pictures, Timings())
    assert any(collected.regions)
    assert collected.in_bank
    assert collected.skipped
    entry = write_collected(tmp_path / "known.h5", collected, records, ["a" * 64, *[""] * (len(records) - 1)])
    found, digests = read_collected(tmp_path / "known.h5", entry, records)
    assert digests == ["a" * 64, *[""] * (len(records) - 1)]
    for name in ("records", "placements", "regions", "in_bank", "skipped", "sha256", "routes"):
        assert getattr(found, name) == getattr(collected, name), name
    assert found.mean_passed_over == collected.mean_passed_over
    np.testing.assert_array_equal(np.concatenate(found.statistics), np.concatenate(collected.statistics))
    assert found.scores.keys() == collected.scores.keys()
    for name, values in collected.scores.items():
        np.testing.assert_array_equal(found.scores[name], values)
    (tmp_path / "known.h5").write_bytes(b"something else")
    with pytest.raises(BankError, match="not the file that was written"):
        read_collected(tmp_path / "known.h5", entry, records)


def test_a_part_of_which_nothing_could_be_read(tmp_path: Path, new: Path) -> None:
    _, records = find_images(new)
    entry = write_collected(tmp_path / "known.h5", Collected(), records, [""] * len(records))
    found, _ = read_collected(tmp_path / "known.h5", entry, records)
    assert vars(found) == vars(Collected())
