"""The metrics of a labeled set: for all defects together, and for each kind of defect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.scoring.metrics import Detection, Localization, detection_metrics, localization_metrics


@dataclass(frozen=True, kw_only=True)
class KindMetrics:
    """How well defective images are told from normal ones.

    Args:
        images: the number of defective images.
        not_visible: the number of those whose mask has no pixel inside the region that was scored.
        by_knn: ranks images by SPADE's image score.
        by_map: ranks images by the map's maximum.
        by_top: ranks images by the mean of the map's highest pixels.
        by_structure: ranks images by the structure score; None without a calibration.
        pixel: ranks the pixels of the region that was scored; None without masks.
    """

    images: int
    not_visible: int
    by_knn: Detection
    by_map: Detection
    by_top: Detection
    by_structure: Detection | None
    pixel: Localization | None


@dataclass(frozen=True, kw_only=True)
class Metrics(KindMetrics):
    """The metrics of a labeled set: of all defects together and, in `kinds`, of each kind against all normal images."""

    kinds: dict[str, KindMetrics]


@dataclass(frozen=True, eq=False, kw_only=True)
class PixelTruth:
    """The ground truth of n images' pixels and their scores. Those of an image that is smaller than others lie at the top left.

    Args:
        masks: (n, H, W), True for a defective pixel.
        valid: (n, H, W), False for pixels that were not scored, or that an image does not have.
        maps: (n, H, W) score maps.
    """

    masks: Bools
    valid: Bools
    maps: FloatArray


def measure(kinds: list[str], defective: Bools, scores: Mapping[str, FloatArray], pixels: PixelTruth | None) -> Metrics:
    """Compute the metrics of n scored images.

    Args:
        kinds: the kind of each image.
        defective: (n,) labels.
        scores: (n,) image scores by their names in `IMAGE_SCORES`; `structure` may be missing.
        pixels: the ground truth and the scores of all pixels; None for a set without masks.

    Raises:
        InputError: if there is no normal or no defective image, or a score is not finite.
    """

    def metrics_of(chosen: Bools) -> KindMetrics:
        not_visible, pixel = 0, None
        if pixels is not None:
            not_visible = int((defective & ~pixels.masks.any(axis=(1, 2)))[chosen].sum())
            if pixels.masks[chosen].any():
                pixel = localization_metrics(pixels.masks[chosen], pixels.maps[chosen], pixels.valid[chosen])
        return KindMetrics(
            images=int(defective[chosen].sum()),
            not_visible=not_visible,
            by_knn=detection_metrics(defective[chosen], scores["knn"][chosen]),
            by_map=detection_metrics(defective[chosen], scores["max"][chosen]),
            by_top=detection_metrics(defective[chosen], scores["top"][chosen]),
            by_structure=detection_metrics(defective[chosen], scores["structure"][chosen]) if "structure" in scores else None,
            pixel=pixel,
        )

    kind_of = np.array(kinds)
    return Metrics(
        **vars(metrics_of(np.ones(len(kinds), np.bool_))),
        kinds={str(kind): metrics_of(~defective | (kind_of == kind)) for kind in np.unique(kind_of[defective])},
    )
