"""Checks of settings, and dataclasses built from parsed YAML or JSON: unknown keys and values out of range are refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from numbers import Real
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from spade_faiss.core.errors import InputError

T = TypeVar("T")

# How much of a value a message shows. Whoever wrote the file chose it, and it may be as long as the file.
_SHOWN = 200


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise InputError unless `value` is one of `choices`; the message names the setting `name`."""
    if value not in choices:
        raise InputError(f"{name}={shorten(value)} is not one of {', '.join(str(choice) for choice in choices)}")


def check_at_least(name: str, value: object, least: int) -> None:
    """Raise InputError unless `value` is an integer of at least `least`; the message names the setting `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={shorten(value)} must be an integer of at least {least}")


def shorten(value: object) -> str:
    """Return a value as it is written in Python, cut off where it is long."""
    return cut(repr(value), _SHOWN)


def cut(text: str, most: int) -> str:
    """Return a text, cut off after so many characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def is_finite(value: object) -> bool:
    """Tell whether `value` is a finite number; a bool does not count as one."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def from_mapping(cls: type[T], mapping: object, where: str) -> T:
    """Build the dataclass `cls` from a parsed YAML or JSON mapping.

    Nested dataclasses are built the same way, and a list becomes a tuple where the field is a tuple. A field that had another
    name is found under that, too: the metadata of the field hold it as `formerly`.

    Args:
        cls: the dataclass.
        mapping: the parsed content.
        where: the place that the content came from, such as a file; error messages start with it.

    Raises:
        InputError: for content that is not a mapping, an unknown or missing key, or a value of the wrong type or range.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where}: expected a mapping, got {type(mapping).__name__}")
    fields, hints = dataclasses.fields(cls), _type_hints(cls)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    renamed: dict[str, str] = {field.metadata["formerly"]: field.name for field in fields if field.metadata.get("formerly")}
    if any(old in mapping and new not in mapping for old, new in renamed.items()):
        mapping = {renamed.get(str(name), str(name)): value for name, value in mapping.items()}
    if unknown := sorted(set(map(str, mapping)) - set(known)):
        raise InputError(f"{where}: unknown key {shorten(unknown[0])}; known are {', '.join(known)}")
    values = {name: _checked(hints[name], value, f"{where}: {name}") for name, value in mapping.items()}
    needed = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(values)):
        raise InputError(f"{where}: missing key {missing[0]!r}")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


# The types that stand for themselves in a field.
_PLAIN: dict[type, set[type]] = {float: {float, int}, int: {int}, str: {str}}

# A manifest may hold a hundred thousand entries, and the hints of their class take longer to find than the rest.
_type_hints = cache(get_type_hints)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """Return a parsed value as the type that a field asks for, or raise InputError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        if type(None) in arguments:  # `X | None`
            return None if value is None else _checked(arguments[0], value, where)
        for several in (argument for argument in arguments if get_origin(argument) is tuple):  # `X | tuple[X, ...]`
            if isinstance(value, list | tuple):
                return _checked(several, value, where)
        kinds = tuple(argument for argument in arguments if get_origin(argument) is None)
        if isinstance(value, bool) or not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{where}={shorten(value)} is of type {type(value).__name__}, expected {names}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_mapping(cast(type[Any], hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}={shorten(value)} is of type {type(value).__name__}, expected a list")
        if arguments[-1] is Ellipsis and set(map(type, value)) <= _PLAIN.get(arguments[0], set()):
            return tuple(value)  # a calibration holds ten thousand numbers
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(kinds):
            raise InputError(f"{where}={shorten(value)} has {len(value)} values, expected {len(kinds)}")
        return tuple(_checked(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}={shorten(value)} is of type {type(value).__name__}, expected a mapping")
        return {
            _checked(arguments[0], key, where): _checked(arguments[1], item, f"{where}: {key}") for key, item in value.items()
        }
    allowed = (int, float) if hint is float else hint
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, allowed):
        raise InputError(f"{where}={shorten(value)} is of type {type(value).__name__}, expected {hint.__name__}")
    return value
