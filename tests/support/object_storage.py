"""An S3-compatible server on loopback, and what tests do to objects behind the back of the package."""

from __future__ import annotations

import contextlib
import os
import secrets
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import obstore
from obstore.store import S3Store


@dataclass(frozen=True)
class Server:
    """A server, and the environment that leads to it."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "whose-key-nobody-may-see",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self) -> str:
        """Return the URL of a new bucket."""
        name = f"bucket-{secrets.token_hex(6)}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        with urllib.request.urlopen(request) as answer:
            answer.read()
        return f"s3://{name}"

    def objects(self, url: str) -> Objects:
        """The objects below a URL."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        keys = self.environment
        store = S3Store(
            bucket,
            prefix=prefix or None,
            config={
                "endpoint": self.endpoint,
                "access_key_id": keys["AWS_ACCESS_KEY_ID"],
                "secret_access_key": keys["AWS_SECRET_ACCESS_KEY"],
                "region": keys["AWS_REGION"],
            },
            client_options={"allow_http": True},
        )
        return Objects(store)


@dataclass(frozen=True)
class Objects:
    """Objects below a URL, as somebody else sees them."""

    store: S3Store

    def names(self) -> list[str]:
        return sorted(meta["path"] for chunk in obstore.list(self.store) for meta in chunk)

    def __getitem__(self, name: str) -> bytes:
        return bytes(obstore.get(self.store, name).bytes())

    def __setitem__(self, name: str, content: bytes) -> None:
        obstore.put(self.store, name, content)

    def __delitem__(self, name: str) -> None:
        obstore.delete(self.store, name)

    def contents(self) -> dict[str, bytes]:
        return {name: self[name] for name in self.names()}


@contextlib.contextmanager
def run_server() -> Iterator[Server]:
    """Run moto's server on a free port of loopback."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Server(f"http://{host}:{port}")
    finally:
        server.stop()


def clean_environment() -> dict[str, str]:
    """The environment without anything that leads to other storage."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
