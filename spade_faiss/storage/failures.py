"""Errors of storage, said in one way whatever library reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from spade_faiss.core.errors import StorageError
from spade_faiss.storage.url import Url

# How much is said about an error: what follows is the server's answer and the library's own state.
_MOST_CHARACTERS = 300


class Failures(NamedTuple):
    """What a library raises.

    Attributes:
        failed: where storage cannot be reached, or does not do what it is asked for.
        refused: where access is refused.
        check: what is to be checked then, as the end of a sentence.
    """

    failed: tuple[type[Exception], ...]
    refused: tuple[type[Exception], ...] = ()
    check: str = ""

    @contextmanager
    def named(self, url: Url, done: str, name: str = "") -> Iterator[None]:
        """Raise StorageError, which names the URL and says what to do, in place of what the library raises.

        A FileNotFoundError is left as it is: that there is no such object is an answer.

        Args:
            url: where the storage is.
            done: what is done there, as in `cannot be DONE`.
            name: the object below the URL that it is done to; empty for all of them.
        """
        place = f"{url}/{name}" if name else str(url)
        try:
            yield
        except FileNotFoundError:
            raise
        except self.refused as error:
            raise StorageError(
                f"{place} cannot be {done}: access is refused; check the credentials in the environment ({in_short(error)})"
            ) from error
        except self.failed as error:
            raise StorageError(f"{place} cannot be {done}: {in_short(error)}{self.check}") from error


def in_short(error: Exception) -> str:
    """What went wrong, on one line; without what obstore says of its own state."""
    return " ".join(str(error).split("Debug source:")[0].split())[:_MOST_CHARACTERS]
