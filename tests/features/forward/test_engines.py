"""Engines for the forward pass: features are torch's, whatever the batch, the thread or the process."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from spade_faiss.core.device import CPU, Device
from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.forward import choice
from spade_faiss.features.forward.choice import choose_engine, open_forward, usable_engines
from spade_faiss.features.forward.graph import check_graph
from spade_faiss.features.forward.probe import Probe, difference
from spade_faiss.features.loading import load_backbone
from tests.support.networks import SMALL, inputs

ENGINES = ("onnxruntime", "openvino")
NAMES = ("fine", "coarse")


def given(graph: bytes) -> bytes:
    return graph


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_are_those_of_torch(tiny: Backbone, graph: bytes, engine: str, count: int) -> None:
    x = inputs(count, 24)
    before = x.copy()
    forward = open_forward(engine, partial(given, graph), NAMES, "float32", (24, 24))
    embedding, maps = forward(x)
    expected_embedding, expected = tiny(x)
    assert forward.engine == engine
    np.testing.assert_allclose(embedding, expected_embedding, rtol=0, atol=2e-6 * np.abs(expected_embedding).max())
    assert list(maps) == list(NAMES)
    for level, found in maps.items():
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_allclose(found, expected[level], rtol=0, atol=2e-6 * np.abs(expected[level]).max())
    np.testing.assert_array_equal(x, before)


def test_openvino_is_loaded_without_its_telemetry(tmp_path: Path) -> None:
    code = """
