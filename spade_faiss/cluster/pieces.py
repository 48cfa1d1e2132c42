"""Running the pieces of a plan on a cluster: Ray schedules them, and runs those again whose worker or node is lost."""

from __future__ import annotations

import pickle
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from spade_faiss.cluster.plan import Piece
from spade_faiss.cluster.session import RETRIES, Session, import_ray
from spade_faiss.core.errors import ClusterError, SpadeError

State = TypeVar("State")
Argument = TypeVar("Argument")
Result = TypeVar("Result")

# Pieces that are under way for each worker: one that it computes, and one whose result waits for those before it.
_AHEAD = 3

# What this process, a worker's, has opened for the command that it works for: a network, a bank. Ray starts a process once
# for many pieces.
_opened: dict[str, Any] = {}


@dataclass(frozen=True)
class Work(Generic[State, Argument, Result]):
    """What is done with each piece.

    Args:
        open: opens what all pieces need, once in each worker; it travels pickled, with what it holds.
        run: works on a piece: gets what was opened, and what the piece is of.
    """

    open: Callable[[], State]
    run: Callable[[State, Argument], Result]


class PieceRunner(Generic[State, Argument, Result]):
    """Runs pieces of one command. What a worker opens stays open from piece to piece.

    Args:
        session: the connection.
        work: what is done.
        device: where workers compute, see `Session.options`.
    """

    def __init__(self, session: Session, work: Work[State, Argument, Result], device: str = "cpu") -> None:
        ray = import_ray()
        self._session = session
        self._key = secrets.token_hex(8)
        # As bytes: a worker unpickles what it opens once, and what goes wrong then is an error of the piece.
        self._work = ray.put(_Packed(pickle.dumps(work.open), work.run))
        self._task = ray.remote(_run_piece).options(**session.options(device))

    def __call__(self, pieces: Iterable[tuple[Piece, Argument]]) -> Iterator[tuple[Piece, Result]]:
        """Yield the result of each piece, in the order of the pieces, while others are computed.

        Pieces are taken as they are needed: what they are of is not all in memory at a time. After an error, those that were
        begun end by themselves, or with the connection. Ray (2.60) does not survive to cancel a task that has just been sent to
        its worker: the answer that comes all the same ends the whole process (ray-project/ray#54785, "Tried to complete task
        that was not pending").

        Raises:
            SpadeError: what a piece raised; the message names the node and the piece.
            ClusterError: for a piece whose worker was lost again and again, or that failed in another way.
        """
        ray, waiting = import_ray(), iter(pieces)
        running: deque[tuple[Piece, Any]] = deque()
        while True:
            ahead = _AHEAD * self._session.workers()
            while len(running) < ahead and (following := next(waiting, None)) is not None:
                piece, argument = following
                running.append((piece, self._task.remote(self._key, self._work, str(piece), argument)))
            if not running:
                return
            piece, reference = running.popleft()
            with _errors_named(str(piece)):
                found: Result = ray.get(reference)
            yield piece, found


def node_name() -> str:
    """What messages call the node that this process runs on."""
    ray = import_ray()
    return f"node {socket.gethostname()} ({ray.util.get_node_ip_address()})"


@dataclass(frozen=True)
class _Packed(Generic[State, Argument, Result]):
    """A `Work` as it travels."""

    open: bytes
    run: Callable[[State, Argument], Result]


def _run_piece(key: str, work: _Packed[State, Argument, Result], piece: str, argument: Argument) -> Result:
    """What a worker does, in its own process."""
    try:
        if key not in _opened:
            _opened.clear()  # of a command before
            _opened[key] = pickle.loads(work.open)()
        return work.run(_opened[key], argument)
    except SpadeError as error:
        raise type(error)(f"{error} [{node_name()}, {piece}]") from error
    except Exception as error:  # the outermost frame of a worker
        raise ClusterError(f"a worker failed: {type(error).__name__}: {error} [{node_name()}, {piece}]") from error


@contextmanager
def _errors_named(piece: str) -> Iterator[None]:
    """Raise what a piece raised, and ClusterError for what became of its worker."""
    errors = import_ray().exceptions
    try:
        yield
    except errors.RayTaskError as error:
        if isinstance(error.cause, SpadeError):
            raise error.cause from None
        raise ClusterError(f"{piece} could not be begun: {error.cause!r}") from error
    except errors.RayError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(
            f"{piece} was begun {RETRIES + 1} times, and its worker or its node was lost each time: {first}; look into Ray's "
            "logs, and run the command again: it goes on where it stopped"
        ) from error
