"""Tuning: the settings of a bank are chosen by its normal pictures and spoilt copies of them; no defect is needed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spade_faiss.bank.backbone import backbone_of
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.manifest import is_begun
from spade_faiss.core.errors import InputError, SpadeError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.presets import DEFAULT, Usual, load_preset
from spade_faiss.core.settings import Run, Tuning
from spade_faiss.core.signed_json import hash_json
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import ImageRecord, Images, load_dataset, survey
from spade_faiss.features.grouping import find_groups
from spade_faiss.features.kinds import check_normals
from spade_faiss.features.pages import hash_image, hash_images
from spade_faiss.features.video_frames import VideoFrame
from spade_faiss.index.build import build_index
from spade_faiss.report.exchange import TUNING_NUMBERS, TUNING_PAGE
from spade_faiss.report.html import write_html
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.output_folder import output_folder
from spade_faiss.report.output_place import check_place
from spade_faiss.report.tuning_page import tuning_numbers, tuning_page
from spade_faiss.search.recipe import load_recipe
from spade_faiss.storage.copy import bank_folder
from spade_faiss.tuning.inputs import FoundInput, Input, search_inputs
from spade_faiss.tuning.options import Option, Stored, default_option, option_of
from spade_faiss.tuning.record import Record, read_record, record_of, write_record
from spade_faiss.tuning.search import Found, Question, TooFewPicturesError, check_enough, deadline_of, search
from spade_faiss.workflows.calibrate import calibrate_if_needed
from spade_faiss.workflows.fit import fit
from spade_faiss.workflows.tune_inputs import candidates, check_inputs

# What is kept of an interrupted run lies beside the bank, under its name and this.
_SUFFIX = ".tuning"
# Is in there while a new bank is made by what was chosen.
_MAKING = "making"
# In so much of the budget, inputs are begun to be compared: what is chosen among their options matters as much.
_SHARE_OF_INPUTS = 0.5


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuned:
    """What `tune` did.

    Args:
        bank: the bank, which is searched by what was chosen.
        record: the choice and its evidence, as the bank remembers it; None where there was none to make.
        notice: why there was none, or what else the reader should know; empty otherwise.
        timing_s: seconds by stage.
    """

    bank: Bank
    record: Record | None
    notice: str
    timing_s: dict[str, float]


def tune(
    images: Images,
    *,
    bank: str | Path,
    extraction: Extraction = Extraction(),
    tuning: Tuning = Tuning(),
    out: str | Path | None = None,
    run: Run = Run(),
) -> Tuned:
    """Choose the settings that tell spoilt copies of normal pictures from the pictures best, and have the bank use them.

    A bank that is not there is made by what was chosen, as `fit` does. One that is there keeps its features: of options, those
    can be chosen that search them. What is surely better than the default, or than how the bank is searched already, is chosen;
    if nothing is, all stays as it is. After an interruption, the same call goes on where it stopped.

    Args:
        images: normal pictures: a folder, an image, or a list of them; for a bank that is there, those of the bank.
        bank: the bank's folder, or a URL.
        extraction: for a new bank, the backbone and how its features are stored; what is given is not chosen.
        tuning: the seed, the limits, a labeled set to use in place of spoilt copies, and, for a new bank, which other networks
            and inputs are tried.
        out: a folder for a page and the numbers; None for none.
        run: the device, the weights, the memory budget, and how many pictures that cannot be read may be skipped.

    Raises:
        InputError: for bad input, too many unreadable images, a bank of tiles, with regions of interest or with views, inputs
            to choose among for a bank that is there, or an `out` that is no place for results.
        NotFoundError: if a path does not exist.
        BankError: if the bank is damaged, or another process is writing to it.
    """
    found = survey(images, run)
    check_normals(found.sources, [record.path for record in found.records])
    folder = bank_folder(bank)
    work = Path(f"{folder}{_SUFFIX}")  # beside the bank, or beside the copy of one at a URL
    # One that an interrupted run has begun to make is made by the same choice.
    opened = Bank.open(bank) if is_begun(folder) and not (work / _MAKING).exists() else None
    if out is not None and opened is not None:
        check_place(out, bank=opened, images=found.sources)
    check_inputs(tuning, extraction, is_new=opened is None, run=run)
    _check_whole(extraction, opened)
    records, labeled = found.records, _labeled(tuning)
    if any(isinstance(record, VideoFrame) for record in (*records, *labeled)):
        raise InputError("settings can be chosen by images, not yet by frames of videos; leave tuning out, or the videos")
    records, group_of = _distinct(records, opened, extraction)
    question = Question(records=records, labeled=labeled, group_of=group_of)
    try:
        check_enough(records, group_of)
        if opened is None:
            choice = _choose_new(work, folder, question, extraction, tuning, run)
        else:
            choice = _choose_among_searches(work, opened, question, extraction, tuning, run)
    except TooFewPicturesError as error:
        made = opened or fit(images, bank=bank, extraction=extraction, run=run).bank
        return Tuned(bank=made, record=None, notice=f"{error}: the default stays", timing_s={})
    chosen, digests = choice.found, tuple(hash_image(record.path) for record in labeled)
    if opened is None:
        extraction = replace(choice.extraction, **vars(chosen.option.map.stored))
        work.mkdir(parents=True, exist_ok=True)
        (work / _MAKING).touch()
        opened = fit(images, bank=bank, extraction=extraction, preset=chosen.option.preset(extraction), run=run).bank
        record = record_of(chosen, tuning.seed, None, digests, choice.found_input)
        write_record(opened, record)
        notice = ""
    else:
        record = record_of(chosen, tuning.seed, _to_go_back_to(opened), digests)
        write_record(opened, record)  # first: after a kill in between, what to go back to is known
        notice = _apply(opened, chosen, run)
    if out is not None:
        _write_page(out, opened, chosen, record)
    shutil.rmtree(work, ignore_errors=True)
    return Tuned(bank=opened, record=record, notice=notice, timing_s=choice.timing_s)


def undo_tuning(bank: str | Path, *, run: Run = Run()) -> Bank:
    """Have a bank searched again as it was before `tune`; its features and indexes stay.

    Raises:
        InputError: for a bank that was not tuned, or that was made by what was chosen.
        NotFoundError: if there is no such bank.
        BankError: if the bank is damaged, or another process is writing to it.
    """
    opened = Bank.open(bank)
    record = read_record(opened)
    if record is None:
        raise InputError(f"the bank {bank} was not tuned: there is nothing to undo")
    if record.before is None:
        raise InputError(
            f"the bank {bank} was made by what was chosen, and holds features for that; make another one with: "
            f"spade-faiss fit IMAGES --bank BANK"
        )
    opened.choose(record.before, "undo tune")
    build_index(opened, load_recipe(opened.usual.recipe), progress=run.progress)
    calibrate_if_needed(opened, run)
    return opened


@dataclass(frozen=True, eq=False, kw_only=True)
class _Choice:
    """What was found, the input by which it was found, if there were several, and the extraction of that."""

    found: Found
    extraction: Extraction
    found_input: FoundInput | None = None

    @property
    def timing_s(self) -> dict[str, float]:
        """Seconds by stage."""
        own = {} if self.found_input is None else {"inputs": self.found_input.s}
        return {**own, **self.found.timing_s}


def _choose_new(work: Path, bank: Path, question: Question, extraction: Extraction, tuning: Tuning, run: Run) -> _Choice:
    """Choose for a new bank: first a network and its input, by default options, then the options."""
    deadline, first = deadline_of(tuning), deadline_of(tuning, _SHARE_OF_INPUTS)
    several = candidates(bank, extraction, tuning, question.records, run)
    inputs = []
    for each in several:
        own = _given(question, extraction, [level.name for level in each.backbone.levels])
        folder = work / _fingerprint(each.backbone, own, tuning)
        inputs.append(Input(backbone=each.backbone, folder=folder, question=own))
    found_input = search_inputs(inputs, tuning, run, deadline=first) if len(inputs) > 1 else None
    place = 0 if found_input is None else found_input.chosen.option
    chosen = inputs[place]
    found = search(chosen.folder, chosen.backbone, chosen.question, tuning, run, deadline=deadline)
    return _Choice(found=found, extraction=several[place].extraction, found_input=found_input)


def _choose_among_searches(
    work: Path, opened: Bank, question: Question, extraction: Extraction, tuning: Tuning, run: Run
) -> _Choice:
    """Choose how a bank that is there is searched; its features stay."""
    given = extraction.backbone if isinstance(extraction.backbone, Backbone) else None
    backbone = backbone_of(opened, given, run)
    default = option_of(opened.usual, opened.layout)
    method = replace(opened.usual.method, localize="all", flag_above=None)
    question = replace(question, default=default, only_stored=default.map.stored, method=method)
    found = search(work / _fingerprint(backbone, question, tuning), backbone, question, tuning, run)
    return _Choice(found=found, extraction=extraction)


def _check_whole(extraction: Extraction, opened: Bank | None) -> None:
    """Raise InputError for what copies cannot be made of yet, and for several products, which all share the settings."""
    if extraction.products is not None or (opened is not None and opened.is_of_products):
        raise InputError(
            "settings are chosen for one product, and a bank of several has the same for all; tune a bank of one of them, and "
            "make the bank of all by what it says: spade-faiss fit IMAGES --products ... --preset FILE"
        )
    given = extraction.backbone
    preprocess = given.source.preprocess if isinstance(given, Backbone) else extraction.preprocess
    if opened is not None and opened.manifest.source is not None:
        preprocess = opened.manifest.source.preprocess
    views = extraction.augment is not None or (opened is not None and opened.manifest.augment is not None)
    if preprocess.tile is not None or preprocess.own_rois or preprocess.roi is not None or extraction.roi is not None or views:
        raise InputError(
            "settings can be chosen for banks of whole pictures, not yet for tiles, regions of interest or views; "
            "leave tuning out, or choose by hand with: spade-faiss evaluate"
        )


def _labeled(tuning: Tuning) -> list[ImageRecord]:
    """The pictures of the labeled set, if one is named."""
    if tuning.labels is None:
        return []
    labeled = load_dataset(tuning.labels).test
    defective = [bool(record.defective) for record in labeled]
    if not any(defective) or all(defective):
        raise InputError(f"labels={tuning.labels} needs normal and defective pictures in test/, to compare them")
    return labeled


def _distinct(
    records: Sequence[ImageRecord], opened: Bank | None, extraction: Extraction
) -> tuple[list[ImageRecord], dict[str, str]]:
    """The pictures, each content once, and the groups of those that belong to one, by their ids.

    A twin or a sibling that is left in the bank makes a normal picture look nearer to the others than any new one is.
    """
    by_digest: dict[str, ImageRecord] = {}
    for record, digest in zip(records, _digests(records), strict=True):
        by_digest.setdefault(digest, record)
    distinct = list(by_digest.values())
    ids = [record.id for record in distinct]
    if opened is None:
        groups = find_groups(ids, extraction.grouping, extraction.group_by)
    else:  # by content: a picture's id depends on how its folder was named
        own, held = opened.group_of, opened.sha256_of
        group_by_digest = {held[name]: group for name, group in own.items() if name in held}
        groups = tuple(group_by_digest.get(digest) or own.get(record.id, "") for digest, record in by_digest.items())
    return distinct, {name: group for name, group in zip(ids, groups, strict=False) if group}


def _digests(records: Sequence[ImageRecord]) -> list[str]:
    """The checksum of each picture; a picture that cannot be opened, which is skipped when it is read, has one of its own."""
    try:
        return hash_images([record.path for record in records])
    except (SpadeError, OSError):
        return [_digest_or_name(record) for record in records]


def _digest_or_name(record: ImageRecord) -> str:
    try:
        return hash_image(record.path)
    except (SpadeError, OSError):
        return f"cannot be opened: {record.id}"


def _fingerprint(backbone: Backbone, question: Question, tuning: Tuning) -> str:
    """What an interrupted run must have in common with this one, to go on with what it left."""
    files = [
        (record.id, record.path.stat().st_size, record.path.stat().st_mtime_ns)
        for record in (*question.records, *question.labeled)
        if record.path.is_file()
    ]
    source = repr(backbone.source.comparable())
    return hash_json({"files": files, "source": source, "seed": tuning.seed, "groups": dict(question.group_of)})[:16]


def _given(question: Question, extraction: Extraction, levels: Sequence[str]) -> Question:
    """The question, without how features are stored where that is given: they are stored as `fit` would store them."""
    if all(getattr(extraction, name) == getattr(Extraction, name) for name in vars(Stored())):
        return question
    only = Stored.of(load_preset(DEFAULT).with_extraction(extraction).extraction)
    return replace(question, default=Option(map=replace(default_option(levels).map, stored=only)), only_stored=only)


def _to_go_back_to(bank: Bank) -> Usual:
    """How a bank was searched before it was tuned; where it was tuned before and is searched by that, before the first time."""
    last = read_record(bank)
    if last is not None and last.before is not None and last.usual in (bank.manifest.usual, bank.usual):
        return last.before
    return bank.manifest.usual


def _apply(bank: Bank, found: Found, run: Run) -> str:
    """Have the bank use what was chosen; returns what a new bank might gain beside."""
    if found.chosen.option != found.default:
        bank.choose(found.option.usual)
    if bank.usual.preset == found.option.usual.preset:  # also where a kill came between the choice and its index
        build_index(bank, load_recipe(bank.usual.recipe), progress=run.progress)
        calibrate_if_needed(bank, run)
    return "the bank keeps its features; how they are stored, too, is chosen for a new bank: spade-faiss fit --tune"


def _write_page(out: str | Path, bank: Bank, found: Found, record: Record) -> None:
    check_place(out, bank=bank)
    with output_folder(out, "tune", replaces=(TUNING_PAGE, TUNING_NUMBERS)) as folder:
        write_html(folder.staged / TUNING_PAGE, replace(tuning_page(found, record), run=folder.run))
        write_json(folder.staged / TUNING_NUMBERS, {"run": folder.stamp(), **tuning_numbers(record)})
