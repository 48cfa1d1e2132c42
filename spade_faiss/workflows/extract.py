"""Extraction: images go through the backbone into a bank, shard by shard; an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spade_faiss.bank.backbone import backbone_of
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.manifest import is_begun, read_manifest
from spade_faiss.bank.origin import Origin
from spade_faiss.bank.places import MANIFEST
from spade_faiss.bank.shards import SHARD_BYTES
from spade_faiss.core.copies import named
from spade_faiss.core.declaring import for_each
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.memory import BATCH_SIZE, parse_bytes
from spade_faiss.core.presets import DEFAULT, Preset, Usual, load_preset
from spade_faiss.core.products import check_product
from spade_faiss.core.settings import Run
from spade_faiss.core.store import Store
from spade_faiss.core.timing import Timings
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import Duplicate, ImageRecord, Images, Skipped, Survey, survey
from spade_faiss.features.depth import find_bit_depth
from spade_faiss.features.folders import LeftOut
from spade_faiss.features.forward.choice import check_torch
from spade_faiss.features.grouping import find_groups, find_products
from spade_faiss.features.kinds import check_normals
from spade_faiss.features.layout import Layout
from spade_faiss.features.memory import forward_bytes
from spade_faiss.features.pages import hash_images
from spade_faiss.features.placement import Visible
from spade_faiss.features.roi_files import place_roi, read_roi
from spade_faiss.features.stream import FeatureStream
from spade_faiss.index.build import check_recipe
from spade_faiss.search.levels import searched_levels
from spade_faiss.search.protocol import check_own_rois
from spade_faiss.search.recipe import load_recipe
from spade_faiss.storage.copy import bank_folder
from spade_faiss.workflows.bank_network import make_network
from spade_faiss.workflows.extract_pieces import Extracting, Pass, extract_pieces
from spade_faiss.workflows.shard_buffer import Belonging, ShardBuffer

# How images are placed in the network's input; the rest of the preprocessing is the backbone's own, or found.
_PLACED = ("resize_mode", "resize", "size", "tile", "overlap", "roi", "own_rois")


@dataclass(frozen=True, kw_only=True)
class Added:
    """What `extract` or `add` did.

    Args:
        bank: the bank.
        added: the number of images that were extracted.
        present: the number of images that were in the bank before.
        removed: the ids of images that were removed from the bank before, and are not added again.
        duplicates: the images that have the same content as another one.
        skipped: the images that could not be read.
        left_out: the other files of the folders, by suffix.
        visible: how much of the added images the resize mode shows.
        timing_s: seconds by stage; stages in different threads overlap.
        total_s: seconds by the clock.
        no_network: why a new bank carries no network although it should; empty otherwise.
    """

    bank: Bank
    added: int
    present: int
    removed: tuple[str, ...]
    duplicates: tuple[Duplicate, ...]
    skipped: tuple[Skipped, ...]
    left_out: LeftOut
    visible: Visible
    timing_s: dict[str, float]
    total_s: float
    no_network: str = ""


def extract(
    images: Images,
    *,
    bank: str | Path,
    extraction: Extraction = Extraction(),
    preset: str | Path | Preset | None = None,
    run: Run = Run(),
) -> Added:
    """Extract the features of normal images into a bank, which is created if there is none.

    Features are committed shard by shard, and images that the bank holds are not extracted again: after an interruption, the
    same call goes on where it stopped.

    Args:
        images: a folder, an image, or a list of them.
        bank: the bank's folder.
        extraction: the backbone, and how its features are stored; where a setting is at its default, that of the preset counts.
        preset: how features are stored, and how the bank is searched unless something else is asked for; that of the bank, or
            `default` for a new one, unless given.
        run: `device`, `engine` and `weights` are for a backbone that is given by name.

    Raises:
        InputError: for bad input, a folder that holds defects or masks beside normal images, too many unreadable images, an
            image that has changed since the bank took it, views of images that are cut into tiles, or an existing bank with
            other settings.
        NotFoundError: if a path does not exist.
        BankError: if the bank is damaged, or another process is writing to it.
    """
    check_backbone(extraction, run)
    folder = bank_folder(bank)
    chosen = choose_preset(bank, preset).with_extraction(extraction)
    extraction = chosen.extraction
    found = _find_normals(images, run)
    backbone = load_named(extraction, run)
    if extraction.augment is not None and backbone.source.preprocess.tile is not None:
        raise InputError(f"augment={extraction.augment!r} is of whole images, and tile cuts them up; leave one of them out")
    if backbone.source.preprocess.bit_depth is None:
        backbone = backbone.with_bit_depth(_find_bit_depth(folder, found.records, run))
    if extraction.roi is not None:
        own_rois = Path(extraction.roi).is_dir()
        backbone = backbone.with_roi(None if own_rois else read_roi(extraction.roi), own_rois=own_rois)
    elif (placed := extraction.preprocess).roi is not None or placed.own_rois:  # the bank's own
        backbone = backbone.with_roi(placed.roi, own_rois=placed.own_rois)
    preprocess = backbone.source.preprocess
    run = replace(
        run, roi=extraction.roi if preprocess.own_rois else run.roi, group_by=extraction.group_by, products=extraction.products
    )
    store = Store.parse(extraction.store)
    is_divided = extraction.products is not None or run.cluster is not None
    if store.is_coded and is_divided and not is_begun(folder):
        # Codes are learned from the first pictures, which are of one product, or on one of many workers.
        raise InputError(
            f"a bank of several products, or one that a cluster makes, is not made with store={store}: make it with "
            f"store=float16, and then: spade-faiss convert BANK OUT --store {store}"
        )
    layout = Layout(
        levels=backbone.levels,
        embedding_dim=backbone.embedding_dim,
        input_size=backbone.input_size,
        dtype=store.dtype,
        numbers=store.numbers,
        bits=store.bits,
        normalize=extraction.normalize,
        pool=extraction.pool,
        pool_border=extraction.pool_border,
        roi=place_roi(preprocess),
        own_rois=preprocess.own_rois,
    )
    usual = chosen.usual([level.name for level in layout.levels])
    _check_usual(usual, layout)
    timings = Timings()
    with timings("network"):
        made = make_network(folder, backbone, found.records, extraction, run)
    with timings("check"):
        target = Bank.open_or_create(
            bank,
            layout,
            Origin(
                source=made.backbone.source,
                weights_file=None if run.weights is None else str(Path(run.weights).resolve()),
                network=made.carried,
                augment=extraction.augmentation,
                grouping=extraction.grouping,
                products=extraction.product_grouping,
                usual=usual,
            ),
        )
    return replace(_add_records(target, made.backbone, found, run, timings), no_network=made.why_none)


def _check_usual(usual: Usual, layout: Layout) -> None:
    """Raise InputError for a way to search that a bank of this layout could not remember; before the work begins."""
    recipe, method = load_recipe(usual.recipe), usual.method
    check_recipe(recipe, layout.embedding_dim)
    levels = searched_levels(layout.levels, method.fusion, method.levels)
    for_each("k_gallery", method.k_gallery, len(levels))
    for_each("level_weights", method.level_weights or 1.0, len(levels))
    if layout.own_rois:
        check_own_rois(recipe)
        if method.fusion == "concat" or any("+" in name for name in method.levels):
            raise InputError(
                "levels that are joined take one region of interest for all images, and each has one of its own here; search "
                "each level by itself, or make a bank with one mask: --roi MASK.png"
            )


def choose_preset(bank: str | Path, preset: str | Path | Preset | None) -> Preset:
    """The preset that is asked for; else the settings of the bank, or, if there is none, `default`.

    Args:
        bank: the bank's folder.
        preset: the preset that is asked for.

    Raises:
        NotFoundError: for a preset that there is not.
        InputError: for a file that holds no preset.
        BankError: if the bank is damaged.
    """
    if preset is not None:
        return load_preset(preset)
    folder = bank_folder(bank)
    made = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if made is None or made.generation == 0:  # nothing was ever stored, so its settings may still change
        return load_preset(DEFAULT)
    placed = {} if made.source is None else {name: getattr(made.source.preprocess, name) for name in _PLACED}
    stored = {name: getattr(made.layout, name) for name in ("normalize", "pool", "pool_border")}
    augment = None if made.augment is None else str(made.augment)
    extraction = Extraction(**stored, store=str(made.layout.store), augment=augment, preprocess=Preprocess(**placed))
    if made.source is not None:
        network = {name: getattr(made.source, name) for name in ("backbone", "precision", "blocks")}
        extraction = replace(extraction, **network)
    return Preset(name=made.usual.preset, recipe=made.usual.recipe, extraction=extraction, method=made.usual.method)


def add(images: Images, *, bank: str | Path, backbone: Backbone | None = None, run: Run = Run()) -> Added:
    """Add normal images to an existing bank, with its own backbone and settings.

    Its indexes stay as they are. Images that they do not hold are searched without them, until `update_indexes` adds them.

    Args:
        images: a folder, an image, or a list of them.
        bank: the bank's folder.
        backbone: the backbone that the bank was made with; needed if it is a module of your own, and the bank carries no
            network.
        run: `engine` is what runs the backbone; `weights` is the file of its weights, if they are not where they were and
            cannot be downloaded; `roi` is the folder of the images' masks, if the bank was made with one; `group_by` says
            how these images belong together, if the bank needs to be told; `products`, or `product` if all of them are of one,
            says which products they show, in a bank of several. With `product`, their ids begin with its name.

    Raises:
        InputError: for bad input, a folder that holds defects or masks beside normal images, too many unreadable images, an
            image that has changed since the bank took it, or a backbone that is not the bank's.
        NotFoundError: if there is no such bank, or a path does not exist.
        BankError: if the bank is damaged, or another process is writing to it.
    """
    found = _find_normals(images, run)
    timings = Timings()
    with timings("check"):
        target = Bank.open(bank)
        network = backbone_of(target, backbone, run)
    return _add_records(target, network, found, run, timings)


def _find_normals(images: Images, run: Run) -> Survey:
    found = survey(images, run)
    check_normals(found.sources, [record.path for record in found.records])
    return found


def check_backbone(extraction: Extraction, run: Run) -> None:
    """Raise InputError if a backbone is neither a name nor a `Backbone`, or if settings are given that a `Backbone` has."""
    backbone = extraction.backbone
    if not isinstance(backbone, str | Backbone):
        found = type(backbone).__name__
        raise InputError(
            f"backbone is a {found}; wrap a module: Backbone(Network.from_module(module, name=..., taps=..., embedding=...))"
        )
    defaults = Extraction()
    if isinstance(backbone, Backbone) and (
        run.weights is not None
        or (run.device, run.engine) != (Run.device, Run.engine)
        or (extraction.precision, extraction.preprocess, extraction.blocks)
        != (defaults.precision, defaults.preprocess, defaults.blocks)
    ):
        raise InputError(
            "weights, precision, preprocess, blocks, device and engine belong to a backbone given by name; this one has its own"
        )


def load_named(extraction: Extraction, run: Run) -> Backbone:
    """The backbone of an extraction: the one that was given, or the one of that name, by torch."""
    if isinstance(extraction.backbone, Backbone):
        return extraction.backbone
    check_torch()
    from spade_faiss.features.loading import load_backbone  # imports torch, which `add` does not need

    return load_backbone(
        str(extraction.backbone),
        weights=run.weights,
        precision=extraction.precision,
        preprocess=extraction.preprocess,
        blocks=extraction.blocks,
        device=run.device,
    )


def _find_bit_depth(bank: Path, records: Sequence[ImageRecord], run: Run) -> int | None:
    """The bit depth of a bank: its own, if it exists; else that of the images it will be made from."""
    if (bank / MANIFEST).is_file():
        made = Bank.open(bank).manifest.source
        return None if made is None else made.preprocess.bit_depth
    return find_bit_depth([record.path for record in records], parse_bytes(run.memory))


def _add_records(target: Bank, backbone: Backbone, found: Survey, run: Run, timings: Timings) -> Added:
    """Extract the images that the bank does not hold, and commit them shard by shard."""
    records = found.records if run.product is None else _of_product(found.records, run.product)
    augmentation = target.manifest.augment
    views = 1 if augmentation is None else augmentation.views
    with target.writing():  # from the start: a second run fails at once, not after it has computed a shard
        with timings("check"):
            new, removed = _not_in(target, records)
            products = find_products([record.id for record in new], target.manifest.products, run.products, run.product)
            product_of = dict(zip([record.id for record in new], products, strict=False))
            if products:  # a shard is of one product
                new.sort(key=lambda record: product_of[record.id])
            groups = find_groups([record.id for record in new], target.manifest.grouping, run.group_by)
            group_of = {record.id: group for record, group in zip(new, groups, strict=True)} if groups else {}
            known = {digest: name for name, digest in target.with_removed().sha256_of.items()}
        work = Extracting(
            found=replace(found, records=new),
            run=run,
            batch_size=_batch_size(backbone, run, views),
            shard_bytes=SHARD_BYTES,
            # In a second run, the images that are left may be those that could not be read in the first.
            allow_none=len(new) < len(records),
            belongs=Belonging(group_of, product_of),
        )
        before = len(target.pictures)
        if run.cluster is None or not new:
            came = _extract_here(target, backbone, work, known, timings)
        else:
            with timings("cluster"):
                came = extract_pieces(target, backbone, work, known)
        return Added(
            bank=target,
            added=len(target.pictures) - before,
            present=len(records) - len(new) - len(removed),
            removed=tuple(removed),
            duplicates=tuple(came.duplicates),
            skipped=tuple(came.skipped),
            left_out=found.left_out,
            visible=Visible.of(came.placements, backbone.source.preprocess.input_mode),
            timing_s=timings.seconds,
            total_s=timings.total_s,
        )


def _extract_here(target: Bank, backbone: Backbone, work: Extracting, known: dict[str, str], timings: Timings) -> Pass:
    """Extract images in this process; arguments are those of `extract_pieces`, and the seconds of each stage are added."""
    stream = FeatureStream(
        backbone, work.run, batch_size=work.batch_size, timings=timings, allow_none=work.allow_none, known=known
    )
    augmentation = target.manifest.augment
    label = "extract" if augmentation is None else f"extract, {augmentation.views} views each"

    def commit(batch: FeatureBatch, product: str) -> None:
        target.append_prepared(batch, product=product)

    with ShardBuffer(commit, target.layout, work.shard_bytes, timings) as buffer:
        placements = buffer.fill(stream(work.found.root, work.found.records, label, augmentation), work.belongs)
    return Pass(placements, stream.skipped, stream.duplicates)


def _of_product(records: Sequence[ImageRecord], product: str) -> list[ImageRecord]:
    """Records whose ids begin with the name of their product: those of two products may be called the same otherwise."""
    return [replace(record, id=f"{check_product(product)}/{record.id}") for record in records]


def _batch_size(backbone: Backbone, run: Run, views: int) -> int:
    """How many inputs the network takes at once: as many as fit into the memory, one at least.

    All `views` of an image are in memory at the same time, even where the network takes fewer at once.
    """
    memory, size_of = parse_bytes(run.memory), backbone.input_size
    fitting = (size for size in range(BATCH_SIZE, 1, -1) if forward_bytes(max(size, views), size_of) <= memory)
    return next(fitting, 1)


def _not_in(bank: Bank, records: Sequence[ImageRecord]) -> tuple[list[ImageRecord], list[str]]:
    """Return the records of images that the bank never held, and the ids of those that were removed from it.

    Raises:
        InputError: if the bank holds an image of the same name with other content.
    """
    everything = bank.with_removed()
    held = everything.sha256_of
    present = [record for record in records if record.id in held]
    digests = hash_images([record.path for record in present])
    for record, digest in zip(present, digests, strict=True):
        if held[record.id] != digest:
            before = everything.image_path(record.id)
            gone = "; it was removed: compact the bank to forget it" if record.id in bank.removed else ""
            if before != Path(named(str(record.path))):
                raise InputError(
                    f"the bank {bank.path} holds another image named {record.id!r}, from {before}; "
                    f"rename this one, {record.path}{gone}"
                )
            raise InputError(
                f"{record.id} has changed since the bank {bank.path} took it (sha256 {held[record.id]}, now {digest}); "
                f"give it another name, or extract a new bank{gone}"
            )
    return [record for record in records if record.id not in held], [
        record.id for record in present if record.id in bank.removed
    ]
