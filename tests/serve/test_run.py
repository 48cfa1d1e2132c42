"""The server as a process: how it starts and ends, and what it holds when it is killed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvicorn

from benchmarks.serve.cases import try_cases
from benchmarks.serve.kills import kill_under_load
from benchmarks.serve.server import Load, Server, call, running, wait_until
from spade_faiss import Run
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.serve import run
from spade_faiss.serve.run import name_banks, serve
from spade_faiss.serve.settings import ServeSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bank(fitted_bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted_bank, tmp_path / "bottle.bank"))


@pytest.fixture
def pictures(dataset_folder: Path, tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    found = sorted((dataset_folder / "test").rglob("*.png"))
    return [Path(shutil.copy(path, folder / f"{number:03d}.png")) for number, path in enumerate(found)]


def test_banks_are_called_as_their_folders(bank: Path, tmp_path: Path) -> None:
    assert name_banks([bank]) == {"bottle": bank.resolve()}
    with pytest.raises(NotFoundError, match="there is no bank"):
        name_banks([tmp_path / "none"])
    twin = shutil.copytree(bank, tmp_path / "other" / "bottle.bank")
    with pytest.raises(InputError, match="two banks are called 'bottle'"):
        name_banks([bank, twin])
    with pytest.raises(InputError, match="cannot be the name"):
        name_banks([shutil.copytree(bank, tmp_path / "a#b.bank")])


def test_a_server_that_cannot_start_says_why(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tmp_path / "served")
    for words, told in (
        (["--host", "0.0.0.0"], "--token-file"),
        (["--token-file", str(tmp_path / "none")], "cannot be read"),
        (["--keep", "x"], "such as 30d"),
        (["--database", "sqlite:////none/h.sqlite"], "unable to open"),
    ):
        assert main(["serve", str(bank), "--data", data, "--port", "0", *words]) == 1
        assert told in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(bank), "--data", data, "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err


def test_old_pictures_are_removed_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_PURGE_S", 0.0)
    ending, tried = threading.Event(), []

    class Broken:
        def purge(self, *_: object) -> None:
            tried.append(1)
            if len(tried) == 2:
                ending.set()
            raise RuntimeError("broken")

    run._purge(Broken(), ServeSettings(keep="1d"), ending)  # type: ignore[arg-type]
    assert len(tried) == 2


def test_nohup_is_left_alone() -> None:
    server = run._Server(uvicorn.Config("none:app", log_config=None))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_line_imports_no_server() -> None:
    code = "import sys, spade_faiss.cli; print([n for n in ('fastapi', 'sqlalchemy', 'numpy', 'uvicorn') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_server_ends_when_it_is_told_to_and_answers_what_it_has_taken(
    bank: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    data = tmp_path / "served"
    with running([bank], data) as server:
        assert call(server.url, "GET", "/healthz").status == 200
        with pytest.raises(InputError, match="another process is writing the served data"):
            serve([bank], ServeSettings(data=str(data), port=0), Run())
        load = Load(server, "bottle", pictures * 3, 4, patient=True).start()
        wait_until(lambda: len(load.answered) >= 3)
        assert server.stop() == 0
        load._ending.set()
        load.join()
    assert not load.errors
    with running([bank], data) as server:
        for item in load.answered:
            assert call(server.url, "GET", f"/v1/pictures/{item.picture['id']}").json["scores"] == item.picture["scores"]
    assert list((data / "incoming").iterdir()) == []


@pytest.mark.slow
def test_a_kill_loses_no_verdict_that_was_answered(bank: Path, tmp_path: Path, pictures: list[Path]) -> None:
    found = kill_under_load(bank, tmp_path / "served", pictures, 3, seed=1)
    assert found["faults"] == []
    assert found["answered"] > len(pictures)


@pytest.mark.slow
def test_no_generated_request_meets_a_bug(bank: Path, tmp_path: Path, pictures: list[Path]) -> None:
    with running([bank], tmp_path / "served") as server:
        load = Load(server, "bottle", pictures, 2)
        load.start().join()
        found = try_cases(server.url, [item.picture["id"] for item in load.answered], 300)
    assert found["faults"] == []
    assert found["cases"] > 200
    assert {"200", "404", "422"} <= set(found["statuses"])


@pytest.mark.slow
def test_a_full_disk_gives_503_and_recovers(bank: Path, tmp_path: Path, pictures: list[Path]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        server = Server([bank], disk / "served")
        server.log = tmp_path / "log"
        server.start()
        data, statuses = pictures[0].read_bytes(), []
        headers = {"content-type": "image/png"}
        filler = disk / "filler"
        for _ in range(40):
            reply = call(server.url, "POST", "/v1/banks/bottle/score", data, **headers)
            statuses.append(reply.status)
            if reply.status != 200:
                break
            with filler.open("ab") as file:
                try:
                    file.write(b"\0" * 40_000)
                    file.flush()
                except OSError:
                    continue
        assert statuses[0] == 200
        assert statuses[-1] == 503, server.log.read_text()
        assert reply.headers["content-type"] == "application/problem+json"
        assert "retry-after" in reply.headers
        filler.unlink()
        assert call(server.url, "POST", "/v1/banks/bottle/score", data, **headers).status == 200
        total = call(server.url, "GET", "/v1/banks/bottle/pictures").json["total"]
        assert total == statuses.count(200) + 1
        assert server.stop() == 0
        assert list((disk / "served" / "incoming").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
