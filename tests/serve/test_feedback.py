"""What people say goes into the bank, and the server follows it without dropping a request."""

from __future__ import annotations

import errno
import io
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spade_faiss import Bank, Extraction, Preprocess, add, evaluate, fit
from spade_faiss.core.errors import InputError
from spade_faiss.features.backbone import Backbone
from spade_faiss.serve.history.records import Filter
from spade_faiss.serve.station import upkeep
from spade_faiss.serve.station.upkeep import Upkeep, _Round
from tests.serve.conftest import PNG, Line, Serve


def wait(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def settled(line: Line, answer: Any) -> Any:
    def look() -> Any:
        found = line.client.get(f"/v1/answers/{answer['id']}").json()
        return found if found["state"] != "pending" else None

    return wait(look)


def say(line: Line, picture: Any, kind: str, **more: str) -> Any:
    reply = line.client.post(f"/v1/pictures/{picture['id']}/feedback", json={"kind": kind, **more})
    assert reply.status_code == 202, reply.text
    return reply.json()


def test_an_alarm_that_is_normal_comes_into_the_bank_and_can_be_taken_back(serve: Serve, defect: Path, good: Path) -> None:
    line = serve()
    first, twin = line.score(defect), line.score(defect)
    assert first["alarm"]
    answer = say(line, first, "normal", note="a shadow")
    assert settled(line, answer)["state"] == "in the bank"
    bank = Bank.open(line.bank)
    assert (bank.generation, len(bank.pictures)) == (2, 25)
    assert f"{first['id']}.png" in bank.pictures.ids
    change = line.client.get("/v1/banks/weave/changes").json()[0]
    assert (change["generation_before"], change["generation_after"], change["added"]) == (1, 2, 1)
    assert set(change["alarms_gone"]) == {first["id"], twin["id"]}, "the same picture is no alarm any more"
    assert change["answers"] == [answer["id"]]
    now = line.client.get(f"/v1/pictures/{twin['id']}").json()["now"]
    assert now == {"generation": 2, "p_value": now["p_value"], "alarm": False}
    later = line.score(defect)
    assert (later["generation"], later["alarm"]) == (2, False)
    assert line.station.rules is not None, "it is calibrated as before"
    assert line.station.alpha == pytest.approx(first["alpha"])
    assert line.client.get("/v1/banks/weave").json()["waiting"] == 0

    assert line.client.post(f"/v1/answers/{answer['id']}/undo").json()["undone"]
    assert settled(line, answer)["state"] == "undone"
    assert len(Bank.open(line.bank).pictures) == 24
    assert line.score(defect)["alarm"]
    again = say(line, first, "normal")
    assert settled(line, again)["state"] == "in the bank"
    assert len(Bank.open(line.bank).pictures) == 25, "what was removed is restored"


def test_answers_that_wait_are_followed_together(serve: Serve, dataset_folder: Path) -> None:
    line = serve(upkeep=False)
    pictures = [line.score(path) for path in sorted((dataset_folder / "test").rglob("*.png"))[:5]]
    answers = [say(line, picture, "normal") for picture in pictures]
    line.client.post(f"/v1/answers/{answers[4]['id']}/undo")
    follower = Upkeep(line.station)
    follower.start()
    try:
        states = [settled(line, answer)["state"] for answer in answers]
    finally:
        follower.close()
    assert states == ["in the bank"] * 4 + ["undone"]
    assert len(line.client.get("/v1/banks/weave/changes").json()) == 1


def test_no_request_fails_while_the_bank_changes(serve: Serve, defect: Path, good: Path) -> None:
    line = serve()
    picture, statuses, generations, ending = line.score(defect), [], set(), threading.Event()

    def send() -> None:
        while not ending.is_set():
            reply = line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG)
            statuses.append(reply.status_code)
            generations.add(reply.json()["pictures"][0]["picture"]["generation"])

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    settled(line, say(line, picture, "normal"))
    wait(lambda: 2 in generations)
    ending.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}
    assert generations == {1, 2}


