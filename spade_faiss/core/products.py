"""The names of a bank's products, and of the folders in which what is built of one lies."""

from __future__ import annotations

import hashlib
import re

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import shorten
from spade_faiss.core.text import printable

_LONGEST = 200
_READABLE = 40


def check_product(name: object) -> str:
    """Return the name of a product.

    Raises:
        InputError: for one that is empty, too long, or that cannot be shown on one line as it is.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST or name != name.strip() or printable(name) != name:
        raise InputError(
            f"product={shorten(name)} must be the name of a product: text of 1 to {_LONGEST} characters on one line, without "
            f"spaces around it"
        )
    return name


def is_product_folder(name: str) -> bool:
    """Whether a folder may be one that `product_folder` names."""
    return re.fullmatch(rf"[A-Za-z0-9_-]{{1,{_READABLE}}}-[0-9a-f]{{16}}", name) is not None


def product_folder(name: str) -> str:
    """Return the name of the folder of a product: what can be read of its name, and a part of its hash."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:_READABLE]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
