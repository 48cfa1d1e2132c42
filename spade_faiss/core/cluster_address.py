"""Which cluster is meant: the text of `--cluster`, without Ray."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spade_faiss.core.errors import InputError

AUTO = "auto"
_LOCAL = re.compile(r"local:([1-9][0-9]{0,4})")
_REMOTE = re.compile(r"ray://(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True)
class Address:
    """A cluster that runs somewhere, or one that is started on this machine for one command.

    Args:
        ray: what Ray connects to; None for a cluster of this machine's own.
        workers: how many workers that one has; 0 for a cluster that runs.
    """

    ray: str | None
    workers: int = 0


def parse_address(text: str) -> Address:
    """Read the text of `--cluster`.

    Raises:
        InputError: for a text that is none of `auto`, `ray://HOST:PORT` and `local:N`.
    """
    if text == AUTO:
        return Address(ray=AUTO)
    if found := _LOCAL.fullmatch(text):
        return Address(ray=None, workers=int(found[1]))
    if (found := _REMOTE.fullmatch(text)) and 0 < int(found[2]) < 1 << 16:
        return Address(ray=text)
    raise InputError(
        f"cluster={text!r} is no cluster; give auto (the one that this machine belongs to), ray://HOST:PORT, or local:N for N "
        "workers on this machine"
    )
