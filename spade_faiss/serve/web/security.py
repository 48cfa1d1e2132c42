"""Who may ask the server for anything: the token, sessions of the page, and requests that another site had a browser send.

- Programs send the token: `Authorization: Bearer TOKEN`.
- People type it into the page once, and get a cookie: signed, with an end, out of reach of scripts and of other sites.
- Without a token the server listens to its own machine alone. There, the name that a browser asks for must be one of this
  machine (a page of another site could otherwise have its own name lead here), and what changes anything must come from no
  other site.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spade_faiss.serve.errors import RefusedError
from spade_faiss.serve.settings import LOOPBACK, ServeSettings
from spade_faiss.serve.web.problems import problem_of

COOKIE = "spade_session"
CSRF_FIELD = "csrf"
CSRF_HEADER = "x-csrf-token"
SESSION_S = 12 * 3600
# What needs no token: whether the server lives, the way in, and what the page of that is made of.
OPEN_PATHS = ("/healthz", "/readyz", "/login")
OPEN_FOLDERS = ("/static/",)

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_SAFE = ("GET", "HEAD", "OPTIONS")
# What takes pictures bounds them itself. Everything else is small, and some is read before it is known who sends it.
_UPLOADS = ("/score", "/normals", "/upload")
_MOST_BYTES = 1 << 20

# How a request was let in: by the token, by a session of the page, or because no token is needed.
Entry = Literal["token", "session", "open"]


class Security:
    """Signs and checks sessions, and knows the token.

    Args:
        settings: say where the server listens, and where its token is.
        folder: keeps the secret that sessions are signed with, so that they survive a restart.
    """

    def __init__(self, settings: ServeSettings, folder: Path) -> None:
        self._settings = settings
        self._token = settings.token()
        key = _secret(folder / "secret")
        # With another token, nobody's session holds any more.
        self._key = hmac.digest(key, (self._token or "").encode(), "sha256")

    @property
    def needs_token(self) -> bool:
        """Whether clients need a token."""
        return self._token is not None

    def is_token(self, given: str) -> bool:
        """Whether a text is the token; it takes as long for every text of a length."""
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())

    def new_session(self) -> str:
        """The content of a session's cookie."""
        content = f"{int(time.time()) + SESSION_S}.{secrets.token_urlsafe(16)}"
        return f"{content}.{self._sign('session', content)}"

    def is_session(self, cookie: str) -> bool:
        """Whether a cookie is that of a session that has not ended."""
        content, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign("session", content).encode()):
            return False
        end = content.partition(".")[0]
        return end.isdecimal() and time.time() < int(end)

    def set_session(self, request: Request, response: Response) -> None:
        """Begin a session of who sent a request."""
        response.set_cookie(
            COOKIE,
            self.new_session(),
            max_age=SESSION_S,
            path="/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )

    def end_session(self, response: Response) -> None:
        """End a session."""
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")

    def csrf_token(self, request: Request) -> str:
        """What forms of the page send with them as `csrf` (or as the header `X-CSRF-Token`); it holds for a session."""
        return self._sign("csrf", _cookie_of(request.headers) or "no session")

    def check_csrf(self, request: Request, given: str | None) -> None:
        """Raise RefusedError unless a form was sent by a page of ours; needless for who sends the token."""
        if self.entry(request.headers) == "token":
            return
        given = given or request.headers.get(CSRF_HEADER) or ""
        if not hmac.compare_digest(given.encode(), self.csrf_token(request).encode()):
            raise RefusedError("this form is not from a page of this session; load the page again")

    def entry(self, headers: Headers) -> Entry | None:
        """How somebody may come in; None if not at all."""
        if self._token is None:
            return "open"
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(given.strip()):
            return "token"
        cookie = _cookie_of(headers)
        return "session" if cookie is not None and self.is_session(cookie) else None

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise RefusedError for a request that may not come in."""
        host = headers.get("host", "")
        if self._token is None and _name_of(host) not in (*LOOPBACK, self._settings.host):
            raise RefusedError(f"this server does not answer by the name {host[:80]!r}; ask for 127.0.0.1, or use --token-file")
        entry = self.entry(headers)
        if entry is None and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS):
            raise RefusedError("a token is needed: send Authorization: Bearer TOKEN, or log in at /login", 401)
        if method in _SAFE or entry == "token":
            return
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site not in (None, "same-origin", "none"):
            raise RefusedError("another site had this browser send the request")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise RefusedError(f"another site, {origin[:80]!r}, had this browser send the request")
        if entry == "session" and path.startswith("/v1/"):
            given = headers.get(CSRF_HEADER, "")
            expected = self._sign("csrf", _cookie_of(headers) or "no session")
            if not hmac.compare_digest(given.encode(), expected.encode()):
                raise RefusedError("with a session, the API needs the page's X-CSRF-Token; programs send the token instead")

    def _sign(self, purpose: str, content: str) -> str:
        return hmac.new(self._key, f"{purpose}:{content}".encode(), hashlib.sha256).hexdigest()


class SecurityMiddleware:
    """Lets only those in who may, and adds the headers that keep browsers safe."""

    def __init__(self, app: ASGIApp, security: Security) -> None:
        self._app = app
        self._security = security

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if "cache-control" not in headers and not scope["path"].startswith(OPEN_FOLDERS):
                    headers["cache-control"] = "no-store"
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._security.check(scope["method"], scope["path"], headers)
        except RefusedError as error:
            response: Response = problem_of(error, scope["path"])
            if error.status == 401 and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
                response = Response(status_code=303, headers={"location": _login(scope)})
            await response(scope, receive, guarded)
            return
        bounded = receive if scope["path"].endswith(_UPLOADS) else _bounded(receive)
        await self._app(scope, bounded, guarded)


def _bounded(receive: Receive) -> Receive:
    """Receives a body of no more than `_MOST_BYTES`; raises an HTTPException beyond."""
    count = 0

    async def bounded() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > _MOST_BYTES:
            raise HTTPException(413, f"the request is larger than {_MOST_BYTES} bytes, and brings no picture")
        return message

    return bounded


def _cookie_of(headers: Headers) -> str | None:
    try:
        found: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    return found[COOKIE].value if COOKIE in found else None


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _secret(path: Path) -> bytes:
    """The secret of a server's folder, which is made at its first start."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if len(found := path.read_bytes()) >= 32:
            return found
        path.unlink()  # a kill left a part of it
        return _secret(path)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret := secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    return secret


def _login(scope: Scope) -> str:
    """Where to log in, and what to show then: a path of ours, whatever was asked for."""
    asked = scope["path"] + ("?" + scope["query_string"].decode("latin-1") if scope["query_string"] else "")
    return f"/login?next={quote(asked, safe='')}"
