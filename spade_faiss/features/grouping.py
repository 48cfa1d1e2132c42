"""Finds the group and the product of each normal picture.

Pictures of a group are left out together where normal pictures are scored; those of a product are searched by themselves.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.grouping import FOLDER, NONE, REGEX, TABLE, Grouping, compile_pattern
from spade_faiss.core.products import check_product
from spade_faiss.core.schema import shorten
from spade_faiss.features.folders import name_some

_COLUMNS = ("id", "group")
_LARGEST_TABLE = 1 << 28
_log = logging.getLogger(__name__)


def find_groups(names: Sequence[str], grouping: Grouping | None, given: str | None) -> tuple[str, ...]:
    """The group of each picture; an empty text for one that belongs to none.

    Args:
        names: the ids of the pictures.
        grouping: that of the bank; None if its pictures have no groups.
        given: what the caller says of these pictures: the bank's grouping again, a table, or `none`. None says nothing, which
            is enough for folders. A pattern is not taken from a bank: it may be somebody else's, and matching can be made to
            take forever.

    Returns:
        A group for each; none at all if no picture has one.

    Raises:
        InputError: if the bank is grouped otherwise or needs to be told, if a table is no such table, or if what
            is given finds no group for any of several pictures.
        NotFoundError: if there is no such table.
    """
    if given == NONE or (grouping is None and given is None):
        return ()
    if grouping is None:
        raise InputError(f"group_by={shorten(given)}: this bank was made without groups; leave it out, or make a new bank")
    if given is None:
        if grouping.by != FOLDER:
            raise InputError(
                f"this bank groups its pictures by {grouping}; say how these belong together: --group-by "
                f"{'FILE.csv' if grouping.by != REGEX else repr(str(grouping))}, or --group-by none if each is by itself"
            )
        asked, table = grouping, ""
    else:
        asked, table = Grouping.parse(given)
    if asked != grouping:
        raise InputError(f"this bank groups its pictures by {grouping}, asked for {asked}; use the bank's, or make a new bank")
    group_of = _group_of(asked, table)
    groups = tuple(group_of(name) or "" for name in names)
    if missing := [name for name, group in zip(names, groups, strict=True) if not group]:
        if given is not None and len(missing) == len(names) > 1:
            raise InputError(
                f"group_by={shorten(given or grouping)} finds no group for any of {len(names)} pictures: {name_some(missing)}"
            )
        _log.warning(
            "%d of %d pictures belong to no group, each is by itself: %s", len(missing), len(names), name_some(missing)
        )
    return groups if any(groups) else ()


def find_products(names: Sequence[str], grouping: Grouping | None, given: str | None, product: str | None) -> tuple[str, ...]:
    """The product of each picture; none at all in a bank that was made without.

    Args:
        names: the ids of the pictures.
        grouping: that of the bank; None if it has no products.
        given: what the caller says of these pictures: the bank's grouping again, or a table. With `folder`, the first folder of
            an id names the product.
        product: the product of all of these pictures, in place of that.

    Raises:
        InputError: if nothing is said or too much, the bank tells products otherwise or has none, a table is no such table, or
            a picture is of no product.
        NotFoundError: if there is no such table.
    """
    if product is not None and given is not None:
        raise InputError(f"product={shorten(product)} and products={shorten(given)} exclude each other; leave one of them out")
    if grouping is None:
        if product is None and given is None:
            return ()
        raise InputError("this bank was made without products; leave them out, or make a new bank with --products")
    if product is not None:
        return (check_product(product),) * len(names)
    if given is None:
        raise InputError(
            f"this bank is of several products; say which ones these pictures show: --product NAME, or --products "
            f"{'FILE.csv' if grouping.by == TABLE else repr(str(grouping))}"
        )
    asked, table = Grouping.parse(given, "products")
    if asked != grouping:
        raise InputError(
            f"this bank tells products by {grouping}, asked for {asked}; use the bank's, or name one: --product NAME"
        )
    product_of = _first_folder if asked.by == FOLDER else _group_of(asked, table)
    found = tuple(product_of(name) or "" for name in names)
    if missing := [name for name, of in zip(names, found, strict=True) if not of]:
        raise InputError(
            f"products={shorten(given)} finds no product for {len(missing)} of {len(names)} pictures: {name_some(missing)}; "
            f"each picture of this bank is of one. Those of one product are added with: --product NAME"
        )
    return tuple(check_product(of) for of in found)


def _first_folder(name: str) -> str:
    folder, sign, _ = name.partition("/")
    return folder if sign else ""


def _group_of(grouping: Grouping, table: str) -> Callable[[str], str | None]:
    if grouping.by == FOLDER:
        return lambda name: PurePosixPath(name).parent.as_posix().removeprefix(".")
    if grouping.by == REGEX:
        pattern = compile_pattern(grouping.pattern)

        def found(name: str) -> str | None:
            match = pattern.search(name)
            return None if match is None else "/".join(part or "" for part in match.groups())

        return found
    return read_groups(table).get


def read_groups(path: str | Path) -> dict[str, str]:
    """Read a table of groups: a CSV in UTF-8 with a header and the columns `id` and `group`.

    Raises:
        NotFoundError: if there is no such file.
        InputError: for a file that is too large or no such table, and for a picture that has two groups.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"there is no table of groups at {path}; it is a CSV with the columns {' and '.join(_COLUMNS)}")
    if (size := file.stat().st_size) > _LARGEST_TABLE:
        raise InputError(f"the table {path} has {size} bytes, at most {_LARGEST_TABLE}")
    found: dict[str, str] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise InputError(f"the table {path} has no column {missing[0]!r}; its columns are {shorten(reader.fieldnames)}")
            for row in reader:
                name, group = row["id"] or "", row["group"] or ""
                if found.setdefault(name, group) != group:
                    raise InputError(
                        f"the table {path} puts {shorten(name)} into two groups, {shorten(found[name])} and {shorten(group)}"
                    )
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"the table {path} is no CSV in UTF-8: {error}") from error
    return found
