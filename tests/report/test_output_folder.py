"""Output folders: one complete run at any instant, whoever is killed when, and nothing of others is touched."""

from __future__ import annotations

import itertools
import linecache
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

from spade_faiss.core import interrupts, sole_writer
from spade_faiss.core.errors import InputError
from spade_faiss.report import exchange as module
from spade_faiss.report.output_folder import OutputFolder, check_folder, output_folder
from tests.support.scores import leftovers

FIRST = {"scores.h5": "1", "regions.csv": "1", "report.json": "1", "overlays/a.png": "1", "overlays/spot/b.png": "1"}
SECOND = {"scores.h5": "2", "scores.csv": "2", "report.json": "2", "overlays/b.png": "2"}


def write(folder: OutputFolder, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder.staged / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.staged / name).write_text(text)


def run(out: Path, files: dict[str, str]) -> None:
    with output_folder(out, "score") as folder:
        write(folder, files)


def shown(out: Path) -> dict[str, str]:
    return {path.relative_to(out).as_posix(): path.read_text() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(params=["exchanged", "one by one", "mount point"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How results are replaced: by what the file system offers."""
    if request.param == "one by one":
        monkeypatch.setattr(module, "exchange", _no_exchange)
    if request.param == "mount point":
        monkeypatch.setattr(module, "_can_move", lambda source, target: False)
    return str(request.param)


def _no_exchange(one: Path, other: Path) -> None:
    raise OSError(22, "Invalid argument", str(one), None, str(other))


def test_results_replace_results_as_a_whole(tmp_path: Path, way: str) -> None:
    """Fault: yesterday's overlay beside today's score; a regions.csv of a run that had a calibration."""
    out = tmp_path / "out"
    run(out, FIRST)
    assert shown(out) == FIRST
    inode = out.stat().st_ino
    run(out, SECOND)
    assert shown(out) == SECOND
    assert out.stat().st_ino == inode, "people stand in it"
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(out) == ["overlays", "report.json", "scores.csv", "scores.h5"]


def test_nothing_is_shown_before_all_is_and_nothing_of_a_failure(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    for before in ({}, FIRST):
        if before:
            run(out, before)
        with pytest.raises(InputError, match="no page"), output_folder(out, "score") as folder:
            write(folder, {"report.json": "2"})
            assert {name: text for name, text in shown(out).items() if not name.startswith(".")} == before
            raise InputError("no page")
        assert shown(out) == before
        with pytest.raises(KeyboardInterrupt), output_folder(out, "score") as folder:
            write(folder, SECOND)
            raise KeyboardInterrupt
        assert shown(out) == before
    assert leftovers(tmp_path) == ["out"]


def test_what_others_put_there_stays(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    run(out, FIRST)
    (out / "notes.txt").write_text("mine")
    (out / ".gitignore").write_text("*")
    (out / "more" / "deep").mkdir(parents=True)
    (out / "more" / "deep" / "x.png").write_text("mine")
    (out / "overlays" / "notes.txt").write_text("mine")
    (out / "dangling").symlink_to("nowhere")
    out.chmod(0o700)
    mine = {".gitignore": "*", "more/deep/x.png": "mine", "notes.txt": "mine", "overlays/notes.txt": "mine"}
    for files in (SECOND, FIRST, {"report.json": "3"}):
        run(out, files)
        assert shown(out) == {**files, **mine}
        assert (out / "dangling").readlink() == Path("nowhere")
        assert out.stat().st_mode & 0o777 == 0o700
    assert leftovers(tmp_path) == ["out"]


def test_what_others_put_there_while_a_run_goes_on_stays(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    run(out, FIRST)
    with output_folder(out, "score") as folder:
        write(folder, SECOND)
        (out / "notes.txt").write_text("mine")
    assert shown(out) == {**SECOND, "notes.txt": "mine"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "report.html", "z.jpg"):
        (tmp_path / "photos" / name).write_text("mine")
    before = shown(tmp_path)
    with pytest.raises(InputError, match=r"holds other files and no results \(a.jpg, b.jpg, c.jpg and 1 more\); choose a new"):
        run(tmp_path / "photos", FIRST)
    with pytest.raises(InputError, match="is a file; choose a folder"):
        run(tmp_path / "photos" / "a.jpg", FIRST)
    (tmp_path / "odd" / "report.json").mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder, and a file of the results has its name"):
        run(tmp_path / "odd", FIRST)
    assert shown(tmp_path) == before


def test_empty_folders_links_and_deep_paths_are_taken(tmp_path: Path, way: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_text("litter")
    run(tmp_path / "empty", FIRST)
    run(tmp_path / "deep" / "er" / ("long" * 63), FIRST)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    run(tmp_path / "link", SECOND)
    assert (tmp_path / "link").is_symlink()
    assert shown(tmp_path / "empty") == {**SECOND, ".DS_Store": "litter"}


def test_some_results_are_replaced_and_others_stay(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    run(out, FIRST)
    for text in "ab":
        with output_folder(out, "drift", replaces=("drift.html", "drift.json")) as folder:
            write(folder, {"drift.json": text, "drift.html": text})
        assert shown(out) == {**FIRST, "drift.json": text, "drift.html": text}
    run(out, SECOND)
    assert shown(out) == SECOND


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    """Fault: scores.csv of one run, report.json of the other, both exit 0."""
    out = tmp_path / "out"
    code = """
import sys
from spade_faiss.report.output_folder import output_folder
with output_folder(sys.argv[1], "score") as folder:
    print("holds", flush=True)
    sys.stdin.read()
    (folder.staged / "report.json").write_text("1")
"""
    (tmp_path / "link").symlink_to(out)
    for _ in range(2):  # into no folder yet, and into results
        first = subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=-1, stdout=-1, text=True)
        assert first.stdout is not None
        assert first.stdout.readline() == "holds\n"
        with pytest.raises(
            InputError, match=rf"another process is writing results to .*out: process {first.pid} on .* since 20"
        ):
            run(out, SECOND)
        with pytest.raises(InputError, match=f"process {first.pid} on"):
            run(tmp_path / "link", SECOND)
        run(tmp_path / "other", SECOND)
        first.communicate("")
        assert first.returncode == 0
        assert shown(out) == {"report.json": "1"}
    run(out, SECOND)
    assert shown(out) == SECOND
    assert leftovers(tmp_path) == ["link", "other", "out"]


def test_writers_that_come_and_go_never_write_at_once(tmp_path: Path) -> None:
    """The lock's own file goes with its holder: whoever had opened it before must not think that it holds anything."""
    code = """
import sys
from pathlib import Path
from spade_faiss.core.errors import InputError
from spade_faiss.core.sole_writer import SoleWriter
folder, wins = Path(sys.argv[1]), 0
while wins < 100:
    try:
        writer = SoleWriter(folder / "lock", "it")
    except InputError:
        continue
    (folder / "held").mkdir()  # fails if another one is here
    (folder / "held").rmdir()
    writer.end()
    wins += 1
"""
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert leftovers(tmp_path) == []


def in_child(work: Callable[[], object]) -> int:
    """Start `work` in a fork; returns its process id."""
    if pid := os.fork():
        return pid
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.slow
def test_a_kill_at_every_step_leaves_one_run(tmp_path: Path, way: str) -> None:
    """Fault: after SIGTERM between two files the folder was mixed, and nothing said so.

    Python announces each operation on a file; the child dies before the n-th, for every n.
    """
    out, mine = tmp_path / "out", {"notes.txt": "mine", "overlays/notes.txt": "mine", "more/x": "mine"}

    def reset() -> None:
        run(out, FIRST)
        for name, text in mine.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(text)

    def die_before(step: int) -> None:
        count = 0

        def on_event(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event.startswith(("os.", "shutil.", "ctypes.call", "open")) and event not in ("os.listdir", "os.scandir"):
                count += 1
                if count == step:
                    os._exit(9)

        with output_folder(out, "score") as folder:
            write(folder, SECOND)
            sys.addaudithook(on_event)

    seen, step = [], 0
    while True:
        step += 1
        reset()
        pid = in_child(partial(die_before, step))
        died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = {name: text for name, text in shown(out).items() if not name.startswith(".spade-") and name not in mine}
        whole = found in (FIRST, SECOND)
        part = any(found.items() <= files.items() and "report.json" not in found for files in (FIRST, SECOND))
        assert whole or (way != "exchanged" and part), (step, found)
        seen.append(found)
        with pytest.raises(ZeroDivisionError), output_folder(out, "score"):  # the next run clears, though it fails
            raise ZeroDivisionError
        assert leftovers(tmp_path) == ["out"]
        left = shown(out)
        assert {name: left.pop(name) for name in mine} == mine
        assert left in (FIRST, SECOND)
        if whole and way == "exchanged":
            assert left == found
        if died == 0:
            break
    assert step > 10
    assert seen[0] == FIRST
    assert seen[-1] == SECOND


def test_what_is_there_stays_reachable_while_the_folder_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(out, FIRST)
    (out / "notes.txt").write_text("mine")
    states = []

    def watched(one: Path, other: Path) -> None:
        from spade_faiss.core.files import exchange

        exchange(one, other)
        if out in (one, other):
            states.append({name: text for name, text in shown(out).items() if not name.startswith(".")})

    monkeypatch.setattr(module, "exchange", watched)
    run(out, SECOND)
    assert states == [{**SECOND, "notes.txt": "mine"}] * 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_writer_keeps_nobody_away(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    run(out, FIRST)

    def hold() -> None:
        with output_folder(out, "score") as folder:
            write(folder, SECOND)
            (tmp_path / "holding").touch()
            time.sleep(60)

    pid = in_child(hold)
    while not (tmp_path / "holding").exists():
        time.sleep(0.01)
    os.kill(pid, number)
    os.waitpid(pid, 0)
    (tmp_path / "holding").unlink()
    assert shown(out) == FIRST
    run(out, SECOND)
    assert shown(out) == SECOND
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("before", [{}, FIRST])
def test_what_a_killed_writer_had_begun_to_write_is_no_strangers(tmp_path: Path, way: str, before: dict[str, str]) -> None:
    """Fault: after a first run was killed while it scored, no other could write there: its file had no place to go to."""
    out = tmp_path / "out"
    if before:
        run(out, before)

    def die() -> None:
        with output_folder(out, "score") as folder:
            write(folder, {".spade-0123456789abcdef.tmp": "half a file", "overlays/a.png": "2"})
            os._exit(9)

    os.waitpid(in_child(die), 0)
    assert {name: text for name, text in shown(out).items() if not name.startswith(".")} == before
    run(out, SECOND)
    assert shown(out) == SECOND
    assert leftovers(tmp_path) == ["out"]


def test_no_room_is_one_line_and_leaves_the_old_results(tmp_path: Path, way: str) -> None:
    """Fault: tracebacks on a 4 kB disk for `--out`."""
    out = tmp_path / "out"
    run(out, FIRST)
    said = r"no room for .*out \(No space left on device\); make room and run"
    with pytest.raises(InputError, match=said) as error, output_folder(out, "score") as folder:
        write(folder, SECOND)
        raise OSError(28, "No space left on device")
    assert ".spade" not in str(error.value)
    assert shown(out) == FIRST
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("size", ["4k", "64k"])
@pytest.mark.parametrize("kind", ["bytes", "hdf5"])
def test_a_small_disk(tmp_path: Path, size: str, kind: str) -> None:
    """Also a mount point: results are staged inside of it."""
    code = f"""
import subprocess, sys
from pathlib import Path
out = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size={size}", "tmpfs", out]).returncode:
    sys.exit(77)
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import write_bytes
from spade_faiss.report.output_folder import output_folder
try:
    with output_folder(out, "score") as folder:
        (folder.staged / "report.json").write_text("1")
except InputError as error:
    print(error)
before = sorted(path.name for path in out.iterdir())
try:
    with output_folder(out, "score") as folder:
        if sys.argv[2] == "hdf5":
            from tests.support.scores import make_scores, write_scores
            write_scores(folder.staged / "scores.h5", make_scores(400))
        write_bytes(folder.staged / "scores.csv", bytes(1 << 20))
except InputError as error:
    print(error)
assert sorted(path.name for path in out.iterdir()) == before, before
"""
    (tmp_path / "out").mkdir()
    command = ["unshare", "-m", sys.executable, "-c", code, str(tmp_path / "out"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip("cannot mount here")
    assert done.returncode == 0, done.stderr
    assert f"there is no room for {tmp_path / 'out'} (No space left on device)" in done.stdout
    assert len(done.stdout.splitlines()) == (2 if size == "4k" else 1)
    assert leftovers(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(InputError, match=r"cannot write results to .*out: Permission denied"):
        run(tmp_path / "out", FIRST)


class Interruption:
    """Sends SIGINT before one line of what holds a folder of results, counted over all of its modules."""

    files = frozenset({module.__file__, interrupts.__file__, sole_writer.__file__, check_folder.__code__.co_filename})

    def __init__(self, number: int) -> None:
        self._left = number
        self.line = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Interruption | None:
        if frame.f_code.co_filename not in self.files:
            return None
        # Python looks for signals where something is called or repeated: never at a `try`, before which all is done.
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and text != "try:":
            self._left -= 1
            if self._left == 0:
                self.line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}: {text}"
                signal.raise_signal(signal.SIGINT)
        return self


@pytest.mark.parametrize("has_results", [False, True])
def test_an_interrupt_at_any_line_leaves_one_run_and_nothing_else(tmp_path: Path, has_results: bool) -> None:
    """Fault: a signal in the midst of taking or giving back the lock left a folder beside the results."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    lines = set[str]()
    try:
        for number in itertools.count(1):
            folder = tmp_path / str(number)
            folder.mkdir()
            if has_results:
                run(folder / "out", FIRST)
            interruption = Interruption(number)
            sys.settrace(interruption)
            try:
                run(folder / "out", SECOND)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            assert [path.name for path in folder.iterdir() if path.name != "out"] == [], interruption.line
            found = shown(folder / "out")
            assert found == SECOND or found == (FIRST if has_results else {}), interruption.line
            if not interruption.line:
                break
            lines.add(interruption.line)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(lines) > 80
