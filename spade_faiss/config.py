"""Settings as frozen dataclasses that refuse unknown keys and values out of range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from spade_faiss.errors import InputError

T = TypeVar("T")

FRAMINGS = ("crop", "stretch", "letterbox")
FUSIONS = ("mean", "concat")
DISTANCES = ("l2", "squared_l2")
LOCALIZE = ("all", "flagged", "none")
PRECISIONS = ("float32", "bfloat16")
DTYPES = ("float16", "float32")
NORMALIZE = ("none", "l2")

DEFAULT_BACKBONE = "wide_resnet50_2"
# Unreadable images that a run leaves out before it gives up.
MAX_SKIPPED = 10
# That scoring may take beside what is loaded at the start.
MEMORY = "2GiB"
# Where to compute unless told.
DEVICE = "cpu"
# Images that a report shows in full.
SHOWN = 24

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}={value!r} is not one of {', '.join(str(choice) for choice in choices)}")


def check_at_least(name: str, value: object, least: int) -> None:
    """Raise InputError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r} must be an integer of at least {least}")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the backbone's input; recorded in the bank, identical for every query.

    `framing` says which part of an image is scored:
    - `crop`: the shorter side to `resize` pixels, then the central `crop` x `crop` square (the paper's way);
    - `stretch`: the whole image, resized to `crop` x `crop` whatever its aspect ratio;
    - `letterbox`: the whole image, aspect ratio kept, its longer side to `crop` pixels; margins repeat its border and
      are not scored.
    """

    framing: str = "crop"
    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_choice("framing", self.framing, FRAMINGS)
        check_at_least("crop", self.crop, 1)
        check_at_least("resize", self.resize, 1)
        if self.framing == "crop" and self.resize < self.crop:
            raise InputError(f"resize={self.resize} is smaller than crop={self.crop}; the crop must fit into the resized image")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3 or not all(map(_is_finite, values)):
                raise InputError(f"{name}={values!r} must be a tuple of three finite numbers, one a colour")
        if not all(value > 0 for value in self.std):
            raise InputError(f"std must be positive, got {self.std}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Who made the features of a bank: two sources that differ in anything give distances that mean nothing."""

    backbone: str
    weights_sha256: str
    preprocess: Preprocess
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The parameters of SPADE at query time; changing one never needs a rebuild.

    `k_image`: nearest normals that the image score averages. `k_gallery`: nearest normals whose maps are searched.
    `kappa`: nearest gallery vectors that a pixel score averages. `distance`: `l2`, or `squared_l2` as in the paper,
    for image and pixel scores alike. `sigma`: of the Gaussian that smooths the map, in input pixels; 0 leaves it as it is.
    `localize`: which images get a map, `all`, `none`, or those `flagged`: with an image score above
    `flag_above`, or with a p-value of it of at most `flag_below_p`, by the bank's calibration.
    """

    k_image: int = 5
    k_gallery: int = 5
    kappa: int = 1
    fusion: str = "mean"
    distance: str = "l2"
    sigma: float = 4.0
    localize: str = "all"
    flag_above: float | None = None
    flag_below_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("k_image", "k_gallery", "kappa"):
            check_at_least(name, getattr(self, name), 1)
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("distance", self.distance, DISTANCES)
        if not _is_finite(self.sigma) or self.sigma < 0:
            raise InputError(f"sigma={self.sigma!r} must be a number of 0 or more")
        check_choice("localize", self.localize, LOCALIZE)
        limits = {name: getattr(self, name) for name in ("flag_above", "flag_below_p") if getattr(self, name) is not None}
        if len(limits) > 1:
            raise InputError(
                f"flag_above={self.flag_above!r} and flag_below_p={self.flag_below_p!r} exclude each other; give one"
            )
        given = next(iter(limits.values()), None)
        if self.localize == "flagged" and not _is_finite(given):
            raise InputError(
                "localize='flagged' needs flag_above, the image score from which on it looks, "
                f"or flag_below_p, the p-value up to which it does; got {given!r}"
            )
        if self.localize != "flagged" and limits:
            raise InputError(
                f"{next(iter(limits))}={given!r} does nothing with localize={self.localize!r}; use localize='flagged'"
            )
        if self.flag_below_p is not None and not 0 < self.flag_below_p < 1:
            raise InputError(f"flag_below_p={self.flag_below_p!r} must be between 0 and 1")
        for name in ("sigma", "flag_above", "flag_below_p"):  # a NumPy number is one too, but none that JSON knows
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))


def from_mapping(cls: type[T], mapping: object, where: str) -> T:
    """Build the dataclass `cls` from a parsed YAML or JSON mapping.

    Nested dataclasses are built the same way; a list becomes the tuple that the field asks for.

    Raises:
        InputError: for a value that is no mapping, an unknown or missing key, or a value of the wrong type or range;
            the message starts with `where`.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where}: expected a mapping, got {type(mapping).__name__}")
    hints = get_type_hints(cls)
    if unknown := sorted(set(map(str, mapping)) - set(hints)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
    values = {name: _checked(hints[name], value, f"{where}: {name}") for name, value in mapping.items()}
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(values)):
        raise InputError(f"{where}: missing key {missing[0]!r}")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _checked(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        if type(None) in arguments:  # `X | None`
            return None if value is None else _checked(arguments[0], value, where)
        if isinstance(value, bool) or not isinstance(value, arguments):
            names = " or ".join(argument.__name__ for argument in arguments)
            raise InputError(f"{where}={value!r} is of type {type(value).__name__}, expected {names}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_mapping(cast(type[Any], hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}={value!r} is of type {type(value).__name__}, expected a list")
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(kinds):
            raise InputError(f"{where}={value!r} has {len(value)} values, expected {len(kinds)}")
        return tuple(_checked(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}={value!r} is of type {type(value).__name__}, expected a mapping")
        return {
            _checked(arguments[0], key, where): _checked(arguments[1], item, f"{where}: {key}") for key, item in value.items()
        }
    allowed = (int, float) if hint is float else hint
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, allowed):
        raise InputError(f"{where}={value!r} is of type {type(value).__name__}, expected {hint.__name__}")
    return value
