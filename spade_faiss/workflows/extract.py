"""Images -> backbone -> bank: decoding ahead of the network, resumable, with progress."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.shards import SHARD_BYTES
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.files import hash_file
from spade_faiss.core.memory import BATCH_SIZE
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.settings import DEFAULT_BACKBONE, DEVICE, MAX_SKIPPED, Preprocess
from spade_faiss.core.timing import Stages
from spade_faiss.features.backbone import Backbone, is_known, load_backbone
from spade_faiss.features.batch import FeatureBatch, concatenate
from spade_faiss.features.images import ImageRecord, Skipped, find_images
from spade_faiss.features.layout import Layout, prepare
from spade_faiss.features.stream import Duplicate, FeatureStream
from spade_faiss.index.build import check_recipe
from spade_faiss.search.recipe import Recipe

Images = str | Path | Sequence[str | Path]


class _ShardBuffer:
    """Gathers prepared batches into shards and commits them in a thread of their own, beside the network."""

    def __init__(self, bank: Bank, stages: Stages) -> None:
        self._bank = bank
        self._stages = stages
        self._batches: list[FeatureBatch] = []
        self._bytes = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._pending: Future[None] | None = None

    def add(self, batch: FeatureBatch) -> None:
        with self._stages("prepare"):
            prepared = prepare(batch, self._bank.layout)
        self._batches.append(prepared)
        self._bytes += prepared.embedding.nbytes + sum(maps.nbytes for maps in prepared.levels.values())
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what was gathered to the writer, once it has finished the shard before."""
        self._wait()
        if self._batches:
            self._pending = self._pool.submit(self._commit, self._batches)
            self._batches, self._bytes = [], 0

    def _commit(self, batches: list[FeatureBatch]) -> None:
        with self._stages("write"):
            self._bank.append_prepared(concatenate(batches))

    def _wait(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, None
            with self._stages("wait for write"):
                pending.result()

    def __enter__(self) -> _ShardBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        # After an error or Ctrl-C too: what was computed is kept, and the next run goes on from there.
        try:
            self.flush()
            self._wait()
        finally:
            self._pool.shutdown()


@dataclass(frozen=True, kw_only=True)
class Added:
    """What `extract` or `add` did.

    `added` images were extracted, `present` were in the bank before, `removed` were taken out of it and are not taken in again,
    `duplicates` have the content of another one, `skipped` could not be read; `stage_s` are seconds by stage (stages in other
    threads overlap) and `total_s` the wall clock.
    """

    bank: Bank
    added: int
    present: int
    removed: tuple[str, ...]
    duplicates: tuple[Duplicate, ...]
    skipped: tuple[Skipped, ...]
    stage_s: dict[str, float]
    total_s: float


def extract(
    images: Images,
    *,
    bank: str | Path,
    backbone: str | Backbone = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    precision: str = "float32",
    preprocess: Preprocess | None = None,
    dtype: str = "float16",
    normalize: str = "none",
    pool: int = 1,
    recipe: Recipe | None = None,
    device: str = DEVICE,
    max_skipped: int = MAX_SKIPPED,
    progress: bool = False,
) -> Added:
    """Extract the features of normal images into a bank, which is made if there is none.

    Features are committed shard by shard, and an image that the bank holds is not extracted again: when interrupted, run the
    same call again and it goes on where it stopped.

    Args:
        images: a folder, an image, or a list of them.
        bank: the bank's folder; made if there is none.
        backbone: a name that `load_backbone` knows, or a `Backbone`, to which the next three and `device` do not apply.
        weights: a file of weights to use instead of the published ones.
        precision: `float32` or `bfloat16`.
        preprocess: framing and sizes; the normalisation is the backbone's own.
        dtype: of the stored maps, `float16` or `float32`.
        normalize: `none` or `l2`, see `Bank.create`.
        pool: see `Bank.create`.
        recipe: that will be built over the bank: checked before the work.
        device: where a backbone given by name runs, see `Detector.open`.
        max_skipped: how many unreadable images to leave out before giving up.
        progress: show bars on stderr if that is a terminal.

    Raises:
        InputError: for bad input, too many unreadable images, an image that has changed since the bank took it, or an existing
            bank with other settings.
        NotFoundError: if a path does not exist.
        BankError: if the bank is damaged, or another process is writing to it.
    """
    check_at_least("max_skipped", max_skipped, 0)
    if not isinstance(backbone, str | Backbone):
        found = type(backbone).__name__
        raise InputError(f"backbone is a {found}; wrap a module: Backbone(module, name=..., taps=..., embedding=...)")
    if isinstance(backbone, Backbone) and (
        weights is not None or precision != "float32" or preprocess is not None or device != DEVICE
    ):
        raise InputError("weights, precision, preprocess and device belong to a backbone given by name; this one has its own")
    root, records = find_images(images)
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, weights=weights, precision=precision, preprocess=preprocess, device=device)
    layout = Layout(
        levels=backbone.levels,
        embedding_dim=backbone.embedding_dim,
        input_size=backbone.input_size,
        dtype=dtype,
        normalize=normalize,
        pool=pool,
    )
    if recipe is not None:
        check_recipe(recipe, layout.embedding_dim)
    weights_file = None if weights is None else str(Path(weights).resolve())
    stages = Stages()
    with stages("check"):
        target = Bank.open_or_create(bank, layout, source=backbone.source, weights_file=weights_file)
    return _add_records(target, backbone, root, records, stages, max_skipped=max_skipped, progress=progress)


