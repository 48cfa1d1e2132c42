"""The settings of the engine, each declared once: its name, its type, its default, and the help text of its option.

The command line makes its options from these dataclasses (`cli/options.py`), and library functions take them as they are. A new
setting is one field here; the code that acts on it reads it from the dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least, check_choice, is_finite

RESIZE_MODES = ("crop", "stretch", "letterbox")
FUSIONS = ("mean", "concat")
DISTANCES = ("l2", "squared_l2")
LOCALIZE = ("all", "flagged", "none")
PRECISIONS = ("float32", "bfloat16")
DTYPES = ("float16", "float32")
NORMALIZE = ("none", "l2")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def setting(
    default: Any, help: str, *, choices: tuple[str, ...] = (), metavar: str | None = None, kind: type | None = None
) -> Any:
    """A field of a settings dataclass that the command line makes an option of.

    Args:
        default: the field's default; `dataclasses.MISSING` if the option has to be given.
        help: what the option does, without its default.
        choices: the values that it may have, if they are few.
        metavar: what stands for its value in the help text.
        kind: what the command line parses its text as; the field's own type unless given.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, "kind": kind})


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the backbone's input; recorded in the bank, identical for every query.

    `resize_mode` says which part of an image is scored:
    - `crop`: the shorter side to `resize` pixels, then the central `crop` x `crop` square (as in the paper);
    - `stretch`: the whole image, resized to `crop` x `crop` whatever its aspect ratio;
    - `letterbox`: the whole image, aspect ratio kept, its longer side to `crop` pixels; margins repeat its border and
      are not scored.

    `bit_depth` says how many bits the camera gives of the 16 that a channel is stored in: all images are scaled alike by it.
    None says that no normal image has 16 bits; a new bank finds the depth on its normal images.
    """

    resize_mode: str = setting(
        "crop",
        "the part of an image that is scored: its central square (crop), all of it squeezed into a square (stretch), or all of "
        "it at its own aspect ratio (letterbox)",
        choices=RESIZE_MODES,
    )
    resize: int = setting(256, "shorter side of an image before its central square is cut out", metavar="PIXELS")
    crop: int = setting(224, "side of the backbone's input", metavar="PIXELS")
    bit_depth: int | None = setting(
        None,
        "how many bits the camera gives in images that are stored with 16, such as 12; found on the normal images unless given",
        metavar="BITS",
        kind=int,
    )
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_choice("resize_mode", self.resize_mode, RESIZE_MODES)
        check_at_least("crop", self.crop, 1)
        check_at_least("resize", self.resize, 1)
        if self.resize_mode == "crop" and self.resize < self.crop:
            raise InputError(f"resize={self.resize} is smaller than crop={self.crop}; the crop must fit into the resized image")
        if self.bit_depth is not None:
            check_choice("bit_depth", self.bit_depth, tuple(range(8, 17)))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3 or not all(map(is_finite, values)):
                raise InputError(f"{name}={values!r} must be a tuple of three finite numbers, one a color")
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
class Extraction:
    """How normal images become the features of a new bank. All of it is recorded in the bank and applied to every query.

    `backbone` is a name that `load_backbone` knows, or a `Backbone` of your own, which brings its own precision and preprocess.
    """

    backbone: object = setting(
        "wide_resnet50_2", "a torchvision ResNet, efficientnet_lite0, or timm:NAME", metavar="NAME", kind=str
    )
    precision: str = setting("float32", "of the forward pass", choices=PRECISIONS)
    preprocess: Preprocess = field(default_factory=Preprocess)
    dtype: str = setting("float16", "of the feature maps as they are stored", choices=DTYPES)
    normalize: str = setting("none", "l2 scales the vector of each location to unit length", choices=NORMALIZE)
    pool: int = setting(1, "average each CELLS x CELLS neighborhood of a feature map", metavar="CELLS")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The parameters of SPADE at query time; changing one never needs a rebuild.

    An image score is the mean distance to the `k_image` nearest normal images. A pixel score is the mean distance to the
    `kappa` nearest vectors in the feature maps of the `k_gallery` nearest normal images. With `localize='flagged'`, images with
    an image score above `flag_above` get a map and the others do not.
    """

    k_image: int = setting(5, "nearest normal images that the image score averages", metavar="K")
    k_gallery: int = setting(5, "nearest normal images whose feature maps are searched", metavar="K")
    kappa: int = setting(1, "nearest vectors that a pixel score averages", metavar="K")
    fusion: str = setting(
        "mean", "of the pyramid levels: the mean of their maps, or one search in all of them", choices=FUSIONS
    )
    distance: str = setting("l2", "of every score; the paper's is squared_l2", choices=DISTANCES)
    sigma: float = setting(4.0, "of the Gaussian that smooths the map, in input pixels; 0 for none", metavar="PIXELS")
    localize: str = setting("all", "which images get a map", choices=LOCALIZE)
    flag_above: float | None = setting(
        None, "the image score above which an image gets a map under --localize flagged", metavar="SCORE"
    )

    def __post_init__(self) -> None:
        for name in ("k_image", "k_gallery", "kappa"):
            check_at_least(name, getattr(self, name), 1)
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("distance", self.distance, DISTANCES)
        if not is_finite(self.sigma) or self.sigma < 0:
            raise InputError(f"sigma={self.sigma!r} must be a number of 0 or more")
        check_choice("localize", self.localize, LOCALIZE)
        if self.localize == "flagged" and not is_finite(self.flag_above):
            raise InputError(
                "localize='flagged' needs flag_above, the image score above which an image gets a map "
                f"(on the command line, or --flag-below-p); got {self.flag_above!r}"
            )
        if self.localize != "flagged" and self.flag_above is not None:
            raise InputError(
                f"flag_above={self.flag_above!r} does nothing with localize={self.localize!r}; use localize='flagged'"
            )
        for name in ("sigma", "flag_above"):  # a NumPy number is one too, but none that JSON knows
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which rate of false alarms verdicts keep: `alpha`, or `fdr` in its place."""

    alpha: float | None = setting(
        None, "share of normal images that may be alarms; the calibration's own unless given", metavar="A"
    )
    fdr: float | None = setting(None, "share of the alarms that may be false, to be kept in place of alpha", metavar="Q")

    def __post_init__(self) -> None:
        if self.alpha is not None and self.fdr is not None:
            raise InputError(f"alpha={self.alpha} and fdr={self.fdr} are two rules for one verdict; give one")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a folder of results shows beside its numbers."""

    overlays: bool = setting(False, "write a PNG of each image under its heat map")
    shown: int = setting(24, "images that the report shows in full", metavar="N")

    def __post_init__(self) -> None:
        check_at_least("shown", self.shown, 0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How work is done on this machine; results do not depend on it.

    `weights` is where the backbone's weights are, in place of the published ones; a bank remembers where they were, and their
    hash. Up to `max_skipped` unreadable images are left out. `progress` shows bars on stderr if that is a terminal.
    """

    device: str = setting("cpu", "where to compute: cpu, cuda, cuda:NUMBER, cuda:all, or auto")
    memory: str | int = setting(
        "2GiB", "that scoring may take, such as 500MB; batches and caches follow from it", metavar="SIZE", kind=str
    )
    weights: str | Path | None = setting(
        None, "a state dict (.safetensors or saved by torch) for the backbone", metavar="FILE", kind=str
    )
    max_skipped: int = setting(10, "unreadable images to leave out before giving up", metavar="N")
    progress: bool = False

    def __post_init__(self) -> None:
        check_at_least("max_skipped", self.max_skipped, 0)


DEFAULT_BACKBONE = "wide_resnet50_2"
