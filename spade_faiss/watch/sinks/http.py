"""What webhooks and servers have in common: several requests at a time, and what an answer means."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from spade_faiss.watch.ledger import Parcel
from spade_faiss.watch.packages import import_httpx
from spade_faiss.watch.sinks.sink import Delivered, TryLaterError

if TYPE_CHECKING:
    import httpx

_IN_FLIGHT = 8
_TIMEOUT_S = 30.0
# The request is wrong, and stays so. Whatever else is not a success may be put right, and is tried again.
_REFUSED = (400, 405, 406, 409, 410, 411, 413, 414, 415, 422)


class HttpSink:
    """Sends one request for each parcel.

    Raises:
        DependencyError: if httpx is not installed.
    """

    wants_files = False
    at_a_time = 4 * _IN_FLIGHT

    def __init__(self) -> None:
        self._httpx = import_httpx()
        self._client: httpx.Client | None = None
        self._pool: ThreadPoolExecutor | None = None

    def open(self, fact: str | None) -> None:
        """See `Sink`."""
        self._client = self._httpx.Client(timeout=_TIMEOUT_S, follow_redirects=False)
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="deliver")

    def request(self, parcel: Parcel) -> dict[str, Any]:
        """The arguments of `httpx.Client.request` that deliver a parcel.

        Raises:
            InputError: for a parcel that cannot be delivered ever.
        """
        raise NotImplementedError

    def deliver(self, parcels: Sequence[Parcel]) -> Delivered:
        """See `Sink`."""
        assert self._pool is not None
        taken, refused = [], []
        later: TryLaterError | None = None
        for parcel, found in zip(parcels, self._pool.map(self._send, parcels), strict=True):
            if found is None:
                taken.append(parcel)
            elif isinstance(found, TryLaterError):
                later = found
            else:
                refused.append((parcel, found))
        return Delivered(taken, refused, later)

    def _send(self, parcel: Parcel) -> str | TryLaterError | None:
        """Deliver one parcel: None if it was taken, a text if it was refused for good."""
        assert self._client is not None
        try:
            response = self._client.request(**self.request(parcel))
        except ValueError as error:  # an InputError: it cannot be sent, and an address that is none
            return str(error)
        except self._httpx.HTTPError as error:
            return TryLaterError(f"{type(error).__name__}: {error}")
        if response.is_success:
            return None
        said = f"{response.status_code} {response.reason_phrase}: {response.text[:200]}".rstrip(": ")
        if response.status_code in _REFUSED:
            return said
        return TryLaterError(said, _after_s(response.headers.get("Retry-After", "")))

    def close(self) -> None:
        """See `Sink`."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._client is not None:
            self._client.close()


def _after_s(text: str) -> float:
    """The seconds that a Retry-After header asks for: a number of them, or a date."""
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) if text else 0.0
    except (ValueError, OverflowError):
        return 0.0
