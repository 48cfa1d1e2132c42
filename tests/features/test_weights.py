"""Weights: known by their content whatever file they came in; files that hold anything else are refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.loading import load_backbone
from tests.support.networks import ODD, TINY, inputs, load_tiny, tiny_state


def test_a_classifier_of_any_size_fits(resnet18: nn.Module, resnet18_file: Path, odd: Backbone, tmp_path: Path) -> None:
    state = {key: value for key, value in resnet18.state_dict().items() if not key.startswith("fc.")}
    torch.save({**state, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, tmp_path / "seven.pth")
    seven = load_backbone("resnet18", weights=tmp_path / "seven.pth", preprocess=ODD)
    assert seven.source == odd.source
    np.testing.assert_array_equal(seven(inputs(1, 72))[0], odd(inputs(1, 72))[0])


def test_the_hash_is_that_of_the_weights_not_of_the_file(tiny_file: Path, tmp_path: Path) -> None:
    state = tiny_state()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pt")
    # A counter of training steps, which is never read.
    torch.save({k: v + 9 if "tracked" in k else v for k, v in state.items()}, tmp_path / "trained.pt")
    names = ["w.safetensors", "checkpoint.pt", "old.pt", "reversed.pt", "trained.pt"]
    hashes = {load_tiny(path).source.weights_sha256 for path in [tiny_file, *(tmp_path / name for name in names)]}
    assert len(hashes) == 1
    assert all(len(value) == 64 for value in hashes)

    changed = tiny_state()
    name = next(key for key in changed if key.startswith("layer3") and key.endswith("weight"))
    changed[name].view(-1)[-1] += 1e-3
    torch.save(changed, tmp_path / "changed.pt")
    assert load_tiny(tmp_path / "changed.pt").source.weights_sha256 not in hashes


def test_files_of_both_formats_give_the_same_features(tiny_file: Path, tmp_path: Path) -> None:
    save_file(tiny_state(), tmp_path / "w.safetensors")
    one, two = load_tiny(tiny_file)(inputs(2, 64)), load_tiny(tmp_path / "w.safetensors")(inputs(2, 64))
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1].keys() == two[1].keys()


def test_weights_that_do_not_fit_name_the_tensors(tmp_path: Path) -> None:
    state = tiny_state()
    path = tmp_path / "w.pt"
    conv = next(iter(state))
    torch.save({key: value for key, value in state.items() if key != conv}, path)
    with pytest.raises(InputError, match=rf"do not fit {TINY}: 1 tensors are missing \['{conv}'\], 0 are unknown \[\]"):
        load_tiny(path)
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"0 tensors are missing \[\], 1 are unknown \['extra.weight'\]"):
        load_tiny(path)
    torch.save({**state, conv: torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match=f"do not fit {TINY}: .* size mismatch for {conv}"):
        load_tiny(path)
    torch.save({}, path)
    with pytest.raises(InputError, match=r"tensors are missing"):
        load_tiny(path)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {"a": 1}, {"state_dict": 5}, {0: torch.zeros(1)}, {"state_dict": {"a": "b"}}, None]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt holds no state dict"):
        load_tiny(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x00" * 100, b"PK\x03\x04broken"])
def test_a_damaged_file_of_weights_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(InputError, match="is no state dict of tensors alone"):
        load_tiny(tmp_path / f"w{suffix}")


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_of_weights_is_never_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "was run"
    torch.save({"a": Evil(marker)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="is no state dict of tensors alone"):
        load_tiny(tmp_path / "w.pt")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # the trap works


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no weights file at .*missing\.pth"):
        load_tiny(tmp_path / "missing.pth")
