"""A server of this project as a destination: it gets the pictures, scores them itself, and has them in its history."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spade_faiss.core.errors import InputError
from spade_faiss.watch.ledger import Parcel
from spade_faiss.watch.sinks.http import HttpSink
from spade_faiss.watch.sources.camera import label_of

# By the first bytes of a file; the server looks at these, too.
_KINDS = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"BM", "image/bmp"), (b"RIFF", "image/webp"))


class ServerSink(HttpSink):
    """Posts pictures to a bank of a server. A request that comes twice has one key, by which the server scores it once.

    Args:
        url: the address of the bank, such as `http://127.0.0.1:8000/parts`.
        token: what the server lets in; None if it needs none.
        source: what the server's history calls the source.

    Raises:
        InputError: for an address without the name of a bank.
        DependencyError: if httpx is not installed.
    """

    takes_all = True
    wants_pictures = True

    def __init__(self, url: str, token: str | None, source: str) -> None:
        super().__init__()
        base, _, bank = url.rstrip("/").rpartition("/")
        if not base or base.endswith(("/", ":")):
            raise InputError(f"server:{label_of(url)} names no bank; give one, such as server:http://127.0.0.1:8000/parts")
        self.name = f"server:{label_of(url)}"
        self._url = f"{base}/v1/banks/{bank}/score"
        self._headers = {"X-Spade-Faiss-Source": quote(source, safe="")}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def request(self, parcel: Parcel) -> dict[str, Any]:
        """See `HttpSink`."""
        content = _content(parcel)
        kind = next((kind for start, kind in _KINDS if content.startswith(start)), "application/octet-stream")
        name = quote(parcel.body.decode(), safe="")
        headers = {**self._headers, "Content-Type": kind, "Idempotency-Key": parcel.id, "X-Spade-Faiss-Name": name}
        return {"method": "POST", "url": self._url, "content": content, "headers": headers}


def _content(parcel: Parcel) -> bytes:
    if parcel.picture is not None:
        return parcel.picture
    assert parcel.path is not None
    path, _, sha256 = parcel.path.rpartition("#")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} is gone before it was delivered: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{path} was changed before it was delivered; in its new state, it is another picture")
    return content
