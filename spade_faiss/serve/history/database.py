"""The database of a history: how it is opened, and what it cannot do at the moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import Engine, create_engine, make_url
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from spade_faiss.core.files import is_full
from spade_faiss.serve.errors import UnavailableError

# How long a write waits for another process that holds the database, before the client is told to come again.
_LOCKED_S = 5.0
# The option of a connection that will write.
WRITES = "spade_writes"


def sqlite_url(path: str) -> str:
    """The URL of a SQLite database in a file."""
    return f"sqlite:///{path}"


def open_database(url: str) -> Engine:
    """Make the engine of a database; it connects at its first use."""
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if make_url(url).get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    """Readers do not wait for the writer, and what was committed survives a power cut."""
    connection.isolation_level = None  # `_begin_sqlite` begins transactions; the driver would begin them late
    for pragma in (
        f"busy_timeout = {int(1000 * _LOCKED_S)}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # Whoever writes takes the lock first: a reader that becomes a writer may find that it cannot.
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def problems() -> Iterator[None]:
    """What a database cannot do at the moment is no fault of the request."""
    try:
        yield
    except OperationalError as error:
        said = str(error.orig)
        raise UnavailableError(f"the history cannot be used at the moment: {said}; nothing was stored", 2) from error
    except DBAPIError as error:
        if error.connection_invalidated or type(error) is DatabaseError:  # a damaged file is nothing more special
            raise UnavailableError(f"the history cannot be used: {error.orig}; nothing was stored", 2) from error
        raise
    except OSError as error:
        if is_full(error):
            raise UnavailableError(f"the disk has no room: {error}; nothing was stored", 10) from error
        raise
