"""A webhook as a destination: each verdict is posted as JSON, signed as Standard Webhooks (standardwebhooks.com) says."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from typing import Any

from spade_faiss.watch.ledger import Parcel
from spade_faiss.watch.sinks.http import HttpSink
from spade_faiss.watch.sources.camera import label_of

_PREFIX = "whsec_"


class WebhookSink(HttpSink):
    """Posts verdicts to an address.

    A verdict may come twice, if the process is killed between the answer and writing it down: `webhook-id` and
    `Idempotency-Key` are the picture's id, by which a receiver knows it again.

    Args:
        url: the address.
        secret: what requests are signed with; None to sign none.
        takes_all: whether it gets all pictures even where alarms alone are asked for.
    """

    takes_all = False
    wants_pictures = False

    def __init__(self, url: str, secret: str | None) -> None:
        super().__init__()
        self.name = f"webhook:{label_of(url)}"
        self._url = url
        self._key = None if secret is None else _key(secret)

    def request(self, parcel: Parcel) -> dict[str, Any]:
        """See `HttpSink`."""
        stamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": parcel.id,
            "webhook-id": parcel.id,
            "webhook-timestamp": stamp,
        }
        if self._key is not None:
            headers["webhook-signature"] = sign(self._key, parcel.id, stamp, parcel.body)
        return {"method": "POST", "url": self._url, "content": parcel.body, "headers": headers}


def sign(key: bytes, name: str, stamp: str, body: bytes) -> str:
    """The signature of a message with an id that was sent at a Unix time: `v1,` and an HMAC-SHA256 in base64."""
    signed = b".".join((name.encode(), stamp.encode(), body))
    return f"v1,{base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()}"


def _key(secret: str) -> bytes:
    """The key of a secret: `whsec_` and base64, or any other text as it is."""
    if secret.startswith(_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            pass
    return secret.encode()
