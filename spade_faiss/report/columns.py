"""Verdicts and regions as the columns of scores.h5, see `scorefile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.decisions.calibration import Verdicts
from spade_faiss.decisions.regions import Region

Columns = dict[str, npt.NDArray[Any]]


def verdict_columns(verdicts: Verdicts) -> Columns:
    """The columns of the group `verdict`."""
    return {
        "p_image": verdicts.p_image,
        "p_map": verdicts.p_map,
        "p_top": verdicts.p_top,
        "p_structure": verdicts.p_structure,
        "p_value": verdicts.p_value,
        "alarm": verdicts.alarm.astype(np.uint8),
    }


def region_columns(regions: Sequence[Sequence[Region]]) -> Columns:
    """The columns of the group `regions`, from the regions of each image."""
    flat = [region for found in regions for region in found]
    columns: Columns = {
        "image": np.repeat(np.arange(len(regions)), [len(found) for found in regions]).astype(np.int64),
        "score": np.array([region.score for region in flat], np.float64),
        "p_value": np.array([region.p_value for region in flat], np.float64),
    }
    for where, extents in (("input", [region.input for region in flat]), ("original", [region.original for region in flat])):
        columns |= {
            f"{where}_box": np.array([extent.box for extent in extents], np.int64).reshape(-1, 4),
            f"{where}_area": np.array([extent.area for extent in extents], np.int64),
            f"{where}_peak": np.array([extent.peak for extent in extents], np.int64).reshape(-1, 2),
            f"{where}_size": np.array([extent.size for extent in extents], np.int64).reshape(-1, 2),
            f"{where}_counts": np.array([count for extent in extents for count in extent.counts], np.int64),
            f"{where}_runs": np.array([len(extent.counts) for extent in extents], np.int64),
        }
    return columns
