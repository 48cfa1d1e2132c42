"""The settings of the server; the command line makes its options from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from spade_faiss.core.declaring import setting
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.schema import check_at_least, is_finite, shorten

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHORTEST_TOKEN = 16
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How banks are served.

    `token_file` holds the token that clients have to know; without one, the server can be reached from its own machine alone.
    """

    host: str = setting(
        "127.0.0.1", "the address to listen at; any other than that of this machine needs --token-file", metavar="ADDRESS"
    )
    port: int = setting(8000, "the port to listen at; 0 takes one that is free", metavar="PORT")
    data: str | Path = setting(
        "served", "the folder of what was scored: the history, pictures and maps", metavar="FOLDER", kind=str
    )
    database: str | None = setting(
        None,
        "the database of the history as SQLAlchemy names it, such as postgresql+psycopg://user@host/name (default: SQLite, in "
        "the folder of --data)",
        metavar="URL",
    )
    token_file: str | Path | None = setting(
        None,
        "a file that holds the token that clients have to send; make one with: openssl rand -hex 32",
        metavar="FILE",
        kind=str,
    )
    max_wait_ms: float = setting(
        2.0, "how long a picture waits for others that are being decoded, to be scored together with them", metavar="MS"
    )
    max_queue: int = setting(64, "how many pictures may wait for a bank; further ones are answered 503 at once", metavar="N")
    keep: str | None = setting(
        None,
        "how long verdicts and pictures are kept that nobody answered, such as 30d or 12h (default: for good)",
        metavar="TIME",
    )
    keep_bytes: str | int | None = setting(
        None,
        "how much pictures and maps may take on disk, such as 20GB; the oldest go first (default: all there is)",
        metavar="SIZE",
        kind=str,
    )
    max_upload_bytes: str | int = setting("64MB", "the most bytes of a request", metavar="SIZE", kind=str)
    max_pixels: int = setting(50_000_000, "the most pixels of a picture", metavar="N")
    max_files: int = setting(64, "the most pictures of a request", metavar="N")
    timeout_s: float = setting(60.0, "how long a request may take to arrive, and to be answered then", metavar="SECONDS")
    score_again: int = setting(200, "how many older alarms are scored again when a bank has changed", metavar="N")
    holdout: str | None = setting(
        None,
        "for banks that were calibrated with held-out images: the folder of those, needed to calibrate again when the bank "
        "changes; several banks: NAME=FOLDER,NAME=FOLDER",
        metavar="FOLDERS",
    )

    def __post_init__(self) -> None:
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 1 << 16:
            raise InputError(f"port={shorten(self.port)} must be a number from 0 to 65535")
        for name in ("max_queue", "max_pixels", "max_files"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("score_again", self.score_again, 0)
        for name, least in (("max_wait_ms", 0.0), ("timeout_s", 0.1)):
            if not is_finite(value := getattr(self, name)) or value < least:
                raise InputError(f"{name}={shorten(value)} must be a number of at least {least:g}")
        _ = self.kept_for, self.kept_bytes, self.upload_bytes  # they raise for what cannot be
        if self.token_file is None and not self.is_loopback:
            raise InputError(
                f"host={self.host} can be reached from other machines, so clients need a token: make a file with "
                "`openssl rand -hex 32 > token` and give --token-file token, or leave --host out"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return self.host in LOOPBACK or bool(re.fullmatch(r"127\.\d{1,3}\.\d{1,3}\.\d{1,3}", self.host))

    @property
    def kept_for(self) -> timedelta | None:
        """`keep` as a time; None for good."""
        if self.keep is None:
            return None
        found = re.fullmatch(r"(\d{1,6})([smhdw])", self.keep)
        if found is None or not int(found[1]):
            raise InputError(f"keep={shorten(self.keep)} must be a number and one of s, m, h, d, w, such as 30d")
        return timedelta(**{_UNITS[found[2]]: int(found[1])})

    @property
    def kept_bytes(self) -> int | None:
        """`keep_bytes` as a number."""
        return None if self.keep_bytes is None else parse_bytes(self.keep_bytes)

    @property
    def upload_bytes(self) -> int:
        """`max_upload_bytes` as a number."""
        return parse_bytes(self.max_upload_bytes)

    def token(self) -> str | None:
        """The token that clients have to send; None if they need none.

        Raises:
            InputError: if the file cannot be read, or its token is too short to be safe.
        """
        if self.token_file is None:
            return None
        try:
            found = Path(self.token_file).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"token_file={self.token_file} cannot be read: {error}") from error
        if len(found) < SHORTEST_TOKEN or not found.isprintable() or " " in found:
            raise InputError(
                f"token_file={self.token_file} holds a token of {len(found)} characters; at least {SHORTEST_TOKEN} and no "
                f"spaces are needed: openssl rand -hex 32 > {self.token_file}"
            )
        return found

    def holdout_of(self, bank: str) -> str | None:
        """The folder of held-out images of a bank; None if none is given."""
        if self.holdout is None:
            return None
        if "=" not in self.holdout:
            return self.holdout
        named = dict(part.partition("=")[::2] for part in self.holdout.split(","))
        return named.get(bank)
