"""Pictures for the page, drawn when somebody looks at them: what the backbone saw, heat maps, overlays, normal pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.pictures import Picture, load_image
from spade_faiss.report.normals import NormalPictures
from spade_faiss.report.pictures import heat_map, overlay, shrink, shrink_map, to_png
from spade_faiss.serve.errors import UnknownError
from spade_faiss.serve.history.files import Files
from spade_faiss.serve.history.records import ScoredPicture

_CACHED_BYTES = 64 << 20
# PNG files are looked at once or twice: the time to make them counts for more than their size.
_COMPRESSION = 1


class Views:
    """Draws what was scored against a bank; what was drawn last is kept in memory, up to a bound.

    Args:
        files: the pictures and maps.
        bank: gives the state of the bank that is served.
    """

    def __init__(self, files: Files, bank: Callable[[], Snapshot]) -> None:
        self._files = files
        self._bank = bank
        self._drawn: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def picture(self, scored: ScoredPicture) -> bytes:
        """A picture as the backbone saw it, as large as reports show it."""
        return self._cached(scored.id, "picture", lambda: shrink(self._load(scored)))

    def map(self, scored: ScoredPicture) -> bytes:
        """The colors of a score map."""
        return self._cached(scored.id, "map", lambda: heat_map(shrink_map(self._map(scored)), *_colors(scored)))

    def overlay(self, scored: ScoredPicture) -> bytes:
        """A picture under its heat map."""

        def draw() -> Picture:
            return overlay(shrink(self._load(scored)), shrink_map(self._map(scored)), *_colors(scored))

        return self._cached(scored.id, "overlay", draw)

    def normal(self, name: str) -> bytes:
        """A normal picture of the bank, as the backbone saw it.

        Raises:
            UnknownError: if the bank has no such picture, or its file is gone or has changed.
        """

        def draw() -> Picture:
            bank = self._bank()
            if bank.pictures.number(name) is None:
                raise UnknownError(f"the bank has no normal picture {name[:80]!r}")
            shown = NormalPictures(bank)(name)
            if shown.picture is None:
                raise UnknownError(f"this normal picture cannot be shown: {shown.missing}")
            return shown.picture

        return self._cached(name, "normal", draw)

    def _load(self, scored: ScoredPicture) -> Picture:
        source = self._bank().manifest.source
        path = self._files.picture_path(scored.id, scored.suffix)
        if source is None or not path.is_file():
            raise UnknownError(f"the file of picture {scored.id} was removed, see --keep and --keep-bytes")
        try:
            return load_image(ImageRecord(scored.id, path), source.preprocess).picture
        except InputError as error:
            raise UnknownError(f"the file of picture {scored.id} cannot be read any more: {error}") from error

    def _map(self, scored: ScoredPicture) -> FloatArray:
        found = self._files.read_map(scored.id)
        if found is None:
            raise UnknownError(f"picture {scored.id} has no map, or its file was removed, see --keep and --keep-bytes")
        return found

    def _cached(self, name: str, kind: str, draw: Callable[[], Picture]) -> bytes:
        key = (kind, name)
        with self._lock:
            if key in self._drawn:
                self._drawn.move_to_end(key)
                return self._drawn[key]
        data = to_png(draw(), _COMPRESSION)
        with self._lock:
            if key not in self._drawn:
                self._drawn[key] = data
                self._bytes += len(data)
            while self._bytes > _CACHED_BYTES:
                self._bytes -= len(self._drawn.popitem(last=False)[1])
        return data


def _colors(scored: ScoredPicture) -> tuple[float, float]:
    low, high = scored.colors or (0.0, 1.0)
    return low, max(high, float(np.nextafter(low, np.inf)))
