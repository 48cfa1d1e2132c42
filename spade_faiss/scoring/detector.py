"""The detector: an opened bank, its indexes and a method; images in, scores out."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.device import find_device
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import parse_bytes, plan
from spade_faiss.core.settings import DEVICE, MAX_SKIPPED, MEMORY, Method
from spade_faiss.core.timing import Stages
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.decisions.calibration import Way, flag_threshold
from spade_faiss.features.batch import FeatureBatch, Level, check_ids
from spade_faiss.features.images import find_images
from spade_faiss.features.layout import prepare
from spade_faiss.index.gallery_index import KeptLevel, open_gallery
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.scoring.fusion import score_maps, to_distance
from spade_faiss.scoring.scores import NEAREST_DTYPE, NearestArray, Scores, join
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.levels import open_blocks, searched_levels, vectors_of
from spade_faiss.search.protocol import GallerySearch, find_method
from spade_faiss.search.recipe import Recipe, load_recipe
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone
    from spade_faiss.workflows.extract import Images

# A network's forward pass takes about this much, and so many times the bytes of each input (measured on efficientnet_lite0 and
# wide_resnet50_2); decoded images wait for it, and so do those that they were decoded from.
_FORWARD_BYTES = 64 << 20
_FORWARD_INPUTS = 25


class Detector:
    """Scores images against a bank, in the state that the bank had when it was opened. Safe to share between threads."""

    def __init__(
        self, bank: Bank | Snapshot, recipe: Recipe, method: Method, memory: str | int = MEMORY, device: str = DEVICE
    ) -> None:
        # A state of its own: whatever is done to the bank, by whomever, scores are against this one.
        self.bank = bank = bank.snapshot() if isinstance(bank, Bank) else bank
        self.recipe = recipe
        self.method = method
        self.way = Way.of(recipe, method)
        self._flag_above = flag_threshold(bank, self.way, method)
        self._searched = searched_levels(bank.layout.levels, method.fusion)
        self._memory, self._device_name = memory, device
        self.device = find_device(device)
        self._images = ImageIndex.open(bank, recipe, self.device)
        self._workers = Workers(device=self.device)
        self._cache: BlockCache[FloatArray] = BlockCache()
        self._searches = {} if method.localize == "none" else self._open_searches()
        cacheable = len(bank) * sum(_floats(level.shape) for level in self._searched)
        self.plan = plan(parse_bytes(memory), self._working_bytes, cacheable)
        self._cache.capacity = self.plan.cache_bytes
        self._backbone: Backbone | None = None
        self._loading = threading.Lock()

    @classmethod
    def open(
        cls,
        bank: str | Path,
        *,
        recipe: str | Path | Recipe = "exact",
        k_image: int = 5,
        k_gallery: int = 5,
        kappa: int = 1,
        fusion: str = "mean",
        distance: str = "l2",
        sigma: float = 4.0,
        localize: str = "all",
        flag_above: float | None = None,
        flag_below_p: float | None = None,
        memory: str | int = MEMORY,
        device: str = DEVICE,
        backbone: str | Backbone | None = None,
        weights: str | Path | None = None,
    ) -> Detector:
        """Open a bank for scoring.

        Args:
            bank: the bank's folder.
            recipe: a recipe's name or file.
            k_image, k_gallery, kappa, fusion, distance, sigma, localize, flag_above, flag_below_p: see `Method`.
            memory: how much the process may grow by while it scores, for instance `2GiB`: batches and caches follow from it.
            device: `cpu`, `cuda`, `cuda:NUMBER`, `cuda:all`, or `auto`: for backbone, image index and gallery search.
            backbone: a backbone in place of the one the bank names; it must be the same network with the same weights.
            weights: where the bank's backbone's weights are, if they are not where they were or cannot be downloaded.

        Raises:
            NotFoundError: if there is no such bank or recipe.
            BankError: if the bank or its index is damaged or missing; with `flag_below_p`, if its calibration is.
            InputError: for a setting out of range, more neighbours than normal images, too little memory, a device that is not
                there, or a backbone that is not the bank's.
        """
        method = Method(
            k_image=k_image,
            k_gallery=k_gallery,
            kappa=kappa,
            fusion=fusion,
            distance=distance,
            sigma=sigma,
            localize=localize,
            flag_above=flag_above,
            flag_below_p=flag_below_p,
        )
        opened = Bank.open(bank)
        _check_neighbors(opened, method)
        detector = cls(opened, load_recipe(recipe), method, memory, device)
        if backbone is not None or weights is not None:
            detector._backbone = _load_backbone(opened, backbone, weights, device)
        return detector

    def with_localize(self, localize: str) -> Detector:
        """The same detector for `all` images or `none`: it shares the bank's files, not the caches."""
        method = replace(self.method, localize=localize, flag_above=None, flag_below_p=None)
        detector = Detector(self.bank, self.recipe, method, self._memory, self._device_name)
        detector._backbone = self._backbone
        return detector

    @property
    def backbone(self) -> Backbone:
        """The bank's own backbone, loaded at first use.

        Raises:
            InputError: if the bank was made by another extractor, or the weights that load now are not those it was made with.
        """
        with self._loading:
            if self._backbone is None:
                self._backbone = _load_backbone(self.bank, None, None, self.device.torch_names[0])
            return self._backbone

    def score(self, images: Images, *, max_skipped: int = MAX_SKIPPED, progress: bool = False) -> Scores:
        """Score images: those of a folder in the order of their ids, those of a list in its own.

        All maps are held in memory; for more images than fit, score them in parts.

        Args:
            images: a folder, an image, or a list of them.
            max_skipped: how many unreadable images to leave out (each is logged) before giving up.
            progress: show a bar on stderr if that is a terminal.

        Raises:
            InputError: for bad input, or too many unreadable images.
            NotFoundError: if a path does not exist.
        """
        from spade_faiss.features.stream import FeatureStream

        root, records = find_images(images)
        stream = FeatureStream(self.backbone, Stages(), root=root, max_skipped=max_skipped, batch_size=self.plan.batch)
        with tqdm(total=len(records), desc="score", unit="img", disable=None if progress else True) as bar:
            parts = []
            for extracted in stream(records):
                parts.append(self.score_features(extracted.batch))
                bar.update(len(extracted.batch))
        return join(parts)

    def score_features(self, batch: FeatureBatch, *, stages: Stages | None = None) -> Scores:
        """Score images by their features, from any extractor.

        Args:
            batch: features of n images, of the bank's levels and source.
            stages: where to count the time.

        Raises:
            InputError: for features that do not fit the bank.
        """
        stages = stages or Stages()
        self.bank.check_source(batch.source)
        check_ids(batch.ids)
        size = self.plan.batch
        return join([self._score(batch[start : start + size], stages) for start in range(0, max(1, len(batch)), size)])

    def score_rows(self, rows: Sequence[int], *, stages: Stages | None = None) -> Scores:
        """Score normal images of the bank, each against all the others: how normal images look to this detector.

        Args:
            rows: bank rows.
            stages: where to count the time.

        Raises:
            InputError: for a bank that has no other image for each of the neighbours asked for, or a recipe that searches the
                maps of the whole bank: it would meet the image itself.
        """
        self.check_others()
        stages = stages or Stages()
        size = self.plan.batch
        parts = [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]
        return join([self._score_rows(np.asarray(part, np.int64), stages) for part in parts])

    def check_others(self) -> None:
        """Raise InputError if an image of the bank cannot be scored against all the others, see `score_rows`."""
        method = self.method
        if (k := max(method.k_image, method.k_gallery)) >= len(self.bank):
            raise InputError(
                f"each of the {len(self.bank)} normal images in {self.bank.path} has {len(self.bank) - 1} others, "
                f"k={k} were asked for; lower k_image and k_gallery, or add images"
            )
        if self._searches and find_method(self.recipe).method.whole_bank:
            raise InputError(
                f"recipe {self.recipe.name!r} searches all normal images and would meet the scored one itself; "
                f"use another recipe, or score images that are not in the bank"
            )

    def _score(self, batch: FeatureBatch, stages: Stages) -> Scores:
        with stages("prepare"):
            query = prepare(batch, self.bank.layout)
        with stages("image search"):
            sq_dist, rows = self._images.search(query.embedding, max(self.method.k_image, self.method.k_gallery))
        return self._score_prepared(query, sq_dist, rows, stages)

    def _score_rows(self, own: IntArray, stages: Stages) -> Scores:
        k = max(self.method.k_image, self.method.k_gallery)
        with stages("read"):
            query = self.bank.read(own)
        with stages("image search"):
            sq_dist, rows = self._images.search(query.embedding, k + 1)
            # All but the image itself; an approximate index may have missed it, or equal ones may stand before it.
            others = rows != own[:, None]
            others[others.all(axis=1), -1] = False
            sq_dist, rows = sq_dist[others].reshape(-1, k), rows[others].reshape(-1, k)
        return self._score_prepared(query, sq_dist, rows, stages)

    def _score_prepared(self, query: FeatureBatch, sq_dist: FloatArray, rows: IntArray, stages: Stages) -> Scores:
        """Score prepared features whose nearest normals are known."""
        k_image, k_gallery = self.method.k_image, self.method.k_gallery
        neighbor_dist = to_distance(sq_dist, self.method.distance)
        image_score = neighbor_dist[:, :k_image].mean(axis=1)
        looked = np.flatnonzero(self._looks_at(image_score))
        level_dist, nearest = {}, {}
        with stages("pixel search"):
            for level in self._searched:
                level_dist[level.name], nearest[level.name] = self._search_level(level, query, rows[:, :k_gallery], looked)
        with stages("fusion"):
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
        chosen = find_method(self.recipe)
        if chosen.method.train is None:
            kept = None
        elif self.method.fusion == "mean":
            kept = open_gallery(self.bank, self.recipe)
        else:
            raise InputError(f"recipe {self.recipe.name!r} keeps each level by itself; fusion=concat needs one like 'exact'")
        searches = {}
        for level in self._searched:
            blocks = open_blocks(self.bank, level, self._cache)
            of_level = None if kept is None else KeptLevel(kept, level, blocks)
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
        if self.method.localize == "flagged":
            assert self._flag_above is not None
            return image_score > self._flag_above
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


def _load_backbone(bank: Snapshot, backbone: str | Backbone | None, weights: str | Path | None, device: str) -> Backbone:
    from spade_faiss.workflows.extract import backbone_of

    return backbone_of(bank, backbone, weights, device)


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
