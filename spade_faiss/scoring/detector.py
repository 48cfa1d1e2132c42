"""The detector: an opened bank, its indexes and a method; images in, scores out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.device import find_device
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import parse_bytes, plan_memory
from spade_faiss.core.once import Once
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch, Level, check_ids
from spade_faiss.features.images import Images, find_images
from spade_faiss.features.layout import prepare
from spade_faiss.index.gallery_index import EncodedLevel, open_gallery
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.scoring.fusion import score_maps, to_distance
from spade_faiss.scoring.scores import NEAREST_DTYPE, NearestArray, Scores, join
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.levels import open_blocks, searched_levels, vectors_of
from spade_faiss.search.protocol import GallerySearch, resolve_recipe
from spade_faiss.search.recipe import Recipe, load_recipe
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone

# A network's forward pass takes about this much, and so many times the bytes of each input (measured on efficientnet_lite0 and
# wide_resnet50_2); decoded images wait for it, and so do those that they were decoded from.
_FORWARD_BYTES = 64 << 20
_FORWARD_INPUTS = 25


class Detector:
    """Scores images against a bank, in the state that the bank had when it was opened. Safe to share between threads.

    Args:
        bank: what to score against.
        recipe: how it is searched.
        method: the parameters of SPADE.
        run: the device, the memory budget, and how images are read.
        backbone: the bank's own, for a bank that was made with a module of yours; else it is loaded at first use.
    """

    def __init__(
        self,
        bank: Bank | Snapshot,
        recipe: Recipe,
        method: Method,
        run: Run = Run(),
        backbone: str | Backbone | None = None,
    ) -> None:
        # A state of its own: whatever is done to the bank, by whomever, scores are against this one.
        self.bank = bank = bank.snapshot() if isinstance(bank, Bank) else bank
        self.resolved = resolve_recipe(recipe)
        self.method = method
        self.run = run
        self.scoring_config = ScoringConfig.of(self.resolved, method)
        self.device = find_device(run.device)
        self._searched = searched_levels(bank.layout.levels, method.fusion)
        self._images = ImageIndex.open(bank, recipe, self.device)
        self._workers = Workers(device=self.device)
        self._cache: BlockCache[FloatArray] = BlockCache()
        self._searches = {} if method.localize == "none" else self._open_searches()
        cacheable = len(bank) * sum(_floats(level.shape) for level in self._searched)
        self.plan = plan_memory(parse_bytes(run.memory), self._working_bytes, cacheable)
        self._cache.capacity = self.plan.cache_bytes
        self._given_backbone = backbone
        self._backbone = Once(partial(_load_backbone, bank, backbone, run, self.device.torch_names[0]))

    @classmethod
    def open(
        cls,
        bank: str | Path,
        *,
        recipe: str | Path | Recipe = "exact",
        method: Method = Method(),
        run: Run = Run(),
        backbone: str | Backbone | None = None,
    ) -> Detector:
        """Open a bank for scoring.

        Args:
            bank: the bank's folder.
            recipe: a recipe's name or file.
            method: the parameters of SPADE.
            run: `device` is for the backbone, the image index and the gallery search; `memory` is how much the process may
                grow by while it scores; `weights` says where the backbone's weights are, if they are not where they were.
            backbone: a backbone in place of the one the bank names; it must be the same network with the same weights.

        Raises:
            NotFoundError: if there is no such bank or recipe.
            BankError: if the bank or its index is damaged or missing.
            InputError: for a setting out of range, more neighbors than normal images, too little memory, a device that is not
                there, or a backbone that is not the bank's.
        """
        opened = Bank.open(bank)
        _check_neighbors(opened, method)
        detector = cls(opened, load_recipe(recipe), method, run, backbone)
        if backbone is not None or run.weights is not None:
            _ = detector.backbone  # what was passed is checked now
        return detector

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was opened with."""
        return self.resolved.recipe

    def with_localize(self, localize: str) -> Detector:
        """The same detector for `all` images or `none`: it shares the bank's files, not the caches."""
        method = replace(self.method, localize=localize, flag_above=None)
        return Detector(self.bank, self.recipe, method, self.run, self._given_backbone)

    @property
    def backbone(self) -> Backbone:
        """The bank's own backbone, loaded at first use.

        Raises:
            InputError: if the bank was made by another extractor, or the weights that load now are not those it was made with.
        """
        return self._backbone()

    def score(self, images: Images) -> Scores:
        """Score images: those of a folder in the order of their ids, those of a list in its own.

        All maps are held in memory; for more images than fit, score them in parts.

        Args:
            images: a folder, an image, or a list of them.

        Raises:
            InputError: for bad input, or too many unreadable images.
            NotFoundError: if a path does not exist.
        """
        from spade_faiss.scoring.stream import ScoreStream

        return join([scores for _, scores in ScoreStream(self, Timings(), "score")(*find_images(images))])

    def score_features(self, batch: FeatureBatch, *, timings: Timings | None = None) -> Scores:
        """Score images by their features, from any extractor.

        Args:
            batch: features of n images, of the bank's levels and source.
            timings: where to count the time.

        Raises:
            InputError: for features that do not fit the bank.
        """
        timings = timings or Timings()
        self.bank.check_source(batch.source)
        check_ids(batch.ids)
        size = self.plan.batch
        return join([self._score(batch[start : start + size], timings) for start in range(0, max(1, len(batch)), size)])

    def score_rows(self, rows: Sequence[int], *, timings: Timings | None = None) -> Scores:
        """Score normal images of the bank, each against all the others: how normal images look to this detector.

        Args:
            rows: bank rows.
            timings: where to count the time.

        Raises:
            InputError: for a bank that has no other image for each of the neighbors asked for, or a recipe that searches the
                maps of the whole bank: it would meet the image itself.
        """
        self.check_others()
        timings = timings or Timings()
        size = self.plan.batch
        parts = [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]
        return join([self._score_rows(np.asarray(part, np.int64), timings) for part in parts])

    def check_others(self) -> None:
        """Raise InputError if an image of the bank cannot be scored against all the others, see `score_rows`."""
        method = self.method
        if (k := max(method.k_image, method.k_gallery)) >= len(self.bank):
            raise InputError(
                f"each of the {len(self.bank)} normal images in {self.bank.path} has {len(self.bank) - 1} others, "
                f"k={k} were asked for; lower k_image and k_gallery, or add images"
            )
        if self._searches and self.resolved.method.whole_bank:
            raise InputError(
                f"recipe {self.recipe.name!r} searches all normal images and would meet the scored one itself; "
                f"use another recipe, or score images that are not in the bank"
            )

    def _score(self, batch: FeatureBatch, timings: Timings) -> Scores:
        with timings("prepare"):
            query = prepare(batch, self.bank.layout)
        with timings("image search"):
            sq_dist, rows = self._images.search(query.embedding, max(self.method.k_image, self.method.k_gallery))
        return self._score_prepared(query, sq_dist, rows, timings)

    def _score_rows(self, own: IntArray, timings: Timings) -> Scores:
        k = max(self.method.k_image, self.method.k_gallery)
        with timings("read"):
            query = self.bank.read(own)
        with timings("image search"):
            sq_dist, rows = self._images.search(query.embedding, k + 1)
            # All but the image itself; an approximate index may have missed it, or equal ones may stand before it.
            others = rows != own[:, None]
            others[others.all(axis=1), -1] = False
            sq_dist, rows = sq_dist[others].reshape(-1, k), rows[others].reshape(-1, k)
        return self._score_prepared(query, sq_dist, rows, timings)

    def _score_prepared(self, query: FeatureBatch, sq_dist: FloatArray, rows: IntArray, timings: Timings) -> Scores:
        """Score prepared features whose nearest normals are known."""
        k_image, k_gallery = self.method.k_image, self.method.k_gallery
        neighbor_dist = to_distance(sq_dist, self.method.distance)
        image_score = neighbor_dist[:, :k_image].mean(axis=1)
        looked = np.flatnonzero(self._looks_at(image_score))
        level_dist, nearest = {}, {}
        with timings("pixel search"):
            for level in self._searched:
                level_dist[level.name], nearest[level.name] = self._search_level(level, query, rows[:, :k_gallery], looked)
        with timings("fusion"):
            maps = np.full((len(query), *self.bank.layout.input_size), np.nan, np.float32)
            if len(looked):
                of_looked = [dist[looked] for dist in level_dist.values()]
                maps[looked] = score_maps(of_looked, self.bank.layout.input_size, self.method.sigma)
            if query.valid is not None:
                maps *= query.valid
        ids = self.bank.ids
        return Scores(
            ids=list(query.ids),
            image_score=image_score,
            maps=maps,
            neighbor_ids=np.array([[ids[row] for row in line] for line in rows]),
            neighbor_dist=neighbor_dist,
            level_dist=level_dist,
            nearest=nearest,
            distance=self.method.distance,
        )

    def _open_searches(self) -> dict[str, GallerySearch]:
        chosen = self.resolved
        if chosen.method.train is None:
            kept = None
        elif self.method.fusion == "mean":
            kept = open_gallery(self.bank, self.recipe)
        else:
            raise InputError(f"recipe {self.recipe.name!r} keeps each level by itself; fusion=concat needs one like 'exact'")
        searches = {}
        for level in self._searched:
            blocks = open_blocks(self.bank, level, self._cache)
            of_level = None if kept is None else EncodedLevel(kept, level, blocks)
            searches[level.name] = chosen.method.open(blocks, self._workers, chosen.build, chosen.query, of_level)
        return searches

    def _working_bytes(self, images: int) -> int:
        """What scoring so many images at a time takes, about: from the decoded images to the finished maps."""
        layout, k_gallery, kappa = self.bank.layout, self.method.k_gallery, self.method.kappa
        image = _floats((3, *layout.input_size))
        forward = _FORWARD_BYTES + images * _FORWARD_INPUTS * image if self.bank.manifest.source else 0
        features = images * sum(2 * _floats(level.shape) for level in layout.levels)
        search = max(
            (
                images * _floats(level.shape) + self._searches[level.name].working_bytes(images, k_gallery, kappa)
                for level in self._searched
                if self._searches
            ),
            default=0,
        )
        # Distances, and where they are from; score maps before and after smoothing.
        results = images * sum(10 * _floats((level.height, level.width)) for level in self._searched) + images * 2 * image
        return max(forward, search) + features + results

    def _looks_at(self, image_score: FloatArray) -> npt.NDArray[np.bool_]:
        """Which images the pixel search runs for."""
        if (above := self.method.flag_above) is not None:
            return image_score > above
        return np.full(image_score.shape, self.method.localize == "all")

    def _search_level(
        self, level: Level, query: FeatureBatch, gallery: IntArray, looked: IntArray
    ) -> tuple[FloatArray, NearestArray]:
        shape = (len(query), level.height, level.width)
        dist, nearest = np.full(shape, np.nan, np.float32), np.zeros(shape, NEAREST_DTYPE)
        nearest["neighbor"] = nearest["row"] = -1
        if len(looked) == 0:
            return dist, nearest
        gallery, shape = gallery[looked], (len(looked), *shape[1:])
        every = len(looked) == len(query)  # the usual case, without a copy
        levels = self.bank.layout.levels
        xq = vectors_of(level, levels, lambda name: query.levels[name] if every else query.levels[name][looked])
        hits = self._searches[level.name](xq.reshape(len(looked), -1, level.channels), gallery, self.method.kappa)
        dist[looked] = to_distance(hits.sq_dist, self.method.distance).mean(axis=-1).reshape(shape)
        found = np.empty(shape, NEAREST_DTYPE)
        of = gallery[:, None, :] == hits.row[..., None]
        found["neighbor"] = np.where(of.any(axis=-1), of.argmax(axis=-1), -1).reshape(shape)
        found["row"] = hits.row.reshape(shape)
        found["y"], found["x"] = np.divmod(hits.location.reshape(shape), level.width)
        nearest[looked] = found
        return dist, nearest


def _floats(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 array."""
    return math.prod(shape) * np.dtype(np.float32).itemsize


def _load_backbone(bank: Snapshot, backbone: str | Backbone | None, run: Run, device: str) -> Backbone:
    from spade_faiss.bank.backbone import backbone_of  # imports torch, which features that are given do not need

    return backbone_of(bank, backbone, run, device)


def _check_neighbors(bank: Snapshot, method: Method) -> None:
    for name in ("k_image", "k_gallery"):
        if (k := getattr(method, name)) > len(bank):
            raise InputError(
                f"{name}={k} is larger than the number of normal images, {len(bank)} in {bank.path}; lower it or add images"
            )
    for level in searched_levels(bank.layout.levels, method.fusion):
        if method.kappa > (most := method.k_gallery * level.height * level.width):
            raise InputError(
                f"kappa={method.kappa} is larger than the gallery, {most} vectors at level {level.name!r}; lower it"
            )
