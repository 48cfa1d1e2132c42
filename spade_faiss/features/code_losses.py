"""What codes lose against the numbers that they were made of, measured between pictures of the bank when it is made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import is_finite, shorten
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.codes import Codes, LevelCodes

# A vector is as good as the nearest if it is at most so many times as far.
NEARLY = 1.05
# Pictures that are compared with each other, and vectors of each of them.
_COMPARED, _VECTORS = 8, 48


@dataclass(frozen=True, kw_only=True)
class LevelLoss:
    """What a level's codes lose against the float32 numbers that they were made of, measured between pictures of the bank.

    Attributes:
        level: the name of the level.
        kept: the share of the vectors' variance that the numbers of a code keep, that of the rest left out.
        cut_off: the share of numbers beyond what a code holds.
        found: the share of vectors whose nearest one in other pictures, by the codes, is really at most `NEARLY` as far as the
            nearest.
        correlation: that of the distances to the nearest vector by codes with those in float32.
    """

    level: str
    kept: float
    cut_off: float
    found: float
    correlation: float

    def __post_init__(self) -> None:
        if not all(is_finite(value) and -1 <= value <= 1 for name, value in vars(self).items() if name != "level"):
            raise InputError(f"the loss of level {shorten(self.level)} holds {shorten(vars(self))}, expected shares")


def measure_losses(batch: FeatureBatch, codes: Codes) -> tuple[LevelLoss, ...]:
    """Measure what codes lose, between some pictures of a bank; empty if these are one picture.

    Args:
        batch: what `prepare` returned for pictures of the bank.
        codes: what they are encoded by.
    """
    firsts = list({name: place for place, name in reversed(list(enumerate(batch.picture_ids)))}.values())[::-1]
    if len(firsts) < 2:
        return ()
    chosen = [firsts[int(place)] for place in np.linspace(0, len(firsts) - 1, min(_COMPARED, len(firsts)))]
    return tuple(_measure(name, of, np.asarray(batch.levels[name][chosen], np.float32)) for name, of in codes.levels.items())


def _measure(name: str, codes: LevelCodes, maps: FloatArray) -> LevelLoss:
    maps = maps.reshape(len(maps), -1, maps.shape[-1])
    vectors, numbers = maps.reshape(-1, maps.shape[-1]), codes.query(maps)
    step = -(-maps.shape[1] // _VECTORS)
    true, by_codes, reached = [], [], []
    for one in range(len(maps)):
        others = np.arange(len(maps)) != one
        exact = _sq_distances(maps[one, ::step], maps[others].reshape(-1, maps.shape[-1]))
        coded = _sq_distances(numbers[one, ::step], codes.decode(codes.encode(maps[others])).reshape(-1, numbers.shape[-1]))
        true.append(exact.min(axis=1))
        by_codes.append(coded.min(axis=1))
        reached.append(exact[np.arange(len(exact)), coded.argmin(axis=1)])
    nearest, found = np.sqrt(np.concatenate(true)), np.sqrt(np.concatenate(reached))
    variance = np.square(vectors - codes.center, dtype=np.float64).sum()
    spanned = codes.numbers(vectors)
    kept = np.square(spanned[:, :-1]).sum() / variance if codes.has_rest and variance > 0 else 1.0
    return LevelLoss(
        level=name,
        kept=min(1.0, float(kept)),
        cut_off=codes.cut_off(maps),
        found=float(np.mean(found <= NEARLY * nearest)),
        correlation=_correlation(nearest, np.sqrt(np.concatenate(by_codes))),
    )


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Pearson's; 1 where neither varies."""
    if a.std() == 0 or b.std() == 0:
        return float(a.std() == b.std())
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))


def _sq_distances(xq: FloatArray, xb: FloatArray) -> npt.NDArray[np.float64]:
    """The squared distances (nq, nb) of vectors, off by what float64 rounds."""
    q, x = xq.astype(np.float64), xb.astype(np.float64)
    found: npt.NDArray[np.float64] = np.square(q).sum(axis=1)[:, np.newaxis] + np.square(x).sum(axis=1) - 2 * (q @ x.T)
    np.maximum(found, 0, out=found)
    return found
