"""A bank that is served: scores pictures, remembers them, and follows the bank when that changes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Literal

import numpy as np

from spade_faiss.core.errors import InputError, SpadeError
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.decisions.conformal import Doubles
from spade_faiss.decisions.drift import DEFECTS, LEVEL, Drift, find_drift
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.pages import list_pages
from spade_faiss.features.stream import Decoded, Extracted
from spade_faiss.scoring.detector import Detector
from spade_faiss.serve.errors import ConflictError, UnavailableError
from spade_faiss.serve.history.history import History
from spade_faiss.serve.history.records import RecentScore, ScoredPicture
from spade_faiss.serve.metrics import Metrics
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.pipeline import Job, Pipeline, ScoredBatch
from spade_faiss.serve.station.served import Served, for_serving
from spade_faiss.serve.station.verdicts import Scored, Upload, records_of
from spade_faiss.serve.station.views import Views

_log = logging.getLogger(__name__)

State = Literal["opening", "ready", "changing", "failed", "closed"]

# The drift test looks at so many of the last pictures, and at no fewer than the second number.
_DRIFT_PICTURES, _LEAST_DRIFT = 200, 20
_DRIFT_S = 10.0


class Station:
    """A bank that is served.

    Args:
        name: what clients call it.
        path: its folder.
        history: where verdicts go.
        settings: how it is served.
        run: how work is done on this machine.
        metrics: where it counts.
    """

    def __init__(self, name: str, path: Path, history: History, settings: ServeSettings, run: Run, metrics: Metrics) -> None:
        self.name = name
        self.path = path
        self.history = history
        self.settings = settings
        self.run = for_serving(run)
        self.metrics = metrics
        self.state: State = "opening"
        self.message = ""
        self.changed = threading.Event()  # that there is something to follow
        self.views = Views(history.files, lambda: self.served.detector.bank)
        self._served: Served | None = None
        self._pipeline: Pipeline | None = None
        self._drift: tuple[float, int, Drift | None] = (-1e9, -1, None)
        self._drift_lock = threading.Lock()
        self._gauge()

    @property
    def served(self) -> Served:
        """The state of the bank that is served.

        Raises:
            UnavailableError: while it is being opened, and if that failed.
        """
        if self._served is None:
            failed = self.state == "failed"
            said = (
                f"the bank {self.name} cannot be served: {self.message}" if failed else f"the bank {self.name} is being opened"
            )
            raise UnavailableError(said, 30 if failed else 2)
        return self._served

    @property
    def detector(self) -> Detector:
        """Scores against the state of the bank that is served; see `served`."""
        return self.served.detector

    @property
    def rules(self) -> DecisionRules | None:
        """Decide which pictures are alarms; None without a calibration."""
        return self.served.rules

    @property
    def generation(self) -> int:
        """The generation that is served; 0 while it is being opened."""
        return 0 if self._served is None else self._served.generation

    @property
    def alpha(self) -> float | None:
        """The promised rate of false alarms, the highest if products have several; None without a calibration."""
        rules = None if self._served is None else self._served.rules
        return None if rules is None else max(rule.thresholds.alpha for rule in rules.rules)

    @property
    def normals(self) -> int:
        """How many normal pictures the bank has; 0 while it is being opened."""
        return 0 if self._served is None else len(self._served.detector.bank.pictures)

    def maxima(self, product: str | None) -> Doubles | None:
        """(n,) the map maxima of the normal pictures of the calibration, that of a product of several, ascending; or None."""
        rules = None if self._served is None else self._served.rules
        rule = None if rules is None else rules.rule_of(product)
        return None if rule is None else np.sort(rule.calibration.scores["max"])

    @property
    def waiting(self) -> int:
        """How many pictures are on their way."""
        return 0 if self._pipeline is None else self._pipeline.taken

    @property
    def is_open(self) -> bool:
        """Whether pictures are taken."""
        return self._served is not None and self.state in ("ready", "changing")

    def open(self) -> None:
        """Open the bank; until this has returned, pictures are refused. What goes wrong is logged, and is in `message`."""
        try:
            served = Served.open(self.path, self.run, holdout=self.settings.holdout_of(self.name))
        except (SpadeError, OSError) as error:
            if self.message != str(error):
                _log.error("the bank %s cannot be served: %s", self.name, error)
            self.state, self.message = "failed", str(error)
            return
        if served.rules is None:
            _log.warning(served.notice)
        steps = _Steps(self, served)
        self._pipeline = Pipeline(
            self.name,
            steps,
            batch=served.detector.images_at_a_time,
            max_queue=self.settings.max_queue,
            max_wait_s=self.settings.max_wait_ms / 1000,
            metrics=self.metrics,
        )
        self._served = served  # after the pipeline is there: a request may come at any moment
        self.state, self.message = "ready", served.message
        self._gauge()

    def submit(self, uploads: Sequence[Upload]) -> list[Job]:
        """Take pictures that have arrived, all or none; each job's future gets the record, or an error.

        Raises:
            UnavailableError: if the queue has no room for them, or the bank is not open.
        """
        _ = self.served
        assert self._pipeline is not None
        return self._pipeline.submit(uploads)

    def check_room(self) -> None:
        """Raise UnavailableError if no picture can be taken: worth knowing before one is read."""
        _ = self.served
        if self.waiting >= self.settings.max_queue:
            assert self._pipeline is not None
            self._pipeline.refuse(1)

    def change_over(self, served: Served) -> None:
        """Serve another state of the bank from the next batch on."""
        self._served = served
        self.metrics.changes.labels(self.name).inc()
        self._gauge()

    def wake(self) -> None:
        """Have the bank follow the answers soon."""
        self.changed.set()

    def drift(self) -> Drift | None:
        """The drift test of the last pictures; None without enough of them, or without a calibration. A few seconds old.

        In a bank of several products, each with enough pictures is tested, and what is told is the strongest sign of drift,
        with a p-value of all tests together (Bonferroni).
        """
        served = self._served
        if served is None or served.rules is None:
            return None
        with self._drift_lock:
            since, generation, found = self._drift
            if generation == served.generation and monotonic() - since < _DRIFT_S:
                return found
            scores = self.history.recent_scores(self.name, served.generation, _DRIFT_PICTURES)
            found = _strongest(list(_drifts(served.rules, scores)))
            self._drift = (monotonic(), served.generation, found)
            # What a generation before said would stay otherwise.
            self.metrics.drift_p.labels(self.name).set(float("nan") if found is None else found.p_value)
            return found

    def close(self) -> None:
        """Answer what was taken, and take nothing more."""
        if self._pipeline is not None:
            self._pipeline.close()
        self.state = "closed"
        self._gauge()

    def _gauge(self) -> None:
        served, metrics = self._served, self.metrics
        metrics.capacity.labels(self.name).set(self.settings.max_queue)
        metrics.ready.labels(self.name).set(int(self.is_open))
        metrics.waiting.labels(self.name).set(self.waiting)
        if served is not None:
            metrics.generation.labels(self.name).set(served.generation)
            metrics.images.labels(self.name).set(len(served.detector.bank.pictures))
            metrics.alpha.labels(self.name).set(float("nan") if self.alpha is None else self.alpha)


def _drifts(rules: DecisionRules, scores: Sequence[RecentScore]) -> Iterator[Drift]:
    """The drift test of each product of which there are enough pictures."""
    for product in dict.fromkeys(score.product for score in scores):
        own = [score for score in scores if score.product == product]
        if len(own) < _LEAST_DRIFT or (rule := rules.rule_of(product)) is None:
            continue
        recent = {"image": np.array([score.image for score in own], np.float64)}
        by_map = [score.map for score in own if score.map is not None]
        if len(by_map) == len(own):
            recent["map"] = np.array(by_map, np.float64)
        yield find_drift(rule.calibration, recent, level=LEVEL, defects=DEFECTS)


def _strongest(found: Sequence[Drift]) -> Drift | None:
    if not found:
        return None
    strongest = min(found, key=lambda drift: drift.p_value)
    p_value = min(1.0, strongest.p_value * len(found))
    return replace(strongest, p_value=p_value, moved=p_value <= LEVEL)


class _Steps:
    """What a station does with pictures, see `pipeline.Steps`."""

    def __init__(self, station: Station, served: Served) -> None:
        self._station = station
        self._files = station.history.files
        # The network is the same in all states of the bank, and so is what decodes for it.
        self._features = served.detector.feature_stream(Timings())
        self._max_pixels = station.settings.max_pixels
        self._served = served
        self._score = self._served.detector.batch_scorer(Timings())
        self._is_prepared = False
        self._products: dict[str, str | None] = {}  # of the uploads on their way

    def decode(self, upload: Upload) -> Decoded:
        """Decode a picture, by the path that files take; its file is on the disk then."""
        if len(list_pages(upload.path)) > 1:
            raise InputError(f"{upload.name[:80]!r} holds several pages; send each as a file of its own")
        try:
            decoded = self._features.decode(ImageRecord(upload.id, upload.path), max_pixels=self._max_pixels)
        except InputError as error:
            # Clients know the picture by their own name for it, and learn nothing of where it lies here.
            raise InputError(str(error).replace(repr(str(upload.path)), repr(upload.name[:80]))) from error
        sync(upload.path)
        if upload.product is not None:
            self._products[upload.id] = upload.product
        return decoded

    def extract(self, decoded: Sequence[Decoded]) -> Iterator[Extracted]:
        """Compute features of pictures."""
        return self._features.extract(decoded, self._files.root)

    def score(self, extracted: Extracted, *, first: bool) -> Scored | None:
        """Search for features, in the state of the bank that is served when a batch begins."""
        if first:
            self._served = self._station.served
            self._score = self._served.detector.batch_scorer(Timings())
        if not self._is_prepared:
            self._served.detector.prepare_thread()
            self._is_prepared = True
        asked = [self._products.pop(name, None) for name in extracted.batch.ids]
        # A product that was named when the picture came may be gone by now.
        held = self._served.detector.bank.products
        named = [name if name in held else None for name in asked]
        # In a bank of one product, nobody can have named one.
        scores = self._score(extracted.batch, products=named) if any(named) else self._score(extracted.batch)
        return None if scores is None else Scored(served=self._served, extracted=extracted, scores=scores)

    def record(self, batches: Sequence[ScoredBatch]) -> list[ScoredPicture | ConflictError]:
        """Decide, and store verdicts, maps and pictures: those of all batches by one commit."""
        records: list[ScoredPicture] = []
        for batch in batches:
            uploads = [job.upload for job in batch.jobs]
            records += records_of(batch.scored, uploads, self._station.name, self._files)
        repeated = {item.id for item in self._station.history.record(records)}
        return [
            ConflictError(f"a picture with the key {item.key!r} was scored before") if item.id in repeated else item
            for item in records
        ]

    def drop(self, upload: Upload) -> None:
        """Remove what is left of a picture that gets no record."""
        self._products.pop(upload.id, None)
        self._files.drop(upload.id)


def sync(path: Path) -> None:
    """Have the content of a file reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