def test_a_defect_is_a_label_that_evaluate_takes(serve: Serve, dataset_folder: Path, tmp_path: Path) -> None:
    line = serve(upkeep=False)
    assert line.client.get("/v1/banks/weave/labels.zip").status_code == 404
    for path in sorted((dataset_folder / "test" / "spot").glob("*.png"))[:3]:
        assert say(line, line.score(path), "defect")["state"] == "kept"
    for path in sorted((dataset_folder / "test" / "good").glob("*.png"))[:3]:
        say(line, line.score(path), "normal")
    zipfile.ZipFile(io.BytesIO(line.client.get("/v1/banks/weave/labels.zip").content)).extractall(tmp_path / "labels")
    found = evaluate(tmp_path / "labels", bank=line.bank, out=tmp_path / "out")
    assert found.metrics is not None
    assert found.images == 6
    achieved = line.client.get("/v1/banks/weave").json()["achieved"]
    assert (achieved["misses"]["count"], achieved["misses"]["of"]) == (0, 3)
    assert achieved["false_alarms"]["of"] == 3
    low, high = achieved["misses"]["interval"]
    assert low == 0
    assert 0.5 < high < 1
    assert list(line.service.files.exports.iterdir()) == []


def test_an_archive_that_has_no_room_is_removed(line: Line, defect: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(line, line.score(defect), "defect")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "write", fail)
        reply = line.client.get("/v1/banks/weave/labels.zip")
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)
    assert list(line.service.files.exports.iterdir()) == []
    assert line.client.get("/v1/banks/weave/labels.zip").status_code == 200


def test_a_second_thought_takes_the_first_one_back(serve: Serve, defect: Path) -> None:
    line = serve()
    picture = line.score(defect)
    first = say(line, picture, "normal")
    assert say(line, picture, "normal")["id"] == first["id"], "the same answer twice is one"
    settled(line, first)
    second = say(line, picture, "defect")
    assert settled(line, first)["state"] == "undone"
    assert line.client.get(f"/v1/answers/{second['id']}").json()["state"] == "kept"
    assert len(Bank.open(line.bank).pictures) == 24
    assert line.client.get(f"/v1/pictures/{picture['id']}").json()["answer"]["kind"] == "defect"


def test_an_upload_is_by_itself_where_the_bank_has_groups(
    serve: Serve, dataset_folder: Path, backbone: Backbone, defect: Path, tmp_path: Path
) -> None:
    """A pattern would have to be told of uploads: nobody knows their siblings."""
    path = tmp_path / "grouped.bank"
    extraction = Extraction(backbone=backbone, group_by=r"regex=(\d)\.png")
    fit(dataset_folder / "train" / "good", bank=path, preset="spade", extraction=extraction)
    line = serve(bank=path)
    assert settled(line, say(line, line.score(defect), "normal"))["state"] == "in the bank"
    bank = Bank.open(path)
    assert len(bank.pictures) == 25
    assert len(bank.group_of) == 24


def test_a_bank_of_few_images_says_so_until_it_has_enough(serve: Serve, dataset_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.bank"
    normals = sorted((dataset_folder / "train" / "good").iterdir())[:5]
    fit(normals, bank=path, extraction=Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=72, size=64)))
    line = serve(bank=path)
    said = "image scores are distances to the 4 nearest normal images, where k_image=5 is usual: the bank holds 5 normal images"
    assert said in line.client.get("/v1/banks/weave").json()["message"]
    assert said in line.client.get("/banks/weave").text
    new = sorted((dataset_folder / "test" / "good").iterdir())[0]
    assert settled(line, say(line, line.score(new), "normal"))["state"] == "in the bank"
    wait(lambda: line.station.state == "ready")
    assert line.client.get("/v1/banks/weave").json()["message"] == ""
    assert said not in line.client.get("/v1/banks/weave/changes").json()[0]["cause"], "what is so all the time caused nothing"


def test_normals_are_taken_without_an_alarm(serve: Serve, dataset_folder: Path) -> None:
    line = serve()
    paths = sorted((dataset_folder / "test" / "good").glob("*.png"))[:2]
    files = [("p", (path.name, path.read_bytes())) for path in paths]
    reply = line.client.post("/v1/banks/weave/normals", files=[*files, ("p", ("bad.png", b"\x89PNG damaged"))])
    assert reply.status_code == 422
    assert line.history.pending("weave") == []
    reply = line.client.post("/v1/banks/weave/normals", files=files)
    assert reply.status_code == 202
    assert [settled(line, answer)["state"] for answer in reply.json()] == ["in the bank"] * 2
    assert len(Bank.open(line.bank).pictures) == 26


def test_a_picture_that_the_bank_holds_is_not_taken_twice_nor_removed(serve: Serve, dataset_folder: Path) -> None:
    line = serve()
    path = sorted((dataset_folder / "train" / "good").glob("*.png"))[0]
    answer = settled(line, say(line, line.score(path), "normal"))
    assert answer["state"] == "in the bank"
    assert "held the same picture before, as 000.png" in answer["message"]
    line.client.post(f"/v1/answers/{answer['id']}/undo")
    settled(line, answer)
    bank = Bank.open(line.bank)
    assert (bank.generation, len(bank.pictures)) == (1, 24)


