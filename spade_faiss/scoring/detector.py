"""The detector: an opened bank, its indexes and a method; images in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.device import check_fork, find_device
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import parse_bytes, plan_memory
from spade_faiss.core.once import Once
from spade_faiss.core.process import fork_safe
from spade_faiss.core.settings import ALL, Method, Run, for_each
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch, check_ids
from spade_faiss.features.datasets import Images, find_images
from spade_faiss.features.layout import prepare
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.scoring.fusion import score_maps, to_distance
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.scoring.level_search import gallery_sizes, open_level_searches
from spade_faiss.scoring.memory import DECODE_BYTES, float32_bytes, working_bytes
from spade_faiss.scoring.scores import Scores, join
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.levels import searched_levels
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe, load_recipe
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone
    from spade_faiss.features.frames import Pixels
    from spade_faiss.features.roi_folder import RoiFolder
    from spade_faiss.scoring.stream import ScoreStream


class Detector:
    """Scores images against a bank, in the state that the bank had when it was opened. Safe to share between threads.

    A fork of the process may use it, too; with CUDA, only if the process had not used CUDA before. Pickled or copied, it is
    opened again from the bank's folder, in the same state of the bank, with caches of its own. A `Backbone` that was passed to
    it is shared by copies and cannot be pickled.

    Args:
        bank: the bank of normal images.
        recipe: how the bank is searched.
        method: the parameters of SPADE.
        run: the device, the memory budget, and how images are read.
        backbone: the backbone of a bank that was made with a module of yours; else the bank's own is loaded at first use.
    """

    @fork_safe
    def __init__(
        self,
        bank: Bank | Snapshot,
        recipe: Recipe,
        method: Method,
        run: Run = Run(),
        backbone: str | Backbone | None = None,
    ) -> None:
        # A snapshot: the bank may change while the detector is open, its scores are against this state.
        self.bank = bank = bank.snapshot() if isinstance(bank, Bank) else bank
        self.resolved = resolve_recipe(recipe)
        self.method = method
        self.run = run
        if method.sigma > (most := max(bank.layout.input_size)):
            raise InputError(
                f"sigma={method.sigma:g} is wider than the input, {most} pixels: it would level all maps; lower it"
            )
        self.scoring_config = ScoringConfig.of(self.resolved, method)
        self.device = find_device(run.device)
        self._images = ImageIndex.open(bank, recipe, self.device)
        self._workers = Workers(device=self.device)
        self._cache: BlockCache[FloatArray] = BlockCache()
        self._searches = open_level_searches(bank, self.resolved, method, self._workers, self._cache)
        cacheable = len(bank) * sum(float32_bytes(search.level.stored_shape) for search in self._searches.values())
        decodes = bank.manifest.source is not None
        self.plan = plan_memory(parse_bytes(run.memory), self._working_bytes, cacheable, decodes=decodes)
        self._cache.capacity = self.plan.cache_bytes
        self._given_backbone = backbone
        self._backbone = Once(partial(_load_backbone, bank, backbone, run, self.device.torch_name))

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
            run: `device` computes the backbone, the image index and the gallery search; the process may grow by `memory` while
                it scores; `weights` is the file of the backbone's weights, if it is no longer where the bank remembers it.
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
            _ = detector.backbone  # what the caller passed is checked now, not at the first image
        return detector

    def __reduce__(self) -> tuple[type[Detector], tuple[Snapshot, Recipe, Method, Run, str | Backbone | None]]:
        return type(self), (self.bank, self.recipe, self.method, self.run, self._given_backbone)

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was opened with."""
        return self.resolved.recipe

    def with_localize(self, localize: str) -> Detector:
        """A detector with the same settings that localizes `all` images or `none`; it has caches of its own."""
        method = replace(self.method, localize=localize, flag_above=None)
        return Detector(self.bank, self.recipe, method, self.run, self._given_backbone)

    @property
    def backbone(self) -> Backbone:
        """The bank's own backbone, loaded at first use.

        Raises:
            InputError: if the bank was made by another extractor, or the weights that load now are not those it was made with.
        """
        return self._backbone()

    @property
    def rois(self) -> RoiFolder | None:
        """The regions of interest of pictures, if each has one of its own.

        Raises:
            InputError: if `run.roi` is missing, or is given without need.
            NotFoundError: if it is no folder.
        """
        from spade_faiss.features.roi_folder import find_rois  # imports Pillow, which scoring features does not need

        return find_rois(self.backbone.source.preprocess, self.run.roi)

    @property
    def decode_bytes(self) -> int:
        """How much memory the images may take that are decoded at the same time: what the plan leaves of the budget."""
        return max(DECODE_BYTES, parse_bytes(self.run.memory) - self.plan.working_bytes - self.plan.cache_bytes)

    def score(self, images: Images | Pixels | Sequence[Pixels], *, ids: Sequence[str] | None = None) -> Scores:
        """Score images: those of a folder in the order of their ids, those of a list in the list's order.

        An image from memory scores as a file would that holds the same pixels without loss.

        The maps of all images stay in memory; score more images than fit in parts, or with `score_folder`.

        Args:
            images: a folder, an image file, or a list of them; or images from memory, one or several: arrays (H, W, 3) of RGB
                or (H, W) of gray, uint8 or uint16, or Pillow images.
            ids: the names of images from memory; `frame-0`, `frame-1` ... unless given.

        Raises:
            InputError: for bad input, too many unreadable files, or a single image from memory that cannot be used.
            NotFoundError: if a path does not exist.
        """
        from spade_faiss.features.frames import find_frames  # imports Pillow, which scoring features does not need

        frames = find_frames(images, ids)
        stream = self.stream(Timings(), "score")
        found = stream(*find_images(cast(Images, images))) if frames is None else stream(Path(), frames)
        scores = [scores for _, scores in found]
        if frames is not None and stream.skipped:
            raise InputError(stream.skipped[0].reason)
        return join(scores)

    def stream(self, timings: Timings, label: str) -> ScoreStream:
        """Make a stream that scores images batch by batch, with as many at a time as the memory budget allows.

        Args:
            timings: where the seconds of each step are added.
            label: what the progress bar says.
        """
        # They import torch, which scoring features does not need.
        from spade_faiss.features.stream import FeatureStream
        from spade_faiss.scoring.stream import ScoreStream

        run = replace(self.run, memory=self.decode_bytes)
        features = FeatureStream(self.backbone, run, batch_size=self.plan.batch, timings=timings)
        return ScoreStream(features, partial(self.score_features, timings=timings), label)

    @fork_safe
    def score_features(self, batch: FeatureBatch, *, timings: Timings | None = None) -> Scores:
        """Score images by their features, from any extractor.

        Args:
            batch: features of n images, of the bank's levels and source.
            timings: where the seconds of each step are added.

        Raises:
            InputError: for features that do not fit the bank.
        """
        check_fork(self.device)
        timings = timings or Timings()
        self.bank.check_source(batch.source)
        check_ids(batch.ids)
        size, found = self.plan.batch, []
        for start in range(0, max(1, len(batch)), size):
            with timings("prepare"):
                query = prepare(batch[start : start + size], self.bank.layout)
            with timings("image search"):
                sq_dist, rows = self._images.search(query.embedding, self._neighbors)
            found.append(self._score(query, sq_dist, rows, timings))
        return join(found)

    @fork_safe
    def score_rows(self, rows: Sequence[int], *, timings: Timings | None = None) -> Scores:
        """Score normal images of the bank, each against all the others: how normal images score with this detector.

        Args:
            rows: bank rows.
            timings: where the seconds of each step are added.

        Raises:
            InputError: for a bank that has no other image for each of the neighbors asked for.
        """
        check_fork(self.device)
        self.check_leave_one_out()
        timings = timings or Timings()
        size, found = self.plan.batch, []
        for start in range(0, max(1, len(rows)), size):
            own = np.asarray(rows[start : start + size], np.int64)
            with timings("read"):
                query = self.bank.read(own)
            with timings("image search"):
                sq_dist, others = self._search_others(query.embedding, own)
            found.append(self._score(query, sq_dist, others, timings, own))
        return join(found)

    def check_leave_one_out(self) -> None:
        """Raise InputError if an image of the bank cannot be scored against all the others, see `score_rows`."""
        if self._neighbors >= len(self.bank):
            raise InputError(
                f"each of the {len(self.bank)} normal images in {self.bank.path} has {len(self.bank) - 1} others, "
                f"k={self._neighbors} were asked for; lower k_image and k_gallery, or add images"
            )

    @property
    def _neighbors(self) -> int:
        """How many nearest normal images are looked up for each image."""
        return max([self.method.k_image, *(int(k) for k in self._k_gallery if k != ALL)])

    @property
    def _k_gallery(self) -> tuple[int | str, ...]:
        """The method's `k_gallery` for each of the searched levels."""
        return for_each("k_gallery", self.method.k_gallery, len(self._searches))

    def _search_others(self, embedding: FloatArray, own: IntArray) -> tuple[FloatArray, IntArray]:
        """The nearest normal images of normal images, each one itself left out."""
        k = self._neighbors
        sq_dist, rows = self._images.search(embedding, k + 1)
        others = rows != own[:, None]
        # An approximate index may have missed the image itself, or equal ones may stand before it: leave out the last then.
        others[others.all(axis=1), -1] = False
        return sq_dist[others].reshape(-1, k), rows[others].reshape(-1, k)

    def _gallery(self, k_gallery: int | str, rows: IntArray, own: IntArray | None) -> IntArray:
        """(n, K) the bank rows that n images are searched in; nearest first, as far as the nearest `rows` (n, k) are known.

        `own` (n,) are the rows of the images themselves, if they are the bank's own: they are left out.
        """
        if k_gallery != ALL and not self.resolved.method.whole_bank:
            return rows[:, : int(k_gallery)]
        every, line = np.arange(len(self.bank)), []
        if own is None and self.resolved.method.whole_bank:
            # Written out, it would be as large as the bank for each image.
            return np.broadcast_to(every, (len(rows), len(every)))
        for index, nearest in enumerate(rows):
            known = nearest if own is None else np.append(nearest, own[index])
            line.append(np.concatenate([nearest, np.delete(every, known)]))
        return np.stack(line)

    def _score(
        self, query: FeatureBatch, sq_dist: FloatArray, rows: IntArray, timings: Timings, own: IntArray | None = None
    ) -> Scores:
        """Score features whose nearest normal images `rows` are known; for `own`, see `_gallery`."""
        neighbor_dist = to_distance(sq_dist, self.method.distance)
        image_score = neighbor_dist[:, : self.method.k_image].mean(axis=1)
        localized = np.flatnonzero(self._is_localized(image_score))
        with timings("pixel search"):
            galleries = {k: self._gallery(k, rows, own) for k in dict.fromkeys(self._k_gallery)}
            levels = {
                name: search(query, rows, galleries[k], localized)
                for (name, search), k in zip(self._searches.items(), self._k_gallery, strict=True)
            }
        level_dist = {name: found.dist for name, found in levels.items()}
        with timings("fusion"):
            size = self.bank.layout.input_size
            maps = np.full((len(query), *size), np.nan, np.float32)
            if len(localized):
                maps[localized] = score_maps([dist[localized] for dist in level_dist.values()], size, self.method.sigma)
            if query.valid is not None:
                maps *= query.valid
            statistics = map_statistics(maps, query.valid, self.method.top_share)
        ids = self.bank.ids
        return Scores(
            ids=list(query.ids),
            image_score=image_score,
            maps=maps,
            statistics=statistics,
            neighbor_ids=np.array([[ids[row] for row in line] for line in rows]),
            neighbor_dist=neighbor_dist,
            level_dist=level_dist,
            nearest={name: found.nearest for name, found in levels.items()},
            distance=self.method.distance,
            passed_over={name: found.passed_over for name, found in levels.items() if found.passed_over is not None},
            valid=query.valid,
        )

    def _is_localized(self, image_score: FloatArray) -> npt.NDArray[np.bool_]:
        """(n,) which images get a map."""
        if (above := self.method.flag_above) is not None:
            with np.errstate(over="ignore"):  # one beyond float32 is above all scores
                return image_score > above
        return np.full(image_score.shape, self.method.localize == "all")

    def _working_bytes(self, images: int) -> int:
        """About how many bytes it takes to score so many images at a time."""
        searches = self._searches.values()
        return working_bytes(
            images,
            self.bank.layout,
            [search.level for search in searches],
            max(search.working_bytes(images) for search in searches),
            forward=self.bank.manifest.source is not None,
        )


def _load_backbone(bank: Snapshot, backbone: str | Backbone | None, run: Run, device: str) -> Backbone:
    from spade_faiss.bank.backbone import backbone_of  # imports torch, which scoring features does not need

    return backbone_of(bank, backbone, run, device)


def _check_neighbors(bank: Snapshot, method: Method) -> None:
    levels = searched_levels(bank.layout.levels, method.fusion, method.levels)
    sizes = gallery_sizes(method, len(levels), len(bank))
    for name, k in (("k_image", method.k_image), ("k_gallery", max(sizes))):
        if k > len(bank):
            raise InputError(
                f"{name}={k} is larger than the number of normal images, {len(bank)} in {bank.path}; lower it or add images"
            )
    for level, size in zip(levels, sizes, strict=True):
        if method.kappa > (most := size * level.locations):
            raise InputError(
                f"kappa={method.kappa} is larger than the gallery, {most} vectors at level {level.name!r}; lower it"
            )
