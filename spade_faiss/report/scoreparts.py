"""The `scores.h5` of several parts of a run, read as one file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.routing import Routes

# What the parts of a run have in common.
_COMMON = ("grid", "size", "distance", "settings", "run")
# What each image has.
_ROWS = ("image_score", "map_score", "top_score", "peak", "neighbor_ids", "neighbor_dist")


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreParts(ScoreFile):
    """The open score files of a run that was scored in parts: see `ScoreFile`.

    Args:
        parts: the files, in the order of their images.
    """

    parts: tuple[ScoreFile, ...]

    @classmethod
    def open(cls, path: Any) -> ScoreParts:
        """Open the score files at some paths, one at least.

        Raises:
            NotFoundError: if there is no such file.
            InputError: for one that is no score file, damaged, or of another run than the first.
        """
        with ExitStack() as stack:
            parts = tuple(stack.enter_context(ScoreFile.open(file)) for file in path)
            first = parts[0]
            for part in parts:
                if different := [name for name in _COMMON if getattr(part, name) != getattr(first, name)]:
                    raise InputError(f"{part.path} and {first.path} are not of one run: they differ in {different[0]}")
            structure = [part.structure_score for part in parts if part.structure_score is not None]
            routes = [part.routes for part in parts if part.routes is not None]
            columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ROWS}
            joined = cls(
                path=first.path.parent.parent,
                ids=tuple(name for part in parts for name in part.ids),
                **columns,
                routes=Routes.join(routes) if routes else None,
                structure_score=np.concatenate(structure) if structure else None,
                match={level: np.concatenate([part.match[level] for part in parts]) for level in first.match},
                **{name: getattr(first, name) for name in _COMMON},
                _maps=first._maps,
                parts=parts,
            )
            stack.pop_all()
            return joined

    def map(self, i: int) -> npt.NDArray[np.float32]:
        """See `ScoreFile`."""
        if not 0 <= i < len(self):
            raise InputError(f"there is no map {i} in {self.path}: it holds {len(self)}")
        number = bisect_right(self._stops, i)
        return self.parts[number].map(i - (self._stops[number - 1] if number else 0))

    @property
    def _stops(self) -> list[int]:
        """For each part, the number of images up to its end."""
        return list(accumulate(len(part) for part in self.parts))

    def table(self, group: str) -> dict[str, npt.NDArray[Any]]:
        """See `ScoreFile`; the numbers of images are those of the run."""
        tables = [part.table(group) for part in self.parts]
        for start, table in zip([0, *self._stops], tables, strict=False):
            if group == "regions" and table:
                table["image"] = table["image"] + start
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    def files(self, folder: Path) -> Iterator[tuple[Path, ScoreFile, slice]]:
        """See `ScoreFile`; tables lie beside each file."""
        for start, stop, part in zip([0, *self._stops], self._stops, self.parts, strict=False):
            yield part.path.parent, part, slice(start, stop)

    def close(self) -> None:
        """Close all files."""
        for part in self.parts:
            part.close()
