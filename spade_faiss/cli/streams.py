"""The standard streams: they may be closed, full, or a pipe that nobody reads, and their encoding may be ASCII."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from spade_faiss.core.text import printable


def open_closed_streams() -> None:
    """Open the null device in place of each standard stream that is closed.

    Otherwise the next file that is opened, such as a part of a bank, takes the stream's place, and what a library prints is
    written into it. `sys.stdout` stays None, so that `write_output` knows.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the smallest number that is free
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends


def write_output(text: str) -> None:
    """Write lines to standard output; characters that it cannot encode are escaped.

    Raises:
        OSError: if they cannot be written. What is written after that is lost.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError:
        # Python flushes once more at its end, and would report the same error again.
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        raise


def write_error(text: str) -> None:
    """Write one line to standard error, if that is possible."""
    with suppress(OSError):
        sys.stderr.write(f"spade-faiss: {printable(' '.join(text.split()))}\n")
        sys.stderr.flush()
