"""Watching as a whole: the verdicts are those of `score`, each is delivered once, and a bank that changes is followed."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss import Detector, add, calibrate
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.settings import Decision
from spade_faiss.watch.arrivals import Stamp
from spade_faiss.watch.destinations import source_name
from spade_faiss.watch.judge import Judge
from spade_faiss.watch.latency import latency_ms
from spade_faiss.watch.ledger import Ledger, Parcel
from spade_faiss.watch.settings import WatchSettings
from spade_faiss.workflows.score import score_folder
from tests.support.pictures import save_png, weave
from tests.support.receivers import Receiver, receiving
from tests.support.videos import numbered, write_video
from tests.support.watching import ALPHA, judge_of, read_lines, watching, write_pictures

# What report.json says of an image and a line of a watch as well.
SAME = ("image_score", "map_score", "top_score", "p_image", "p_map", "p_top", "p_value", "alarm", "regions", "neighbors")


@pytest.fixture(scope="module")
def judge(fitted_bank: Path) -> Judge:
    """A judge of a bank that does not change."""
    return judge_of(fitted_bank)


def scored(source: Path, bank: Path, out: Path) -> dict[str, dict[str, Any]]:
    """What `score` says, by image."""
    score_folder(source, bank=bank, out=out, decision=Decision(alpha=ALPHA))
    return {item["id"]: item for item in json.loads((out / "report.json").read_text())["scores"]}


@pytest.mark.slow
def test_verdicts_are_those_of_score_to_the_bit(tmp_path: Path, fitted_bank: Path, judge: Judge) -> None:
    names = write_pictures(tmp_path / "in", 9)
    write_video(tmp_path / "in" / "clip.mp4", numbered(4, (80, 96)))
    with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, once=True):
        pass
    found = {line["name"]: line for line in read_lines(tmp_path / "out")}
    expected = scored(tmp_path / "in", fitted_bank, tmp_path / "results")
    assert found.keys() == expected.keys() == {*names, *(f"clip.mp4#t=0.{k}00" for k in range(4))}
    for name, line in found.items():
        assert {key: line[key] for key in SAME} == {key: expected[name][key] for key in SAME}, name
        assert line.get("time_s") == expected[name].get("time_s"), name
    assert sum(line["alarm"] for line in found.values()) >= 3


def test_alarms_have_their_map_and_overlay(tmp_path: Path, judge: Judge, fitted_bank: Path) -> None:
    write_pictures(tmp_path / "in", 4)
    with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, once=True):
        pass
    lines = read_lines(tmp_path / "out")
    assert {line["alarm"] for line in lines} == {True, False}
    detector = Detector.open(fitted_bank)
    for line in lines:
        assert ("map" in line) == ("overlay" in line) == line["alarm"]
        if line["alarm"]:
            (own,) = detector.score(tmp_path / "in" / line["name"]).maps
            np.testing.assert_array_equal(np.load(tmp_path / "out" / line["map"]), own.astype(np.float16))
            with Image.open(tmp_path / "out" / line["overlay"]) as picture:
                assert picture.size == (64, 64)


def test_pictures_that_come_while_it_watches(tmp_path: Path, judge: Judge) -> None:
    (tmp_path / "in").mkdir()
    with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, rescan_s=1e6) as running:
        first = write_pictures(tmp_path / "in", 3)
        running.wait_for(lambda: len(running.lines) == 3)
        write_pictures(tmp_path / "away", 4, seed=1)
        (tmp_path / "away").rename(tmp_path / "in" / "moved")  # as a whole, with a folder in it
        running.wait_for(lambda: len(running.lines) == 7)
        save_png(weave(np.random.default_rng(9)), tmp_path / "in" / ".hidden.png")
        (tmp_path / "in" / "notes.txt").write_text("no picture")
        time.sleep(0.5)
    assert {*running.names} == {
        *first,
        *(f"moved/{name}" for name in ("01-000.png", "01-002.png")),
        *(f"moved/sub/{name}" for name in ("01-001.png", "01-003.png")),
    }
    assert sorted(line["name"] for line in read_lines(tmp_path / "out")) == sorted(running.names)


def test_a_file_counts_when_it_is_complete(tmp_path: Path, judge: Judge) -> None:
    (tmp_path / "in").mkdir()
    data = io.BytesIO()
    Image.fromarray(weave(np.random.default_rng(0))).save(data, "PNG")
    parts = [data.getvalue()[start : start + 4000] for start in range(0, len(data.getvalue()), 4000)]
    assert len(parts) >= 4
    with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, give_up_s=30.0) as running:
        with (tmp_path / "in" / "slow.png").open("wb") as file:
            for number, part in enumerate(parts):
                file.write(part)
                file.flush()
                # Once, the writer pauses for longer than it takes to count as complete.
                time.sleep(0.7 if number == 1 else 0.05)
                assert running.lines == []
        running.wait_for(lambda: running.lines)
    (line,) = read_lines(tmp_path / "out")
    assert (line["kind"], line["name"]) == ("verdict", "slow.png")


def test_a_file_that_never_becomes_readable_is_reported_once(tmp_path: Path, judge: Judge) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    state = tmp_path / "state.db"
    for run in range(2):
        with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, state=state) as running:
            if run == 0:
                running.wait_for(lambda: running.lines)
            time.sleep(1)
        assert len(running.lines) == (run == 0)
    (line,) = read_lines(tmp_path / "out")
    assert (line["kind"], line["name"]) == ("skipped", "bad.png")
    assert "damaged" in line["reason"]
    # What it becomes later is another picture.
    save_png(weave(np.random.default_rng(0)), tmp_path / "in" / "bad.png")
    with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, state=state, once=True):
        pass
    assert [line["kind"] for line in read_lines(tmp_path / "out")] == ["skipped", "verdict"]


def test_a_name_that_is_written_again_is_another_picture_and_a_touch_is_none(tmp_path: Path, judge: Judge) -> None:
    path, state = tmp_path / "in" / "latest.png", tmp_path / "state.db"
    rng = np.random.default_rng(0)
    for run, (write, expected) in enumerate(((True, 1), (False, 1), (True, 2))):
        if write:
            save_png(weave(rng), path)
        else:
            os.utime(path, (1e9, 1e9))
        with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, state=state, once=True):
            pass
        lines = read_lines(tmp_path / "out")
        assert len(lines) == len({line["id"] for line in lines}) == expected, run


def test_a_video_goes_on_where_it_was(tmp_path: Path, judge: Judge) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered(30, (80, 96)))
    state = tmp_path / "state.db"
    with watching(path, [f"folder:{tmp_path / 'out'}"], judge=judge, state=state, every=2) as running:
        running.wait_for(lambda: running.lines)
    with watching(path, [f"folder:{tmp_path / 'out'}"], judge=judge, state=state, every=2) as running:
        running.join()
    assert [line["name"] for line in read_lines(tmp_path / "out")] == [f"clip.mp4#t={k / 5:.3f}" for k in range(15)]


def test_several_destinations_and_alarms_only(tmp_path: Path, judge: Judge) -> None:
    names = write_pictures(tmp_path / "in", 6)
    with receiving(Receiver()) as receiver:
        to = [f"folder:{tmp_path / 'out'}", f"webhook:{receiver.url}/hook", f"server:{receiver.url}/parts"]
        with watching(tmp_path / "in", to, judge=judge, once=True, alarms_only=True):
            pass
    alarms = {line["name"] for line in read_lines(tmp_path / "out") if line["alarm"]}
    hooks = [request.json for request in receiver.taken if request.path == "/hook"]
    posted = [request for request in receiver.taken if request.path == "/v1/banks/parts/score"]
    assert len(read_lines(tmp_path / "out")) == len(posted) == 6
    assert 0 < len(alarms) < 6
    assert {line["name"] for line in hooks} == alarms
    assert {request.body for request in posted} == {(tmp_path / "in" / name).read_bytes() for name in names}


def test_a_server_alone_needs_no_bank_and_gets_whole_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 2)
    write_video(tmp_path / "in" / "clip.mp4", numbered(3, (80, 96)))
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with (
        receiving(Receiver()) as receiver,
        watching(tmp_path / "in", [f"server:{receiver.url}/parts"], judge=None, once=True) as running,
    ):
        running.join()
    assert sorted(line.facts["kind"] for line in running.lines) == ["handed on"] * 5 + ["skipped"]
    assert len(receiver.taken) == len({request.headers["idempotency-key"] for request in receiver.taken}) == 5
    for request in receiver.taken:
        with Image.open(io.BytesIO(request.body)) as picture:
            assert picture.size == (96, 80)


def test_a_page_that_cannot_be_sent_as_a_picture_is_skipped_and_ends_nothing(tmp_path: Path) -> None:
    """It ended the process, and every start after that ended at the same page."""
    (tmp_path / "in").mkdir()
    page = Image.fromarray(weave(np.random.default_rng(0)))
    deep = Image.fromarray(np.full((80, 96), 3000, np.uint16))  # of 12 bits, or of 16
    page.save(tmp_path / "in" / "scan.tif", save_all=True, append_images=[deep, page])
    with (
        receiving(Receiver()) as receiver,
        watching(tmp_path / "in", [f"server:{receiver.url}/parts"], judge=None, once=True) as running,
    ):
        running.join()
    assert sorted(f"{line.facts['kind']} {line.facts['name']}" for line in running.lines) == [
        "handed on scan.tif#1",
        "handed on scan.tif#3",
        "skipped scan.tif#2",
    ]
    (said,) = [line.skipped for line in running.lines if line.skipped]
    assert "bits" in said
    assert len(receiver.taken) == 2
    assert (running.watch.done.scored, running.watch.done.skipped) == (2, 1)


def test_a_destination_that_does_not_answer_holds_up_no_other(tmp_path: Path, judge: Judge) -> None:
    write_pictures(tmp_path / "in", 5)
    state = tmp_path / "state.db"
    with receiving(Receiver(answer=lambda number, request: (503, {}))) as receiver:
        to = [f"folder:{tmp_path / 'out'}", f"webhook:{receiver.url}"]
        with watching(tmp_path / "in", to, judge=judge, state=state, once=True, drain_s=0.3) as running:
            running.join()
        assert len(read_lines(tmp_path / "out")) == 5
        assert running.watch.done.waiting[to[1].removesuffix("/")] == 5
        receiver.answer = lambda number, request: (200, {})
        with watching(tmp_path / "in", to, judge=judge, state=state, once=True) as running:
            pass
    assert running.lines == [], "nothing is scored again"
    assert sorted(request.json["name"] for request in receiver.taken) == sorted(
        line["name"] for line in read_lines(tmp_path / "out")
    )


def test_scoring_waits_for_a_destination_that_is_far_behind(tmp_path: Path, judge: Judge) -> None:
    write_pictures(tmp_path / "in", 20)
    with (
        receiving(Receiver(answer=lambda number, request: (503, {}))) as receiver,
        watching(tmp_path / "in", [f"webhook:{receiver.url}"], judge=judge, max_undelivered=3, drain_s=0.1) as running,
    ):
        running.wait_for(lambda: running.lines)
        time.sleep(0.6)
        assert len(running.lines) < 20
        receiver.answer = lambda number, request: (200, {})
        running.wait_for(lambda: len(running.lines) == 20)


@pytest.mark.slow
def test_a_bank_that_changes_is_followed_once_it_is_calibrated(tmp_path: Path, fitted_bank: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(fitted_bank, bank)
    judge = judge_of(bank)
    generation = judge.detector.bank.generation
    write_pictures(tmp_path / "more", 4, seed=3)
    assert not judge.follow()
    add(tmp_path / "more", bank=bank)
    assert not judge.follow(), "without a calibration, there would be no verdicts"
    assert judge.detector.bank.generation == generation
    assert not judge.follow()
    calibrate(Detector.open(bank))
    assert judge.follow()
    assert not judge.follow()
    assert judge.detector.bank.generation == generation + 1
    write_pictures(tmp_path / "in", 3)
    with watching(tmp_path / "in", [f"folder:{tmp_path / 'out'}"], judge=judge, once=True):
        pass
    assert {line["generation"] for line in read_lines(tmp_path / "out")} == {generation + 1}
    expected = scored(tmp_path / "in", bank, tmp_path / "results")
    for line in read_lines(tmp_path / "out"):
        assert {key: line[key] for key in SAME} == {key: expected[line["name"]][key] for key in SAME}


class TestLedger:
    def test_one_process_has_it(self, tmp_path: Path) -> None:
        first = Ledger(tmp_path / "state.db", "in")
        with pytest.raises(InputError, match="another process uses"):
            Ledger(tmp_path / "state.db", "in")
        first.close()
        with pytest.raises(InputError, match="is of another source: 'in', not 'other'"):
            Ledger(tmp_path / "state.db", "other")
        Ledger(tmp_path / "state.db", "in").close()

    def test_what_is_no_state_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "photo.png"
        path.write_bytes(b"\x89PNG" * 100)
        with pytest.raises(InputError, match="is not the state of a watched source"):
            Ledger(path, "in")
        assert path.read_bytes() == b"\x89PNG" * 100
        with pytest.raises(NotFoundError, match="does not exist"):
            Ledger(tmp_path / "none" / "state.db", "in")

    def test_it_remembers(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "state.db", "in")
        ledger.add(["1"], [Parcel(sink="s", id="1", body=b"x"), Parcel(sink="t", id="1", body=b"y")], {"a.png": Stamp(3, 4)})
        ledger.close()
        ledger = Ledger(tmp_path / "state.db", "in")
        assert ledger.has_picture("1")
        assert not ledger.has_picture("2")
        assert ledger.stamp("a.png") == Stamp(3, 4)
        assert ledger.stamp("b.png") is None
        assert ledger.count_waiting() == {"s": 1, "t": 1}
        ledger.confirm(ledger.waiting("s", 9), ("size", "7"))
        (parcel,) = ledger.waiting("t", 9)
        ledger.refuse(parcel, "why")
        assert (ledger.count_waiting(), ledger.count_refused(), ledger.fact("size")) == ({}, 1, "7")
        ledger.close()


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], str]:
        code = main([*map(str, words), "--settle-s", "0.1", "--give-up-s", "0.1"])
        out = capsys.readouterr()
        return code, out.out.splitlines(), out.err

    def test_lines_for_programs_and_for_people(
        self, tmp_path: Path, fitted_bank: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_pictures(tmp_path / "in", 4)
        (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
        words = ("watch", tmp_path / "in", "--bank", fitted_bank, "--alpha", ALPHA, "--once")
        code, lines, _ = self.run(capsys, *words, "--json")
        assert code == 0
        *pictures, end = map(json.loads, lines)
        assert [line["kind"] for line in pictures].count("verdict") == 4
        assert (end["kind"], end["scored"], end["skipped"], end["state"]) == ("end", 4, 1, None)
        assert end["latency_ms"].keys() == {"p50", "p95", "p99"}
        code, lines, _ = self.run(capsys, *words)
        assert code == 0
        assert sum(line.startswith("ALARM ") for line in lines) == end["alarms"]
        assert sum(line.startswith("skipped bad.png") for line in lines) == 1
        assert f"4 scored, {end['alarms']} alarms, 1 skipped" in lines

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["in"], "--bank is missing"),
            (["in", "--bank", "BANK", "--to", "webhook:http://127.0.0.1:9"], "--state is missing"),
            (["in", "--bank", "BANK", "--to", "folder:in/out"], "lies inside of"),
            (["none", "--bank", "BANK"], "does not exist"),
            (["in/a.txt", "--bank", "BANK"], "is no folder and no video"),
            (["ftp://host/a", "--bank", "BANK"], "is no stream that can be read"),
            (["in", "--bank", "BANK", "--settle-s", "-1"], "must be a number of seconds"),
        ],
    )
    def test_wrong_words_say_what_to_type(
        self,
        tmp_path: Path,
        fitted_bank: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        words: list[str],
        said: str,
    ) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.txt").write_text("")
        monkeypatch.chdir(tmp_path)
        assert main(["watch", *(str(fitted_bank) if word == "BANK" else word for word in words)]) == 1
        assert said in capsys.readouterr().err

    def test_alarms_only_needs_verdicts(self, tmp_path: Path, fitted_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(fitted_bank, tmp_path / "bank", ignore=shutil.ignore_patterns("calibration"))
        (tmp_path / "in").mkdir()
        assert main(["watch", str(tmp_path / "in"), "--bank", str(tmp_path / "bank"), "--alarms-only"]) == 1
        assert "--alarms-only needs verdicts" in capsys.readouterr().err


def test_small_things(tmp_path: Path) -> None:
    assert latency_ms([]) == {}
    assert latency_ms([0.001 * k for k in range(1, 101)]) == pytest.approx({"p50": 51, "p95": 96, "p99": 100})
    assert source_name("rtsp://me:secret@cam/1?key=2") == "rtsp://cam/1"
    assert source_name(str(tmp_path)) == str(tmp_path.resolve())
    with pytest.raises(InputError, match="max_wait_ms"):
        WatchSettings(max_wait_ms=-1)
