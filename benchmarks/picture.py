"""README's picture: solar cells and their heat maps, from what `make demo` leaves in its folder.

Run as `python -m benchmarks.picture demo docs/images/solar-cells.jpg`. The cells are ELPV's (CC BY-NC-SA 4.0); the picture has
their license.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from spade_faiss import Bank
from spade_faiss.features.decoding import read_image
from spade_faiss.features.pictures import to_picture
from spade_faiss.features.placement import place
from spade_faiss.report.pictures import color_range, overlay
from spade_faiss.report.scorefile import ScoreFile

# Cells that are cracked across, cracked along one line, broken at a corner, and inactive in the middle.
CELLS = ("cell0415", "cell0496", "cell0529", "cell0057")
_GAP = 6
_QUALITY = 82


def main() -> None:
    """Draw each cell above itself under its heat map, with the colors of the demo's report."""
    demo, target = map(Path, sys.argv[1:])
    source = Bank.open(demo / "cells.bank").manifest.source
    if source is None:
        sys.exit(f"{demo / 'cells.bank'} was not made from images; run: make demo")
    columns = []
    with ScoreFile.open(demo / "results" / "scores.h5") as scores:
        low, high = color_range(scores.map_score, scores.map, ["defective" in name for name in scores.ids])
        for cell in CELLS:
            name = f"test/defective/{cell}.png"
            image = read_image(demo / "cells" / name)
            picture = to_picture(image, place(*image.size, source.preprocess))
            heat = overlay(picture, scores.map(scores.ids.index(name)), low, high)
            gap = np.full((_GAP, picture.shape[1], 3), 255, np.uint8)
            columns.append(np.vstack([picture, gap, heat]))
    gap = np.full((columns[0].shape[0], _GAP, 3), 255, np.uint8)
    whole = np.hstack([part for column in columns for part in (column, gap)][:-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(whole).save(target, quality=_QUALITY)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