def test_a_picture_that_left_the_bank_under_another_name_comes_back(serve: Serve, defect: Path) -> None:
    line = serve()
    first, twin = line.score(defect), line.score(defect)
    answer = say(line, first, "normal")
    settled(line, answer)
    line.client.post(f"/v1/answers/{answer['id']}/undo")
    settled(line, answer)
    again = say(line, twin, "normal")
    assert settled(line, again)["state"] == "in the bank"
    assert f"{first['id']}.png" in Bank.open(line.bank).pictures.ids
    assert not line.score(defect)["alarm"]
    line.client.post(f"/v1/answers/{again['id']}/undo")
    assert settled(line, again)["state"] == "undone"
    assert len(Bank.open(line.bank).pictures) == 24


def test_what_a_kill_left_in_the_bank_is_taken_back_too(serve: Serve, defect: Path) -> None:
    line = serve(upkeep=False)
    picture = line.score(defect)
    answer = say(line, picture, "normal")
    follower = Upkeep(line.station)
    follower._add(line.history.pending("weave"), _Round(answers=()))  # and nothing is settled
    assert len(Bank.open(line.bank).pictures) == 25
    line.client.post(f"/v1/answers/{answer['id']}/undo")
    follower.start()
    try:
        assert settled(line, answer)["state"] == "undone"
    finally:
        follower.close()
    assert len(Bank.open(line.bank).pictures) == 24


def test_a_locked_bank_is_followed_once_it_is_free(serve: Serve, defect: Path) -> None:
    line = serve()
    picture = line.score(defect)
    with Bank.open(line.bank).writing():
        answer = say(line, picture, "normal")
        wait(lambda: "another process is writing" in line.station.message)
        assert line.client.get(f"/v1/answers/{answer['id']}").json()["state"] == "pending"
        assert line.score(defect)["generation"] == 1
    assert settled(line, answer)["state"] == "in the bank"


def test_a_bank_on_a_full_disk_is_followed_once_there_is_room(
    serve: Serve, defect: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = serve()
    picture = line.score(defect)

    def fail(*_: object, **__: object) -> None:
        raise InputError("there is no room") from OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(upkeep, "add", fail)
        answer = say(line, picture, "normal")
        wait(lambda: "no room" in line.station.message)
        time.sleep(0.1)
        assert line.client.get(f"/v1/answers/{answer['id']}").json()["state"] == "pending"
        assert line.score(defect)["generation"] == 1
    assert settled(line, answer)["state"] == "in the bank"


def test_what_others_do_to_the_bank_is_noticed(serve: Serve, good: Path, defect: Path, tmp_path: Path) -> None:
    line = serve()
    add(shutil.copy(good, tmp_path / "another.png"), bank=line.bank)
    wait(lambda: line.station.generation == 2)
    change = wait(lambda: line.client.get("/v1/banks/weave/changes").json())[0]
    assert change["cause"] == "somebody else changed the bank"
    assert line.station.rules is not None
    assert line.score(defect)["generation"] == 2


def test_what_cannot_be_followed_fails_and_says_so(serve: Serve, defect: Path) -> None:
    line = serve(upkeep=False)
    picture = line.score(defect)
    line.history.files.picture_path(picture["id"], ".png").unlink()
    answer = say(line, picture, "normal")
    follower = Upkeep(line.station)
    follower.start()
    try:
        found = settled(line, answer)
    finally:
        follower.close()
    assert found["state"] == "failed"
    assert "was removed" in found["message"]
    assert Bank.open(line.bank).generation == 1


def test_feedback_on_what_is_not_there(line: Line) -> None:
    nobody = "0" * 32
    client = line.client
    assert client.post(f"/v1/pictures/{nobody}/feedback", json={"kind": "normal"}).status_code == 404
    assert client.post("/v1/banks/weave/feedback", json={"kind": "normal", "id": nobody}).status_code == 404
    assert client.post(f"/v1/answers/{nobody}/undo").status_code == 404
    for body in ({}, {"kind": "other"}, {"kind": "normal", "note": "x" * 3000}, {"kind": "normal", "more": 1}):
        reply = client.post(f"/v1/pictures/{nobody}/feedback", json=body)
        assert (reply.status_code, reply.headers["content-type"]) == (422, "application/problem+json")
    assert line.history.find(Filter()).total == 0
