"""The detector: an opened bank, its indexes and a method; images in, scores out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot, unknown_product
from spade_faiss.core.declaring import for_each
from spade_faiss.core.device import check_fork, find_device
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import parse_bytes, plan_memory
from spade_faiss.core.once import Once
from spade_faiss.core.process import fork_safe
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch, by_picture, check_ids
from spade_faiss.features.datasets import Images, find_images
from spade_faiss.features.memory import most_tiled_bytes
from spade_faiss.features.tiles import largest_image
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.scoring.fusion import score_maps, to_distance
from spade_faiss.scoring.image_scores import STATISTICS, map_statistics
from spade_faiss.scoring.level_search import LevelSearch, open_level_searches
from spade_faiss.scoring.memory import DECODE_BYTES, float32_bytes, working_bytes
from spade_faiss.scoring.neighbors import ImageSearch, Neighbors, check_neighbors, method_of
from spade_faiss.scoring.products import ProductSearch, check_routable
from spade_faiss.scoring.routing import Routes
from spade_faiss.scoring.scores import Scores, join
from spade_faiss.scoring.stitching import Stitcher, check_tiling
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.levels import searched_levels
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe, load_recipe
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone
    from spade_faiss.features.frames import Pixels
    from spade_faiss.features.roi_folder import RoiFolder
    from spade_faiss.features.stream import FeatureStream
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
        shared: what the detectors of a bank's products have in common.

    In a bank of several products, each image is searched in the product that it shows, see `of_product` and `Scores.routes`.
    """

    @fork_safe
    def __init__(
        self,
        bank: Bank | Snapshot,
        recipe: Recipe,
        method: Method,
        run: Run = Run(),
        backbone: str | Backbone | None = None,
        *,
        shared: Shared | None = None,
    ) -> None:
        # A snapshot: the bank may change while the detector is open, its scores are against this state.
        self.bank = bank = bank.snapshot() if isinstance(bank, Bank) else bank
        recipe = recipe.within_product if bank.product else recipe
        self.resolved = resolve_recipe(recipe)
        self.method = method
        self.run = run
        if method.sigma > (most := max(bank.layout.input_size)):
            raise InputError(
                f"sigma={method.sigma:g} is wider than the input, {most} pixels: it would level all maps; lower it"
            )
        check_tiling(bank, method, whole_bank=self.resolved.method.whole_bank)
        if method.level_weights:
            searched = searched_levels(bank.layout.levels, method.fusion, method.levels)
            for_each("level_weights", method.level_weights, len(searched))
        self.scoring_config = ScoringConfig.of(self.resolved, method)
        self.device = find_device(run.device)
        # Where owners of its shards search a bank, no other process opens all of its embeddings.
        self._images_once = Once(partial(ImageIndex.open, bank, recipe, self.device))
        self._index_bytes = 0 if run.replicas is not None else self._images_once().nbytes
        if bank.is_of_products:
            # Each product's own are searched flat, beside the index of all of them.
            self._index_bytes += float32_bytes((len(bank), bank.layout.embedding_dim))
        self.neighbors = Neighbors(bank, method, self._open_image_search(), whole_bank=self.resolved.method.whole_bank)
        is_beside = shared is not None
        shared = shared or Shared(
            Workers(device=self.device),
            BlockCache(),
            Once(partial(_load_backbone, bank, backbone, run, self.device.torch_name)),
            self._index_bytes,
        )
        self._workers, self._cache, self._backbone, self._index_bytes = shared
        self._given_backbone = backbone
        self._products: ProductSearch[Detector] | None = None
        self._searches: dict[str, LevelSearch]
        if bank.is_of_products:
            check_routable(bank)
            if run.replicas is not None:
                raise InputError(f"owners search one product: name one of {bank.path}, or leave replicas={run.replicas} out")
            self._products = ProductSearch(
                bank,
                self._images_once(),
                lambda part: Detector(part, recipe, method_of(bank, part, method), run, backbone, shared=shared),
                self.neighbors.count,
            )
            self._searches = self._products.largest._searches
        else:
            self._searches = self._open_searches()
        cacheable = len(bank) * sum(
            float32_bytes((search.level.locations, search.level.channels)) for search in self._searches.values()
        )
        decodes = bank.manifest.source is not None
        self.plan = plan_memory(
            parse_bytes(run.memory),
            self._working_bytes,
            cacheable,
            decodes=decodes,
            picture_bytes=0 if bank.tile_places is None else most_tiled_bytes(largest_image(bank.tile_places)),
            index_bytes=self._index_bytes,
        )
        if not is_beside:
            self._cache.capacity = self.plan.cache_bytes

    @classmethod
    def open(
        cls,
        bank: str | Path | Bank,
        *,
        recipe: str | Path | Recipe | None = None,
        method: Method | None = None,
        run: Run = Run(),
        backbone: str | Backbone | None = None,
        product: str | None = None,
    ) -> Detector:
        """Open a bank for scoring.

        Args:
            bank: the bank's folder, or the opened bank.
            recipe: a recipe's name or file; the bank's usual one unless given, or `exact` if a method is.
            method: the parameters of SPADE; the bank's usual ones unless given.
            run: `device` computes the backbone, the image index and the gallery search; the process may grow by `memory` while
                it scores; `weights` is the file of the backbone's weights, if it is no longer where the bank remembers it.
            backbone: a backbone in place of the one the bank names; it must be the same network with the same weights.
            product: the one that all images show, in a bank of several; None has each image's nearest normals name it.

        Raises:
            NotFoundError: if there is no such bank or recipe.
            BankError: if the bank or its index is damaged or missing.
            InputError: for a setting out of range, more neighbors than normal images, too little memory, a device that is not
                there, a backbone that is not the bank's, or a product that it holds no image of.
        """
        whole = bank if isinstance(bank, Bank) else Bank.open(bank)
        opened = whole if product is None else whole.part(product)
        if recipe is None:
            recipe = opened.usual.recipe if method is None else "exact"
        method = opened.usual.method if method is None else method
        check_neighbors(opened, method)
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

    def with_method(self, method: Method) -> Detector:
        """A detector with other parameters of SPADE and caches of its own."""
        return Detector(self.bank, self.recipe, method, self.run, self._given_backbone)

    def reopening(self, run: Run) -> Callable[[], Detector]:
        """What opens the same detector to work in another way, in another process.

        Raises:
            InputError: for a `Backbone` that was passed to it: no other process has it.
        """
        if not isinstance(self._given_backbone, str | None):
            raise InputError("a Backbone that was passed is of this process; pass its name, or leave it to the bank")
        return partial(Detector, self.bank, self.recipe, self.method, run, self._given_backbone)

    def of_product(self, product: str) -> Detector:
        """The detector of one product of a bank of several: it takes all images for images of that.

        Raises:
            InputError: for a product that the bank holds no image of.
        """
        if self._products is None:
            if product != self.bank.product or not product:
                raise InputError(unknown_product(self.bank, product))
            return self
        return self._products.of_product(product)

    @property
    def product_configs(self) -> dict[str, ScoringConfig]:
        """The scoring config of each product of a bank of several; none of any other."""
        if self._products is None:
            return {}
        resolved, bank = resolve_recipe(self.recipe.within_product), self.bank
        return {name: ScoringConfig.of(resolved, method_of(bank, bank.part(name), self.method)) for name in bank.products}

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

    @property
    def images_at_a_time(self) -> int:
        """How many images are scored together: as many as the plan says, and one whose tiles are."""
        return 1 if self.bank.is_tiled else self.plan.batch

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
        found = stream(*find_images(cast(Images, images), self.run)) if frames is None else stream(Path(), frames)
        scores = [scores for _, scores in found]
        if frames is not None and stream.skipped:
            raise InputError(stream.skipped[0].reason)
        return join(scores)

    def stream(self, timings: Timings, label: str, *, allow_none: bool = False) -> ScoreStream:
        """Make a stream that scores images batch by batch, with as many at a time as the memory budget allows.

        Args:
            timings: where the seconds of each step are added.
            label: what the progress bar says.
            allow_none: whether a stream may end with all of its images skipped.
        """
        from spade_faiss.scoring.stream import ScoreStream  # imports Pillow, which scoring features does not need

        features = self.feature_stream(timings, allow_none=allow_none)
        return ScoreStream(features, self.batch_scorer(timings), label, self.prepare_thread)

    def feature_stream(self, timings: Timings, *, allow_none: bool = False) -> FeatureStream:
        """Make what decodes images and computes their features, within the memory budget.

        Args:
            timings: where the seconds of each step are added.
            allow_none: whether a stream may end with all of its images skipped.
        """
        from spade_faiss.features.stream import FeatureStream  # imports Pillow, which scoring features does not need

        run = replace(self.run, memory=self.decode_bytes)
        return FeatureStream(self.backbone, run, batch_size=self.plan.batch, timings=timings, allow_none=allow_none)

    def batch_scorer(self, timings: Timings) -> Callable[..., Scores | None]:
        """Make what scores batches of features as they come; it returns None for tiles after which others of an image follow.

        In a bank of several products, it takes `products` as `score_features` does.

        Args:
            timings: where the seconds of each step are added.
        """
        if self.bank.is_tiled:
            return partial(self._score_tiles, stitcher=self._stitcher(), timings=timings)
        return partial(self.score_features, timings=timings)

    def prepare_thread(self) -> None:
        """Have the calling thread, which is about to score, use as many of FAISS's threads as who opened the detector."""
        import_faiss().omp_set_num_threads(self._workers.threads)

    @fork_safe
    def score_features(
        self, batch: FeatureBatch, *, products: Sequence[str | None] | None = None, timings: Timings | None = None
    ) -> Scores:
        """Score images by their features, from any extractor.

        Args:
            batch: features of n images, of the bank's levels and source; of all of their tiles, if the bank holds tiles.
            products: (n,) the product of each image, in a bank of several; None where its nearest normals shall name it.
            timings: where the seconds of each step are added.

        Raises:
            InputError: for features that do not fit the bank, or a product that it holds no image of.
        """
        check_fork(self.device)
        timings = timings or Timings()
        self.bank.check_source(batch.source)
        self.bank.check_tiles(batch)
        check_ids(batch.ids)
        size = self.plan.batch
        if products is not None and (self._products is None or len(products) != len(batch)):
            raise InputError(
                unknown_product(self.bank, products[0] if len(products) else None)
                if self._products is None
                else f"{len(batch)} images were given with {len(products)} products; give the product of each, or None"
            )
        if not self.bank.is_tiled or not len(batch):
            named = list(products) if products is not None else [None] * len(batch)
            places = (slice(start, start + size) for start in range(0, max(1, len(batch)), size))
            return join([self._score_entries(batch[place], timings, named[place]) for place in places])
        stitcher, found = self._stitcher(), []
        for image in by_picture(batch):
            parts = (image[start : start + size] for start in range(0, len(image), size))
            found += [self._score_tiles(part, stitcher, timings) for part in parts]
        stitcher.check_complete()
        return join([scores for scores in found if scores is not None])

    def _stitcher(self) -> Stitcher:
        source = self.bank.manifest.source
        assert source is not None
        return Stitcher(source.preprocess, self.method)

    @fork_safe
    def _score_tiles(self, tiles: FeatureBatch, stitcher: Stitcher, timings: Timings) -> Scores | None:
        """Score tiles of one image, at most as many as are scored together; see `Stitcher.add`."""
        check_fork(self.device)
        scores = self._score_entries(tiles, timings)
        assert tiles.places is not None
        with timings("fusion"):
            return self._named(stitcher.add(tiles.picture_ids[0], tiles.places, scores))

    def _named(self, scores: Scores | None) -> Scores | None:
        """The scores of whole images with the product that this is the detector of, if it is of one."""
        if scores is None or not self.bank.product:
            return scores
        return replace(scores, routes=Routes.named([self.bank.product] * len(scores)))

    def _score_entries(self, batch: FeatureBatch, timings: Timings, named: Sequence[str | None] = ()) -> Scores:
        """Score images, or tiles, at most as many as are scored together; for `named`, see `score_features`."""
        with timings("prepare"):
            query = self.bank.prepared(batch)
        if self._products is not None:
            return self._products(query, named, timings)
        return self.score_prepared(query, timings=timings)

    def score_prepared(self, query: FeatureBatch, *, timings: Timings) -> Scores:
        """Score images, or tiles, of one product by features that `prepare` returned, at most `images_at_a_time`."""
        with timings("image search"):
            sq_dist, rows = self.neighbors.search(query)
        return self._score(query, sq_dist, rows, timings)

    @fork_safe
    def score_rows(self, rows: Sequence[int], *, timings: Timings | None = None) -> Scores:
        """Score normal images of the bank, each against all the others: how normal images score with this detector.

        All entries of the picture that a row was made of, and of all pictures of its group, are left out; in a bank of several
        products, the others are those of its own.

        Args:
            rows: bank rows; their scores are named after their pictures. In a bank of tiles, a row stands for its picture, all
                tiles of which are scored.
            timings: where the seconds of each step are added.

        Raises:
            InputError: for a bank that has no other entry for each of the neighbors asked for.
        """
        check_fork(self.device)
        timings = timings or Timings()
        if self._products is not None:
            return self._products.score_rows(np.asarray(rows, np.int64), timings)
        self.neighbors.check_leave_one_out()
        if not self.bank.is_tiled:
            batches = self.neighbors.batches_of_one_size(np.asarray(rows, np.int64), self.plan.batch)
            return join([self._score_own(own, timings) for own in batches])
        pictures, stitcher, size, found = self.bank.pictures, self._stitcher(), self.plan.batch, []
        places = self.bank.tile_places
        assert places is not None
        for number in pictures.of(np.asarray(rows, np.int64)).tolist():
            tiles = pictures.rows(number)
            for start in range(0, len(tiles), size):
                own = tiles[start : start + size]
                found.append(self._named(stitcher.add(pictures.ids[number], places[own], self._score_own(own, timings))))
            stitcher.check_complete()
        return join([scores for scores in found if scores is not None])

    @fork_safe
    def score_copies(self, batch: FeatureBatch, rows: Sequence[int], *, timings: Timings | None = None) -> Scores:
        """Score changed copies of normal images of the bank, each against all but the original and its siblings.

        Args:
            batch: features of n copies, of the bank's levels and source; a bank of tiles takes none.
            rows: (n,) the bank rows of the images that they are copies of, an image that has one entry each.
            timings: where the seconds of each step are added.

        Raises:
            InputError: for features that do not fit the bank, and for a bank whose images have several entries, or that has
                no other entry for each of the neighbors asked for.
        """
        check_fork(self.device)
        self.neighbors.check_leave_one_out()
        self.bank.check_source(batch.source)
        if self.bank.is_tiled or self.bank.pictures.largest > 1:
            raise InputError(f"images of the bank {self.bank.path} have several entries each; copies need one entry an image")
        if len(rows) != len(batch):
            raise InputError(f"{len(batch)} copies were given with {len(rows)} rows; give the row of each")
        timings, found, start = timings or Timings(), [], 0
        for own in self.neighbors.batches_of_one_size(np.asarray(rows, np.int64), self.plan.batch):
            with timings("prepare"):
                query = self.bank.prepared(batch[start : start + len(own)])
            found.append(self._score_own(own, timings, query))
            start += len(own)
        return join(found)

    def _score_own(self, own: IntArray, timings: Timings, copies: FeatureBatch | None = None) -> Scores:
        """Score rows, or prepared copies of theirs, at most as many as are scored together, against all but their siblings."""
        with timings("read"):
            query = self.bank.read(own) if copies is None else copies
            query = replace(query, ids=query.picture_ids)
        with timings("image search"):
            sq_dist, others = self.neighbors.search(query, own)
        return self._score(query, sq_dist, others, timings, own)

    def _open_searches(self) -> dict[str, LevelSearch]:
        """The search of each level, by its name."""
        return open_level_searches(self.bank, self.resolved, self.method, self._workers, self._cache)

    def _open_image_search(self) -> ImageSearch:
        """What finds the nearest normal images. It does not hold the detector, which is to go when nobody uses it any more."""
        images_once = self._images_once
        return lambda embedding, k: images_once().search(embedding, k)

    @property
    def _k_gallery(self) -> tuple[int | str, ...]:
        """The method's `k_gallery` for each of the searched levels."""
        return for_each("k_gallery", self.method.k_gallery, len(self._searches))

    def _score(
        self, query: FeatureBatch, sq_dist: FloatArray, rows: IntArray, timings: Timings, own: IntArray | None = None
    ) -> Scores:
        """Score features whose nearest normal images `rows` are known; for `own`, see `Neighbors`."""
        neighbor_dist = to_distance(sq_dist, self.method.distance)
        image_score = neighbor_dist[:, : self.method.k_image].mean(axis=1)
        localized = np.flatnonzero(self._is_localized(image_score))
        with timings("pixel search"):
            galleries = {k: self.neighbors.gallery(k, query, rows, own) for k in dict.fromkeys(self._k_gallery)}
            levels = {
                name: search(query, rows, galleries[k], localized)
                for (name, search), k in zip(self._searches.items(), self._k_gallery, strict=True)
            }
        level_dist = {name: found.dist for name, found in levels.items()}
        with timings("fusion"):
            size = self.bank.layout.input_size
            maps = np.full((len(query), *size), np.nan, np.float32)
            # Those of tiles are smoothed and reduced once they are one map.
            is_tile = self.bank.is_tiled
            if len(localized):
                sigma = 0.0 if is_tile else self.method.sigma
                own_dist = [dist[localized] for dist in level_dist.values()]
                maps[localized] = score_maps(own_dist, size, sigma, self.method.level_weights)
            if query.valid is not None:
                maps *= query.valid
            if is_tile:
                statistics = np.full((len(query), len(STATISTICS)), np.nan, np.float32)
            else:
                statistics = map_statistics(maps, query.valid, self.method.top_share)
        return Scores(
            ids=list(query.ids),
            image_score=image_score,
            maps=maps,
            statistics=statistics,
            neighbor_ids=np.array([self.bank.pictures.names(line) for line in rows]),
            neighbor_dist=neighbor_dist,
            level_dist=level_dist,
            nearest={name: found.nearest for name, found in levels.items()},
            distance=self.method.distance,
            passed_over={name: found.passed_over for name, found in levels.items() if found.passed_over is not None},
            valid=query.valid,
            routes=Routes.named([self.bank.product] * len(query)) if self.bank.product else None,
        )

    def _is_localized(self, image_score: FloatArray) -> npt.NDArray[np.bool_]:
        """(n,) which images get a map."""
        if (above := self.method.flag_above) is not None:
            with np.errstate(over="ignore"):  # one beyond float32 is above all scores
                return image_score > above
        return np.full(image_score.shape, self.method.localize == "all")

    def _working_bytes(self, images: int) -> int:
        """About how many bytes it takes to score so many images at a time, the image index included."""
        searches = self._searches.values()
        return self._index_bytes + working_bytes(
            images,
            self.bank.layout,
            [search.level for search in searches],
            max(search.working_bytes(images) for search in searches),
            forward=self.bank.manifest.source is not None,
        )


class Shared(NamedTuple):
    """What the detectors of a bank's products have in common: threads, the cache, the network, and what their indexes take."""

    workers: Workers
    cache: BlockCache[FloatArray]
    backbone: Once[Backbone]
    index_bytes: int


def _load_backbone(bank: Snapshot, backbone: str | Backbone | None, run: Run, device: str) -> Backbone:
    from spade_faiss.bank.backbone import backbone_of  # imports torch, which scoring features does not need

    return backbone_of(bank, backbone, run, device)
