"""The names of the networks that can be loaded; to know them takes no torch."""

from __future__ import annotations

EFFICIENTNET_LITE0 = "efficientnet_lite0"
TIMM_PREFIX = "timm:"
# The ResNets of torchvision whose weights are published as IMAGENET1K_V1.
TORCHVISION_NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)


def is_known(name: str) -> bool:
    """Whether `load_backbone` takes this name."""
    return name in TORCHVISION_NAMES or name == EFFICIENTNET_LITE0 or name.startswith(TIMM_PREFIX)
