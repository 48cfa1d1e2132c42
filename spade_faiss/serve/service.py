"""What the API and the page do alike: the one place where requests meet the history and the banks that are served."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from spade_faiss.core.errors import InputError
from spade_faiss.serve.errors import UnknownError
from spade_faiss.serve.history.history import History
from spade_faiss.serve.history.records import Achieved, Answer, Change, Kind, Overview, ScoredPicture
from spade_faiss.serve.metrics import Metrics
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.station import Station

LONGEST_NOTE = 2000


class Service:
    """The banks that are served, and their history.

    Args:
        stations: the banks by their names.
        history: what was scored and answered.
        settings: how they are served.
    """

    def __init__(self, stations: Mapping[str, Station], history: History, settings: ServeSettings) -> None:
        self.stations = stations
        self.history = history
        self.files = history.files
        self.settings = settings
        self.metrics = next(iter(stations.values())).metrics if stations else Metrics()
        # What is being scored under a key of its sender, so that the same request finds it.
        self.in_flight: dict[tuple[str, str], asyncio.Future[ScoredPicture]] = {}
        # What is being scored, whether or not its sender still waits for it.
        self.at_work: set[asyncio.Task[list[ScoredPicture | BaseException]]] = set()

    def station(self, bank: str) -> Station:
        """The station of a bank.

        Raises:
            UnknownError: if no such bank is served.
        """
        if bank not in self.stations:
            raise UnknownError(f"there is no bank {bank[:80]!r}; there are: {', '.join(sorted(self.stations))}")
        return self.stations[bank]

    def overview(self, bank: str) -> Overview:
        """How a bank is doing: by its history, and by what is served."""
        station = self.station(bank)
        drift = station.drift()
        return replace(
            self.history.overview(bank),
            generation=station.generation,
            alpha=station.alpha,
            drift_p=None if drift is None else drift.p_value,
            drift_images=0 if drift is None else drift.images,
        )

    def achieved(self, bank: str) -> Achieved:
        """How often verdicts were right, as far as answers tell, beside what is promised."""
        return replace(self.history.achieved(bank), alpha=self.station(bank).alpha)

    def answer(self, picture_id: str, kind: Kind, note: str = "", by: str = "") -> Answer:
        """Store what somebody said of a picture; the bank follows in the background.

        Raises:
            UnknownError: if there is no such picture, or its bank is not served any more.
            InputError: for another kind of answer, and for a note that is too long.
            UnavailableError: if the history cannot be written to at the moment.
        """
        if kind not in ("normal", "defect"):
            raise InputError(f"kind={kind[:40]!r} must be normal or defect")
        if len(note) > LONGEST_NOTE:
            raise InputError(f"the note has {len(note)} characters, at most {LONGEST_NOTE}; make it shorter")
        station = self.station(self.history.get(picture_id).bank)
        given = self.history.answer(picture_id, kind, note, by)
        station.metrics.answers.labels(station.name, kind).inc()
        station.wake()
        return given

    def undo(self, answer_id: str) -> Answer:
        """Take an answer back; the bank follows in the background.

        Raises:
            UnknownError: if there is no such answer, or its bank is not served any more.
            UnavailableError: if the history cannot be written to at the moment.
        """
        station = self.station(self.history.get_answer(answer_id).bank)
        given = self.history.undo(answer_id)
        station.wake()
        return given

    def change_of(self, answer_id: str) -> Change | None:
        """The change that an answer caused; None while it is pending, and if it changed nothing."""
        given = self.history.get_answer(answer_id)
        return next((change for change in self.history.changes(given.bank, 200) if answer_id in change.answers), None)

    def picture_png(self, picture: ScoredPicture) -> bytes:
        """A picture as the backbone saw it, as PNG; raises UnknownError if its file is gone."""
        return self.station(picture.bank).views.picture(picture)

    def map_png(self, picture: ScoredPicture) -> bytes:
        """The heat map of a picture as PNG; raises UnknownError if there is none."""
        return self.station(picture.bank).views.map(picture)

    def overlay_png(self, picture: ScoredPicture) -> bytes:
        """A picture under its heat map as PNG; raises UnknownError if there is none."""
        return self.station(picture.bank).views.overlay(picture)

    def normal_png(self, bank: str, name: str) -> bytes:
        """A normal picture of a bank as the backbone saw it, as PNG; raises UnknownError if it cannot be read."""
        return self.station(bank).views.normal(name)
