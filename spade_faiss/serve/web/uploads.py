"""Uploads: bodies become files as they arrive, counted in bytes, files and seconds. A client's name for one is no path."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from io import FileIO
from typing import Any
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from spade_faiss.core.errors import InputError
from spade_faiss.serve.errors import TooLargeError, UnavailableError
from spade_faiss.serve.history.files import Files, suffix_of
from spade_faiss.serve.history.records import UPLOAD, new_id, utc_now
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.verdicts import Upload

KEY_HEADER = "idempotency-key"
NAME_HEADER = "x-spade-faiss-name"
SOURCE_HEADER = "x-spade-faiss-source"
LONGEST_NAME = 255
LONGEST_KEY = 128

# Fields beside the files mean nothing to us, but may come with a form.
_MOST_FIELD_BYTES = 1 << 16
_MOST_FIELDS = 100
_START = 16
_KEY_LETTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._:-")


@dataclass(eq=False)
class _File:
    """A file that is arriving."""

    id: str
    name: str
    stream: FileIO
    count: int = 0
    start: bytes = b""

    def write(self, data: bytes) -> None:
        """Add a part of its content."""
        if len(self.start) < _START:
            self.start += data[: _START - len(self.start)]
        self.count += len(data)
        rest = memoryview(data)
        while rest:  # not buffered, so that a full disk is met here, and not where the file is closed
            rest = rest[self.stream.write(rest) or 0 :]


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A file of a request: an upload, or why it cannot be one."""

    name: str
    upload: Upload | None = None
    error: InputError | None = None


@dataclass(eq=False)
class Receiver:
    """Takes the body of one request.

    Args:
        files: where its files are put.
        settings: the limits.
        source: where the pictures come from.
        key: what the sender calls the request.
    """

    files: Files
    settings: ServeSettings
    source: str
    key: str | None
    received: datetime = field(default_factory=utc_now)
    _open: list[_File] = field(default_factory=list)

    async def __call__(self, request: Request) -> list[Arrived]:
        """Read the body into files.

        Raises:
            TooLargeError: if it has more bytes or files than are allowed.
            InputError: for a form that cannot be understood, or holds no file.
            HTTPException: 408 if it takes too long, 415 for another kind of body.
        """
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        is_form = kind == b"multipart/form-data"
        if not is_form and kind != b"application/octet-stream" and not kind.startswith(b"image/"):
            raise HTTPException(415, "send a picture as it is (image/png, image/jpeg ...), or several as multipart/form-data")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal():
            self._check_bytes(int(announced))
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                if is_form:
                    await self._read_form(self._body(request), options)
                else:
                    await self._read_raw(self._body(request), request)
        except TimeoutError:
            self.drop()
            raise HTTPException(408, f"the request took longer than {self.settings.timeout_s:g} s to arrive") from None
        except ClientDisconnect:
            self.drop()
            raise HTTPException(400, "the request ended before its body was complete") from None
        except OSError as error:
            self.drop()
            raise UnavailableError(f"the picture cannot be stored at the moment: {error.strerror}", 10) from error
        except BaseException:
            self.drop()
            raise
        return self._arrived()

    def drop(self) -> None:
        """Remove the files."""
        for file in self._open:
            file.stream.close()
            self.files.drop(file.id)
        self._open = []

    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        count = 0
        async for chunk in request.stream():
            count += len(chunk)
            self._check_bytes(count)
            yield chunk

    def _check_bytes(self, count: int) -> None:
        if count > (most := self.settings.upload_bytes):
            raise TooLargeError(f"the request is larger than the {most} bytes allowed (see --max-upload-bytes)")

    async def _read_raw(self, body: AsyncIterator[bytes], request: Request) -> None:
        file = self._new(_text_of(unquote(request.headers.get(NAME_HEADER, ""))) or "picture")
        async for chunk in body:
            file.write(chunk)

    async def _read_form(self, body: AsyncIterator[bytes], options: dict[bytes, bytes]) -> None:
        form = _Form(self)
        try:
            parser = MultipartParser(options.get(b"boundary", b""), form.callbacks())
            async for chunk in body:
                parser.write(chunk)
            parser.finalize()
        except (FormParserError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the form cannot be understood: {error}") from error
        if not form.ended:
            raise InputError("the form ends before its last boundary")
        if not self._open:
            raise InputError("the form holds no file; send pictures as its parts, each with a filename")

    def _new(self, name: str) -> _File:
        if len(self._open) == self.settings.max_files:
            raise TooLargeError(f"a request may hold {self.settings.max_files} pictures at most (see --max-files)")
        ident = new_id()
        file = _File(ident, name, FileIO(self.files.incoming(ident), "wb"))
        self._open.append(file)
        return file

    def _arrived(self) -> list[Arrived]:
        found = []
        for number, file in enumerate(self._open):
            file.stream.close()
            try:
                if not file.count:
                    raise InputError("the file is empty")
                suffix = suffix_of(file.start)
            except InputError as error:
                self.files.drop(file.id)
                found.append(Arrived(name=file.name, error=InputError(f"cannot use {file.name!r}: {error}")))
                continue
            path = self.files.incoming(file.id, suffix)
            os.replace(self.files.incoming(file.id), path)  # noqa: PTH105  # a rename, of paths that are ours
            upload = Upload(
                id=file.id,
                path=path,
                suffix=suffix,
                bytes=file.count,
                name=file.name,
                source=self.source,
                key=self.key if self.key is None or not number else f"{self.key}#{number}",
                received=self.received,
            )
            found.append(Arrived(name=file.name, upload=upload))
        return found


class _Form:
    """The parts of a form, as its parser meets them."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._name, self._value, self._disposition = b"", b"", b""
        self._file: _File | None = None
        self._field_bytes = self._fields = 0
        self.ended = False

    def callbacks(self) -> Any:
        """What the parser calls."""
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "headers_finished", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self._name, self._value, self._disposition, self._file = b"", b"", b"", None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if not options.get(b"filename"):  # browsers send an empty one where no file was chosen
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise TooLargeError(f"the form has more than {_MOST_FIELDS} fields that are no files")
            return
        name = options[b"filename"].decode("utf-8", "replace")
        # Some clients send a path; its last part is the name, whatever system it is of.
        self._file = self._receiver._new(_text_of(name.replace("\\", "/").rpartition("/")[2]) or "picture")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
            return
        self._field_bytes += end - start
        if self._field_bytes > _MOST_FIELD_BYTES:
            raise TooLargeError(f"the form has more than {_MOST_FIELD_BYTES} bytes beside its files")

    def _part_end(self) -> None:
        self._file = None

    def _end(self) -> None:
        self.ended = True


def receiver_of(request: Request, files: Files, settings: ServeSettings) -> Receiver:
    """What takes the body of a request, by the headers of that.

    Raises:
        InputError: for a key that cannot be one.
    """
    key = request.headers.get(KEY_HEADER)
    if key is not None and not (0 < len(key) <= LONGEST_KEY and set(key) <= _KEY_LETTERS):
        raise InputError(f"Idempotency-Key must be 1 to {LONGEST_KEY} letters, digits, and . _ : -")
    source = _text_of(unquote(request.headers.get(SOURCE_HEADER, ""))) or UPLOAD
    return Receiver(files, settings, source, key)


def _text_of(text: str) -> str:
    """Text of a client that any database and any page can hold."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")[:LONGEST_NAME].strip()
