"""A bank that is served."""

from __future__ import annotations

from pathlib import Path

from spade_faiss.decisions.drift import Drift
from spade_faiss.serve.history.history import History
from spade_faiss.serve.history.records import ScoredPicture
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.views import Views


class Station:
    """A bank that is served: scores pictures, remembers them, and follows the bank when that changes."""

    name: str
    path: Path
    views: Views

    def __init__(self, name: str, path: Path, history: History, settings: ServeSettings) -> None:
        raise NotImplementedError

    @property
    def generation(self) -> int:
        """The generation that is served."""
        raise NotImplementedError

    @property
    def alpha(self) -> float | None:
        """The promised rate of false alarms; None without a calibration."""
        raise NotImplementedError

    def drift(self) -> Drift | None:
        """The drift test of the last pictures; None without enough of them, or without a calibration."""
        raise NotImplementedError

    def wake(self) -> None:
        """Have the bank follow the answers soon."""
        raise NotImplementedError

    def again(self, picture: ScoredPicture) -> None:
        """To be written."""
        raise NotImplementedError
