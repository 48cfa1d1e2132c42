"""The history keeps what it is given, in SQLite and in PostgreSQL, and says what cannot be kept at the moment."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import is_full
from spade_faiss.serve.errors import UnavailableError, UnknownError
from spade_faiss.serve.history import database
from spade_faiss.serve.history import history as history_module
from spade_faiss.serve.history.database import sqlite_url
from spade_faiss.serve.history.files import Files, suffix_of
from spade_faiss.serve.history.history import History
from spade_faiss.serve.history.records import (
    Change,
    Filter,
    LaterVerdict,
    MatchedPatch,
    NearestNormal,
    ScoredPicture,
    new_id,
    time_of,
    utc_now,
)
from spade_faiss.serve.history.tables import metadata
from tests.serve.conftest import PNG, Line

START = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


def picture(number: int = 0, **more: Any) -> ScoredPicture:
    patch = MatchedPatch(level="blocks.2", box=(1, 2, 3, 4), size=(64, 64), query=(5, 6, 7, 8))
    values: dict[str, Any] = {
        "id": new_id(),
        "bank": "b",
        "name": f"Número-{number}.png",
        "source": "camera 1",
        "received": START + timedelta(minutes=number),
        "sha256": f"{number:064x}",
        "width": 96,
        "height": 80,
        "generation": 3,
        "scores": {"knn": 0.1 + number, "max": 1 / 3, "top": None, "structure": 2.5},
        "ranked_by": "knn",
        "p_value": 0.01,
        "alpha": 0.02,
        "alarm": True,
        "threshold": 1.5,
        "colors": (0.5, 2.5),
        "regions": ({"score": 2.0, "p_value": 0.1, "input": {"box": [1, 2, 3, 4]}},),
        "nearest": (NearestNormal(id="000.png", distance=1.25, patches=(patch,)), NearestNormal(id="1.png", distance=None)),
        "peak": (7, 9),
        "bytes": 100,
    }
    return ScoredPicture(**{**values, **more})


def put(history: History, item: ScoredPicture) -> ScoredPicture:
    history.files.incoming(item.id, item.suffix).write_bytes(b"\x89PNG")
    assert history.record([item]) == []
    return item


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that runs as long as the tests."""
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    found = [*Path("/usr/lib/postgresql").glob("*/bin")] if Path("/usr/lib/postgresql").is_dir() else []
    if not found:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    # It refuses to run as root, and another user cannot enter the folders of pytest.
    folder = Path(tempfile.mkdtemp(prefix="spade-postgres-"))
    as_other = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    if as_other:
        shutil.chown(folder, "postgres", "postgres")
    binaries, data = sorted(found)[-1], folder / "data"

    def run(*words: str) -> None:
        done = subprocess.run([*as_other, *words], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            pytest.skip(f"PostgreSQL cannot be started here: {done.stderr[-300:]}")

    run(str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-U", "spade", "-E", "UTF8", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    run(str(binaries / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    yield f"postgresql+psycopg://spade@/postgres?host={folder}"
    run(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[History]:
    url = sqlite_url(str(tmp_path / "h.sqlite"))
    if request.param == "postgres":
        url = request.getfixturevalue("postgres")
        engine = create_engine(url)
        with engine.begin() as connection:
            metadata.drop_all(connection)
            connection.exec_driver_sql("DROP TABLE IF EXISTS alembic_version")
        engine.dispose()
    found = History(url, Files(tmp_path / "files"))
    yield found
    found.close()


def test_what_is_recorded_is_found_as_it_was(history: History) -> None:
    item = put(history, picture(1))
    assert history.get(item.id) == item
    assert history.files.picture_path(item.id, ".png").read_bytes() == b"\x89PNG"
    with pytest.raises(UnknownError):
        history.get("0" * 32)


def test_the_migrations_make_the_tables_that_the_code_knows(history: History) -> None:
    with history._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    again = History(str(history._engine.url.render_as_string(hide_password=False)), history.files)
    again.close()


def test_ids_ascend_and_tell_the_time() -> None:
    ids = [new_id() for _ in range(20_000)]
    assert ids == sorted(set(ids))
    assert all(name[12] == "7" and name[16] in "89ab" for name in ids)
    assert abs(time_of(ids[0]) - utc_now()) < timedelta(minutes=1)


def test_filters_orders_and_pages(history: History) -> None:
    items = [put(history, picture(number, p_value=0.5 - number / 20, alarm=number > 3)) for number in range(8)]
    other = put(history, picture(9, bank="other", p_value=None, alarm=None, name="50%_off.png"))
    history.answer(items[5].id, "defect")

    def names(**wanted: Any) -> list[str]:
        return [item.name for item in history.find(Filter(**wanted)).items]

    assert names(bank="b")[:2] == ["Número-7.png", "Número-6.png"]
    assert names(bank="b", order="p_value")[:2] == ["Número-7.png", "Número-6.png"]
    assert names(order="p_value")[-1] == "50%_off.png", "without a p-value, last"
    assert names(alarm=True, answered=False, order="p_value") == ["Número-7.png", "Número-6.png", "Número-4.png"]
    assert names(answered=True) == names(answered="defect") == ["Número-5.png"]
    assert names(answered="normal") == []
    assert names(text="NÚMERO-3") == ["Número-3.png"]
    assert names(text="%_") == ["50%_off.png"], "text is text"
    assert names(since=items[6].received, until=other.received) == ["Número-7.png", "Número-6.png"]
    page = history.find(Filter(bank="b", page=2, size=3))
    assert ([item.name for item in page.items], page.total, page.pages) == ([f"Número-{n}.png" for n in (4, 3, 2)], 8, 3)
    assert [item.name for item in history.every(Filter(bank="b"))] == [f"Número-{n}.png" for n in range(7, -1, -1)]


def test_every_picture_is_listed_once_whatever_the_size_of_a_part(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_PURGED", 3)
    for number in range(8):
        put(history, picture(number // 2))  # pairs of one moment
    found = [item.id for item in history.every(Filter())]
    assert len(found) == len(set(found)) == 8


def test_recent_scores_are_of_the_last_pictures_and_of_one_generation(history: History) -> None:
    for number, generation in enumerate((3, 3, 4, 3, 4)):
        put(history, picture(number, generation=generation))
    put(history, picture(9, bank="other"))
    put(history, picture(8, scores={"knn": None, "max": None, "top": None}))
    assert [knn for knn, *_ in history.recent_scores("b", 3, 100)] == [3.1, 1.1, 0.1]
    assert [knn for knn, *_ in history.recent_scores("b", 3, 5)] == [3.1, 1.1], "of the last five, whatever they are of"
    if history._engine.dialect.name == "sqlite":
        with history._reading() as connection:
            asked = "EXPLAIN QUERY PLAN SELECT knn FROM pictures WHERE bank = 'b' ORDER BY received DESC LIMIT 5"
            assert "pictures_by_time" in str(connection.exec_driver_sql(asked).all())


def test_the_queue_is_walked_through_by_p_value(history: History) -> None:
    items = [put(history, picture(number, p_value=p)) for number, p in enumerate((0.01, 0.005, 0.005, 0.02))]
    put(history, picture(8, alarm=False, p_value=0.5))
    walked, after = [], None
    while (item := history.next_in_queue("b", after)) is not None:
        walked.append(item.id)
        after = item.id
    # Of the same p-value, the one that scores highest comes first.
    assert walked == [items[2].id, items[1].id, items[0].id, items[3].id]
    history.answer(items[2].id, "normal")
    history.score_again([(items[1].id, LaterVerdict(generation=4, p_value=0.7, alarm=False))])
    first = history.next_in_queue("b")
    assert first is not None
    assert first.id == items[0].id, "what was answered, or is no alarm any more, waits no longer"
    assert history.overview("b").waiting == 2
    assert history.get(items[1].id).now == LaterVerdict(generation=4, p_value=0.7, alarm=False)


def test_an_answer_that_was_taken_back_meanwhile_stays_to_be_followed(history: History) -> None:
    item = put(history, picture())
    given = history.answer(item.id, "normal", "note", "me")
    (seen,) = history.pending("b")
    assert seen == given
    history.undo(given.id)
    history.settle(seen, "in the bank", "", "x.png")
    (left,) = history.pending("b")
    assert (left.undone, left.state, left.bank_picture) == (True, "pending", "x.png")
    history.settle(left, "undone")
    assert history.pending("b") == []
    assert history.get(item.id).answer is None


def test_changes_come_back_newest_first(history: History) -> None:
    changes = [
        Change(
            id=new_id(),
            bank="b",
            generation_before=number,
            generation_after=number + 1,
            changed=START,
            cause="why",
            answers=("a",),
            added=1,
            alarms_gone=("x", "y"),
            alarms_left=2,
            seconds=0.5,
            error=None if number else "no",
        )
        for number in range(3)
    ]
    for change in changes:
        history.add_change(change)
    assert history.changes("b", 2) == changes[:0:-1]


def test_an_overview_counts_by_the_hour(history: History) -> None:
    now = utc_now()
    for minutes, alarm in ((0, True), (1, False), (90, False), (60 * 30, True)):
        put(history, picture(received=now - timedelta(minutes=minutes), alarm=alarm))
    found = history.overview("b")
    assert (found.scored, found.alarms, found.rate) == (3, 1, 1 / 3)
    assert sum(scored for _, scored, _ in found.per_hour) == 3
    assert len(found.per_hour) == 24
    assert found.interval is not None
    assert found.interval[0] < 1 / 3 < found.interval[1]


def test_what_is_too_old_or_too_much_goes_and_labels_stay(history: History) -> None:
    now = utc_now()
    items = [put(history, picture(number, received=now - timedelta(days=number))) for number in range(6)]
    history.answer(items[5].id, "defect")
    history.undo(history.answer(items[4].id, "defect").id)
    assert history.purge(timedelta(days=3, hours=12), None) == 1
    assert {item.id for item in history.every(Filter())} == {item.id for n, item in enumerate(items) if n != 4}
    assert not history.files.picture_path(items[4].id, ".png").exists()
    assert history.files.picture_path(items[5].id, ".png").exists(), "a label"
    assert history.purge(None, 350) == 2
    kept = [history.get(items[n].id).kept for n in (0, 1, 2, 3, 5)]
    assert kept == [True, True, False, False, True], "the oldest first, and no label"
    assert history.purge(None, 350) == 0


def test_a_picture_that_the_bank_has_yet_to_give_up_stays(history: History) -> None:
    item = put(history, picture(received=utc_now() - timedelta(days=9)))
    given = history.answer(item.id, "normal")
    history.undo(given.id)
    assert history.purge(timedelta(days=1), 0) == 0
    (left,) = history.pending("b")
    history.settle(left, "undone")
    assert history.purge(None, 0) == 1
    assert history.purge(timedelta(days=1), 0) == 1
    assert history.find(Filter()).total == 0


def test_nobody_answers_a_picture_while_it_is_removed(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [put(history, picture(received=utc_now() - timedelta(days=9))) for _ in range(2)]
    outcomes: list[object] = []

    def answer(name: str) -> None:
        try:
            outcomes.append(history.answer(name, "defect"))
        except UnknownError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=answer, args=(item.id,)) for item in items]
    remove = history.files.remove

    def removing(name: str, suffix: str) -> None:
        if not outcomes and not threads[0].is_alive():
            for thread in threads:
                thread.start()
            time.sleep(0.1)
            assert outcomes == [], "it waits until that is done"
        remove(name, suffix)

    monkeypatch.setattr(history.files, "remove", removing)
    assert history.purge(timedelta(days=1), None) == 2
    for thread in threads:
        thread.join()
    assert [type(outcome) for outcome in outcomes] == [UnknownError] * 2


def test_a_key_is_given_once(history: History) -> None:
    put(history, picture(1, key="k"))
    items = [picture(number, key=key) for number, key in ((2, "k"), (4, "l"), (5, "l"), (6, None))]
    assert history.record(items) == [items[0], items[2]], "the others of the commit are stored"
    put(history, picture(3, key="k", bank="other"))
    assert history.find(Filter()).total == 4
    found = history.with_key("b", "k")
    assert found is not None
    assert found.name == "Número-1.png"


def test_after_a_kill_files_without_a_record_go_and_others_find_their_place(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, kept = picture(1), picture(2)
    history.files.incoming(lost.id).write_bytes(b"part")
    history.files.incoming(lost.id, ".png").write_bytes(b"x")
    (history.files.root / "incoming" / "strange").write_bytes(b"x")
    with monkeypatch.context() as patched:
        patched.setattr(history.files, "settle", lambda *_: None)  # killed between the commit and the move
        put(history, kept)
    assert history.files.picture_path(kept.id, ".png").exists()
    assert history.reconcile() == 3
    assert history.files.unsettled() == {}
    assert history.files.picture_path(kept.id, ".png").parent.parent.parent.name == "pictures"


def test_a_locked_database_gives_503_and_recovers(line: Line, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = line.history._engine
    path = engine.url.database
    assert path is not None
    line.score(good)
    engine.dispose()
    monkeypatch.setattr(database, "_LOCKED_S", 0.05)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        reply = line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG)
        assert (reply.status_code, reply.headers["content-type"]) == (503, "application/problem+json")
        assert "locked" in reply.json()["detail"]
        assert "retry-after" in reply.headers
        assert line.client.get("/v1/banks/weave/pictures").json()["total"] == 1, "reading goes on"
        other.execute("ROLLBACK")
    other.close()
    line.score(good)
    assert line.history.find(Filter()).total == 2
    assert line.history.files.unsettled() == {}


def test_a_database_that_is_full_gives_503_and_recovers(line: Line, good: Path) -> None:
    with line.history._reading() as connection:
        pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar_one())
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    reply, tries = line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG), 0
    while reply.status_code == 200 and tries < 200:
        reply, tries = line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG), tries + 1
    assert reply.status_code == 503
    assert "full" in reply.json()["detail"]
    before = line.history.find(Filter()).total
    with line.history._reading() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    line.score(good)
    assert line.history.find(Filter()).total == before + 1
    assert line.history.files.unsettled() == {}


def test_a_map_that_has_no_room_says_so(tmp_path: Path) -> None:
    files, limit = Files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            files.write_map(new_id(), np.ones((100, 100), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert is_full(raised.value)
    name = new_id()
    assert files.write_map(name, np.ones((10, 10), np.float32)) == files.map_path(name).stat().st_size


def test_names_of_files_are_never_those_of_clients(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for bad in ("../x", "a" * 31, "A" * 32, "", "0" * 31 + "/"):
        with pytest.raises(InputError):
            files.picture_path(bad, ".png")
    assert files.normals("../..") == tmp_path / "normals" / "_.."
    assert suffix_of(b"\xff\xd8\xff\xe0") == ".jpg"
    for bad_start in (b"", b"text", b"GIF89a"):
        with pytest.raises(InputError):
            suffix_of(bad_start)


def test_a_history_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="unable to open"):
        History(sqlite_url(str(tmp_path / "none" / "h.sqlite")), Files(tmp_path / "files"))
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    with pytest.raises(UnavailableError, match="not a database"):
        History(sqlite_url(str(tmp_path / "text.sqlite")), Files(tmp_path / "files"))
