"""What is counted and measured while banks are served, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From the request to its answer; what each consists of follows.
STAGES = ("total", "receive", "queue", "decode", "forward", "score", "record")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOGETHER = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "spade_faiss_stage_seconds",
            "How long each stage takes: decode and total by picture, queue, forward, score and record by batch",
            ["bank", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "spade_faiss_batch_pictures", "Pictures scored together", ["bank"], buckets=_TOGETHER, registry=self.registry
        )
        # alarm, normal, unjudged (there is no calibration), unreadable, refused (a full queue), failed
        self.verdicts = self._counter("pictures_total", "Pictures by what became of them", "bank", "verdict")
        self.answers = self._counter("answers_total", "Answers of people", "bank", "kind")
        self.changes = self._counter("changes_total", "How often the server changed over to a new generation", "bank")
        self.waiting = self._gauge("queue_pictures", "Pictures that wait or are being scored")
        self.capacity = self._gauge("queue_capacity_pictures", "The most pictures that may wait")
        self.generation = self._gauge("bank_generation", "The generation of the bank that is served")
        self.images = self._gauge("bank_pictures", "Normal pictures in the bank")
        self.alpha = self._gauge("alpha", "The promised rate of false alarms")
        self.drift_p = self._gauge("drift_p_value", "The p-value of the drift test of the last pictures")
        self.ready = self._gauge("ready", "Whether pictures can be scored against the bank")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"spade_faiss_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"spade_faiss_{name}", text, ["bank"], registry=self.registry)

    def observe(self, bank: str, stage: str, seconds: float) -> None:
        """Add a time that a stage took."""
        self._seconds.labels(bank, stage).observe(seconds)

    @contextmanager
    def stage(self, bank: str, stage: str) -> Iterator[None]:
        """Measure a stage; one that fails does not count."""
        start = perf_counter()
        yield
        self.observe(bank, stage, perf_counter() - start)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
