"""Images -> backbone -> bank: decoding ahead of the network, resumable, with progress."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from spade_faiss.backbone import Backbone, load_backbone
from spade_faiss.bank import Bank
from spade_faiss.config import DEFAULT_BACKBONE, DEVICE, MAX_SKIPPED, Preprocess, check_at_least
from spade_faiss.device import BATCH_SIZE
from spade_faiss.errors import InputError
from spade_faiss.features import FeatureBatch, FloatArray, Layout, concatenate, prepare
from spade_faiss.files import hash_file
from spade_faiss.images import ImageRecord, Skipped, check_skipped, find_images, load, to_input, valid_region
from spade_faiss.index_build import Built, build_index, check_recipe
from spade_faiss.recipe import Recipe, load_recipe
from spade_faiss.stages import Stages

_SHARD_BYTES = 256 << 20
_BATCHES_AHEAD = 3

_log = logging.getLogger(__name__)

Images = str | Path | Sequence[str | Path]


@dataclass(frozen=True, eq=False)
class Extracted:
    """The features of some images, their records, and their original sizes (width, height)."""

    records: list[ImageRecord]
    sizes: list[tuple[int, int]]
    batch: FeatureBatch


class FeatureStream:
    """Features of images, in order, `batch_size` at a time: threads decode ahead while the network computes.

    Images that cannot be read are left out and listed in `skipped`; more than `max_skipped` of them stop the stream, and
    so does a stream of nothing else, unless `allow_none`.
    """

    def __init__(
        self,
        backbone: Backbone,
        stages: Stages,
        *,
        root: Path,
        batch_size: int,
        max_skipped: int = MAX_SKIPPED,
        allow_none: bool = False,
    ) -> None:
        self.skipped: list[Skipped] = []
        self._backbone = backbone
        self._preprocess = backbone.source.preprocess
        self._stages = stages
        self._root = root
        self._batch_size = batch_size
        self._max_skipped = max_skipped
        self._allow_none = allow_none

    def __call__(self, records: Sequence[ImageRecord]) -> Iterator[Extracted]:
        """Yield the features of `records`.

        Raises:
            InputError: when more images than allowed were skipped, or all of them.
        """
        parts = [records[start : start + self._batch_size] for start in range(0, len(records), self._batch_size)]
        with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode") as pool:
            ahead: deque[list[Future[_Input]]] = deque()
            waiting = iter(parts)
            try:
                for part in parts:
                    for coming in islice(waiting, _BATCHES_AHEAD - len(ahead)):
                        ahead.append([pool.submit(self._load, record) for record in coming])
                    if inputs := self._collect(part, ahead.popleft()):
                        yield self._forward(inputs)
            finally:
                pool.shutdown(cancel_futures=True)
        if records and len(self.skipped) == len(records) and not self._allow_none:
            raise InputError(f"none of the {len(records)} images could be read; the first: {self.skipped[0].reason}")

    def _load(self, record: ImageRecord) -> _Input:
        with self._stages("decode"):
            loaded = load(record, self._preprocess)
            return _Input(record, to_input(loaded.picture, self._preprocess), loaded.size, loaded.sha256)

    def _collect(self, records: Sequence[ImageRecord], futures: Sequence[Future[_Input]]) -> list[_Input]:
        inputs = []
        with self._stages("wait for decode"):
            for record, future in zip(records, futures, strict=True):
                try:
                    inputs.append(future.result())
                except InputError as error:
                    _log.warning("skipped %s", error)
                    self.skipped.append(Skipped(record.id, str(error)))
                    check_skipped(self.skipped, self._max_skipped)
        return inputs

    def _forward(self, inputs: Sequence[_Input]) -> Extracted:
        with self._stages("forward"):
            embedding, levels = self._backbone(np.stack([item.x for item in inputs]))
        records = [item.record for item in inputs]
        batch = FeatureBatch(
            [record.id for record in records],
            embedding,
            levels,
            self._backbone.source,
            valid=self._valid([item.size for item in inputs]),
            paths=[os.path.relpath(record.path, self._root) for record in records],
            sha256=[item.sha256 for item in inputs],
            root=str(self._root.resolve()),
        )
        return Extracted(records, [item.size for item in inputs], batch)

    def _valid(self, sizes: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_] | None:
        if self._preprocess.framing != "letterbox":
            return None
        return np.stack([valid_region(size, self._preprocess) for size in sizes])


class _Input(NamedTuple):
    record: ImageRecord
    x: FloatArray
    size: tuple[int, int]
    sha256: str


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
        if self._bytes >= _SHARD_BYTES:
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
class Fit:
    """What `fit` did.

    `added` images were extracted, `present` were in the bank before, `skipped` could not be read; `stage_s` are seconds by
    stage (stages in other threads overlap) and `total_s` the wall clock; `index` is None where nothing had to be built.
    """

    bank: Bank
    added: int
    present: int
    skipped: tuple[Skipped, ...]
    stage_s: dict[str, float]
    total_s: float
    index: Built | None


def fit(
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
    recipe: str | Path | Recipe | None = "exact",
    device: str = DEVICE,
    max_skipped: int = MAX_SKIPPED,
    progress: bool = False,
) -> Fit:
    """Extract the features of normal images into a bank, and build the recipe's index over it.

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
        recipe: the index to build; None to build none.
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
    chosen = None if recipe is None else load_recipe(recipe)
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
    if chosen is not None:
        check_recipe(chosen, layout.embedding_dim)
    weights_file = None if weights is None else str(Path(weights).resolve())
    stages = Stages()
    with stages("check"):
        target = Bank.open_or_create(bank, layout, source=backbone.source, weights_file=weights_file)
        new = _not_in(target, records)
    # On a second run, what is left of a folder may be the images that could not be read in the first.
    stream = FeatureStream(
        backbone, stages, root=root, batch_size=BATCH_SIZE, max_skipped=max_skipped, allow_none=len(new) < len(records)
    )
    before = len(target)
    with (
        tqdm(total=len(new), desc="extract", unit="img", disable=None if progress else True) as bar,
        _ShardBuffer(target, stages) as buffer,
    ):
        for extracted in stream(new):
            buffer.add(extracted.batch)
            bar.update(len(extracted.batch))
    built = None
    if chosen is not None:
        with stages("index"):
            built = build_index(target, chosen, progress=progress)
    return Fit(
        bank=target,
        added=len(target) - before,
        present=len(records) - len(new),
        skipped=tuple(stream.skipped),
        stage_s=stages.seconds,
        total_s=stages.total_s,
        index=built,
    )


def _not_in(bank: Bank, records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The records that the bank does not hold.

    Raises:
        InputError: if it holds one of that name with other content.
    """
    held = bank.sha256_of
    present = [record for record in records if record.id in held]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(hash_file, [record.path for record in present])
    for record, digest in zip(present, digests, strict=True):
        if held[record.id] != digest:
            if bank.image_path(record.id) != record.path:
                raise InputError(
                    f"the bank {bank.path} holds another image named {record.id!r}, from {bank.image_path(record.id)}; "
                    f"rename this one, {record.path}"
                )
            raise InputError(
                f"{record.id} has changed since the bank {bank.path} took it (sha256 {held[record.id]}, now {digest}); "
                f"give it another name, or extract a new bank"
            )
    return [record for record in records if record.id not in held]
