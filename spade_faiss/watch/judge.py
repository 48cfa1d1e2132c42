"""Scores pictures that arrived, decides, and follows the bank when that changes."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.bank.manifest import read_manifest
from spade_faiss.bank.places import CALIBRATIONS, MANIFEST, PRODUCTS
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.settings import Decision
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.regions import find_regions
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features import stream
from spade_faiss.features.datasets import Skipped
from spade_faiss.features.pictures import LoadedImage
from spade_faiss.features.stream import Extracted
from spade_faiss.report.colors import usual_colors
from spade_faiss.report.metric_labels import SCORE_COLUMNS
from spade_faiss.report.pictures import overlay, shrink, shrink_map, to_png
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores
from spade_faiss.watch.arrivals import Arrival

_log = logging.getLogger(__name__)

# How hard PNG files are compressed: a line has no time for more.
FAST = 1

# More than any command would be asked to skip: what cannot be read is one picture of many here.
_MOST_SKIPPED = 1 << 30
# How often a bank that has changed and cannot be opened is looked at again.
_LOOK_S = 5.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """A picture with its scores and the verdict on it.

    Args:
        arrival: the picture.
        facts: scores and verdict, as report.json has them, and the bank's generation.
        alarm: whether it is an alarm; None without a calibration.
        loaded: the picture as the backbone saw it.
        map: its score map; None if it has none.
        colors: the scores at which the colors of its heat map begin and end.
    """

    arrival: Arrival
    facts: Mapping[str, Any]
    alarm: bool | None
    loaded: LoadedImage
    map: FloatArray | None
    colors: tuple[float, float]

    def overlay(self) -> bytes | None:
        """The picture under its heat map, as a PNG."""
        if self.map is None:
            return None
        shown = overlay(shrink(self.loaded.picture), shrink_map(self.map), *self.colors)
        return to_png(shown, FAST)

    def map_file(self) -> bytes | None:
        """The score map in half precision, as `numpy.save` writes it."""
        if self.map is None:
            return None
        data = io.BytesIO()
        np.save(data, self.map.astype(np.float16), allow_pickle=False)
        return data.getvalue()


class Judge:
    """Scores batches of pictures against a bank.

    Args:
        open_detector: opens the bank in its newest state.
        decision: the rate of false alarms.

    Raises:
        SpadeError: as `Detector.open` and `DecisionRules.of`.
    """

    def __init__(self, open_detector: Callable[[], Detector], decision: Decision) -> None:
        self._open = open_detector
        self._decision = decision
        self.detector, self.rules, self.notice = self._opened()
        # Nothing that has changed since it was opened is taken for what was opened.
        is_current = read_manifest(self.detector.bank.path).generation == self.detector.bank.generation
        self._state = self._bank_state() if is_current else ()
        self._failed: tuple[object, ...] = ()
        self._next_look_s = 0.0
        self._said = ""

    @property
    def at_a_time(self) -> int:
        """How many pictures are scored together."""
        return self.detector.images_at_a_time

    def follow(self) -> bool:
        """Take over the bank's newest state, if it is another one and is ready; returns whether it was.

        A bank that gave verdicts, and whose newest state has no calibration yet, is searched as it was: no alarm goes amiss.
        """
        state = self._bank_state()
        if state == self._state or (state == self._failed and time.monotonic() < self._next_look_s):
            return False
        try:
            detector, rules, notice = self._opened()
        except (SpadeError, OSError) as error:  # somebody is at work on it
            self._failed, self._next_look_s = state, time.monotonic() + _LOOK_S
            self._say(f"the bank has changed and cannot be used yet ({error}); it is searched as it was")
            return False
        if rules is None and self.rules is not None:
            self._state = state  # looked at again when something more changes, such as its calibration
            self._say(f"{notice}; until then, the bank is searched as it was at generation {self.detector.bank.generation}")
            return False
        before, self._said = self.detector.bank.generation, ""
        self.detector, self.rules, self.notice, self._state = detector, rules, notice, state
        _log.info("the bank is now at generation %d, before %d", detector.bank.generation, before)
        return True

    def __call__(self, arrivals: Sequence[Arrival]) -> tuple[list[Judged], list[tuple[Arrival, str]]]:
        """Score pictures.

        Returns:
            Those that could be read, and those that could not be, with the reasons.
        """
        judged: list[Judged] = []
        scoring = self.detector.stream(Timings(), "watch", allow_none=True)
        # Names are not told apart by the stream: the same picture may have been replaced while it waited.
        of_record = {id(arrival.record): arrival for arrival in arrivals}
        with _said_here(), closing(scoring(Path(), [arrival.record for arrival in arrivals])) as batches:
            for extracted, scores in batches:
                judged += self._judge(extracted, scores, [of_record[id(record)] for record in extracted.records])
        return judged, list(_unread(arrivals, scoring.skipped, {id(each.arrival) for each in judged}))

    def _judge(self, extracted: Extracted, scores: Scores, arrivals: Sequence[Arrival]) -> Iterator[Judged]:
        detector, rules, routes = self.detector, self.rules, scores.routes
        values = dict(scores.image_scores) if rules is None else rules.scores_of(scores)
        verdicts = None
        if rules is not None:
            verdicts = rules(values, scores.statistics, None if routes is None else routes.product)
        for i, (arrival, loaded, own) in enumerate(zip(arrivals, extracted.loaded, scores.own_maps(), strict=True)):
            has_map = bool(np.isfinite(values["max"][i]))
            facts: dict[str, Any] = {
                "sha256": loaded.sha256 or None,
                "bank": detector.bank.path.name,
                "generation": detector.bank.generation,
                **{SCORE_COLUMNS[name]: of_images[i] for name, of_images in values.items()},
                "ranked_by": SCORE_COLUMNS[detector.method.score],
                "neighbors": [
                    {"id": str(name), "dist": dist}
                    for name, dist in zip(scores.neighbor_ids[i], scores.neighbor_dist[i], strict=True)
                    if name
                ],
            }
            product = None
            if routes is not None:
                product, confidence, p_none = routes.at(i)
                facts |= {"product": product, "confidence": confidence, "p_none": p_none, "none": bool(routes.none[i])}
            rule = None if rules is None else rules.rule_of(product)
            if rule is not None and verdicts is not None:
                regions = find_regions(own, rule.thresholds.pixel, rule.p_of_pixel, loaded.placement)
                facts |= {
                    **verdicts.numbers(i),
                    "alpha": rule.thresholds.alpha,
                    "regions": [region.numbers() for region in regions],
                }
            yield Judged(
                arrival=arrival,
                facts=facts,
                alarm=None if verdicts is None else verdicts.alarm_of(i),
                loaded=loaded,
                map=own.copy() if has_map else None,
                colors=usual_colors(rule, own) if has_map else (0.0, 1.0),
            )

    def _opened(self) -> tuple[Detector, DecisionRules | None, str]:
        detector = self._open()
        detector = Detector(
            detector.bank,
            detector.recipe,
            detector.method,
            replace(detector.run, max_skipped=_MOST_SKIPPED, progress=False),
        )
        rules, notice = DecisionRules.of(detector, self._decision)
        _ = detector.backbone  # what is wrong with it is said now
        said = [notice] if notice else [] if rules is None else rules.said
        return detector, rules, "; ".join(said)

    def _bank_state(self) -> tuple[object, ...]:
        """What changes whenever the bank or its calibrations do."""
        folder = self.detector.bank.path
        found: list[object] = []
        places = [folder / MANIFEST]
        with suppress(OSError):
            places += sorted((folder / CALIBRATIONS).iterdir())
        places += sorted((folder / PRODUCTS).glob(f"*/{CALIBRATIONS}/*"))
        for place in places:
            try:
                status = os.lstat(place)
            except OSError:
                continue
            found += (place.name, status.st_ino, status.st_mtime_ns, status.st_size)
        return tuple(found)

    def _say(self, text: str) -> None:
        if text != self._said:
            _log.warning("%s", text)
        self._said = text


@contextmanager
def _said_here() -> Iterator[None]:
    """Keep the stream from reporting what cannot be read: it may be tried again, and is reported once if it is not."""
    log = logging.getLogger(stream.__name__)

    def is_other(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def _unread(arrivals: Sequence[Arrival], skipped: Sequence[Skipped], judged: set[int]) -> Iterator[tuple[Arrival, str]]:
    reasons = {item.id: item.reason for item in skipped}
    for arrival in arrivals:
        if id(arrival) not in judged:
            yield arrival, reasons.get(arrival.record.id, "it could not be read")
