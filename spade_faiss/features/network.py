"""Networks with their levels named: a module, and how its embedding and its feature maps are read from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from spade_faiss.core.declaring import check_blocks
from spade_faiss.core.errors import InputError

# SPADE searches the last maps at these strides.
STRIDES = (4, 8, 16)
# The blocks, counted from 0, of twelve that are searched in a transformer, as in RAD ("Is Training Necessary for Anomaly
# Detection?", 2026).
_BLOCKS, _DEPTH = (3, 6, 9, 11), 12


@dataclass(frozen=True, eq=False)
class Network:
    """A module and what is read from it; `Network.from_module` makes one of any `nn.Module`, `Backbone` runs it.

    Args:
        name: recorded in banks; a bank takes queries only from a network of the same name and weights.
        module: what holds the weights.
        forward: takes inputs (n, 3, H, W); returns the embedding (n, d) and, by the name of the level, finest first, the maps
            (n, C, H, W).
        blocks: the blocks of a transformer that are its levels, counted from 0; recorded in banks.
    """

    name: str
    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Mapping[str, Tensor]]]
    blocks: tuple[int, ...] = ()

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
    def from_timm(cls, model: nn.Module, name: str, *, blocks: tuple[int, ...] = ()) -> Network:
        """Read levels and embedding of a model of the timm library.

        The levels of a convolutional network are its maps at strides 4, 8 and 16, its embedding the pooled features. The levels
        of a transformer are the patch tokens of some of its blocks, all at the stride of its patches and after its final norm,
        as RAD and AnomalyDINO (Damm et al., arXiv 2405.14529) read them; class and register tokens are left out. Its embedding
        is the class token after the final norm, or where there is none the mean of the patch tokens.

        Args:
            model: the model; it loses its classifier. A transformer must have been created for the size of the input
                (`img_size`), or for any (`dynamic_img_size`).
            name: the name of the network.
            blocks: the blocks of a transformer that become levels, counted from 0, in ascending order; by default those of RAD,
                3, 6, 9 and 11 of 12, or as deep in networks of another depth.

        Raises:
            InputError: if the model has no maps at these strides, or not these blocks.
        """
        check_blocks(blocks)
        timm_model = cast(Any, model)
        if patch_size(model) is not None:
            return cls._from_blocks(timm_model, name, blocks)
        refuse_blocks(name, blocks)
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

    @classmethod
    def _from_blocks(cls, model: Any, name: str, blocks: tuple[int, ...]) -> Network:
        modules = [str(stage["module"]) for stage in model.feature_info]
        picked = blocks or default_blocks(len(modules))
        if picked[-1] >= len(modules):
            raise InputError(f"blocks={picked}: backbone {name!r} has the blocks 0 to {len(modules) - 1}")
        model.reset_classifier(0)
        if getattr(model, "attn_pool", None) is not None:  # a classifier's, too: it was trained on what this pools
            model.attn_pool = None

        def forward(x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            try:
                # Without the final norm a few channels of the residual stream would make up nearly all of a distance.
                final, maps = model.forward_intermediates(x, indices=list(picked), norm=True, output_fmt="NCHW")
            except AssertionError as error:  # what timm raises for a size that the network was not created for
                height, width = x.shape[2:]
                raise InputError(f"backbone {name!r} does not take inputs of {height} x {width} pixels: {error}") from error
            return _token_embedding(model, final, maps[0]), {modules[block]: m for block, m in zip(picked, maps, strict=True)}

        return cls(name, model, forward, picked)


def patch_size(model: nn.Module) -> int | None:
    """The side of the patches that a transformer of timm cuts its input into; None for any other network.

    What makes a transformer here is that the maps of all blocks are of one stride.
    """
    stages = getattr(model, "feature_info", None) or ()
    strides = {int(stage["reduction"]) for stage in cast(Any, stages)}
    return strides.pop() if len(strides) == 1 and hasattr(model, "forward_intermediates") else None


def default_blocks(depth: int) -> tuple[int, ...]:
    """The blocks that become levels of a transformer of so many, unless others are asked for."""
    return tuple(sorted({round(block * (depth - 1) / (_DEPTH - 1)) for block in _BLOCKS}))


def refuse_blocks(name: str, blocks: tuple[int, ...]) -> None:
    """Raise InputError if blocks are asked for, of a network that is no transformer."""
    if blocks:
        raise InputError(
            f"blocks={blocks}: backbone {name!r} is no transformer, its levels are its maps at strides {STRIDES}; leave out "
            f"--blocks"
        )


def _token_embedding(model: Any, final: Tensor, level: Tensor) -> Tensor:
    """The embedding (n, d) of a transformer.

    Args:
        model: the transformer.
        final: its last tokens, (n, tokens, d), (n, d, H, W) or (n, H, W, d).
        level: the map (n, C, H, W) of a level.
    """
    if final.ndim == 4:
        final = final.flatten(2).transpose(1, 2) if final.shape[2:] == level.shape[2:] else final.flatten(1, 2)
    has_class_token = getattr(model, "cls_token", None) is not None
    pooled = final[:, 0] if has_class_token else final[:, getattr(model, "num_prefix_tokens", 0) :].mean(1)
    # Networks that were trained on the mean of their tokens have their final norm behind it.
    norm = getattr(model, "fc_norm", None)
    return pooled if norm is None else cast(Tensor, norm(pooled))
