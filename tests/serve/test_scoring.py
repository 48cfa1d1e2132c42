"""What comes in is scored as `score` does, recorded before it is answered, and bounded."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss import Detector, score_folder
from spade_faiss.bank.places import CALIBRATIONS
from spade_faiss.serve.errors import UnavailableError
from spade_faiss.serve.history.records import Filter
from spade_faiss.serve.station import station as station_module
from tests.serve.conftest import PNG, Line, Serve


def test_an_upload_scores_what_score_says_of_the_same_file(line: Line, dataset_folder: Path, tmp_path: Path) -> None:
    """Bit for bit: scores, p-values, verdicts and regions, one by one and together."""
    paths = sorted((dataset_folder / "test").rglob("*.png"))
    score_folder(paths, bank=line.bank, out=tmp_path / "out")
    rows = {row["id"]: row for row in json.loads((tmp_path / "out" / "report.json").read_bytes())["scores"]}
    files = [
        ("p", (path.relative_to(dataset_folder / "test").as_posix().replace("/", "__"), path.read_bytes())) for path in paths
    ]
    together = line.client.post("/v1/banks/weave/score", files=files).json()["pictures"]
    for path, item in zip(paths, together, strict=True):
        row, alone = rows[path.relative_to(dataset_folder / "test").as_posix()], line.score(path)
        for told in (item["picture"], alone):
            for ours, theirs in (("knn", "image_score"), ("max", "map_score"), ("top", "top_score")):
                assert np.float32(told["scores"][ours]) == np.float32(row[theirs])
            assert told["p_value"] == row["p_value"]
            assert told["alarm"] == row["alarm"]
            assert [region["input"] for region in told["regions"]] == [region["input"] for region in row["regions"]]
            assert told["nearest"][0]["id"] == row["neighbors"][0]["id"]
    assert any(item["picture"]["alarm"] for item in together)


def test_a_verdict_is_on_disk_when_it_is_answered(line: Line, defect: Path) -> None:
    told = line.score(defect, x_spade_faiss_name="line%2F3%20%C3%BC.png", x_spade_faiss_source="camera%201")
    assert (told["name"], told["source"]) == ("line/3 ü.png", "camera 1")
    found = line.history.get(told["id"])
    assert found.alarm is told["alarm"]
    assert line.history.files.picture_path(found.id, found.suffix).read_bytes() == defect.read_bytes()
    own_map = line.history.files.read_map(found.id)
    assert own_map is not None
    exact = Detector.open(line.bank).score(defect).maps[0]
    np.testing.assert_allclose(own_map, exact, rtol=1e-3)
    y, x = told["peak"]
    assert exact[y, x] == exact.max()
    assert line.history.files.unsettled() == {}


def test_what_a_picture_was_matched_with_is_told(line: Line, defect: Path) -> None:
    told = line.score(defect)
    patches = [patch for normal in told["nearest"] for patch in normal["patches"]]
    assert {patch["level"] for patch in patches} == set(line.station.detector._searches)
    y, x = told["peak"]
    for patch in patches:
        y0, x0, y1, x1 = patch["query"]
        assert y0 <= y < y1
        assert x0 <= x < x1
        assert 0 <= patch["box"][0] < patch["box"][2] <= patch["size"][0]


def test_a_picture_that_cannot_be_read_harms_no_other(line: Line, defect: Path, good: Path) -> None:
    data = good.read_bytes()
    files = [("p", ("a.png", data)), ("p", ("b.png", data[: len(data) // 2])), ("p", ("c.txt", b"text")), ("p", ("d.png", b""))]
    reply = line.client.post("/v1/banks/weave/score", files=[*files, ("p", ("e.png", defect.read_bytes()))])
    assert reply.status_code == 200
    items = reply.json()["pictures"]
    assert [item["problem"] and item["problem"]["status"] for item in items] == [None, 422, 422, 422, None]
    assert all("'b.png'" in items[1]["problem"]["detail"] for _ in items)
    assert str(line.history.files.root) not in reply.text, "nobody learns where files are"
    assert line.history.find(Filter()).total == 2
    assert line.history.files.unsettled() == {}
    alone = line.client.post("/v1/banks/weave/score", content=data[:300], headers=PNG)
    assert (alone.status_code, alone.headers["content-type"]) == (422, "application/problem+json")


def test_a_file_of_several_pages_is_refused(line: Line, good: Path, tmp_path: Path) -> None:
    picture = Image.open(good)
    picture.save(tmp_path / "two.tif", save_all=True, append_images=[picture])
    reply = line.client.post(
        "/v1/banks/weave/score", content=(tmp_path / "two.tif").read_bytes(), headers={"content-type": "image/tiff"}
    )
    assert reply.status_code == 422
    assert "several pages" in reply.json()["detail"]


def test_the_same_key_gets_the_same_record(line: Line, good: Path, defect: Path) -> None:
    first = line.score(good, idempotency_key="frame-1")
    again = line.score(defect, idempotency_key="frame-1")
    assert again == first
    assert line.score(good, idempotency_key="frame-2")["id"] != first["id"]
    assert line.history.find(Filter()).total == 2
    assert line.history.files.unsettled() == {}
    bad = line.client.post("/v1/banks/weave/score", content=b"x", headers={**PNG, "idempotency-key": "a b"})
    assert bad.status_code == 422


def test_requests_with_one_key_at_the_same_time_are_scored_once(line: Line, good: Path) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(line.score(good, idempotency_key="same"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({told["id"] for told in found}) == 1
    assert len(found) == 6
    assert line.history.find(Filter()).total == 1


def test_a_key_stays_in_flight_until_its_picture_is_recorded(serve: Serve, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = serve(upkeep=False, timeout_s=0.5)
    held, steps = threading.Event(), line.station._pipeline._steps  # type: ignore[union-attr]
    score = steps.score

    def wait(*arguments: Any, **options: Any) -> Any:
        held.wait(30)
        return score(*arguments, **options)

    monkeypatch.setattr(steps, "score", wait)
    headers = {**PNG, "idempotency-key": "slow"}
    for _ in range(2):
        late = line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=headers)
        assert late.status_code == 503
        assert list(line.service.in_flight) == [("weave", "slow")]
        assert line.station.waiting == 1, "sent again, it is not scored again"
    held.set()
    while line.service.at_work:
        threading.Event().wait(0.01)
    assert line.service.in_flight == {}
    assert line.history.find(Filter()).total == 1
    assert line.score(good, idempotency_key="slow")["id"] == line.history.find(Filter()).items[0].id
    assert line.history.files.unsettled() == {}


def test_a_key_that_comes_twice_harms_no_other_picture_of_the_commit(
    serve: Serve, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = serve(upkeep=False, max_wait_ms=500.0)  # so that both come into one batch
    first = line.score(good, idempotency_key="k")
    monkeypatch.setattr(line.history, "with_key", lambda *_: None)
    files = [("p", (name, good.read_bytes())) for name in ("a.png", "b.png")]
    found = line.client.post("/v1/banks/weave/score", files=files, headers={"idempotency-key": "k"}).json()["pictures"]
    assert [item["problem"] and item["problem"]["status"] for item in found] == [409, None]
    assert line.history.find(Filter()).total == 2
    assert line.history.get(first["id"]).key == "k"
    assert line.history.files.unsettled() == {}
    assert line.station.waiting == 0


def test_a_history_that_cannot_be_asked_for_a_key_leaves_no_files(
    line: Line, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UnavailableError("locked")

    monkeypatch.setattr(line.history, "with_key", fail)
    headers = {**PNG, "idempotency-key": "k"}
    assert line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=headers).status_code == 503
    assert line.history.files.unsettled() == {}
    assert line.service.in_flight == {}


def test_a_full_queue_refuses_at_once_and_loses_nothing(serve: Serve, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = serve(upkeep=False, max_queue=3)
    held = threading.Event()
    steps = line.station._pipeline._steps  # type: ignore[union-attr]
    score = steps.score

    def wait(*arguments: Any, **options: Any) -> Any:
        held.wait(30)
        return score(*arguments, **options)

    monkeypatch.setattr(steps, "score", wait)
    replies: list[Any] = []

    def send() -> None:
        replies.append(line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG))

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    while line.station.waiting < 3:
        threading.Event().wait(0.01)
    refused = line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    too_many = line.client.post("/v1/banks/weave/score", files=[("p", ("a.png", good.read_bytes()))] * 4)
    held.set()
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200] * 3
    assert too_many.status_code == 503
    more = line.client.post("/v1/banks/weave/score", files=[("p", ("a.png", good.read_bytes()))] * 4)
    assert more.status_code == 413, "so many can never wait"
    assert line.history.find(Filter()).total == 3
    assert line.history.files.unsettled() == {}
    assert line.station.waiting == 0


def test_an_error_of_a_batch_answers_all_of_it_and_the_next_one_is_scored(
    line: Line, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = line.station._pipeline._steps  # type: ignore[union-attr]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    for name in ("extract", "score", "record"):
        with monkeypatch.context() as patched:
            patched.setattr(steps, name, fail)
            with pytest.raises(RuntimeError, match="broken"):
                line.score(good)
        assert line.station.waiting == 0
        assert line.score(good)["bank"] == "weave"
    assert line.history.files.unsettled() == {}


def test_a_disk_that_nothing_can_be_removed_from_ends_no_thread(
    line: Line, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = line.station._pipeline._steps  # type: ignore[union-attr]

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("decode", "record"):
        with monkeypatch.context() as patched:
            patched.setattr(steps, "drop", fail)
            patched.setattr(steps, name, fail)
            with pytest.raises(OSError, match="Read-only"):
                line.score(good)
        assert line.score(good)["bank"] == "weave"
    assert line.station.waiting == 0


def test_what_was_taken_is_answered_before_the_station_ends(line: Line, good: Path) -> None:
    replies: list[int] = []

    def send() -> None:
        replies.append(line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG).status_code)

    threads = [threading.Thread(target=send) for _ in range(5)]
    for thread in threads:
        thread.start()
    line.station.close()
    for thread in threads:
        thread.join()
    assert set(replies) <= {200, 503}
    assert line.history.find(Filter()).total == replies.count(200)
    with pytest.raises(UnavailableError, match="shutting down"):
        line.station.submit([])


def test_no_thread_keeps_a_process_alive_that_is_to_end(serve: Serve) -> None:
    line = serve()
    threads = [thread for thread in threading.enumerate() if thread.name.endswith(" weave")]
    assert len(threads) == 4, "network, search, records, upkeep"
    assert all(thread.daemon for thread in threads)
    assert line.station.is_open


def test_metrics_are_told_whatever_the_history_can_say(line: Line, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drift_p() -> float:
        reply = line.client.get("/metrics")
        assert reply.status_code == 200
        (told,) = [row for row in reply.text.splitlines() if row.startswith('spade_faiss_drift_p_value{bank="weave"}')]
        return float(told.rpartition(" ")[2])

    files = [("p", (f"{number}.png", good.read_bytes())) for number in range(20)]
    assert line.client.post("/v1/banks/weave/score", files=files).status_code == 200
    assert 0 <= drift_p() <= 1
    monkeypatch.setattr(station_module, "_DRIFT_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(line.history, "recent_scores", lambda *_: [])
        assert math.isnan(drift_p()), "too few of a new generation"

    def fail(*_: object) -> None:
        raise UnavailableError("locked")

    monkeypatch.setattr(line.history, "recent_scores", fail)
    drift_p()


def test_until_a_bank_is_open_requests_are_told_to_come_again(serve: Serve, good: Path) -> None:
    line = serve(opened=False)
    reply = line.client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG)
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)
    assert line.client.get("/readyz").status_code == 503
    assert line.client.get("/healthz").status_code == 200
    assert line.client.get("/v1/banks/weave").json()["state"] == "opening"


def test_a_bank_that_cannot_be_served_says_why(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "weave.bank").mkdir()
    line = serve(opened=False)
    line.station.open()
    assert line.station.state == "failed"
    assert "there is no bank" in line.client.get("/v1/banks/weave").json()["message"]


def test_without_a_calibration_there_is_no_verdict(serve: Serve, good: Path, fitted_bank: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted_bank, tmp_path / "weave.bank", ignore=shutil.ignore_patterns(CALIBRATIONS))
    line = serve(upkeep=False)
    told = line.score(good)
    assert told["p_value"] is told["alarm"] is told["alpha"] is None
    assert told["regions"] == []
    assert line.client.get(told["links"]["overlay"]).status_code == 200
    assert "calibrate" in line.client.get("/v1/banks/weave").json()["message"]
