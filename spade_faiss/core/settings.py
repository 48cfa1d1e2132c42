"""Settings as frozen dataclasses that refuse unknown keys and values out of range."""

from __future__ import annotations

from dataclasses import dataclass

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least, check_choice, is_finite

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
            if not isinstance(values, tuple) or len(values) != 3 or not all(map(is_finite, values)):
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
        if not is_finite(self.sigma) or self.sigma < 0:
            raise InputError(f"sigma={self.sigma!r} must be a number of 0 or more")
        check_choice("localize", self.localize, LOCALIZE)
        limits = {name: getattr(self, name) for name in ("flag_above", "flag_below_p") if getattr(self, name) is not None}
        if len(limits) > 1:
            raise InputError(
                f"flag_above={self.flag_above!r} and flag_below_p={self.flag_below_p!r} exclude each other; give one"
            )
        given = next(iter(limits.values()), None)
        if self.localize == "flagged" and not is_finite(given):
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
