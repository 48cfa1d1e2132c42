"""The shapes of defects: how opaque each pixel of a small window is, from 0 to 1."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Alpha = npt.NDArray[np.float32]
Rng = np.random.Generator


def blob(rng: Rng, area: float) -> Alpha:
    """An ellipse whose outline waves, of about `area` pixels."""
    ratio = math.exp(rng.uniform(0.0, 0.9))
    radius = math.sqrt(area / math.pi)
    a, b, turn = radius * math.sqrt(ratio), radius / math.sqrt(ratio), rng.uniform(0, math.pi)
    y, x = _grid(1.4 * a + 2)
    u, v = x * math.cos(turn) + y * math.sin(turn), -x * math.sin(turn) + y * math.cos(turn)
    angle = np.arctan2(v, u)
    waves = sum(rng.uniform(0, 0.16) * np.cos(n * angle + rng.uniform(0, 2 * math.pi)) for n in (2, 3, 5))
    return _inside((1 + waves) - np.hypot(u / a, v / b), min(a, b))


def patch(rng: Rng, area: float) -> Alpha:
    """An upright rectangle, as CutPaste cuts them: sides of up to 3 : 1."""
    ratio = math.exp(rng.uniform(-1.1, 1.1))
    return np.ones((max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))), np.float32)


def scar(rng: Rng, area: float) -> Alpha:
    """A thin rectangle at any angle, as CutPaste's scars: five to fifteen times as long as wide."""
    ratio = rng.uniform(5, 15)
    width = max(1.5, math.sqrt(area / ratio))
    length, turn = max(area / width, width), rng.uniform(0, math.pi)
    y, x = _grid(length / 2 + 2)
    u, v = x * math.cos(turn) + y * math.sin(turn), -x * math.sin(turn) + y * math.cos(turn)
    return _inside(np.minimum(length / 2 - np.abs(u), width / 2 - np.abs(v)), 1.0)


def scratch(rng: Rng, area: float) -> Alpha:
    """A line that bends a little, one pixel wide or more, and thinner towards its ends."""
    width = max(1.3, math.sqrt(area) / rng.uniform(4, 9))
    steps = 48
    length = max(area / width, 4.0)
    turn = np.cumsum(rng.normal(0, rng.uniform(0.01, 0.09), steps)) + rng.uniform(0, 2 * math.pi)
    y, x = (np.cumsum(np.sin(turn)) * length / steps, np.cumsum(np.cos(turn)) * length / steps)
    y, x = y - (y.max() + y.min()) / 2, x - (x.max() + x.min()) / 2
    rows, columns = _grid(max(float(np.abs(y).max()), float(np.abs(x).max())) + width + 2)
    half = width / 2 * (0.45 + 0.55 * np.sin(np.linspace(0, math.pi, steps)))
    far = np.full(np.broadcast_shapes(rows.shape, columns.shape), -np.inf)
    for place in range(steps):
        np.maximum(far, half[place] - np.hypot(rows - y[place], columns - x[place]), out=far)
    return _inside(far, 1.0)


def islands(rng: Rng, area: float) -> Alpha:
    """Where smooth noise is high: parts of any outline, of `area` pixels in all, as DRAEM places its textures."""
    side = max(4, math.ceil(1.9 * math.sqrt(area)))
    values = smooth_noise(rng, (side, side), max(1.5, side * rng.uniform(0.12, 0.3)))
    y, x = _grid(side / 2, side)
    values -= np.float32(1.6) * (np.hypot(y, x) / (side / 2)).astype(np.float32) ** 2
    limit = np.partition(values.ravel(), -min(values.size, max(1, round(area))))[-min(values.size, max(1, round(area)))]
    return cast(Alpha, (values >= limit).astype(np.float32))


def spots(rng: Rng, area: float) -> Alpha:
    """One to five small discs beside each other."""
    count = int(rng.integers(1, 6))
    radii = np.sqrt(area / math.pi / count) * rng.uniform(0.7, 1.2, count)
    reach = float(radii.max()) * (1.0 + 1.6 * math.sqrt(count - 1))
    y, x = _grid(reach + float(radii.max()) + 2)
    far = np.full(np.broadcast_shapes(y.shape, x.shape), -np.inf)
    for radius in radii:
        at_y, at_x = rng.uniform(-reach, reach, 2) if count > 1 else (0.0, 0.0)
        np.maximum(far, radius - np.hypot(y - at_y, x - at_x), out=far)
    return _inside(far, 1.0)


def soften(alpha: Alpha, width: float) -> Alpha:
    """The shape with an edge that falls over about `width` pixels, in a window that is as much larger."""
    if width < 0.5:
        return alpha
    margin = math.ceil(1.5 * width)
    return cast(Alpha, ndimage.gaussian_filter(np.pad(alpha, margin), width / 2, truncate=3.0))


def smooth_noise(rng: Rng, size: tuple[int, int], scale: float) -> Alpha:
    """(H, W) noise of mean 0 and standard deviation 1 that varies over about `scale` pixels."""
    coarse = tuple(max(2, math.ceil(side / max(scale, 1.0)) + 1) for side in size)
    values = rng.standard_normal(coarse)
    zoomed = ndimage.zoom(values, (size[0] / coarse[0], size[1] / coarse[1]), order=2, mode="nearest", grid_mode=True)
    zoomed = zoomed[: size[0], : size[1]].astype(np.float32)
    spread = float(zoomed.std())
    return cast(Alpha, (zoomed - zoomed.mean()) / np.float32(spread if spread > 0 else 1.0))


def _grid(reach: float, side: int = 0) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The rows (h, 1) and columns (1, w) of a window that reaches so far from its center."""
    side = side or 2 * math.ceil(reach) + 1
    line = np.arange(side, dtype=np.float64) - (side - 1) / 2
    return line[:, None], line[None, :]


def _inside(distance: npt.NDArray[np.float64], scale: float) -> Alpha:
    """Opaque where the distance to the outline is positive, with an edge of a pixel."""
    return np.clip(distance * scale + 0.5, 0, 1).astype(np.float32)
