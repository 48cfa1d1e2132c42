"""Which network sees how much of a picture, and how large: inputs are compared by the default options, before all others.

Every input is given the same spoilt copies, which may lie wherever one of the inputs shows the picture: a defect that an input
cuts off is one that it misses. Maps are compared on the grid of the picture, see `picture_grid`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.settings import Run, Tuning
from spade_faiss.core.signed_json import hash_json
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.layout import Layout
from spade_faiss.tuning.forward_cost import forward_ms
from spade_faiss.tuning.options import Option, default_option
from spade_faiss.tuning.picture_stream import input_name, longest_side
from spade_faiss.tuning.references import read_references
from spade_faiss.tuning.samples import Copies, Samples, make_samples, read_samples
from spade_faiss.tuning.search import MOST_SPOILT, Cost, Question, check_enough, choose_within, drawn, grouped
from spade_faiss.tuning.statistics import Chosen, Differences, Doubles, Trials, image_differences, map_differences
from spade_faiss.tuning.trials import Trial, comparable, run_trials

# So many spoilt copies in all, and of each picture at least and at most; they are others than those that options are chosen by.
_COPIES, _LEAST_EACH, _MOST_EACH = 120, 3, 8
_SEED_APART = 7919


@dataclass(frozen=True, eq=False, kw_only=True)
class Input:
    """A network, and how pictures lie in its input.

    Args:
        backbone: the network by the engine that will run it.
        folder: where its features are kept.
        question: what is to be decided about it: the levels of networks have names of their own.
    """

    backbone: Backbone
    folder: Path
    question: Question

    @property
    def preprocess(self) -> Preprocess:
        """How pictures lie in it."""
        return self.backbone.source.preprocess

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return input_name(self.backbone)

    @property
    def option(self) -> Option:
        """How it is searched while inputs are compared."""
        return self.question.default or default_option([level.name for level in self.backbone.levels])


@dataclass(frozen=True, eq=False, kw_only=True)
class FoundInput:
    """Which input was chosen, and by what.

    Args:
        inputs: those that were tried, the default first.
        chosen: the choice, and why.
        allowed: (O,) which of them the limits allow.
        table: what was measured.
        image, maps: how they differ from the default.
        trials, forward_ms: what each of them measured and costs.
        left_out: how many the budget left out.
        s: the seconds that it took.
    """

    inputs: list[Input]
    chosen: Chosen
    allowed: npt.NDArray[np.bool_]
    table: Trials
    image: Differences
    maps: Differences
    trials: list[Trial]
    forward_ms: list[float]
    left_out: int
    s: float

    @property
    def input(self) -> Input:
        """What was chosen."""
        return self.inputs[self.chosen.option]

    @property
    def names(self) -> list[str]:
        """What was tried, in a few words each."""
        return [each.name for each in self.inputs]


def search_inputs(inputs: Sequence[Input], tuning: Tuning, run: Run, *, deadline: float | None = None) -> FoundInput | None:
    """Choose an input by its default options; None where the budget leaves but one, or there is but one.

    After an interruption, the same call goes on where it stopped.

    Args:
        inputs: what is compared, the default first.
        tuning: the seed and the limits.
        run: how images are read, how many may be skipped, and the memory that scoring may use.
        deadline: the `time.monotonic()` after which no further input is begun.

    Raises:
        TooFewPicturesError: for too few normal pictures that can be read.
        InputError: for more pictures that cannot be read than may be skipped.
    """
    start = time.monotonic()
    records, begun = drawn(inputs[0].question, tuning.seed), list[Input]()
    longest = longest_side([each.preprocess.input_size for each in inputs])
    for each in inputs:
        if begun and deadline is not None and time.monotonic() >= deadline:
            break
        # What could not be read for one is left out of all: they are compared on the same pictures.
        records = read_references(each.folder / f"references-{longest}", each.backbone, records, run, longest)[1]
        begun.append(each)
    if len(begun) < 2:
        return None
    check_enough(records, inputs[0].question.group_of)
    measured = [_measure(each, inputs, records, tuning, run) for each in begun]
    table = _table(begun, measured)
    costs = [Cost.of(each.trial, each.forward_ms) for each in measured]
    chosen, allowed = choose_within(table, [each.name for each in begun], costs, tuning)
    return FoundInput(
        inputs=begun,
        chosen=chosen,
        allowed=allowed,
        table=table,
        image=image_differences(table, 0, tuning.seed),
        maps=map_differences(table, 0, tuning.seed),
        trials=[each.trial for each in measured],
        forward_ms=[each.forward_ms for each in measured],
        left_out=len(inputs) - len(begun),
        s=time.monotonic() - start,
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    """What an input was measured on, what its option measured, and how long its network takes."""

    samples: Samples
    trial: Trial
    forward_ms: float


def _measure(each: Input, inputs: Sequence[Input], records: Sequence[ImageRecord], tuning: Tuning, run: Run) -> _Measured:
    """Score the copies in one of the inputs; what is kept of an interrupted run is of the same pictures and inputs."""
    all_inputs = [one.preprocess for one in inputs]
    key = hash_json(
        {"inputs": [repr(one.backbone.source.comparable()) for one in inputs], "ids": [record.id for record in records]}
    )[:16]
    folder, question = each.folder / f"inputs-{key}", each.question
    if question.labeled:
        samples, _ = read_samples(folder, each.backbone, records, question.labeled, run, all_inputs)
    else:
        spoilt = min(MOST_SPOILT, len(records))
        number = min(max(round(_COPIES / spoilt), _LEAST_EACH), _MOST_EACH)
        copies = Copies(pictures=spoilt, each=number, seed=_SEED_APART + tuning.seed)
        samples, _ = make_samples(folder, each.backbone, records, copies, run, all_inputs)
    samples = grouped(samples, records, question.group_of)
    network = each.backbone
    layout = Layout(levels=network.levels, embedding_dim=network.embedding_dim, input_size=network.input_size)
    trial = next(iter(run_trials(folder, samples, layout, [comparable(each.option.map)], run).values()))
    forward = forward_ms(each.folder / "forward.json", network, list(samples.shown.values()))
    return _Measured(samples, trial, forward)


def _table(begun: Sequence[Input], measured: Sequence[_Measured]) -> Trials:
    first = measured[0].samples
    if any(len(each.samples.spoilt) != len(first.spoilt) for each in measured):
        raise InputError(
            "some labeled pictures can be read for one of the inputs and not for another; leave those pictures out"
        )
    scores = [each.option.score for each in begun]
    normal_group, spoilt_group = first.groups
    table = Trials(
        normal=np.stack([each.trial.normal[score] for each, score in zip(measured, scores, strict=True)]),
        spoilt=np.stack([each.trial.spoilt[score] for each, score in zip(measured, scores, strict=True)]),
        areas=np.stack([_areas(each) for each in measured]),
        normal_group=normal_group,
        spoilt_group=spoilt_group,
        seen=np.stack([each.samples.seen for each in measured]),
    )
    return replace(table, least_found=0.0) if begun[0].question.labeled else table


def _areas(measured: _Measured) -> Doubles:
    assert measured.trial.in_picture is not None
    return measured.trial.in_picture
