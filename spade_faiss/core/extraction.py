"""The settings by which images become features: what a network sees of them, which network, and what a bank stores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.declaring import check_blocks, numbers, one_or_more, pixels, setting
from spade_faiss.core.errors import InputError
from spade_faiss.core.grouping import NONE, Grouping
from spade_faiss.core.roi import Roi
from spade_faiss.core.schema import check_at_least, check_choice, is_finite, shorten
from spade_faiss.core.store import Store

RESIZE_MODES = ("crop", "stretch", "letterbox")
PRECISIONS = ("float32", "bfloat16")
# What runs the forward pass of a network.
ENGINES = ("auto", "torch", "openvino", "onnxruntime")
NORMALIZE = ("none", "l2")
POOL_BORDERS = ("valid", "zero")

# The longest side of a network's input, and of an image that it is cut out of, in pixels.
LARGEST_SIDE = 10_000
# A large image has too many tiles that are smaller.
_SMALLEST_TILE = 8
# The paper's: the shorter side is resized to 256 pixels, 224 are cut out.
_RESIZE, _CROP = 256, 224
DEFAULT_BACKBONE = "wide_resnet50_2"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
