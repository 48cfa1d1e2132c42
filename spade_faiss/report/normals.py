"""Pictures of a bank's normal images, read from their files."""

from __future__ import annotations

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.pictures import load_image
from spade_faiss.report.inputs import Shown


class NormalPictures:
    """Reads each picture once, as the backbone saw it; a file that is not the one that the bank was made from is missing."""

    def __init__(self, bank: Snapshot) -> None:
        self._bank = bank
        self._read: dict[str, Shown] = {}

    def __call__(self, name: str) -> Shown:
        """The picture of the normal image `name`."""
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def _load(self, name: str) -> Shown:
        path, source = self._bank.image_path(name), self._bank.manifest.source
        if path is None:
            return Shown(None, "the bank does not know its file")
        if source is None:
            return Shown(None, "the features came from another extractor")
        try:
            loaded = load_image(ImageRecord(name, path), source.preprocess)
        except InputError as error:
            return Shown(None, str(error))
        if self._bank.sha256_of.get(name) not in (None, loaded.sha256):
            return Shown(None, f"{path} has changed since the bank took it")
        return Shown(loaded.picture)
