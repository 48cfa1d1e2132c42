"""S3 and its like, Google's and Azure's storage, by obstore: reading, and writes that depend on a condition."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore import exceptions
from obstore.store import from_url

from spade_faiss.core.errors import InputError, StorageError
from spade_faiss.storage.failures import Failures, in_short
from spade_faiss.storage.objects import NoConditions, Stored, Taken, ignore
from spade_faiss.storage.url import Url

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

_TRIES = 5
# Of a whole request, which may be a file of some GiB; of a part of an answer; of an address that nobody answers at.
_TIMEOUTS = {"timeout": "6h", "read_timeout": "2m", "connect_timeout": "20s"}
_TRY_FOR = timedelta(minutes=2)
# An object of up to this size is written in one request, which alone may have a condition. Amazon takes 5 GiB.
_ONE_REQUEST = 4 << 30
_CHUNK_BYTES = 16 << 20
_DELETED_AT_ONCE = 1000
_FAILURES = Failures(
    failed=(exceptions.BaseError, ValueError),
    refused=(exceptions.PermissionDeniedError, exceptions.UnauthenticatedError),
    check="; check the URL, AWS_ENDPOINT_URL and the network",
)


class CloudStore:
    """Objects below a URL.

    Where they are and who asks comes from the environment, as for the makers' own programs: `AWS_ENDPOINT_URL`, `AWS_REGION`,
    `AWS_ACCESS_KEY_ID` and so on; nothing of that is kept or logged here.

    Raises:
        InputError: if the environment or the URL cannot be used.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self._pid = os.getpid()
        self._opened = self._open()

    @property
    def _client(self) -> Client:
        if self._pid != os.getpid():  # the library's threads are those of the parent
            raise StorageError(f"{self.url} was opened by the parent of this process; open it in each process that uses it")
        return self._opened

    def _open(self) -> Client:
        # An address without TLS is somebody's choice, who wrote it into the environment.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        options: dict[str, Any] = {"client_options": {"allow_http": endpoint.startswith("http://"), **_TIMEOUTS}}
        if self.url.scheme in ("s3", "s3a"):
            if endpoint:
                options["config"] = {"endpoint": endpoint}
            options |= _credentials()
        try:
            return from_url(str(self.url), retry_config={"max_retries": _TRIES, "retry_timeout": _TRY_FOR}, **options)
        except (exceptions.BaseError, ValueError) as error:
            raise InputError(f"{self.url} cannot be opened: {in_short(error)}") from error

    def list(self) -> list[Stored]:
        """See `ObjectStore.list`."""
        with _FAILURES.named(self.url, "listed"):
            found = [_stored(meta) for chunk in obstore.list(self._client, chunk_size=1000) for meta in chunk]
        return sorted(found, key=lambda stored: stored.name)

    def find(self, name: str) -> Stored | None:
        """See `ObjectStore.find`."""
        try:
            with _FAILURES.named(self.url, "read", name):
                return _stored(obstore.head(self._client, name))
        except FileNotFoundError:
            return None

    def read(self, name: str, most: int) -> tuple[bytes, str]:
        """See `ObjectStore.read`."""
        with _FAILURES.named(self.url, "read", name):
            got = obstore.get(self._client, name)
            parts, left = [], most + 1
            for chunk in got.stream(min_chunk_size=1 << 20):
                parts.append(bytes(chunk)[:left])
                left -= len(parts[-1])
                if not left:
                    break
        return b"".join(parts), _version(got.meta)

    def download(self, name: str, path: Path, advance: Callable[[int], object] = ignore) -> None:
        """See `ObjectStore.download`."""
        with _FAILURES.named(self.url, "read", name):
            got = obstore.get(self._client, name)
            with path.open("wb") as file:
                for chunk in got.stream(min_chunk_size=_CHUNK_BYTES):
                    file.write(chunk)
                    advance(len(chunk))

    def create(self, name: str, content: bytes | Path) -> str:
        """See `ObjectStore.create`."""
        if isinstance(content, Path) and content.stat().st_size > _ONE_REQUEST:
            # Only a whole object may be written on a condition. Its name is one that nobody else chooses.
            if self.find(name) is not None:
                raise Taken(name)
            self.put(name, content)
            return ""
        return self._put(name, content, "create")

    def replace(self, name: str, content: bytes, version: str) -> str:
        """See `ObjectStore.replace`."""
        e_tag, _, number = version.partition("\n")
        return self._put(name, content, {"e_tag": e_tag, **({"version": number} if number else {})})

    def _put(self, name: str, content: bytes | Path, mode: Any) -> str:
        with _FAILURES.named(self.url, "written", name):
            try:
                done = obstore.put(self._client, name, content, mode=mode, use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
                raise Taken(name) from error
            except FileNotFoundError as error:  # what was to be replaced is gone
                raise Taken(name) from error
            except (exceptions.NotSupportedError, NotImplementedError) as error:
                raise NoConditions(in_short(error)) from error
            except exceptions.GenericError as error:
                if "409 Conflict" in str(error):  # two writes at the same time, of which the other one is done
                    raise Taken(name) from error
                if "501 Not Implemented" in str(error):
                    raise NoConditions(in_short(error)) from error
                raise
        return _version(done)

    def put(self, name: str, content: bytes | Path) -> None:
        """See `ObjectStore.put`."""
        with _FAILURES.named(self.url, "written", name):
            obstore.put(self._client, name, content, chunk_size=_CHUNK_BYTES)

    def delete(self, names: Sequence[str]) -> None:
        """See `ObjectStore.delete`."""
        for start in range(0, len(names), _DELETED_AT_ONCE):
            some = list(names[start : start + _DELETED_AT_ONCE])
            with _FAILURES.named(self.url, "deleted"):
                try:
                    obstore.delete(self._client, some)
                except FileNotFoundError:  # Google's storage and Azure's say so where S3 does not, and stop there
                    for name in some:
                        with suppress(FileNotFoundError):
                            obstore.delete(self._client, name)


def _credentials() -> dict[str, Any]:
    """Who asks, where the environment does not say and boto3 is installed: it knows profiles, too."""
    if "AWS_ACCESS_KEY_ID" in os.environ or not _has_profile():
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except ValueError:  # it has none, and neither has the environment
        return {}


def _has_profile() -> bool:
    """Whether credentials are in a file, which obstore does not read by itself."""
    given = os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    return "AWS_PROFILE" in os.environ or (Path(given) if given else Path("~/.aws/credentials").expanduser()).is_file()


def _version(meta: Mapping[str, Any]) -> str:
    """What a write on a condition takes: an ETag, and a number where the storage has one, as Google's."""
    return "\n".join(filter(None, (meta["e_tag"], meta["version"])))


def _stored(meta: Mapping[str, Any]) -> Stored:
    return Stored(meta["path"], meta["size"], meta["e_tag"] or "", meta["last_modified"].timestamp())
