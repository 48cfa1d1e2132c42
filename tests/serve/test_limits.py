"""Who may come in, and how much of it: tokens, sessions, other sites, bytes, pixels, files, seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.web.security import COOKIE
from tests.serve.conftest import PNG, Line, Serve

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


def test_other_machines_need_a_token(tmp_path: Path, token_file: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "line.example"):
        with pytest.raises(InputError, match="--token-file"):
            ServeSettings(host=host)
        assert ServeSettings(host=host, token_file=token_file).token() == TOKEN
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        assert ServeSettings(host=host).token() is None
    for text in ("", "short", "with a space in it, and long", "ümlaut-0123456789abcdef"):
        token_file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="token_file"):
            ServeSettings(token_file=token_file).token()
    with pytest.raises(InputError, match="cannot be read"):
        ServeSettings(token_file=tmp_path / "none").token()


def test_settings_that_cannot_be_are_refused() -> None:
    values: list[tuple[str, object]] = [("port", -1), ("port", 70000), ("keep", "30"), ("keep", "0d"), ("keep_bytes", "x")]
    values += [("max_queue", 0), ("max_wait_ms", -1.0), ("timeout_s", 0.0), ("score_again", -1), ("max_pixels", 0)]
    for name, value in values:
        with pytest.raises(InputError):
            replace(ServeSettings(), **{name: value})  # type: ignore[arg-type]
    assert ServeSettings(holdout="a=x,b=y").holdout_of("b") == "y"
    assert ServeSettings(holdout="x").holdout_of("b") == "x"
    assert ServeSettings(holdout="a=x").holdout_of("b") is None


def test_with_a_token_nothing_comes_in_without(serve: Serve, token_file: Path, good: Path) -> None:
    line = serve(upkeep=False, token_file=str(token_file))
    client = line.client
    paths = [route.path for route in client.app.routes if "GET" in (getattr(route, "methods", None) or ())]  # type: ignore[attr-defined]
    for path in (*paths, "/v1/banks/weave", "/metrics", "/openapi.json", "/"):
        if path in ("/healthz", "/readyz", "/login"):
            continue
        reply = client.get(path.replace("{bank}", "weave").replace("{id}", "0" * 32))
        assert reply.status_code == 401, path
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["content-type"] == "application/problem+json"
    assert client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG).status_code == 401
    for wrong in ("", "Bearer", "Bearer x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer \xfc"):
        headers = {b"authorization": wrong.encode("latin-1")}
        assert client.get("/v1/banks", headers=headers).status_code == 401
    right = {"authorization": f"Bearer {TOKEN}"}
    assert client.get("/v1/banks", headers=right).status_code == 200
    assert client.post("/v1/banks/weave/score", content=good.read_bytes(), headers={**PNG, **right}).status_code == 200
    page = client.get("/", headers={"accept": "text/html"}, follow_redirects=False)
    assert (page.status_code, page.headers["location"]) == (303, "/login?next=%2F")


def test_a_session_is_signed_ends_and_needs_its_own_page(
    serve: Serve, token_file: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = serve(upkeep=False, token_file=str(token_file))
    client, security = line.client, line.client.app.state.security  # type: ignore[attr-defined]
    cookie = security.new_session()
    client.cookies.set(COOKIE, cookie)
    assert client.get("/v1/banks").status_code == 200
    alone = client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=PNG)
    assert alone.status_code == 403, "a session alone is no proof of our page"
    csrf = security._sign("csrf", cookie)
    headers = {**PNG, "x-csrf-token": csrf}
    assert client.post("/v1/banks/weave/score", content=good.read_bytes(), headers=headers).status_code == 200
    for site in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        assert client.post("/v1/banks/weave/score", content=b"", headers={**headers, **site}).status_code == 403
    end, nonce, signature = cookie.split(".")
    for forged in (f"{int(end) + 9}.{nonce}.{signature}", f"{end}.{nonce}.{'0' * 64}", f"{end}.{nonce}", "", "x"):
        client.cookies.set(COOKIE, forged)
        assert client.get("/v1/banks").status_code == 401
    client.cookies.set(COOKIE, cookie)
    monkeypatch.setattr("spade_faiss.serve.web.security.time.time", lambda: int(end) + 1)
    assert client.get("/v1/banks").status_code == 401, "it has an end"


def test_another_token_ends_all_sessions(serve: Serve, token_file: Path) -> None:
    from spade_faiss.serve.web.security import Security

    folder = token_file.parent
    first = Security(ServeSettings(token_file=token_file), folder)
    cookie = first.new_session()
    assert Security(ServeSettings(token_file=token_file), folder).is_session(cookie), "a restart ends none"
    token_file.write_text("another-token-that-is-long")
    assert not Security(ServeSettings(token_file=token_file), folder).is_session(cookie)
    assert (folder / "secret").stat().st_mode & 0o077 == 0


def test_another_site_cannot_use_a_browser_on_this_machine(line: Line, good: Path) -> None:
    """Without a token, whoever runs a browser here is let in: so no other site may have it ask."""
    client = line.client
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert client.get("/v1/banks", headers={"host": host}).status_code == 403, "a name that was made to lead here"
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        assert client.get("/v1/banks", headers={"host": host}).status_code == 200
    data = good.read_bytes()
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "http://127.0.0.1:9"}):
        assert client.post("/v1/banks/weave/score", headers={**PNG, **headers}, content=data).status_code == 403
    assert client.post("/v1/banks/weave/score", headers={**PNG, "origin": "http://127.0.0.1"}, content=data).status_code == 200


def test_every_answer_keeps_browsers_safe(line: Line) -> None:
    for path in ("/v1/banks", "/nothing", "/healthz"):
        headers = line.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert headers["cache-control"] == "no-store"


def test_uploads_are_bounded_in_bytes_files_and_pixels(serve: Serve, good: Path, tmp_path: Path) -> None:
    line = serve(upkeep=False, max_upload_bytes=100_000, max_files=2, max_pixels=96 * 80)
    client, data = line.client, good.read_bytes()
    assert client.post("/v1/banks/weave/score", content=data + b"\0" * 100_000, headers=PNG).status_code == 413

    def parts() -> object:
        yield data
        for _ in range(200):
            yield b"\0" * 1000

    streamed = client.post("/v1/banks/weave/score", content=parts(), headers=PNG)  # type: ignore[arg-type]
    assert (streamed.status_code, "content-length" in streamed.request.headers) == (413, False)
    assert client.post("/v1/banks/weave/score", files=[("p", ("a.png", data))] * 3).status_code == 413
    assert client.post("/v1/banks/weave/score", files=[("p", ("a.png", data))] * 2).status_code == 200
    Image.new("RGB", (96, 81)).save(tmp_path / "large.png")
    large = client.post("/v1/banks/weave/score", content=(tmp_path / "large.png").read_bytes(), headers=PNG)
    assert large.status_code == 422
    assert "more than the 7680 allowed" in large.json()["detail"]
    assert client.post("/v1/banks/weave/score", data={"text": "x" * 80_000}, files={"p": ("a.png", data)}).status_code == 413
    assert line.history.files.unsettled() == {}


def test_what_brings_no_picture_is_small(serve: Serve, token_file: Path, good: Path) -> None:
    line = serve(upkeep=False, token_file=str(token_file))
    right = {"authorization": f"Bearer {TOKEN}"}
    picture = line.score(good, **right)
    large = line.client.post("/login", data={"token": "x" * (1 << 20)})  # nobody knows who sends it
    assert (large.status_code, large.headers["content-type"]) == (413, "application/problem+json")
    file = line.client.post("/login", data={"token": TOKEN}, files={"p": ("a.png", b"x" * (2 << 20))})
    assert file.status_code == 413
    url, note = f"/v1/pictures/{picture['id']}/feedback", {"kind": "defect", "note": "x" * (1 << 20)}
    assert line.client.post(url, json=note, headers=right).status_code == 413
    assert line.client.post(url, json={"kind": "defect"}, headers=right).status_code == 202
    data = good.read_bytes() + b"\0" * (2 << 20)
    assert line.client.post("/v1/banks/weave/score", content=data, headers={**PNG, **right}).status_code == 200


def test_bodies_that_cannot_be_understood(line: Line, good: Path) -> None:
    client, url, data = line.client, "/v1/banks/weave/score", good.read_bytes()
    form = "multipart/form-data; boundary=x"
    start = b'--x\r\nContent-Disposition: form-data; name="p"; filename="a.png"\r\n\r\n'
    for kind, body, status in (
        ("text/plain", data, 415),
        ("application/json", b"{}", 415),
        (form, b"", 422),
        (form, b"nonsense", 422),
        (form, start + data, 422),
        (form, b'--x\r\nContent-Disposition: form-data; name="p"; filename=""\r\n\r\n\r\n--x--\r\n', 422),
        ("multipart/form-data", start + data + b"\r\n--x--\r\n", 422),
        ("image/png", b"", 422),
        (form, start + data + b"\r\n--x--\r\n", 200),
    ):
        reply = client.post(url, content=body, headers={"content-type": kind})
        assert reply.status_code == status, (kind, body[:80], reply.text)
        assert status == 200 or reply.headers["content-type"] == "application/problem+json"
    assert client.post("/v1/banks/none/score", content=data, headers=PNG).status_code == 404
    assert line.history.files.unsettled() == {}


def test_names_are_text_and_never_paths(line: Line, good: Path) -> None:
    before = sorted(path for path in line.history.files.root.parent.rglob("*"))
    for name in ("../../evil.png", "/etc/passwd", "C:\\x\\y.png", "\0", "a\nb", "<script>alert(1)</script>.png", "x" * 3000):
        reply = line.client.post("/v1/banks/weave/score", files={"p": (name.replace("\0", "%00"), good.read_bytes())})
        assert reply.status_code == 200, name
        told = reply.json()["pictures"][0]["picture"]
        assert "/" not in told["name"]
        assert len(told["name"]) <= 255
    new = set(line.history.files.root.parent.rglob("*")) - set(before)
    assert all(line.history.files.root in path.parents for path in new if path.suffix == ".png")
    assert not [path for path in new if "evil" in path.name or "script" in path.name]


def test_a_request_that_takes_too_long_to_arrive_is_ended(serve: Serve, good: Path, tmp_path: Path) -> None:
    import asyncio

    from starlette.requests import Request

    from spade_faiss.serve.web.uploads import receiver_of

    line = serve(upkeep=False, timeout_s=0.2)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    async def run() -> int:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [(b"content-type", b"image/png")],
            "query_string": b"",
        }
        request = Request(scope, receive)
        try:
            await receiver_of(request, line.history.files, line.service.settings)(request)
        except Exception as error:
            return int(getattr(error, "status_code", 0))
        return 0

    assert asyncio.run(run()) == 408
    assert line.history.files.unsettled() == {}