import sys
from spade_faiss.features.forward.openvino import load_openvino
assert load_openvino().__name__ == "openvino"
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
import openvino_telemetry
"""
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_real_networks_are_exported(name: str, resnet18_file: Path) -> None:
    weights = resnet18_file if name == "resnet18" else None
    backbone = load_backbone(name, weights=weights, preprocess=SMALL)
    x, names = inputs(3, 64), [level.name for level in backbone.levels]
    for engine in ENGINES:
        forward = open_forward(engine, partial(given, backbone.export()), names, "float32", (64, 64))
        assert difference(forward(x), backbone(x)) < 1e-5
        assert not any(module.training for module in backbone._own_network().module.modules())


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_share_a_network(graph: bytes, engine: str) -> None:
    forward = open_forward(engine, partial(given, graph), NAMES, "float32", (24, 24))
    batches = [inputs(2, 24, seed=seed) for seed in range(24)]
    alone = [forward(x) for x in batches]
    start = threading.Barrier(4)

    def run(part: list[FloatArray]) -> list[object]:
        start.wait()
        return [forward(x) for x in part]

    with ThreadPoolExecutor(4) as pool:
        found = [features for part in pool.map(run, [batches[i::4] for i in range(4)]) for features in part]
    expected = [alone[i] for start_at in range(4) for i in range(start_at, 24, 4)]
    assert all(difference(a, b) == 0 for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fork_computes_the_same(graph: bytes, engine: str) -> None:
    forward = open_forward(engine, partial(given, graph), NAMES, "float32", (24, 24))
    x = inputs(2, 24)
    expected = forward(x)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        sender.send(difference(forward(x), expected))

    process = context.Process(target=run)
    process.start()
    assert receiver.poll(60), "the fork gave no answer"
    assert receiver.recv() == 0
    process.join(60)
    assert process.exitcode == 0


def test_onnxruntime_does_not_depend_on_the_batch(graph: bytes) -> None:
    forward = open_forward("onnxruntime", partial(given, graph), NAMES, "float32", (24, 24))
    x = inputs(7, 24)
    embedding, maps = forward(x)
    for row in range(7):
        one, levels = forward(x[row : row + 1])
        np.testing.assert_array_equal(one[0], embedding[row])
        for level, found in levels.items():
            np.testing.assert_array_equal(found[0], maps[level][row])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_no_network_is_refused(engine: str) -> None:
    with pytest.raises(InputError, match="cannot open the network"):
        open_forward(engine, partial(given, b"no network"), NAMES, "float32", (24, 24))


def outer_product(count: int) -> bytes:
    """A network of a few hundred kilobytes that asks for count * count floats."""
    weights = [
        numpy_helper.from_array(np.ones((count, 1), np.float32), "a"),
        numpy_helper.from_array(np.ones((1, count), np.float32), "b"),
        numpy_helper.from_array(np.array([1, 1]), "two"),
    ]
    return network(
        weights,
        helper.make_node("ReduceSum", ["input"], ["sum"], keepdims=1),
        helper.make_node("Reshape", ["sum", "two"], ["flat"]),
        helper.make_node("Add", ["a", "flat"], ["column"]),
        helper.make_node("MatMul", ["column", "b"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["small"], keepdims=0),
    )


def network(weights: list[TensorProto], *nodes: NodeProto) -> bytes:
    """A network whose outputs are the input plus `small`, a number that nodes make."""
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 24, 24])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("embedding", *NAMES)]
    nodes += tuple(helper.make_node("Add", ["input", "small"], [name]) for name in ("embedding", *NAMES))
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return data


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_asks_for_too_much_memory_is_refused(engine: str) -> None:
    """Of a few hundred kilobytes, it would take 14 GB."""
    check_graph(outer_product(60_000), NAMES)
    small = open_forward(engine, partial(given, outer_product(100)), NAMES, "float32", (24, 24))
    assert small(inputs(1, 24))[0].shape == (1, 3, 24, 24)
    before = peak_bytes()
    with pytest.raises(InputError, match=r"cannot run the network|takes 13"):
        open_forward(engine, partial(given, outer_product(60_000)), NAMES, "float32", (24, 24))(inputs(1, 24))
    assert peak_bytes() - before < 512 << 20


def test_openvino_refuses_a_network_of_sizes_that_depend_on_the_input() -> None:
    places = helper.make_node("NonZero", ["input"], ["places"])
    cast = helper.make_node("Cast", ["places"], ["numbers"], to=TensorProto.FLOAT)
    graph = network([], places, cast, helper.make_node("ReduceSum", ["numbers"], ["small"], keepdims=0))
    with pytest.raises(InputError, match="sizes depend on what it is given; use another --engine"):
        open_forward("openvino", partial(given, graph), NAMES, "float32", (24, 24))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_auto_takes_the_fastest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine("auto", "float32", CPU) == "onnxruntime"
    assert choose_engine("auto", "float32", CPU, exported=False) == "torch"
    assert choose_engine("auto", "float32", Device("cuda")) == "torch"
    monkeypatch.setattr(choice, "is_installed", lambda engine: engine != "onnxruntime")
    assert choose_engine("auto", "float32", CPU) == "openvino"
    monkeypatch.setattr(choice, "is_installed", lambda engine: engine == "torch")
    assert choose_engine("auto", "float32", CPU) == "torch"
    with pytest.raises(DependencyError, match=r"engine='openvino' is not installed; install it with: pip install"):
        choose_engine("openvino", "float32", CPU)


def test_only_openvino_and_torch_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "processor_flags", lambda: frozenset({"avx512_bf16"}))
    assert usable_engines("bfloat16") == ("openvino",)
    assert choose_engine("auto", "bfloat16", CPU) == "openvino"
    with pytest.raises(InputError, match="engine='onnxruntime' does not compute in bfloat16"):
        choose_engine("onnxruntime", "bfloat16", CPU)
    monkeypatch.setattr(choice, "processor_flags", frozenset)
    assert choose_engine("auto", "bfloat16", CPU) == "torch"
    with pytest.raises(InputError, match="this processor does not compute in bfloat16"):
        choose_engine("openvino", "bfloat16", CPU)


def test_engines_for_cpus_do_not_run_on_cards() -> None:
    with pytest.raises(InputError, match="engine='onnxruntime' runs on the CPU, device=cuda:0 was asked for"):
        choose_engine("onnxruntime", "float32", Device("cuda"))


@pytest.mark.parametrize("part", ["embedding", "fine", "coarse"])
def test_a_difference_in_any_output_counts(tiny: Backbone, part: str) -> None:
    x = inputs(1, 24)
    probe = Probe(x, tiny(x))
    assert probe.difference(tiny) == 0

    def wrong(images: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        embedding, maps = tiny(images)
        changed = embedding if part == "embedding" else maps[part]
        changed.flat[3] += np.float32(0.5) * np.abs(changed).max()
        return embedding, maps

    assert probe.difference(wrong) == pytest.approx(0.5, rel=0.01)
    with pytest.raises(InputError, match="features of the shape"):
        probe.difference(lambda images: (tiny(images)[0][:, 1:], tiny(images)[1]))
