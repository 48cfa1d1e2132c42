"""The errors of the server; `web/problems.py` says which status each has."""

from __future__ import annotations

from spade_faiss.core.errors import SpadeError


class UnavailableError(SpadeError):
    """Something cannot be done at the moment, and the same request may succeed later: a full queue, a locked database, a full
    disk.

    Args:
        message: what cannot be done, and why.
        retry_after_s: when it is worth another try, in whole seconds.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownError(SpadeError):
    """A bank, a picture or an answer that is not there; what remains of a picture once its files were removed."""


class RefusedError(SpadeError):
    """A request of somebody who is not known, or that another site had a browser send.

    Args:
        message: why.
        status: 401 where a token helps, 403 where nothing does.
    """

    def __init__(self, message: str, status: int = 403) -> None:
        super().__init__(message)
        self.status = status


class TooLargeError(SpadeError):
    """A request of more bytes, files or pixels than are allowed."""


class ConflictError(SpadeError):
    """A request that does not fit what was done before."""
