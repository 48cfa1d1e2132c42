"""The staged search: features once, then every option on what is kept, then one choice by paired statistics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method, Run, Tuning
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.layout import Layout
from spade_faiss.tuning.forward_cost import forward_ms
from spade_faiss.tuning.options import MapOption, Option, Stored, default_option, map_options, with_scores, within_few
from spade_faiss.tuning.samples import Copies, Samples, make_samples, read_samples
from spade_faiss.tuning.statistics import Chosen, Differences, Trials, choose, image_differences, map_differences
from spade_faiss.tuning.trials import Trial, comparable, of_map, run_trials, table_of

# Fewer normal pictures, or groups of them, say too little about each other.
LEAST_PICTURES = 10
# So many normal pictures are compared with, drawn at random, and so many of them are spoilt: more take longer than they tell.
MOST_REFERENCES, MOST_SPOILT = 200, 40
# So many spoilt copies in all, and of each picture at least and at most.
_COPIES, _LEAST_EACH, _MOST_EACH = 240, 6, 12


@dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """What the search found.

    Args:
        options: what was tried; all that share a map have the same trial.
        default: the number of the one that stays unless another is surely better.
        chosen: the choice, and why.
        allowed: (O,) which of them could be chosen.
        table: what was measured.
        image, maps: how the options differ from the default.
        trials: what each way to make maps measured.
        samples: the pictures.
        forward_ms: the milliseconds of the network's forward pass for an image.
        left_out: how many ways to make maps the budget left out.
        timing_s: seconds by stage.
    """

    options: list[Option]
    default: int
    chosen: Chosen
    allowed: npt.NDArray[np.bool_]
    table: Trials
    image: Differences
    maps: Differences
    trials: dict[MapOption, Trial]
    samples: Samples
    forward_ms: float = 0.0
    left_out: int = 0
    timing_s: dict[str, float] = field(default_factory=dict)

    @property
    def option(self) -> Option:
        """What was chosen."""
        return self.options[self.chosen.option]

    def trial(self, option: Option) -> Trial:
        """What the map of an option measured."""
        return self.trials[of_map(option, self.trials)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """What is to be decided.

    Args:
        records: the normal pictures.
        labeled: pictures of a labeled set, which take the place of spoilt copies; empty for spoilt copies.
        default: what stays unless another option is surely better; None for the preset `default`.
        only_stored: how maps have to be stored, where that is decided already; None where it is to be chosen.
        method: the settings that are not chosen.
        group_of: the groups of those normal pictures that belong to one, by their ids: they are not compared with each other.
    """

    records: Sequence[ImageRecord]
    labeled: Sequence[ImageRecord] = ()
    default: Option | None = None
    only_stored: Stored | None = None
    method: Method = Method()
    group_of: Mapping[str, str] = field(default_factory=dict)


def group_sizes(records: Sequence[ImageRecord], group_of: Mapping[str, str]) -> list[int]:
    """How many of the pictures each group has; one that belongs to none is by itself."""
    grouped = Counter(group_of[record.id] for record in records if record.id in group_of)
    return [*grouped.values(), *[1] * (len(records) - grouped.total())]


class TooFewPicturesError(InputError):
    """There are fewer normal pictures, or groups of them, than a choice takes."""


def deadline_of(tuning: Tuning, share: float = 1.0) -> float | None:
    """The `time.monotonic()` at which a share of the budget is spent, which begins now; None without a budget."""
    return None if tuning.budget is None else time.monotonic() + 60 * tuning.budget * share


def search(
    folder: Path, backbone: Backbone, question: Question, tuning: Tuning, run: Run, *, deadline: float | None = None
) -> Found:
    """Try options on normal pictures and on spoilt copies of them, and choose.

    After an interruption, the same call with the same folder goes on where it stopped.

    Args:
        folder: where features and what was measured are kept.
        backbone: computes features.
        question: the pictures, and what is to be decided.
        tuning: the seed and the limits.
        run: how images are read, how many may be skipped, and the memory that scoring may use.
        deadline: the `time.monotonic()` after which no option is begun; that of the budget, from now on, unless given.

    Raises:
        TooFewPicturesError: for fewer than `LEAST_PICTURES` normal pictures that can be read, or groups of them.
        InputError: for more pictures that cannot be read than may be skipped.
    """
    records = drawn(question, tuning.seed)
    start = time.monotonic()
    deadline = deadline or deadline_of(tuning)
    if question.labeled:
        samples, readable = read_samples(folder / "samples", backbone, records, question.labeled, run)
    else:
        spoilt = min(MOST_SPOILT, len(records))
        each = min(max(round(_COPIES / spoilt), _LEAST_EACH), _MOST_EACH)
        samples, readable = make_samples(
            folder / "samples", backbone, records, Copies(pictures=spoilt, each=each, seed=tuning.seed), run
        )
    check_enough(readable, question.group_of)
    samples = grouped(samples, readable, question.group_of)
    forward = forward_ms(folder / "forward.json", backbone, list(samples.shown.values()))
    made = time.monotonic()
    levels = [level.name for level in backbone.levels]
    default = question.default or default_option(levels)
    tried_maps = map_options(levels, question.method)
    if question.only_stored is not None:
        tried_maps = [replace(option, stored=question.only_stored) for option in tried_maps]
    maps = list(dict.fromkeys(comparable(option) for option in (default.map, *tried_maps)))
    maps = _different(maps, len(readable) - max(group_sizes(readable, question.group_of)))
    layout = Layout(levels=backbone.levels, embedding_dim=backbone.embedding_dim, input_size=backbone.input_size)
    trials = run_trials(folder, samples, layout, maps, run, deadline)
    tried = time.monotonic()
    options = _first(default, [o for o in with_scores(list(trials)) if not _is_same(o, default)])
    table = table_of(options, trials, samples)
    if question.labeled:
        table = replace(table, least_found=0.0)
    costs = [Cost.of(trials[of_map(option, trials)], forward) for option in options]
    chosen, allowed = choose_within(table, [option.name for option in options], costs, tuning)
    return Found(
        options=options,
        default=0,
        chosen=chosen,
        allowed=allowed,
        table=table,
        image=image_differences(table, 0, tuning.seed),
        maps=map_differences(table, 0, tuning.seed),
        trials=trials,
        samples=samples,
        forward_ms=forward,
        left_out=sum(option not in trials for option in maps),
        timing_s={"features": made - start, "options": tried - made, "statistics": time.monotonic() - tried},
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an option costs for an image: the milliseconds of the network and of the search, and bytes in the bank."""

    forward_ms: float
    search_ms: float
    bytes: float

    @staticmethod
    def of(trial: Trial, forward_ms: float) -> Cost:
        """That of a trial, with a network that takes so long."""
        return Cost(forward_ms=forward_ms, search_ms=trial.ms, bytes=trial.bytes)

    def beyond(self, tuning: Tuning) -> str:
        """Which limits it exceeds, in words; empty for none."""
        found, ms = [], self.forward_ms + self.search_ms
        if tuning.max_ms is not None and ms > tuning.max_ms:
            found.append(f"{ms:.1f} ms an image (max_ms={tuning.max_ms:g})")
        if tuning.max_bytes is not None and self.bytes > tuning.max_bytes:
            found.append(f"{self.bytes:.0f} bytes an image (max_bytes={tuning.max_bytes:g})")
        return " and ".join(found)


