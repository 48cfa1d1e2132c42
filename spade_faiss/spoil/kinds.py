"""The kinds of spoils: what is drawn into the window of a defect. Each names where it comes from.

- `cutpaste`, `scar`: a piece of the picture, cut elsewhere and pasted, a rectangle or a thin one at any angle, its colors
  jittered (Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", 2021, https://arxiv.org/abs/2104.04015).
- `foreign`: a piece of another normal picture (Schlueter et al., "Natural Synthetic Anomalies for Self-Supervised Anomaly
  Detection and Localization", 2022, https://arxiv.org/abs/2109.15222).
- `texture`: a texture from elsewhere, blended in where smooth noise is high (Zavrtanik et al., "DRAEM", 2021,
  https://arxiv.org/abs/2108.07610); here it is procedural: sums of noise, stripes and cells (Perlin, "An Image Synthesizer",
  1985, https://doi.org/10.1145/325165.325247).
- `smear`, `blur`, `noise`: motion blur, Gaussian blur and noise of a part (Hendrycks & Dietterich, "Benchmarking Neural Network
  Robustness to Common Corruptions and Perturbations", 2019, https://arxiv.org/abs/1903.12261).
- `scratch`, `blob`: lines and stains that are drawn (Haselmann & Gruber, "Pixel-Wise Defect Detection by CNNs without Manually
  Labeled Training Data", 2019, https://doi.org/10.1080/08839514.2019.1583862).
- `missing`, `moved`: a part shows what lies around the object, or stands beside its place (Bergmann et al., "Beyond Dents and
  Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization", 2022,
  https://doi.org/10.1007/s11263-022-01578-9).
- `color`: a part has other colors (the jitter of CutPaste, nothing moved).
- `holes`: small parts are dark or bright (DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks with
  Cutout", 2017, https://arxiv.org/abs/1708.04552).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from spade_faiss.spoil import shapes
from spade_faiss.spoil.foreground import Mask, Picture
from spade_faiss.spoil.shapes import Alpha, Rng

Colors = npt.NDArray[np.float32]
Box = tuple[slice, slice]


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """What a kind may look at.

    Args:
        picture: (H, W, 3) uint8, the picture that is spoilt.
        other: (H, W, 3) uint8, another normal picture, or the same.
        box: the window of the defect.
        on: (H, W), where defects may lie.
        strength: from 0, just visible, to 1, plain.
        is_gray: whether the picture has no colors, so that a defect must have none.
    """

    picture: Picture
    other: Picture
    box: Box
    on: Mask
    strength: float
    is_gray: bool

    @property
    def window(self) -> Colors:
        """(h, w, 3) float32, what the picture shows there."""
        return self.picture[self.box].astype(np.float32)

    def between(self, least: float, most: float) -> float:
        """A number that rises with the strength."""
        return least + (most - least) * self.strength

    def shade(self, rng: Rng) -> Colors:
        """(3,) a direction of color, of length 1 in its largest channel; without color in a gray picture."""
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if self.is_gray or rng.random() < 0.5:
            return np.full(3, sign, np.float32)
        color = rng.uniform(-1, 1, 3)
        return np.asarray(color / np.abs(color).max(), np.float32)


# What a defect shows in its window, and how opaque it is there at most.
Drawn = tuple[Colors, float]
Draw = Callable[[Rng, Scene], Drawn]


def _jittered(rng: Rng, scene: Scene, colors: Colors) -> Colors:
    most = scene.between(0.05, 0.35)
    gain = np.full(3, rng.uniform(-most, most)) if scene.is_gray else rng.uniform(-most, most, 3)
    shift = 255 * most * 0.5 * rng.uniform(-1, 1)
    return (colors * (1 + gain) + shift).astype(np.float32)


def _pasted(rng: Rng, scene: Scene) -> Drawn:
    return _jittered(rng, scene, _elsewhere(rng, scene, scene.picture)), scene.between(0.5, 1.0)


def _foreign(rng: Rng, scene: Scene) -> Drawn:
    return _elsewhere(rng, scene, scene.other), scene.between(0.4, 1.0)


def _elsewhere(rng: Rng, scene: Scene, source: Picture) -> Colors:
    """A piece as large as the window, cut from anywhere else, by preference from the object; sometimes turned upside down."""
    height, width = scene.window.shape[:2]
    rows, columns = np.nonzero(scene.on[::4, ::4]) if scene.on.shape == source.shape[:2] else ((), ())
    if len(rows):
        at = int(rng.integers(len(rows)))
        top, left = 4 * int(rows[at]) - height // 2, 4 * int(columns[at]) - width // 2
    else:
        top, left = (int(rng.integers(0, max(1, side))) for side in source.shape[:2])
    top, left = min(max(top, 0), source.shape[0] - height), min(max(left, 0), source.shape[1] - width)
    if top < 0 or left < 0:  # a smaller picture
        return np.resize(source.astype(np.float32), (height, width, 3))
    piece = source[top : top + height, left : left + width].astype(np.float32)
    return np.ascontiguousarray(piece[::-1] if rng.random() < 0.3 else piece)


def _texture(rng: Rng, scene: Scene) -> Drawn:
    return procedural_texture(rng, scene.window.shape[:2], is_gray=scene.is_gray), scene.between(0.2, 0.85)


def procedural_texture(rng: Rng, size: tuple[int, int], *, is_gray: bool) -> Colors:
    """(h, w, 3) from 0 to 255: noise of several scales, stripes or cells between two colors."""
    style, span = int(rng.integers(3)), max(size)
    if style == 0:
        values = sum(shapes.smooth_noise(rng, size, max(1.0, span / 2**octave)) / 1.6**octave for octave in range(1, 5))
    elif style == 1:
        turn, period = rng.uniform(0, math.pi), rng.uniform(3, max(4.0, span / 2))
        y, x = np.mgrid[: size[0], : size[1]]
        values = np.sin((x * math.cos(turn) + y * math.sin(turn)) * 2 * math.pi / period + rng.uniform(0, 6)) * 1.5
        values = values + 0.6 * shapes.smooth_noise(rng, size, span / 6)
    else:
        cells = shapes.smooth_noise(rng, size, rng.uniform(2, max(3.0, span / 5)))
        values = np.sign(cells) * 1.2 + 0.3 * shapes.smooth_noise(rng, size, 1.0)
    share = (1 / (1 + np.exp(-np.asarray(values, np.float64))))[..., None]
    first, second = (np.full(3, rng.uniform(0, 255)) if is_gray else rng.uniform(0, 255, 3) for _ in range(2))
    return (first * share + second * (1 - share)).astype(np.float32)


def _smear(rng: Rng, scene: Scene) -> Drawn:
    window = scene.window
    length = max(3, round(scene.between(0.25, 0.8) * max(window.shape[:2])))
    turn = rng.uniform(0, math.pi)
    shifts = [((step - length / 2) * math.sin(turn), (step - length / 2) * math.cos(turn)) for step in range(0, length, 2)]
    moved = [_shift(window, round(dy), round(dx)) for dy, dx in shifts]
    shade = scene.shade(rng) * np.float32(scene.between(2, 25))
    return (np.mean(moved, axis=0, dtype=np.float32) + shade).astype(np.float32), 1.0


def _shift(window: Colors, dy: int, dx: int) -> Colors:
    """The window moved by whole pixels; what enters repeats its border."""
    height, width = window.shape[:2]
    rows, columns = np.clip(np.arange(height) - dy, 0, height - 1), np.clip(np.arange(width) - dx, 0, width - 1)
    return window[np.ix_(rows, columns)]


def _stained(rng: Rng, scene: Scene) -> Drawn:
    window = scene.window
    grain = 1 + 0.25 * shapes.smooth_noise(rng, window.shape[:2], 4.0)[..., None]
    return window + scene.shade(rng) * np.float32(scene.between(14, 110)) * grain, 1.0


def _missing(rng: Rng, scene: Scene) -> Drawn:
    """What lies around the object; where there is nothing around it, the part as smooth as if nothing were on it."""
    if scene.on.all():
        window = scene.window
        return np.broadcast_to(np.median(window, axis=(0, 1)), window.shape).astype(np.float32), scene.between(0.5, 1.0)
    outside = scene.picture[::4, ::4][~scene.on[::4, ::4]]
    color = np.median(outside if len(outside) else scene.picture.reshape(-1, 3), axis=0).astype(np.float32)
    return color + rng.normal(0, 1.5, (*scene.window.shape[:2], 1)).astype(np.float32), scene.between(0.55, 1.0)


def _moved(rng: Rng, scene: Scene) -> Drawn:
    window = scene.window
    far = scene.between(0.08, 0.5) * min(window.shape[:2])
    turn = rng.uniform(0, 2 * math.pi)
    return _shift(window, round(far * math.sin(turn)) or 1, round(far * math.cos(turn)) or 1), 1.0


def _colored(rng: Rng, scene: Scene) -> Drawn:
    window = scene.window
    gain = 1 + scene.shade(rng) * np.float32(scene.between(0.07, 0.5))
    return window * gain + scene.shade(rng) * np.float32(scene.between(3, 25)), 1.0


def _blurred(rng: Rng, scene: Scene) -> Drawn:
    window = scene.window
    sigma = scene.between(0.05, 0.25) * min(window.shape[:2]) + 1.0
    return ndimage.gaussian_filter(window, (sigma, sigma, 0), truncate=2.0, mode="nearest").astype(np.float32), 1.0


def _noisy(rng: Rng, scene: Scene) -> Drawn:
    window, scale = scene.window, rng.uniform(1.0, 3.0)
    noise = shapes.smooth_noise(rng, window.shape[:2], scale)[..., None]
    return window + noise * np.float32(scene.between(12, 60)), 1.0


def _punched(rng: Rng, scene: Scene) -> Drawn:
    window = scene.window
    color = np.float32(rng.uniform(0, 40) if rng.random() < 0.7 else rng.uniform(215, 255))
    return np.full_like(window, color), scene.between(0.25, 1.0)


@dataclass(frozen=True)
class Kind:
    """How a kind of spoil is drawn, and the shape that it has."""

    shape: Callable[[Rng, float], Alpha]
    draw: Draw


KINDS: Mapping[str, Kind] = {
    "cutpaste": Kind(shapes.patch, _pasted),
    "scar": Kind(shapes.scar, _pasted),
    "foreign": Kind(shapes.blob, _foreign),
    "texture": Kind(shapes.islands, _texture),
    "smear": Kind(shapes.blob, _smear),
    "scratch": Kind(shapes.scratch, _stained),
    "blob": Kind(shapes.blob, _stained),
    "missing": Kind(shapes.blob, _missing),
    "moved": Kind(shapes.blob, _moved),
    "color": Kind(shapes.islands, _colored),
    "blur": Kind(shapes.blob, _blurred),
    "noise": Kind(shapes.islands, _noisy),
    "holes": Kind(shapes.spots, _punched),
}
