"""Destinations: what they are sent, what counts as delivered, and that nothing comes twice where that can be promised."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.watch.courier import Courier
from spade_faiss.watch.destinations import Secrets, check_folders, make_sinks, read_secret
from spade_faiss.watch.ledger import Ledger, Parcel
from spade_faiss.watch.sinks.folder import FolderSink
from spade_faiss.watch.sinks.http import _after_s
from spade_faiss.watch.sinks.mqtt import MqttSink
from spade_faiss.watch.sinks.server import ServerSink
from spade_faiss.watch.sinks.sink import Sink, TryLaterError
from spade_faiss.watch.sinks.webhook import WebhookSink
from tests.support.receivers import Broker, Receiver, receiving


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger(None, "test")
    yield ledger
    ledger.close()


def parcel(sink: Sink, name: str, **more: Any) -> Parcel:
    return Parcel(sink=sink.name, id=name, body=json.dumps({"id": name}).encode(), **more)


def deliver_all(sink: Sink, ledger: Ledger, *, timeout_s: float = 10) -> Courier:
    """Deliver what waits, by a courier, as `watch` does."""
    sink.open(ledger.fact(sink.name))
    courier = Courier(sink, ledger)
    courier.start()
    end = time.monotonic() + timeout_s
    while ledger.count_waiting() and time.monotonic() < end and courier.error is None:
        time.sleep(0.01)
    courier.stop(timeout_s)
    sink.close()
    if courier.error is not None:
        raise courier.error
    return courier


def lines(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "verdicts.jsonl").read_text().splitlines()]


class TestFolder:
    def test_a_line_for_each_picture_and_files_for_some(self, tmp_path: Path, ledger: Ledger) -> None:
        sink = FolderSink(tmp_path / "out")
        ledger.add([], [parcel(sink, "a"), parcel(sink, "b", overlay=b"png", map=b"npy")], {})
        assert deliver_all(sink, ledger).delivered == 2
        assert lines(tmp_path / "out") == ["a", "b"]
        assert (tmp_path / "out" / "overlays" / "b.png").read_bytes() == b"png"
        assert (tmp_path / "out" / "maps" / "b.npy").read_bytes() == b"npy"
        assert not (tmp_path / "out" / "overlays" / "a.png").exists()

    @pytest.mark.parametrize("cut", [0, 5], ids=["whole line", "cut line"])
    def test_after_a_kill_between_writing_and_confirming_each_line_is_there_once(
        self, tmp_path: Path, ledger: Ledger, cut: int
    ) -> None:
        sink = FolderSink(tmp_path)
        ledger.add([], [parcel(sink, "a")], {})
        deliver_all(sink, ledger)
        ledger.add([], [parcel(sink, "b"), parcel(sink, "c"), parcel(sink, "d")], {})
        with (tmp_path / "verdicts.jsonl").open("ab") as file:  # what the killed process wrote and did not confirm
            file.write(b'{"id": "b"}\n{"id": "c"}\n')
        if cut:
            os.truncate(tmp_path / "verdicts.jsonl", (tmp_path / "verdicts.jsonl").stat().st_size - cut)
        again = FolderSink(tmp_path)
        deliver_all(again, ledger)
        assert lines(tmp_path) == ["a", "b", "c", "d"]

    def test_a_file_that_was_moved_away_begins_anew(self, tmp_path: Path, ledger: Ledger) -> None:
        for names in ("abc", "d", "e"):
            sink = FolderSink(tmp_path)
            ledger.add([], [parcel(sink, name) for name in names], {})
            deliver_all(sink, ledger)
            if names == "abc":
                (tmp_path / "verdicts.jsonl").rename(tmp_path / "verdicts.1.jsonl")
        assert lines(tmp_path) == ["d", "e"]

    def test_a_full_disk_is_tried_again_and_leaves_no_half_line(
        self, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sink = FolderSink(tmp_path)
        sink.open(None)
        real, fails = os.fsync, iter([OSError(28, "No space left on device")])

        def fsync(descriptor: int) -> None:
            if (error := next(fails, None)) is not None:
                raise error
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(TryLaterError, match="No space left"):
            sink.deliver([parcel(sink, "a")])
        assert (tmp_path / "verdicts.jsonl").read_bytes() == b""
        sink.deliver([parcel(sink, "a")])
        assert lines(tmp_path) == ["a"]
        sink.close()

    def test_a_place_that_is_read_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        for bank, place in ((None, "in/out"), (tmp_path / "bank", "bank/out")):
            with pytest.raises(InputError, match="lies inside of"):
                check_folders(str(tmp_path / "in"), [f"folder:{tmp_path / place}"], bank)
        check_folders(str(tmp_path / "in"), [f"folder:{tmp_path / 'out'}"], tmp_path / "bank")


class TestWebhook:
    def test_it_is_signed_and_named(self, ledger: Ledger) -> None:
        key = b"0123456789abcdef"
        with receiving(Receiver()) as receiver:
            sink = WebhookSink(f"{receiver.url}/hook?token=secret", f"whsec_{base64.b64encode(key).decode()}")
            assert "secret" not in sink.name
            ledger.add([], [parcel(sink, "a")], {})
            deliver_all(sink, ledger)
            (request,) = receiver.requests
        assert request.path == "/hook?token=secret"
        assert request.headers["content-type"] == "application/json"
        assert request.headers["idempotency-key"] == request.headers["webhook-id"] == "a"
        stamp = request.headers["webhook-timestamp"]
        assert abs(int(stamp) - time.time()) < 60
        mac = hmac.new(key, b"a." + stamp.encode() + b"." + request.body, hashlib.sha256).digest()
        assert request.headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"

    def test_it_is_tried_again_until_it_answers(self, ledger: Ledger) -> None:
        with receiving(
            Receiver(answer=lambda number, _: (503, {"Retry-After": "0"}) if number <= 5 else (204, {}))
        ) as receiver:
            sink = WebhookSink(receiver.url, None)
            ledger.add([], [parcel(sink, name) for name in "abc"], {})
            courier = deliver_all(sink, ledger)
        assert (courier.delivered, courier.refused) == (3, 0)
        assert sorted(request.json["id"] for request in receiver.taken) == ["a", "b", "c"]

    def test_nobody_listens_at_first(self, ledger: Ledger) -> None:
        with receiving(Receiver()) as receiver:
            pass  # the port is free again
        sink = WebhookSink(receiver.url, None)
        ledger.add([], [parcel(sink, "a")], {})
        sink.open(None)
        done = sink.deliver(ledger.waiting(sink.name, 10))
        assert done.taken == []
        assert done.later is not None
        sink.close()
        with receiving(receiver):
            deliver_all(WebhookSink(receiver.url, None), ledger)
        assert len(receiver.taken) == 1

    def test_what_is_refused_for_good_is_put_aside(self, ledger: Ledger) -> None:
        with receiving(Receiver(answer=lambda _, request: (422 if request.json["id"] == "b" else 200, {}))) as receiver:
            sink = WebhookSink(receiver.url, None)
            ledger.add([], [parcel(sink, name) for name in "abc"], {})
            courier = deliver_all(sink, ledger)
        assert (courier.delivered, courier.refused, ledger.count_refused()) == (2, 1, 1)
        assert len(receiver.requests) == 3

    def test_retry_after_is_seconds_or_a_date(self) -> None:
        assert _after_s("7") == 7
        assert _after_s("") == _after_s("soon") == _after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0


class TestServer:
    def test_it_posts_pictures_with_a_key(self, tmp_path: Path, ledger: Ledger) -> None:
        path = tmp_path / "a b.png"
        path.write_bytes(b"\x89PNG...")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with receiving(Receiver()) as receiver:
            sink = ServerSink(f"{receiver.url}/parts", "token", "/in")
            good = Parcel(sink=sink.name, id="1", body="ä b.png".encode(), path=f"{path}#{digest}")
            frame = Parcel(sink=sink.name, id="2", body=b"cam#t", picture=b"\x89PNG2")
            ledger.add([], [good, frame], {})
            deliver_all(sink, ledger)
        assert {request.path for request in receiver.requests} == {"/v1/banks/parts/score"}
        first, second = sorted(receiver.requests, key=lambda request: request.headers["idempotency-key"])
        assert (first.body, second.body) == (path.read_bytes(), b"\x89PNG2")
        assert unquote(first.headers["x-spade-faiss-name"]) == "ä b.png"
        assert unquote(first.headers["x-spade-faiss-source"]) == "/in"
        assert first.headers["authorization"] == "Bearer token"
        assert first.headers["content-type"] == "image/png"

    @pytest.mark.parametrize("change", ["removed", "changed"])
    def test_a_picture_that_is_no_more_what_it_was_is_not_sent(self, tmp_path: Path, ledger: Ledger, change: str) -> None:
        path = tmp_path / "a.png"
        if change == "changed":
            path.write_bytes(b"new")
        with receiving(Receiver()) as receiver:
            sink = ServerSink(f"{receiver.url}/parts", None, "/in")
            ledger.add([], [Parcel(sink=sink.name, id="1", body=b"a.png", path=f"{path}#{'0' * 64}")], {})
            assert deliver_all(sink, ledger).refused == 1
        assert receiver.requests == []


class TestMqtt:
    def test_it_publishes_and_waits_for_the_broker(self, ledger: Ledger) -> None:
        broker = Broker(password="pass")
        sink = MqttSink(f"mqtt://me@127.0.0.1:{broker.port}/parts/verdicts", "pass")
        assert "me" not in sink.name
        ledger.add([], [parcel(sink, name) for name in "abc"], {})
        assert deliver_all(sink, ledger).delivered == 3
        broker.close()
        assert [(topic, json.loads(body)["id"]) for topic, body in broker.messages] == [
            ("parts/verdicts", name) for name in "abc"
        ]

    def test_what_was_not_confirmed_comes_again(self, ledger: Ledger) -> None:
        broker = Broker(lose=1)
        sink = MqttSink(f"mqtt://127.0.0.1:{broker.port}/t", None)
        ledger.add([], [parcel(sink, name) for name in "abc"], {})
        assert deliver_all(sink, ledger, timeout_s=20).delivered == 3
        broker.close()
        assert broker.connections == 2
        assert {json.loads(body)["id"] for _, body in broker.messages} == {*"abc"}

    def test_a_wrong_password_delivers_nothing(self, ledger: Ledger) -> None:
        broker = Broker(password="right")
        sink = MqttSink(f"mqtt://me@127.0.0.1:{broker.port}/t", "wrong")
        ledger.add([], [parcel(sink, "a")], {})
        courier = deliver_all(sink, ledger, timeout_s=2.5)
        broker.close()
        assert courier.delivered == 0
        assert "refused" in courier.trouble or "lost" in courier.trouble
        assert ledger.count_waiting() == {sink.name: 1}
        assert broker.messages == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nowhere", "no destination"),
        ("folder:", "no destination"),
        ("webhook:ftp://a/b", "no destination"),
        ("mqtt://host", "no topic"),
        ("mqtt:///topic", "no address of a broker"),
        ("mqtt://host/a/#", "no topic"),
        ("server:http://", "names no bank"),
        ("server:http://host:8000", "names no bank"),
    ],
)
def test_words_that_name_no_destination(word: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_sinks([word], Secrets(), "in")


def test_a_destination_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        make_sinks([f"folder:{tmp_path}", f"folder:{tmp_path}"], Secrets(), "in")


def test_secrets_are_one_line(tmp_path: Path) -> None:
    for number, (content, good) in enumerate(((b"abc\n", True), (b"", False), (b"a\nb\n", False), (b"\xff\xfe", False))):
        path = tmp_path / str(number)
        path.write_bytes(content)
        if good:
            assert read_secret(str(path)) == "abc"
        else:
            with pytest.raises(InputError, match=r"secret"):
                read_secret(str(path))
    with pytest.raises(InputError, match="No such file"):
        read_secret(str(tmp_path / "none"))
