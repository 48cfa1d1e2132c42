"""The pictures and the bank that the server is measured with."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from spade_faiss import Extraction, fit
from spade_faiss.features.datasets import load_dataset

BACKBONE = "efficientnet_lite0"
NAME = "bottle"
SMALL = 60


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where everything is.

    Args:
        data: the folder that holds `mvtec_bottle`.
        scratch: takes pictures, banks and what servers store.
        pictures: how many pictures are sent.
        requests: how many requests show whether memory is flat.
        kills: how often a server is killed.
        feedbacks: how many pictures are answered.
        cases: how many requests are generated from the OpenAPI document.
        repeats: how often speeds are measured.
    """

    data: Path
    scratch: Path
    pictures: int = 2000
    requests: int = 20_000
    kills: int = 30
    feedbacks: int = 50
    cases: int = 6000
    repeats: int = 3

    def normals(self) -> list[Path]:
        """The normal pictures that the bank is made from."""
        return sorted((self.data / "mvtec_bottle" / "train" / "good").glob("*.png"))

    def bank(self) -> Path:
        """The bank of all normal pictures by the preset `default`, calibrated; it is made once, and never changed."""
        path = self.scratch / "kept" / f"{NAME}.bank"
        fit(self.data / "mvtec_bottle" / "train" / "good", bank=path, extraction=Extraction(backbone=BACKBONE))
        return path

    def small_bank(self, folder: str) -> Path:
        """A bank of the first 60 normal pictures, to be changed; calibrating it again takes a second or two."""
        kept, path = self.scratch / "kept" / "small" / f"{NAME}.bank", self.fresh(folder) / f"{NAME}.bank"
        fit(self.normals()[:SMALL], bank=kept, extraction=Extraction(backbone=BACKBONE))
        shutil.copytree(kept, path)
        return path

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def folder(self, count: int) -> list[Path]:
        """A folder of so many pictures: those of the set, again and again under other names."""
        dataset = load_dataset(self.data / "mvtec_bottle")
        paths = [record.path for record in dataset.test] + self.normals()
        folder = self.scratch / "kept" / f"{count} pictures"
        if not folder.is_dir():
            temporary = self.fresh("making")
            for number in range(count):
                source, target = paths[number % len(paths)], temporary / f"{number:06d}.png"
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copyfile(source, target)
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(folder)
        return sorted(folder.glob("*.png"))
