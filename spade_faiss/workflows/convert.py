"""Conversion: another bank of the same pictures that stores their maps in another way, such as in a tenth of the bytes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.network import CarriedNetwork
from spade_faiss.bank.origin import Origin
from spade_faiss.bank.shards import SHARD_BYTES
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import format_bytes, parse_bytes
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.settings import Run
from spade_faiss.core.store import Store
from spade_faiss.decisions.calibration import Calibration
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.codes import learning_bytes
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import Built, build_index
from spade_faiss.search.recipe import load_recipe
from spade_faiss.storage.copy import bank_folder
from spade_faiss.workflows.calibrate import calibrate_whole_if_needed

# Codes are learned from so many pictures, as far as these take no more bytes; from fewer where memory is short.
_LEAST_LEARNED, _MOST_LEARNED, _LEARNED_BYTES = 16, 512, 128 << 20


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` did.

    Args:
        bank: the new bank.
        bytes_before: the bytes of the shards of the bank that it was made of.
        index: the indexes that were built; None if the recipe needs none.
        calibration: the calibration; None if none was asked for, or if it could not be made.
        notice: why there is no calibration; empty otherwise.
        products: of a bank of several products, the calibration of each, or why it has none; then there is none of the whole.
        total_s: seconds by the clock.
    """

    bank: Bank
    bytes_before: int
    index: Built | None
    calibration: Calibration | None
    notice: str
    products: dict[str, Calibration | str]
    total_s: float


def convert(bank: str | Path, out: str | Path, *, store: str, calibrate: bool = True, run: Run = Run()) -> Converted:
    """Make another bank of the same pictures that stores their maps in another way; no picture is read.

    It is searched as the bank is, and gets the index and the calibration of that. Removed pictures are left out. After an
    interruption, the same call goes on where it stopped.

    Args:
        bank: the bank's folder; its maps are stored as float16 or float32.
        out: the folder of the new bank.
        store: how it stores maps, see `Extraction`.
        calibrate: whether to score a sample of the pictures against the others, unless the new bank has a calibration that
            holds.
        run: the memory budget, and whether to show progress.

    Raises:
        InputError: for a bank that stores codes, a store that there is not, an empty bank, or another bank in `out`.
        NotFoundError: if there is no bank.
        BankError: if the bank is damaged, or another process is writing to `out`.
    """
    start, opened = time.perf_counter(), Bank.open(bank)
    if opened.layout.store.is_coded:
        anew = f"make one with --store float16 and convert that to {store}"
        raise InputError(
            f"the bank {bank} stores {opened.layout.store}, and what its codes left out is gone; convert the bank that it was "
            f"made of, or {anew}"
        )
    if not len(opened):
        raise InputError(f"the bank {bank} is empty; add pictures to it first")
    if os.path.realpath(opened.path) == os.path.realpath(bank_folder(out)):
        raise InputError(f"{out} is the bank itself; name a new folder for the other one")
    asked = Store.parse(store)
    layout = replace(opened.layout, dtype=asked.dtype, numbers=asked.numbers, bits=asked.bits)
    target = Bank.open_or_create(out, layout, _origin_of(opened))
    _fill(target, opened.snapshot(), layout, run)
    index = build_index(target, load_recipe(target.usual.recipe), progress=run.progress)
    calibration, notice, products = calibrate_whole_if_needed(target, run) if calibrate else (None, "", {})
    return Converted(
        bank=target,
        bytes_before=opened.bytes_on_disk,
        index=index,
        calibration=calibration,
        notice=notice,
        products=products,
        total_s=time.perf_counter() - start,
    )


def _origin_of(bank: Bank) -> Origin:
    manifest = bank.manifest
    return Origin(
        source=manifest.source,
        weights_file=manifest.weights_file,
        network=None if manifest.network is None else CarriedNetwork(folder=bank.path, entry=manifest.network),
        augment=manifest.augment,
        grouping=manifest.grouping,
        products=manifest.products,
        usual=manifest.usual,
    )


def _fill(target: Bank, source: Snapshot, layout: Layout, run: Run) -> None:
    """Write the pictures that the target does not hold yet, in the order of their rows."""
    with target.writing():
        # Those of a product stand together: a shard is of one.
        parts = [(name, source.part(name)) for name in source.products] if source.is_of_products else [("", source)]
        ids = [name for _, part in parts for name in part.ids]
        if (held := target.with_removed().ids) != ids[: len(held)]:
            raise InputError(
                f"the bank {target.path} holds other pictures than {source.path} begins with; name a new folder, or remove it"
            )
        if layout.store.is_coded and target.manifest.codes is None:
            # Of pictures from all over the bank: the first ones may be of one kind.
            most = _learned_from(source, layout, parse_bytes(run.memory))
            target.learn_prepared(source.read(np.linspace(0, len(ids) - 1, most).round().astype(np.int64)))
        with progress_bar(len(ids), "convert", run.progress, unit="image") as bar:
            done = 0
            for product, batch in ((product, batch) for product, part in parts for batch in part.stored_batches(SHARD_BYTES)):
                left = batch[max(0, len(held) - done) :] if done + len(batch) > len(held) else None
                if left is not None:
                    target.append_prepared(_as_stored(left, layout), product=product)
                done += len(batch)
                bar.update(len(batch))


def _learned_from(source: Snapshot, layout: Layout, memory: int) -> int:
    """From how many pictures codes are learned: as many as fit into the memory.

    Raises:
        InputError: if too few do.
    """

    def taken(pictures: int) -> int:
        return pictures * source.layout.image_bytes + learning_bytes(layout, pictures)

    usual = min(len(source), max(_LEAST_LEARNED, min(_MOST_LEARNED, _LEARNED_BYTES // source.layout.image_bytes)))
    least = min(usual, _LEAST_LEARNED)
    found = next((pictures for pictures in range(usual, least - 1, -1) if taken(pictures) <= memory), None)
    if found is None:
        raise InputError(
            f"memory={format_bytes(memory)} is too small: learning codes of {layout.store} takes {format_bytes(taken(least))}; "
            f"allow at least that, or convert to pcaN-int4 or int8, which take less"
        )
    return found


def _as_stored(batch: FeatureBatch, layout: Layout) -> FeatureBatch:
    """The batch with maps in the number format of a layout; for codes as they are, which are made of them."""
    if layout.store.is_coded:
        return batch
    with np.errstate(over="ignore"):
        levels = {name: maps.astype(layout.dtype) for name, maps in batch.levels.items()}
    for name, maps in levels.items():
        if not np.isfinite(maps).all():
            raise InputError(f"level {name!r} holds numbers beyond {layout.dtype}; convert to another store")
    return replace(batch, levels=levels)