def choose_within(
    table: Trials, names: Sequence[str], costs: Sequence[Cost], tuning: Tuning
) -> tuple[Chosen, npt.NDArray[np.bool_]]:
    """Choose among options that the limits allow, the first of which is the default; with (O,) which they allow."""
    beyond = [cost.beyond(tuning) for cost in costs]
    allowed = np.array([not limits for limits in beyond])
    chosen = choose(table, names, default=0, allowed=allowed, seed=tuning.seed)
    if limits := beyond[chosen.option]:  # only the default can be
        chosen = replace(chosen, reason=f"{chosen.reason}, though it takes {limits}")
    return chosen, allowed


def check_enough(records: Sequence[ImageRecord], group_of: Mapping[str, str]) -> None:
    """Raise TooFewPicturesError unless there are enough normal pictures, or groups of them, to choose by."""
    if (count := len(group_sizes(records, group_of))) < LEAST_PICTURES:
        what = "groups of normal pictures" if group_of else "normal pictures"
        raise TooFewPicturesError(f"{count} {what} are too few to choose by ({LEAST_PICTURES} are enough)")


def grouped(samples: Samples, records: Sequence[ImageRecord], group_of: Mapping[str, str]) -> Samples:
    """The samples of these normal pictures, which know their groups."""
    if not group_of:
        return samples
    groups = [group_of.get(record.id, "") for record in records]
    return replace(samples, references=replace(samples.references, groups=groups))


def drawn(question: Question, seed: int) -> list[ImageRecord]:
    """At most `MOST_REFERENCES` of the normal pictures, in their order.

    Raises:
        TooFewPicturesError: if there are too few.
    """
    chosen = np.random.default_rng([seed, 0xD4A]).permutation(len(question.records))[:MOST_REFERENCES]
    records = [question.records[place] for place in np.sort(chosen)]
    check_enough(records, question.group_of)
    return records


T = TypeVar("T")


def _first(first: T, others: Sequence[T]) -> list[T]:
    return [first, *(other for other in others if other != first)]


def _is_same(option: Option, default: Option) -> bool:
    return option.score == default.score and comparable(option.map) == comparable(default.map)


def _different(options: Sequence[MapOption], others: int) -> list[MapOption]:
    """The options, without those that are one of the others where a picture has no more than so many others.

    One that asks for more neighbors than there are takes all of them, as a bank of so few does.
    """
    found = {within_few(option, others): option for option in reversed(options)}
    return [option for option in options if found[within_few(option, others)] is option]
