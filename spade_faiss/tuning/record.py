"""The evidence of a choice: a signed JSON file in the bank, `BANK/tuning.json`.

The bank's manifest has the choice itself, as it has that of a preset: versions which know nothing of tuning search by it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.manifest import versions
from spade_faiss.bank.places import TUNING
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.inside import check_inside, is_regular
from spade_faiss.core.presets import Usual
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.tuning.inputs import FoundInput
from spade_faiss.tuning.search import Found
from spade_faiss.tuning.statistics import Differences
from spade_faiss.tuning.trials import Trial

FORMAT = "spade_faiss tuning"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Compared:
    """How an option compares to the default in one number, see `statistics.Differences`; None where nothing tells.

    `sure` says whether it is better, allowed for that so many options were tried.
    """

    value: float | None
    difference: float
    low: float
    high: float
    sure: bool

    @staticmethod
    def of(found: Differences, option: int) -> Compared:
        """That of an option by its number."""
        value = float(found.value[option])
        difference, low, high = (float(each[option]) for each in (found.difference, found.low, found.high))
        return Compared(
            value=value if math.isfinite(value) else None,
            difference=difference,
            low=low,
            high=high,
            sure=bool(found.sure[option]),
        )


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An option and what it measured.

    Args:
        name: what it is, in a few words.
        image: how it tells defective pictures from normal ones.
        maps: how much of a defect its maps find.
        ms: the milliseconds that searching took for an image.
        bytes: what an image takes in the bank and its index.
        allowed: whether limits and the bank let it be chosen.
        forward_ms: the milliseconds that the network takes for an image; None where it was not measured.
        memory: the bytes that scoring takes while it runs, as planned, without the cache; None where it was not recorded.
    """

    name: str
    image: Compared
    maps: Compared
    ms: float
    bytes: float
    allowed: bool
    forward_ms: float | None = None
    memory: float | None = None

    @property
    def total_ms(self) -> float:
        """The milliseconds of the network and the search for an image."""
        return self.ms + (self.forward_ms or 0.0)


@dataclass(frozen=True, kw_only=True)
class ChosenInput:
    """Which network and input were chosen, and why, before all other options.

    Args:
        chosen, default: their names.
        reason: why, in a sentence.
        defects: how many spoilt copies, or real defects, were scored.
        found: how many of them were found where they are shown, on which alone the choice rests.
        left_out: how many inputs the budget left out.
        tried: all that were tried, the default first.
    """

    chosen: str
    default: str
    reason: str
    defects: int
    found: int
    left_out: int
    tried: tuple[Tried, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was chosen for a bank, and why.

    Args:
        chosen, default: the names of the choice and of what it was compared with.
        reason: why, in a sentence.
        usual: how the bank is searched since.
        before: how it was searched before; None for a bank that was made by the choice.
        seed: that of the spoils.
        pictures: how many normal pictures were scored.
        defects: how many spoilt copies, or real defects, were scored.
        found: how many of them options find, on which alone the choice rests.
        left_out: how many options the budget left out.
        options: all that were tried, the default first.
        labels_sha256: the checksums of the labeled pictures, where there were some: results that are measured on them say
            nothing about new pictures.
        input: which network and input were chosen; None where they were not chosen among.
        versions: the versions of the libraries that computed it.
    """

    chosen: str
    default: str
    reason: str
    usual: Usual
    before: Usual | None
    seed: int
    pictures: int
    defects: int
    found: int
    left_out: int
    options: tuple[Tried, ...]
    labels_sha256: tuple[str, ...] = ()
    input: ChosenInput | None = None
    versions: dict[str, str] = field(default_factory=versions)


def record_of(
    found: Found, seed: int, before: Usual | None, labels_sha256: tuple[str, ...], found_input: FoundInput | None = None
) -> Record:
    """What a search found, as a bank remembers it."""
    tried = [
        _tried(option.name, found.trial(option), found.forward_ms, (found.image, found.maps, found.allowed), place)
        for place, option in enumerate(found.options)
    ]
    return Record(
        chosen=found.option.name,
        default=found.options[found.default].name,
        reason=found.chosen.reason,
        usual=found.option.usual,
        before=before,
        seed=seed,
        pictures=found.samples.normal_count,
        defects=len(found.samples.spoilt),
        found=int(found.table.found().sum()),
        left_out=found.left_out,
        options=tuple(tried),
        labels_sha256=labels_sha256,
        input=None if found_input is None else _chosen_input(found_input),
    )


def _chosen_input(found: FoundInput) -> ChosenInput:
    several = zip(found.inputs, found.trials, found.forward_ms, strict=True)
    return ChosenInput(
        chosen=found.input.name,
        default=found.inputs[0].name,
        reason=found.chosen.reason,
        defects=len(found.table.spoilt_group),
        found=int(found.table.found().sum()),
        left_out=found.left_out,
        tried=tuple(
            _tried(each.name, trial, forward_ms, (found.image, found.maps, found.allowed), place)
            for place, (each, trial, forward_ms) in enumerate(several)
        ),
    )


def _tried(
    name: str, trial: Trial, forward_ms: float, judged: tuple[Differences, Differences, npt.NDArray[np.bool_]], place: int
) -> Tried:
    image, maps, allowed = judged
    return Tried(
        name=name,
        image=Compared.of(image, place),
        maps=Compared.of(maps, place),
        ms=trial.ms,
        bytes=trial.bytes,
        allowed=bool(allowed[place]),
        forward_ms=forward_ms,
        memory=trial.memory,
    )


def write_record(bank: Snapshot, record: Record) -> None:
    """Store it in the bank, in place of the one before."""
    write_signed(bank.path / TUNING, FORMAT, SCHEMA, asdict(record))


def read_record(bank: Snapshot) -> Record | None:
    """Read it; None for a bank whose settings were not tuned.

    Raises:
        BankError: if it is damaged, a link or no file.
    """
    path = check_inside(bank.path, TUNING)
    return read_signed(path, Record, FORMAT, SCHEMA, "remove it, or tune the bank again") if is_regular(path) else None
