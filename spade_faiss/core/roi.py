"""A region of interest: which pixels of a picture, or which locations of a map, are inspected; written down as run lengths."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spade_faiss.core.errors import InputError
from spade_faiss.core.once import once
from spade_faiss.core.schema import check_at_least, shorten

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A region is part of a bank's manifest, which must stay short. One with a smooth outline takes a few numbers for each row.
_MOST_CHARACTERS = 1 << 20
# More than any picture has that is read: no file of a bank can ask for more memory than a picture takes.
_MOST_CELLS = 1 << 27
_MOST_DIGITS = len(str(_MOST_CELLS))


@dataclass(frozen=True, kw_only=True)
class Roi:
    """Which cells of a grid are inspected: the pixels of a picture or of a network's input, or the locations of a map.

    Args:
        height: the number of rows.
        width: the number of columns.
        runs: how many cells, row by row, are alternately outside and inside, outside first; the numbers are separated by
            spaces, and only the first one may be 0.

    Raises:
        InputError: for runs that are not those of such a grid, and if nothing is inside.
    """

    height: int
    width: int
    runs: str

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check_at_least(f"region of interest: {name}", getattr(self, name), 1)
        if (cells := self.height * self.width) > _MOST_CELLS:
            raise InputError(f"a region of interest of {cells} pixels is too large: at most {_MOST_CELLS}")
        if not isinstance(self.runs, str) or len(self.runs) > _MOST_CHARACTERS:
            raise InputError(
                f"the region of interest takes more than {_MOST_CHARACTERS} characters to write down; smooth its outline, and "
                "remove the noise of its mask"
            )
        if not all(word.isascii() and word.isdecimal() and len(word) <= _MOST_DIGITS for word in self.runs.split(" ")):
            raise InputError(f"runs={shorten(self.runs)} must be whole numbers that are separated by spaces")
        if sum(self.lengths) != cells or 0 in self.lengths[1:]:
            raise InputError(f"runs={shorten(self.runs)} are not those of {self.height} x {self.width} cells")
        if len(self.lengths) < 2:
            raise InputError("the region of interest has nothing inside")

    @staticmethod
    def of(mask: npt.NDArray[np.bool_]) -> Roi:
        """The region that a mask (H, W) marks; True is inside.

        Raises:
            InputError: if the mask is not boolean or not two-dimensional, marks nothing, or is too ragged to be written down.
        """
        import numpy as np  # the settings hold regions, and the help of the command line needs no NumPy

        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise InputError(f"the mask is {mask.dtype} of shape {mask.shape}, expected bool of (height, width)")
        flat = mask.ravel()
        edges = np.flatnonzero(np.diff(flat, prepend=False))
        lengths = np.diff(edges, prepend=0, append=flat.size)
        return Roi(height=mask.shape[0], width=mask.shape[1], runs=" ".join(map(str, lengths.tolist())))

    @once
    def lengths(self) -> tuple[int, ...]:
        """The runs as numbers."""
        return tuple(map(int, self.runs.split(" ")))

    @property
    def share(self) -> float:
        """The share of the cells that is inside, above 0 and at most 1."""
        return sum(self.lengths[1::2]) / (self.height * self.width)

    def facts(self) -> dict[str, Any]:
        """What names it, for reports and `info`: the runs may be long."""
        named = f"{self.height} {self.width} {self.runs}".encode()
        size = {"height": self.height, "width": self.width}
        return {**size, "share": self.share, "sha256": hashlib.sha256(named).hexdigest()}
