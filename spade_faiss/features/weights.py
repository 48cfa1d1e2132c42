"""Weights of networks: read from files without running their code, loaded into a model, and known by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.memory import is_out_of_memory


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file: `.safetensors`, or saved by torch, alone or as `state_dict` of a checkpoint.

    Raises:
        NotFoundError: if there is no such file.
        InputError: if it holds anything but a state dict of tensors.
    """
    if not path.is_file():
        raise NotFoundError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise a dozen types of error for one cause: it is another file
        if is_out_of_memory(error):
            raise
        kind = type(error).__name__
        raise InputError(f"{path} is no state dict of tensors alone ({kind}); save model.state_dict()") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state):
        raise InputError(f"{path} holds no state dict (a mapping of names to tensors)")
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, classifier: str, name: str) -> None:
    """Load weights into a model, all but those of its classifier: weights fine-tuned for any number of classes fit.

    Args:
        model: takes the weights.
        state: the weights by name.
        classifier: the name of the classifier's module; empty if there is none.
        name: what an error calls the model.

    Raises:
        InputError: if a tensor is missing, unknown, or of another shape.
    """

    def is_of_classifier(key: str) -> bool:
        return bool(classifier) and key.startswith(f"{classifier}.")

    try:
        missing, unknown = model.load_state_dict(
            {key: value for key, value in state.items() if not is_of_classifier(key)}, strict=False
        )
    except RuntimeError as error:
        raise InputError(f"the weights do not fit {name}: {' '.join(str(error).split())[:300]}") from error
    missing = [key for key in missing if not is_of_classifier(key)]
    if missing or unknown:
        raise InputError(
            f"the weights do not fit {name}: {len(missing)} tensors are missing {missing[:3]}, {len(unknown)} are unknown "
            f"{list(unknown)[:3]}"
        )


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes and values, so that a set of weights has one hash whatever file it came in."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):  # a counter of training steps: it is never read here, and some files lack it
            continue
        tensor = state[key].cpu()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
