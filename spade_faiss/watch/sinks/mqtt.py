"""An MQTT topic as a destination: each verdict is published with QoS 1, and counts as delivered when the broker confirms it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from spade_faiss.core.errors import InputError
from spade_faiss.watch.ledger import Parcel
from spade_faiss.watch.packages import import_mqtt
from spade_faiss.watch.sinks.sink import Delivered, TryLaterError
from spade_faiss.watch.sources.camera import label_of

if TYPE_CHECKING:
    from paho.mqtt.client import Client

_log = logging.getLogger(__name__)

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_CONNECT_S = 1.0
_CONFIRM_S = 10.0


class MqttSink:
    """Publishes verdicts.

    With QoS 1, a message may come more than once; each holds the picture's id, by which a subscriber knows it again. What was
    handed to the client is not handed to it again while it lives: it sends it anew when the connection is back.

    Args:
        url: `mqtt://HOST:PORT/TOPIC`, or `mqtts://` for TLS; a user's name may stand before the host.
        password: the user's password.

    Raises:
        InputError: for an address without a host or a topic.
        DependencyError: if paho-mqtt is not installed.
    """

    takes_all = False
    wants_files = False
    wants_pictures = False
    at_a_time = 100

    def __init__(self, url: str, password: str | None) -> None:
        self._mqtt = import_mqtt()
        parts = urlsplit(url)
        self._topic = unquote(parts.path.removeprefix("/"))
        if parts.scheme not in _PORTS or not parts.hostname:
            raise InputError(
                f"{label_of(url)} is no address of a broker; give one such as mqtt://127.0.0.1:1883/parts/verdicts"
            )
        if not self._topic or any(letter in url for letter in "#?") or any(letter in self._topic for letter in "+\0"):
            raise InputError(
                f"{label_of(url)} names no topic to publish to; give one such as mqtt://127.0.0.1:1883/parts/verdicts"
            )
        self.name = label_of(url)
        self._parts = parts
        self._password = password
        self._client: Client | None = None
        self._is_connected = threading.Event()
        self._why = "there is no connection"
        self._handed: dict[int, Any] = {}

    def open(self, fact: str | None) -> None:
        """See `Sink`; the connection is made in the background."""
        client = self._mqtt.Client(self._mqtt.CallbackAPIVersion.VERSION2)
        if self._parts.username is not None:
            client.username_pw_set(unquote(self._parts.username), self._password)
        if self._parts.scheme == "mqtts":
            client.tls_set()
        client.reconnect_delay_set(min_delay=1, max_delay=30)
        client.max_inflight_messages_set(self.at_a_time)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        self._client = client
        assert self._parts.hostname is not None
        client.connect_async(self._parts.hostname, self._parts.port or _PORTS[self._parts.scheme], keepalive=30)
        client.loop_start()

    def deliver(self, parcels: Sequence[Parcel]) -> Delivered:
        """See `Sink`."""
        assert self._client is not None
        if not self._is_connected.wait(_CONNECT_S):
            raise TryLaterError(self._why)
        for parcel in parcels:
            if parcel.seq not in self._handed:
                self._handed[parcel.seq] = self._client.publish(self._topic, parcel.body, qos=1)
        deadline = time.monotonic() + _CONFIRM_S
        taken: list[Parcel] = []
        later: TryLaterError | None = None
        for parcel in parcels:
            sent = self._handed[parcel.seq]
            try:
                sent.wait_for_publish(max(0.0, deadline - time.monotonic()))
                is_taken = sent.is_published()
            except (ValueError, RuntimeError) as error:  # the client would not take it; it is published anew
                del self._handed[parcel.seq]
                later = TryLaterError(str(error))
                continue
            if is_taken:
                taken.append(parcel)
                del self._handed[parcel.seq]
            else:
                later = TryLaterError(self._why if not self._is_connected.is_set() else "the broker has not confirmed")
        return Delivered(taken, (), later)

    def _connected(self, client: Client, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        if code.is_failure:
            self._why = f"the broker refused the connection: {code}"
            return
        self._is_connected.set()

    def _disconnected(self, client: Client, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        self._is_connected.clear()
        self._why = f"the connection was lost: {code}"

    def close(self) -> None:
        """See `Sink`."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
