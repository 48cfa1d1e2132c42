"""The settings of the engine. Each is declared once, with its type, its default and the help text of its option.

The command line makes its options from these dataclasses (`cli/options.py`), and library functions take the dataclasses. To add
a setting, add a field here; the code that acts on it reads it from the dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.cluster_address import parse_address
from spade_faiss.core.errors import InputError
from spade_faiss.core.grouping import NONE, Grouping
from spade_faiss.core.roi import Roi
from spade_faiss.core.schema import check_at_least, check_choice, is_finite, shorten
from spade_faiss.core.store import Store

T = TypeVar("T")

RESIZE_MODES = ("crop", "stretch", "letterbox")
FUSIONS = ("mean", "concat")
DISTANCES = ("l2", "squared_l2")
LOCALIZE = ("all", "flagged", "none")
TILE_NEIGHBORS = ("anywhere", "same-place")
PRECISIONS = ("float32", "bfloat16")
# What runs the forward pass of a network.
ENGINES = ("auto", "torch", "openvino", "onnxruntime")
NORMALIZE = ("none", "l2")
POOL_BORDERS = ("valid", "zero")
# Image scores, see `scoring/image_scores.py`.
IMAGE_SCORES = ("knn", "max", "top", "structure")
# As a number of nearest normal images: every one of the bank.
ALL = "all"

# Weights of levels lie between this and its inverse, so that float32 holds what is weighted.
_LIGHTEST = 1e-6

# The longest side of a network's input, and of an image that it is cut out of, in pixels.
LARGEST_SIDE = 10_000
# A large image has too many tiles that are smaller.
_SMALLEST_TILE = 8
# The paper's: the shorter side is resized to 256 pixels, 224 are cut out.
_RESIZE, _CROP = 256, 224
DEFAULT_BACKBONE = "wide_resnet50_2"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    kind: Callable[[str], Any] | None = None,
    formerly: str = "",
) -> Any:
    """Declare a field of a settings dataclass that has an option on the command line.

    Args:
        default: the default of the field and of the option; `dataclasses.MISSING` if the option has to be given.
        help: the help text of the option, without the default. That of a bool which is True says what `--no-NAME` does.
        choices: the values that are allowed, if they are few.
        metavar: the placeholder for the value in the help text.
        kind: what the command line converts the text with; the type of the field unless given.
        formerly: the name under which files hold it that were written before it had this one, see `from_mapping`.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "kind": kind, "formerly": formerly}
    return field(default=default, metadata=metadata)


def int_or_all(text: str) -> int | str:
    """Convert the text of a number of images; `all` stands for every image."""
    return text if text == ALL else int(text)


