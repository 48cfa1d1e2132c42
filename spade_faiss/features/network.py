"""Networks with their levels named: a module, and how its embedding and its feature maps are read from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from spade_faiss.core.errors import InputError

# SPADE searches the last maps at these strides.
STRIDES = (4, 8, 16)


@dataclass(frozen=True, eq=False)
class Network:
    """A module and what is read from it; `Network.from_module` makes one of any `nn.Module`, `Backbone` runs it.

    Args:
        name: recorded in banks; a bank takes queries only from a network of the same name and weights.
        module: what holds the weights.
        forward: takes inputs (n, 3, H, W); returns the embedding (n, d) and, by the name of the level, finest first, the maps
            (n, C, H, W).
    """

    name: str
    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Mapping[str, Tensor]]]

    @classmethod
    def from_module(cls, module: nn.Module, *, name: str, taps: Mapping[str, str], embedding: str) -> Network:
        """Read levels and embedding from modules inside a network.

        Args:
            module: the network; it is switched to evaluation mode.
            name: the name of the network.
            taps: for each level, finest first, the name of the module whose output (n, C, H, W) is that level; module names
                are as torchvision's `get_graph_node_names` lists them.
            embedding: the name of the module whose output, flattened, is the embedding.

        Raises:
            InputError: if a tap does not exist, or if two are the same.
        """
        nodes = {node: level for level, node in taps.items()} | {embedding: ""}
        if len(nodes) <= len(taps):
            raise InputError(
                f"backbone {name!r}: each level and the embedding need a module of their own, got {[*taps.values(), embedding]}"
            )
        try:
            tapped = create_feature_extractor(module.eval(), return_nodes=nodes)
        except ValueError as error:
            raise InputError(f"backbone {name!r}: {error}") from error

        def forward(x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            outputs = tapped(x)
            return outputs.pop("").flatten(1), outputs

        return cls(name, tapped, forward)

    @classmethod
    def from_timm(cls, model: nn.Module, name: str) -> Network:
        """Read the levels at strides 4, 8 and 16 and the pooled features of a model of the timm library.

        Args:
            model: the model; it loses its classifier.
            name: the name of the network.

        Raises:
            InputError: if the model has no maps at these strides.
        """
        timm_model = cast(Any, model)
        try:
            stages = {
                int(stage["reduction"]): (index, str(stage["module"])) for index, stage in enumerate(timm_model.feature_info)
            }
            picked = [stages[stride] for stride in STRIDES]
            forward_intermediates = timm_model.forward_intermediates
        except (AttributeError, KeyError) as error:
            raise InputError(
                f"backbone {name!r} has no maps at strides {STRIDES}, which SPADE searches; choose another"
            ) from error
        indices = [index for index, _ in picked]
        timm_model.reset_classifier(0, "avg")

        def forward(x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            final, maps = forward_intermediates(x, indices=indices, output_fmt="NCHW")
            embedding = timm_model.forward_head(final, pre_logits=True)
            return embedding, {level: m for (_, level), m in zip(picked, maps, strict=True)}

        return cls(name, model, forward)
