"""Watching into a real server: its history has every picture once, with the verdict that `score` gives."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from spade_faiss import Run
from spade_faiss.cli import main
from spade_faiss.serve.history.database import sqlite_url
from spade_faiss.serve.history.files import Files
from spade_faiss.serve.history.history import History
from spade_faiss.serve.history.records import Filter
from spade_faiss.serve.metrics import Metrics
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.web.app import create_app
from spade_faiss.workflows.score import score_folder
from tests.support.videos import numbered, write_video
from tests.support.watching import write_pictures

TOKEN = "0123456789abcdef0123"


@contextmanager
def serving(bank: Path, folder: Path) -> Iterator[tuple[str, History]]:
    """A server in a thread, behind a token."""
    (folder / "token").write_text(TOKEN)
    settings = ServeSettings(data=str(folder / "served"), token_file=str(folder / "token"))
    history = History(sqlite_url(str(folder / "history.sqlite")), Files(folder / "served"))
    station = Station("weave", bank, history, settings, Run(), Metrics())
    station.open()
    server = uvicorn.Server(uvicorn.Config(create_app({"weave": station}, history, settings), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", history
    finally:
        server.should_exit = True
        thread.join()
        station.close()
        history.close()


@pytest.mark.slow
def test_the_history_has_every_picture_once(tmp_path: Path, fitted_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "weave.bank")
    names = write_pictures(tmp_path / "in", 7)
    write_video(tmp_path / "in" / "clip ä.mp4", numbered(3, (80, 96)))
    with serving(bank, tmp_path) as (url, history):
        words = ["watch", str(tmp_path / "in"), "--once", "--settle-s", "0.1", "--to", f"server:{url}/weave"]
        words += ["--token-file", str(tmp_path / "token")]
        assert main([*words, "--state", str(tmp_path / "state.db")]) == 0, capsys.readouterr()
        page = history.find(Filter(bank="weave"))
        assert page.total == 10
        # With a state that was lost, all are posted again, under the same keys.
        assert main([*words, "--state", str(tmp_path / "other.db")]) == 0, capsys.readouterr()
        assert history.find(Filter(bank="weave")).total == 10
        found = {item.name: item for item in history.find(Filter(bank="weave", size=50)).items}
        (tmp_path / "token").write_text(TOKEN[::-1])
        (tmp_path / "in" / names[0]).rename(tmp_path / "in" / "new.png")
        assert main([*words, "--state", str(tmp_path / "state.db"), "--drain-s", "1"]) == 1
        assert "1 wait" in capsys.readouterr().out
    assert found.keys() == {*names, *(f"clip ä.mp4#t=0.{k}00" for k in range(3))}
    assert {item.source for item in found.values()} == {str((tmp_path / "in").resolve())}
    (tmp_path / "in" / "new.png").rename(tmp_path / "in" / names[0])
    score_folder(tmp_path / "in", bank=bank, out=tmp_path / "out")
    for item in json.loads((tmp_path / "out" / "report.json").read_text())["scores"]:
        own = found[item["id"]]
        assert (own.scores["knn"], own.scores["max"]) == (item["image_score"], item["map_score"]), item["id"]
        assert (own.p_value, own.alarm) == (item["p_value"], item["alarm"]), item["id"]