def one_or_more(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A conversion of text to one value, or to one for each level where commas separate several."""

    def convert(text: str) -> Any:
        values = tuple(map(kind, text.split(",")))
        return values[0] if len(values) == 1 else values

    convert.__name__ = kind.__name__  # argparse shows it
    return convert


def for_each(name: str, value: object, levels: int) -> tuple[Any, ...]:
    """The value of a setting for each of some levels: one value counts for all of them.

    Raises:
        InputError: if it has several values, but not one for each level.
    """
    values = value if isinstance(value, tuple) else (value,) * levels
    if len(values) != levels:
        raise InputError(f"{name}={values!r} has {len(values)} values for {levels} levels; give one for each, or one for all")
    return values


def changed(settings: T, changes: Mapping[str, Any]) -> T:
    """Settings with some of them changed; those whose values follow from others, see `Preprocess.derived`, follow anew."""
    kept = {each.name: getattr(settings, each.name) for each in fields(cast(Any, settings))}
    for name in getattr(settings, "derived", ()):
        del kept[name]
    return type(settings)(**{**kept, **changes})


def level_names(text: str) -> tuple[str, ...]:
    """Convert names of levels that are separated by commas."""
    return tuple(text.split(",")) if text else ()


def pixels(text: str) -> int | tuple[int, int]:
    """Convert the side of a square, or `HEIGHTxWIDTH`."""
    height, by, width = text.partition("x")
    return (int(height), int(width)) if by else int(text)


def several_pixels(text: str) -> tuple[int | tuple[int, int], ...]:
    """Convert what `pixels` converts, several of them separated by commas."""
    return tuple(map(pixels, text.split(","))) if text else ()


def numbers(text: str) -> tuple[int, ...]:
    """Convert numbers that are separated by commas."""
    return tuple(map(int, text.split(","))) if text else ()


def real_numbers(text: str) -> tuple[float, ...]:
    """Convert numbers that are separated by commas, which need not be whole."""
    return tuple(map(float, text.split(","))) if text else ()


def check_blocks(blocks: tuple[int, ...]) -> None:
    """Raise InputError unless a choice of blocks is of numbers from 0, in ascending order."""
    if not isinstance(blocks, tuple) or any(isinstance(block, bool) or not isinstance(block, int) for block in blocks):
        raise InputError(f"blocks={shorten(blocks)} must be a tuple of whole numbers, such as (3, 6, 9, 11)")
    if list(blocks) != sorted(set(blocks)) or min(blocks, default=0) < 0:
        raise InputError(f"blocks={shorten(blocks)} must name each block once, counted from 0 and in ascending order")


def check_indexed_levels(names: tuple[str, ...]) -> None:
    """Raise InputError if a choice of levels to index is empty in places, or names one twice."""
    if "" in [part for name in names for part in name.split("+")] or len(set(names)) < len(names):
        raise InputError(f"levels={names!r} must name each level once, such as ('blocks.2', 'blocks.2+blocks.4')")


def check_level_names(names: tuple[str, ...]) -> None:
    """Raise InputError if a choice of levels is empty in places, or names one twice."""
    parts = [part for name in names for part in name.split("+")]
    if not isinstance(names, tuple) or "" in parts or len(set(parts)) < len(parts):
        raise InputError(f"levels={names!r} must name each level once, such as ('blocks.1', 'blocks.2+blocks.4')")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the backbone's input; it is recorded in the bank, and applied to every query.

    `resize_mode` says which part of an image is scored:
    - `crop`: the image is resized at its own aspect ratio until it just covers `size`, enlarged so that its shorter side is
      `resize` pixels; the center is cut out. Of a square that is the paper's: the shorter side is resized to `resize` pixels;
    - `stretch`: the whole image is resized to `size`, whatever its aspect ratio;
    - `letterbox`: the whole image is resized at its own aspect ratio to the largest that fits into `size`; the margins repeat
      its border and are not scored.

    `size` is the side of a square, or (height, width); `input_size` gives both. Unless given, `resize` is to its shorter side
    as 256 is to 224.

    With `tile`, an image is scored in overlapping squares of so many of its own pixels, each of which is one input: `size` is
    then `tile`, there is no resize mode, and an image is resized before only if `resize` is given.

    `bit_depth` says how many of the 16 bits of a channel the camera uses; all images are scaled alike by it. None says that no
    normal image has 16 bits; a new bank finds the depth from its normal images.

    `roi` is the part of the pictures that is inspected, in pixels of the pictures; what lies outside is filled with the color
    `mean` before anything else is done to a picture. None inspects all of it. A new bank reads it from the mask that
    `Extraction` names. `own_rois` says that each picture has a region of its own instead, from a mask that comes with it.
    """

    resize_mode: str = setting(
        "crop",
        "which part of an image is scored: its center (crop), the whole image stretched to the size of the input (stretch), or "
        "the whole image at its own aspect ratio (letterbox)",
        choices=RESIZE_MODES,
    )
    resize: int | None = setting(
        None,
        "the shorter side of an image before its central square is cut out; of an input that is no square, its shorter side "
        "enlarged to so much must just be covered (default: 256 for an input of 224, as much more for others)",
        metavar="PIXELS",
        kind=int,
    )
    size: int | tuple[int, int] = setting(
        224,
        "the size of the backbone's input: the side of a square, such as 448, or height and width, such as 320x640",
        metavar="PIXELS",
        kind=pixels,
        formerly="crop",
    )
    tile: int | None = setting(
        None,
        "score large images in overlapping squares of so many of their own pixels, each of which is an input; it takes the "
        "place of --size and --resize-mode (an image is resized before only if --resize says to what shorter side)",
        metavar="PIXELS",
        kind=int,
    )
    overlap: int | None = setting(
        None,
        "how many pixels neighboring tiles share, at least (default: a seventh of the tile)",
        metavar="PIXELS",
        kind=int,
    )
    bit_depth: int | None = setting(
        None,
        "how many of the 16 bits stored per channel the camera uses, such as 12; found from the normal images unless given",
        metavar="BITS",
        kind=int,
    )
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    roi: Roi | None = None
    own_rois: bool = False

    @property
    def shorter_side(self) -> int:
        """`resize`, in pixels; without tiles it is set, whether it was given or not."""
        assert self.resize is not None
        return self.resize

    @property
    def derived(self) -> tuple[str, ...]:
        """The names of the settings whose values follow from others."""
        if self.tile is not None:
            return ("size", "overlap") if self.overlap == self.tile // 7 else ("size",)
        return ("resize",) if self.resize == _usual_resize(self.input_size) else ()

    @property
    def input_mode(self) -> str:
        """Which part of an image becomes an input, in a word: its resize mode, or `tiles`."""
        return self.resize_mode if self.tile is None else "tiles"

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the backbone's input, in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def __post_init__(self) -> None:
        check_choice("resize_mode", self.resize_mode, RESIZE_MODES)
        self._check_tiles()
        if isinstance(self.size, tuple) and len(self.size) != 2:
            raise InputError(f"size={shorten(self.size)} must be the side of a square, or (height, width)")
        for side in self.input_size:
            _check_side("size", side)
        if isinstance(self.size, tuple) and self.size[0] == self.size[1]:
            object.__setattr__(self, "size", self.size[0])
        shorter = min(self.input_size)
        if self.resize is None and self.tile is None:
            object.__setattr__(self, "resize", _usual_resize(self.input_size))
        if self.resize is not None:
            _check_side("resize", self.resize)
        if self.tile is None and self.resize_mode == "crop" and self.shorter_side < shorter:
            raise InputError(f"resize={self.resize} is smaller than size={shorter}; the input must fit into the resized image")
        if self.own_rois and self.roi is not None:
            raise InputError("own_rois=True says that pictures have regions of interest of their own, roi that they share one")
        if self.bit_depth is not None:
            check_choice("bit_depth", self.bit_depth, tuple(range(8, 17)))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3 or not all(map(is_finite, values)):
                raise InputError(f"{name}={values!r} must be a tuple of three finite numbers, one for each color")
        if not all(value > 0 for value in self.std):
            raise InputError(f"std must be positive, got {self.std}")

    def _check_tiles(self) -> None:
        """Check `tile` and `overlap`, and set what follows from them."""
        if self.tile is None:
            if self.overlap is not None:
                raise InputError(f"overlap={self.overlap} is of tiles; give the side of a tile, too, such as tile=448")
            return
        check_at_least("tile", self.tile, _SMALLEST_TILE)
        _check_side("tile", self.tile)
        if self.size not in (type(self).size, self.tile):
            raise InputError(f"size={shorten(self.size)} and tile={self.tile} are two sizes for one input; give tile alone")
        if self.resize_mode != type(self).resize_mode:
            raise InputError(f"resize_mode={self.resize_mode!r} is of whole images; tiles show all of an image: leave it out")
        if self.roi is not None or self.own_rois:
            raise InputError("tile and roi exclude each other: a region is of whole pictures; leave one of them out")
        object.__setattr__(self, "size", self.tile)
        if self.overlap is None:
            object.__setattr__(self, "overlap", self.tile // 7)
        check_at_least("overlap", self.overlap, 0)
        if 2 * cast(int, self.overlap) > self.tile:
            raise InputError(f"overlap={self.overlap} is more than half of tile={self.tile}; lower it")


def _usual_resize(size: tuple[int, int]) -> int:
    return min(LARGEST_SIDE, round(min(size) * _RESIZE / _CROP))


def _check_side(name: str, value: object) -> None:
    check_at_least(name, value, 1)
    if cast(int, value) > LARGEST_SIDE:
        raise InputError(f"{name}={value} is too large: at most {LARGEST_SIDE} pixels; the usual is 224 to 1024")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What made the features of a bank. Distances between features of sources that differ in anything else than `engine` mean
    nothing; those of engines in float32 differ by rounding, in another precision by more.

    `blocks` are those of a transformer that its levels are; empty for any other network.
    """

    backbone: str
    weights_sha256: str
    preprocess: Preprocess
    precision: str = "float32"
    engine: str = "torch"
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_blocks(self.blocks)
        check_choice("engine", self.engine, ENGINES[1:])

    def comparable(self) -> Source:
        """What has to be equal for features to be comparable: engines that compute in float32 count as one."""
        return replace(self, engine=Source.engine) if self.precision == "float32" else self


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How normal images become the features of a new bank. All settings are recorded in the bank and applied to every
    query.

    `backbone` is a name that `load_backbone` knows, or a `Backbone` of your own, which has its own precision and preprocess.
    `blocks` are for transformers alone, see `Network.from_timm`. `network` says whether the bank carries the network, so that
    it can be used without torch and without the weights. `augment` is about normal images alone: queries have no views. `roi`
    is a mask, a file, of the pictures' aspect ratio, or a folder of masks, one for each picture, by their ids. `group_by` says
    which pictures belong together; these are left out together where normal images are scored. `products` says which product a
    picture shows, where the bank is of several.
    """

    backbone: object = setting(
        DEFAULT_BACKBONE, "the network: a torchvision ResNet, efficientnet_lite0, or timm:NAME", metavar="NAME", kind=str
    )
    blocks: tuple[int, ...] = setting(
        (),
        "the blocks of a transformer that become its levels, counted from 0, such as 2,5,8 (default: 3,6,9,11 of 12, as deep "
        "in others)",
        metavar="NUMBERS",
        kind=numbers,
    )
    precision: str = setting("float32", "the number format of the forward pass", choices=PRECISIONS)
    preprocess: Preprocess = field(default_factory=Preprocess)
    roi: str | Path | None = setting(
        None,
        "a black and white picture whose white part is inspected, or a folder with one for each picture; what lies outside has "
        "no vectors in the bank, no score and no part in metrics (default: all of each picture is inspected)",
        metavar="MASK",
        kind=str,
    )
    network: bool = setting(
        True, "leave the network out of the bank; it can then be used only where torch and the weights are", kind=bool
    )
    store: str = setting(
        "float16",
        "how feature maps are stored: float16 or float32, or as codes: int8, a byte a channel, or int2 to int6, so many bits a "
        "channel on average; pcaN-int8 or pcaN-int4 store N numbers of a location at all levels, or at each, the finest first: "
        "int4 for efficientnet_lite0, pca128-int4 for wide_resnet50_2",
        metavar="STORE",
        formerly="dtype",
    )
    normalize: str = setting("none", "whether the vector of each location is scaled to unit length (l2)", choices=NORMALIZE)
    pool: int | tuple[int, ...] = setting(
        1,
        "the side of the neighborhood that each location of a feature map is averaged over; one for all levels, or one for "
        "each, the finest first, such as 1,3,3",
        metavar="CELLS",
        kind=one_or_more(int),
    )
    pool_border: str = setting(
        "valid",
        "what that average does at a map's border: it is over the locations that exist (valid), or those outside count as "
        "zeros (zero), so that the border weighs less",
        choices=POOL_BORDERS,
    )
    augment: str | None = setting(
        None,
        "views of each normal image that the bank holds as well, such as rotate=8,flip,brightness=0.8:1.2: the image in 8 "
        "positions of a full turn, each mirrored, and one darker and one brighter, 18 in all; for banks of a few images "
        "(default: none)",
        metavar="VIEWS",
    )

    group_by: str | None = setting(
        None,
        "which pictures belong together, such as several shots of one part, so that no picture is a normal neighbor of its "
        "own part where calibrations and suspects compare the bank's pictures with the others: folder, for those of each "
        "folder; regex=PATTERN, for those whose paths have the parts in common that the pattern has in parentheses; or a CSV "
        "with the columns id and group (default: none)",
        metavar="GROUPS",
        kind=str,
    )

    products: str | None = setting(
        None,
        "make one bank of several products, each searched and calibrated by itself: folder, if each product has a folder of "
        "IMAGES; regex=PATTERN, for what the pattern has in parentheses; or a CSV with columns id and group (default: none)",
        metavar="PRODUCTS",
        kind=str,
    )

    @property
    def product_grouping(self) -> Grouping | None:
        """What `products` says, apart from the table that it may name."""
        return None if self.products is None else Grouping.parse(str(self.products), "products")[0]

    @property
    def grouping(self) -> Grouping | None:
        """What `group_by` says, apart from the table that it may name."""
        return None if self.group_by in (None, NONE) else Grouping.parse(str(self.group_by))[0]

    @property
    def augmentation(self) -> Augmentation | None:
        """What `augment` says."""
        return None if self.augment is None else Augmentation.parse(self.augment)

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        _ = self.augmentation, self.grouping, self.product_grouping, Store.parse(self.store)  # raise for what they cannot be
        if self.roi is not None and self.preprocess.tile is not None:
            raise InputError("tile and roi exclude each other: a region is of whole pictures; leave one of them out")
        if self.augment is not None and (self.roi is not None or self.preprocess.roi is not None or self.preprocess.own_rois):
            raise InputError("augment and roi exclude each other: a turned view would need a turned region; leave one out")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The parameters of SPADE at query time; changing one never needs a rebuild.

    An image score is the mean distance to the `k_image` nearest normal images. A pixel score is the mean distance to the
    `kappa` nearest vectors in the feature maps of the `k_gallery` nearest normal images; several numbers are for the searched
    levels, one for each. The score map is the mean of the searched levels' maps, each weighted by its `level_weights`; without
    any, all weigh the same. With `localize='flagged'`, only images whose image score is above `flag_above` get a map.

    `score` and `image_scores` name image scores, see `IMAGE_SCORES`; they say what is done with them, and change none of them.
    """

    k_image: int = setting(5, "how many nearest normal images the image score averages over", metavar="K")
    k_gallery: int | str | tuple[int | str, ...] = setting(
        5,
        "how many nearest normal images have their feature maps searched, or all; one for all searched levels, or one for "
        "each, such as 20,all",
        metavar="K",
        kind=one_or_more(int_or_all),
    )
    kappa: int = setting(1, "how many nearest vectors a pixel score averages over", metavar="K")
    levels: tuple[str, ...] = setting(
        (),
        "which pyramid levels are searched, such as blocks.2,blocks.4; levels that are joined by + are searched as one, such "
        "as blocks.1,blocks.2+blocks.4 (default: all, each by itself)",
        metavar="NAMES",
        kind=level_names,
    )
    fusion: str = setting(
        "mean",
        "how pyramid levels are combined: by the mean of their score maps, or by one search in all of them (concat)",
        choices=FUSIONS,
    )
    level_weights: tuple[float, ...] = setting(
        (),
        "how much the score map of each searched level weighs in their mean, such as 1,2.5,0.8; only their ratios count "
        "(default: all the same)",
        metavar="NUMBERS",
        kind=real_numbers,
    )
    distance: str = setting("l2", "the distance that scores are made of; the paper uses squared_l2", choices=DISTANCES)
    sigma: float = setting(
        4.0, "the width of the Gaussian that smooths score maps, in input pixels; 0 turns it off", metavar="PIXELS"
    )
    localize: str = setting("all", "which images get a map", choices=LOCALIZE)
    flag_above: float | None = setting(
        None, "with --localize flagged, an image gets a map if its image score is above SCORE", metavar="SCORE"
    )
    score: str = setting(
        "knn",
        "which image score ranks images: the distance to the nearest normals (knn), the map's maximum (max), the mean of its "
        "highest pixels (top), or how unlike normal maps it is spread (structure, which takes a calibration)",
        choices=IMAGE_SCORES,
    )
    image_scores: tuple[str, ...] = setting(
        ("knn", "max"),
        "which image scores verdicts combine, such as knn,max,top; all of them together keep the promised rate",
        metavar="NAMES",
        kind=level_names,
    )
    top_share: float = setting(
        0.01, "the share of the map's pixels, the highest, that the scores top and structure average", metavar="SHARE"
    )
    tile_neighbors: str = setting(
        "anywhere",
        "where the neighbors of a tile may lie in normal images: anywhere, or in its own place, of images of its image's size "
        "(same-place)",
        choices=TILE_NEIGHBORS,
    )

    def __post_init__(self) -> None:
        check_choice("tile_neighbors", self.tile_neighbors, TILE_NEIGHBORS)
        for name in ("k_image", "kappa"):
            check_at_least(name, getattr(self, name), 1)
        for k in self.k_gallery if isinstance(self.k_gallery, tuple) else (self.k_gallery,):
            if k != ALL:
                check_at_least("k_gallery", k, 1)
        check_level_names(self.levels)
        check_choice("fusion", self.fusion, FUSIONS)
        weights = self.level_weights
        if not isinstance(weights, tuple) or not all(
            is_finite(each) and _LIGHTEST <= each <= 1 / _LIGHTEST for each in weights
        ):
            raise InputError(
                f"level_weights={shorten(weights)} must be a tuple of positive numbers, one for each searched level, such as "
                f"(1.0, 2.5); to leave a level out, name the others: levels"
            )
        object.__setattr__(self, "level_weights", tuple(map(float, weights)))
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
        check_choice("score", self.score, IMAGE_SCORES)
        names = self.image_scores
        if not isinstance(names, tuple) or not names or len(set(names)) < len(names) or not set(names) <= set(IMAGE_SCORES):
            raise InputError(f"image_scores={names!r} must name some of {', '.join(IMAGE_SCORES)}, each once, such as knn,top")
        if not is_finite(self.top_share) or not 0 < self.top_share <= 1:
            raise InputError(f"top_share={self.top_share!r} must be a number above 0 and at most 1, such as 0.01")
        if self.localize == "none":
            for name, value in (("score", (self.score,)), ("image_scores", names)):
                if "knn" not in value:
                    raise InputError(f"{name}={','.join(value)} is made of maps, and localize='none' makes none; use knn")
        for name in ("sigma", "flag_above", "top_share"):  # NumPy numbers are allowed, but JSON cannot hold them
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Indexing:
    """Which levels of the bank a recipe's index over the maps holds; see `Recipe.with_levels`."""

    levels: tuple[str, ...] = setting(
        (),
        "which pyramid levels are indexed, as `score --levels` takes them, such as blocks.1,blocks.2+blocks.4 (default: those "
        "that the index has, or else all, each by itself)",
        metavar="NAMES",
        kind=level_names,
    )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which rate of false alarms decisions guarantee: `alpha`, or `fdr` in its place."""

    alpha: float | None = setting(
        None, "the share of normal images that may become alarms (default: that of the calibration)", metavar="A"
    )
    fdr: float | None = setting(None, "the share of alarms that may be false; it takes the place of alpha", metavar="Q")

    def __post_init__(self) -> None:
        if self.alpha is not None and self.fdr is not None:
            raise InputError(f"alpha={self.alpha} and fdr={self.fdr} are two rules for one decision; give one of them")


@dataclass(frozen=True, kw_only=True)
class LabeledSet:
    """How a labeled set on disk is to be read."""

    normal_kind: str = setting(
        "good", "the folder of test/ that holds normal images; all others hold a kind of defect", metavar="KIND"
    )


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How settings are chosen, and what limits the choice."""

    labels: str | Path | None = setting(
        None,
        "a labeled set, test/KIND and ground_truth/KIND, whose defects are used in place of spoilt copies (never the one that "
        "results are measured on)",
        metavar="DATASET",
        kind=str,
    )
    backbones: tuple[str, ...] = setting(
        (),
        "for a new bank: other networks that are tried beside --backbone, such as resnet18,timm:NAME; each must be installed",
        metavar="NAMES",
        kind=level_names,
    )
    sizes: tuple[int | tuple[int, int], ...] = setting(
        (),
        "for a new bank: other sizes of the input that are tried beside --size, such as 320,448 or 320x640",
        metavar="PIXELS",
        kind=several_pixels,
    )
    resize_modes: tuple[str, ...] = setting(
        (),
        "for a new bank: which resize modes are tried, such as crop,stretch (default: crop and letterbox, or that of "
        "--resize-mode, --resize or --tile alone where one of them is given)",
        metavar="MODES",
        kind=level_names,
    )
    seed: int = setting(0, "the seed that decides which pictures are spoilt, and how", metavar="N")
    budget: float | None = setting(
        None,
        "begin to try no more options after so many minutes; the default is always tried",
        metavar="MINUTES",
        kind=float,
    )
    max_ms: float | None = setting(
        None,
        "the most milliseconds that the network and the search may take for an image, by this machine's clock",
        metavar="MS",
        kind=float,
    )
    max_bytes: float | None = setting(
        None, "the most bytes that a normal image may take in the bank and its index", metavar="BYTES", kind=float
    )

    def __post_init__(self) -> None:
        check_at_least("seed", self.seed, 0)
        for name in ("backbones", "sizes", "resize_modes"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(set(values)) < len(values) or "" in values:
                raise InputError(f"{name}={shorten(values)} must be a tuple that names each of them once")
        for size in self.sizes:
            Preprocess(size=size)  # raises for what it cannot be
        for mode in self.resize_modes:
            check_choice("resize_modes", mode, RESIZE_MODES)
        for name in ("budget", "max_ms", "max_bytes"):
            value = getattr(self, name)
            if value is not None and (not is_finite(value) or value <= 0):
                raise InputError(f"{name}={value!r} must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class Caching:
    """Where copies of what lies at URLs are kept, for banks and pictures that are given as `s3://BUCKET/NAME`.

    `progress` shows a bar on stderr for each file of a bank that is fetched, if that is a terminal.
    """

    DEFAULT_BYTES: ClassVar[str] = "20GiB"

    cache: str | None = setting(
        None,
        "for banks and pictures at URLs: the folder that copies of their files are kept in (default: SPADE_FAISS_CACHE, or the "
        "user's cache folder)",
        metavar="FOLDER",
    )
    cache_bytes: str | None = setting(
        None,
        "how much of the cache may stay when nobody uses it, such as 5GB; files that were not used for long are deleted first "
        "(default: SPADE_FAISS_CACHE_BYTES, or 20GiB)",
        metavar="SIZE",
    )
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a folder of results shows besides the scores."""

    overlays: bool = setting(False, "write a PNG of each image under its heat map")
    shown: int = setting(24, "how many images the report shows in full", metavar="N")

    def __post_init__(self) -> None:
        check_at_least("shown", self.shown, 0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How work is done on this machine, and how images are read. Scores of an image do not depend on it.

    `weights` is a file of weights to use in place of the published ones; a bank records its place and its hash. `progress`
    shows bars on stderr if that is a terminal. `roi` is no choice: a bank that was made with a folder of masks needs those of
    the pictures that it meets, and no other bank takes them. Nor is `group_by`, for a bank whose normal pictures have groups,
    nor are `products` and `product`, one of which a bank of several products takes for normal pictures that are added.
    `cluster` is for `extract`, `fit`, `add`, `calibrate`, `score_folder` and `evaluate`; pictures, bank and results must then
    lie on storage that all nodes have at the same path. The bank may be at a URL, of which each node has its own cache.
    """

    device: str = setting("cpu", "where computations run: cpu, cuda, cuda:NUMBER, or auto")
    engine: str = setting(
        "auto",
        "what runs the forward pass: torch, openvino, onnxruntime, or the fastest of them that is installed (auto)",
        choices=ENGINES,
    )
    memory: str | int = setting(
        "2GiB",
        "the memory that scoring may use, such as 500MB; it decides the size of batches and caches",
        metavar="SIZE",
        kind=str,
    )
    weights: str | Path | None = setting(
        None, "the backbone's weights: a state dict, as .safetensors or saved by torch", metavar="FILE", kind=str
    )
    roi: str | Path | None = setting(
        None,
        "for a bank that was made with a folder of masks: the folder with those of these pictures",
        metavar="MASKS",
        kind=str,
    )
    group_by: str | None = setting(
        None,
        "for a bank whose pictures are grouped by a pattern or a table: how these normal pictures belong together, by the same "
        "pattern or a table of theirs, or none if each is by itself",
        metavar="GROUPS",
        kind=str,
    )
    cluster: str | None = setting(
        None,
        "work on the machines of a Ray cluster: auto (the one that this machine belongs to), ray://HOST:PORT, or local:N for N "
        "workers on this machine",
        metavar="CLUSTER",
        kind=str,
    )
    replicas: int | None = setting(
        None,
        "with --cluster, for a bank that is larger than the memory of a node: each node searches shards of its own, and each "
        "shard is on N nodes",
        metavar="N",
    )
    products: str | None = setting(
        None,
        "for a bank of several products: which of them, or which new ones, these normal pictures show, by what the bank tells "
        "products by: folder, the same regex=PATTERN, or a CSV of theirs",
        metavar="PRODUCTS",
        kind=str,
    )
    product: str | None = setting(
        None,
        "for a bank of several products: the one that all of these normal pictures show; it may be a new one",
        metavar="NAME",
        kind=str,
    )
    every: int = setting(1, "take every N-th frame of a video as an image, the first included", metavar="N")
    max_skipped: int = setting(10, "how many unreadable images are skipped before the command gives up", metavar="N")
    progress: bool = False

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        if self.cluster is not None:
            parse_address(self.cluster)
        if self.replicas is not None:
            check_at_least("replicas", self.replicas, 1)
            if self.cluster is None:
                raise InputError(f"replicas={self.replicas} is of shards on a cluster; say on which one: --cluster CLUSTER")
        check_at_least("every", self.every, 1)
        check_at_least("max_skipped", self.max_skipped, 0)
