"""The settings of scoring and of runs. Each is declared once, with its type, its default and the help text of its option.

The command line makes its options from these dataclasses (`cli/options.py`), and library functions take the dataclasses. To add
a setting, add a field here, or in `core/extraction.py` if it says how features are made; the code that acts on it reads it from
the dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from spade_faiss.core.cluster_address import parse_address
from spade_faiss.core.declaring import (
    ALL,
    check_level_names,
    int_or_all,
    level_names,
    one_or_more,
    real_numbers,
    setting,
    several_pixels,
)
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import ENGINES, RESIZE_MODES, Preprocess
from spade_faiss.core.schema import check_at_least, check_choice, is_finite, shorten

FUSIONS = ("mean", "concat")
DISTANCES = ("l2", "squared_l2")
LOCALIZE = ("all", "flagged", "none")
TILE_NEIGHBORS = ("anywhere", "same-place")
# Image scores, see `scoring/image_scores.py`.
IMAGE_SCORES = ("knn", "max", "top", "structure")

# Weights of levels lie between this and its inverse, so that float32 holds what is weighted.
_LIGHTEST = 1e-6


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