def add(
    images: Images,
    *,
    bank: str | Path,
    backbone: Backbone | None = None,
    weights: str | Path | None = None,
    device: str = DEVICE,
    max_skipped: int = MAX_SKIPPED,
    progress: bool = False,
) -> Added:
    """Add normal images to a bank that exists, with its own backbone and settings. Its indexes stay as they are: what they do
    not cover is searched beside them, exactly, until `update_indexes` folds it in.

    Args:
        images: a folder, an image, or a list of them.
        bank: the bank's folder.
        backbone: the bank's own, for a bank that was made with a module of yours.
        weights: where the backbone's weights are, if they are not where they were or cannot be downloaded.
        device: where the bank's own backbone runs, see `Detector.open`.
        max_skipped: how many unreadable images to leave out before giving up.
        progress: show bars on stderr if that is a terminal.

    Raises:
        InputError: for bad input, too many unreadable images, an image that has changed since the bank took it, or a backbone
            that is not the bank's.
        NotFoundError: if there is no such bank, or a path does not exist.
        BankError: if the bank is damaged, or another process is writing to it.
    """
    check_at_least("max_skipped", max_skipped, 0)
    root, records = find_images(images)
    stages = Stages()
    with stages("check"):
        target = Bank.open(bank)
        network = backbone_of(target, backbone, weights, device)
    return _add_records(target, network, root, records, stages, max_skipped=max_skipped, progress=progress)


def _add_records(
    target: Bank,
    backbone: Backbone,
    root: Path,
    records: Sequence[ImageRecord],
    stages: Stages,
    *,
    max_skipped: int,
    progress: bool,
) -> Added:
    """Extract what the bank does not hold and commit it shard by shard."""
    with target.writing():  # for the whole run: a second one is told at its start, not when it has computed a shard
        with stages("check"):
            new, removed = _not_in(target, records)
            known = {digest: name for name, digest in target.with_removed().sha256_of.items()}
        # On a second run, what is left of a folder may be the images that could not be read in the first.
        stream = FeatureStream(
            backbone,
            stages,
            root=root,
            batch_size=BATCH_SIZE,
            max_skipped=max_skipped,
            allow_none=len(new) < len(records),
            known=known,
        )
        before = len(target)
        with (
            tqdm(total=len(new), desc="extract", unit="img", disable=None if progress else True) as bar,
            _ShardBuffer(target, stages) as buffer,
        ):
            for extracted in stream(new):
                buffer.add(extracted.batch)
                bar.update(len(extracted.batch))
        return Added(
            bank=target,
            added=len(target) - before,
            present=len(records) - len(new) - len(removed),
            removed=tuple(removed),
            duplicates=tuple(stream.duplicates),
            skipped=tuple(stream.skipped),
            stage_s=stages.seconds,
            total_s=stages.total_s,
        )


def backbone_of(
    bank: Snapshot,
    backbone: str | Backbone | None = None,
    weights: str | Path | None = None,
    device: str = DEVICE,
) -> Backbone:
    """The backbone that a bank was made with.

    Args:
        bank: the bank.
        backbone: the same network from elsewhere: needed where it was a module of your own.
        weights: where its weights are, if they are not where they were.
        device: where one that is loaded here runs, see `Detector.open`.

    Raises:
        InputError: if the bank was made by another extractor, or what is loaded is not what it was made with.
        NotFoundError: if the weights are gone.
    """
    if isinstance(backbone, Backbone) and weights is not None:
        raise InputError("weights belong to a backbone given by name; this one has its own")
    if not isinstance(backbone, Backbone):
        source, recorded = bank.manifest.source, bank.manifest.weights_file
        if source is None:
            raise InputError(f"the bank {bank.path} was made by another extractor; hand it features, or pass a Backbone")
        if weights is None and recorded is not None:
            if not Path(recorded).is_file():
                raise NotFoundError(
                    f"the weights of the bank {bank.path} were in {recorded}, which is gone; pass --weights FILE"
                )
            weights = recorded
        if backbone is None and not is_known(source.backbone):
            raise InputError(f"the bank {bank.path} was made with your own backbone {source.backbone!r}; pass it as backbone=")
        backbone = load_backbone(
            backbone or source.backbone,
            weights=weights,
            precision=source.precision,
            preprocess=source.preprocess,
            device=device,
        )
    bank.check_source(backbone.source)
    return backbone


def _not_in(bank: Bank, records: Sequence[ImageRecord]) -> tuple[list[ImageRecord], list[str]]:
    """The records that the bank never held, and the ids of those that were removed from it.

    Raises:
        InputError: if it holds one of that name with other content.
    """
    everything = bank.with_removed()
    held = everything.sha256_of
    present = [record for record in records if record.id in held]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(hash_file, [record.path for record in present])
    for record, digest in zip(present, digests, strict=True):
        if held[record.id] != digest:
            before = everything.image_path(record.id)
            gone = "; it was removed: compact the bank to forget it" if record.id in bank.removed else ""
            if before != record.path:
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
