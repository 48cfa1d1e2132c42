"""The steps of `benchmarks.gpu_proof`: each yields rows of results, and a row whose result is wrong says so under `failed`.

torch is imported where it computes: spade_faiss must come first, see README.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from benchmarks import kernel
from benchmarks.features import SHAPES, Product
from spade_faiss import Level, doctor
from spade_faiss.core.device import CPU, Device, find_device
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.diagnostics.checks import RED
from spade_faiss.diagnostics.hardware import check_card
from spade_faiss.search.blocks import ArraySource, Blocks, StoredArray
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.native.extension import INSTALL, is_built, usable_simd_level
from spade_faiss.search.protocol import GallerySearch, Hits, resolve_recipe
from spade_faiss.search.recipe import load_recipe
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from torch import Tensor, nn

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
PACKAGES = ("spade-faiss", "torch", "torchvision", "timm", "numpy", "scipy", "h5py", "faiss-cpu", "faiss-gpu")
# The products by which the torch search finds candidates; what it returns must not depend on them.
PRODUCTS = ("float32", "bfloat16")
KAPPAS = (1, 3)
# Squared distances are evaluated directly, in float32: they may be off by this share of themselves.
TOLERANCE = 1e-5
# The CPU's search by FAISS may take a rival for the nearest that is further by this share.
_CPU_TOLERANCE = 2e-4
# By precision, how far features may be from those of the CPU in float32, as a share of the largest.
NETWORK_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
# A timing is the median of so many runs, of fewer where they take longer than that.
_RUNS, _RUNS_S = 7, 3.0
# float32 cannot tell squared distances apart that are below its smallest number.
_LEAST = 1e-30


@dataclass(frozen=True)
class Settings:
    """What the steps run on.

    Attributes:
        device: the device that is proven, see `find_device`; the CPU for a dry run.
        quick: whether small problems stand for those that are measured.
    """

    device: str
    quick: bool = False


Step = Callable[[Settings], Iterator[Row]]


def machine(settings: Settings) -> Iterator[Row]:
    """The card, its driver, the processor beside it, and the versions of what computes."""
    import torch

    numbers = check_card(find_device(settings.device)).numbers
    yield {
        **numbers,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": import_faiss().omp_get_max_threads(),
        "kernel": usable_simd_level() or (f"none: {INSTALL}" if not is_built() else "none: this processor runs no level of it"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
    }


def exactness(settings: Settings) -> Iterator[Row]:
    """The torch search beside float64: vectors that are hard to tell apart or to compute with, then maps of networks."""
    shapes = ((40, 24),) if settings.quick else ((143, 24), (196, 1024), (784, 112))
    for kind, make in {**kernel.HOSTILE, **HOSTILE}.items():
        for rows, channels in shapes:
            rng = np.random.default_rng([rows, channels, len(kind)])
            maps = np.stack([make(rng, rows, channels) for _ in range(5)])
            xq = np.stack([make(rng, rows, channels) for _ in range(2)])
            # Half of the queries are near a vector of the gallery, some of them equal to it.
            near = np.arange(0, rows, 2)
            xq[:, near] = maps[0, near[::-1]] * (1 + np.float32(1e-3) * (near % 3)[:, None].astype(np.float32))
            yield from _compared({"vectors": kind}, maps, xq, settings, np.arange(rows))
    for name, shape in SHAPES.items():
        if settings.quick and name != "lite0":
            continue
        product = Product(shape)
        normals, tests = product.normals(0, 5), product.tests(2)
        for level in shape.levels[-1:] if settings.quick else shape.levels:
            maps, xq = (batch.levels[level.name].reshape(len(batch), -1, level.channels) for batch in (normals, tests))
            # float64 for each location would take minutes; all are searched.
            checked = np.arange(0, xq.shape[1], 1 + xq.shape[1] // 200)
            yield from _compared({"vectors": f"{name} {level.name}"}, maps, xq.astype(np.float32), settings, checked)


def gpu_tests(settings: Settings) -> Iterator[Row]:
    """The tests that are marked `gpu`, a row for each.

    Only their files are collected: the others need packages that a bare machine lacks.

    Raises:
        RuntimeError: if pytest did not run, or on a card no test did.
    """
    files = [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if re.search(r"\bmark\.gpu\b", path.read_text("utf-8"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # A warning of another version of a package says nothing of the card.
        options = ["-m", "gpu", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with exit status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        rows = [_outcome(case) for case in ElementTree.parse(report).iter("testcase")]
    yield from rows
    if find_device(settings.device) != CPU and not any(row["outcome"] == "passed" for row in rows):
        raise RuntimeError("no test that is marked gpu passed")


def doctor_checks(settings: Settings) -> Iterator[Row]:
    """The lines of `spade-faiss doctor`."""
    for check in doctor(settings.device).checks:
        row: Row = {"check": check.name, "state": check.state, "result": check.result, "advice": check.advice}
        yield row | ({"failed": check.result} if check.state == RED else {})


def speed(settings: Settings) -> Iterator[Row]:
    """Milliseconds an image of the exact pixel search: by torch on the device, and by what the CPU runs.

    All images of a batch have the same neighbors, and a card holds their blocks after the first run.
    """
    for name, shape in SHAPES.items():
        if settings.quick and name != "lite0":
            continue
        product = Product(shape)
        for k in (2,) if settings.quick else (5, 50):
            normals = product.normals(0, k)
            for batch in (1,) if settings.quick else (1, 16):
                tests = product.tests(batch)
                ms: dict[str, float] = {}
                differences: dict[str, float] = {}
                for level in shape.levels:
                    maps = normals.levels[level.name].reshape(k, -1, level.channels)
                    xq = tests.levels[level.name].reshape(batch, -1, level.channels).astype(np.float32)
                    for engine, (level_ms, difference) in _timed(level, maps, xq, settings).items():
                        ms[engine] = ms.get(engine, 0) + level_ms
                        differences[engine] = max(differences.get(engine, 0), difference)
                for engine, of_engine in ms.items():
                    row: Row = {"maps": name, "k": k, "batch": batch, "engine": engine, "ms_per_image": of_engine}
                    wrong = differences[engine] > _CPU_TOLERANCE
                    row["from_cpu"] = differences[engine]
                    yield row | ({"failed": f"distances are {differences[engine]:.1g} from the CPU's"} if wrong else {})


def forward(settings: Settings) -> Iterator[Row]:
    """Milliseconds an image of forward passes on the device, and how far features are from the CPU's in float32."""
    import torch

    side, batches = (32, (1,)) if settings.quick else (224, (1, 8, 16))
    device = torch.device(find_device(settings.device).torch_name)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    for name, make in NETWORKS.items():
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = make()
        except ImportError as error:
            yield {"network": name, "not_run": str(error)}
            continue
        x = torch.from_numpy(np.random.default_rng(0).normal(size=(max(batches), 3, side, side)).astype(np.float32))
        with torch.inference_mode():
            module = module.eval().to(memory_format=torch.channels_last)
            expected = module(x)
            module = module.to(device)
            for batch in batches:
                inputs = x[:batch].to(device).contiguous(memory_format=torch.channels_last)
                for precision in PRODUCTS:
                    row: Row = {"network": name, "batch": batch, "precision": precision}
                    yield row | _passed(module, inputs, expected[:batch], precision, settings)


STEPS: dict[str, tuple[Step, float]] = {
    # With the most seconds that each may take.
    "exactness": (exactness, 120),
    "tests": (gpu_tests, 120),
    "doctor": (doctor_checks, 90),
    "speed": (speed, 150),
    "forward": (forward, 90),
}


def _compared(row: Row, maps: StoredArray, xq: FloatArray, settings: Settings, checked: IntArray) -> Iterator[Row]:
    """Search by both products; compare the queries `checked` with float64, and what the products found with each other."""
    level = Level("level", maps.shape[2], stride=1, height=1, width=maps.shape[1])
    neighbors = np.stack([np.random.default_rng(image).permutation(len(maps)) for image in range(len(xq))])
    device = find_device(settings.device)
    searches = {product: _open(level, maps, device, engine="torch", product=product) for product in PRODUCTS}
    for kappa in KAPPAS:
        found = {product: search(xq, neighbors, kappa) for product, search in searches.items()}
        for product, hits in found.items():
            error = _largest_error(hits, maps, xq, checked, kappa)
            same = _same(hits, found["float32"])
            failed = f"squared distances are off by {error:.1g}" if not error <= TOLERANCE else ""
            failed = failed or ("" if same else "it is not what float32 finds")
            queries = len(xq) * len(checked)
            row = row | {"rows": maps.shape[1], "channels": maps.shape[2], "kappa": kappa, "product": product}
            yield row | {"queries": queries, "largest_error": error} | ({"failed": failed} if failed else {})


def _same(hits: Hits, others: Hits) -> bool:
    pairs = ((hits.sq_dist, others.sq_dist), (hits.row, others.row), (hits.location, others.location))
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def _largest_error(hits: Hits, maps: StoredArray, xq: FloatArray, checked: IntArray, kappa: int) -> float:
    """The largest relative error of a squared distance: beside the smallest there are, and beside that of the named vector."""
    import torch

    gallery = torch.from_numpy(maps.reshape(-1, maps.shape[2]).astype(np.float64))
    errors = []
    for image, vectors in enumerate(xq):
        q = torch.from_numpy(vectors[checked].astype(np.float64))
        # Direct differences: products would cancel far from the origin, in float64 too.
        true = torch.cdist(q, gallery, compute_mode="donot_use_mm_for_euclid_dist").square()
        least = true.topk(kappa, largest=False, sorted=True).values.numpy()
        found = hits.sq_dist[image, checked].astype(np.float64)
        named = maps[hits.row[image, checked], hits.location[image, checked]].astype(np.float64)
        named_dist = np.square(q.numpy() - named).sum(axis=1)
        errors.append(np.abs(found - least) / np.maximum(least, _LEAST))
        errors.append(np.abs(found[:, :1] - named_dist[:, None]) / np.maximum(named_dist[:, None], _LEAST))
    return float(max(error.max() for error in errors))


def _open(level: Level, maps: StoredArray, device: Device, **settings: str) -> GallerySearch:
    chosen = resolve_recipe(load_recipe("exact").with_query(settings))
    return chosen.method.open(Blocks(level, ArraySource(maps)), Workers(device=device), chosen.build, chosen.query, None)


def _timed(level: Level, maps: StoredArray, xq: FloatArray, settings: Settings) -> dict[str, tuple[float, float]]:
    """Milliseconds an image of each engine, and the largest relative difference of its squared distances from the CPU's."""
    device, neighbors = find_device(settings.device), np.tile(np.arange(len(maps)), (len(xq), 1))
    searches = {"cpu": _open(level, maps, CPU)}
    searches |= {f"torch {product}": _open(level, maps, device, engine="torch", product=product) for product in PRODUCTS}
    expected = searches["cpu"](xq, neighbors, 1).sq_dist.astype(np.float64)
    timed = {}
    for name, search in searches.items():
        found = search(xq, neighbors, 1).sq_dist
        difference = float((np.abs(found - expected) / np.maximum(expected, _LEAST)).max())
        ms = _median_ms(lambda search=search: search(xq, neighbors, 1), settings)  # type: ignore[misc]
        timed[name] = ms / len(xq), difference
    return timed


def _passed(module: nn.Module, inputs: Tensor, expected: Tensor, precision: str, settings: Settings) -> Row:
    """A forward pass of a network: its time, and how far its features are from those expected (n, d)."""
    import torch

    device = inputs.device
    found: list[Tensor] = []

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found[:] = [module(inputs)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    difference = float((found[0].float().cpu() - expected).abs().max() / expected.abs().max())
    row: Row = {"ms_per_image": _median_ms(run, settings) / len(inputs), "largest_difference": difference}
    wrong = not difference <= NETWORK_TOLERANCE[precision]
    return row | ({"failed": f"features are {difference:.1g} from the CPU's"} if wrong else {})


def _median_ms(task: Callable[[], object], settings: Settings) -> float:
    """The median of a few runs in milliseconds; the task ran before, to warm up."""
    spent: list[float] = []
    while len(spent) < (1 if settings.quick else _RUNS) and sum(spent) < _RUNS_S:
        start = time.perf_counter()
        task()
        spent.append(time.perf_counter() - start)
    return 1000 * statistics.median(spent)


def _outcome(case: ElementTree.Element) -> Row:
    row: Row = {"test": case.get("name"), "outcome": "passed", "s": float(case.get("time", 0))}
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            row["outcome"] = "skipped" if kind == "skipped" else "failed"
            row["reason" if kind == "skipped" else "failed"] = str(found.get("message", kind))[:500]
    return row


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text("utf-8").splitlines() if "model name" in line] if path.is_file() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wide_resnet50_2() -> nn.Module:
    from torch import nn
    from torchvision import models

    module: nn.Module = models.get_model("wide_resnet50_2", weights=None)
    module.fc = nn.Identity()
    return module


def _efficientnet_lite0() -> nn.Module:
    import timm

    module: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    return module


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "wide_resnet50_2": _wide_resnet50_2,
}


def _far(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    # 2 ** -10 is what float32 resolves at 1e4: neighbors differ in the last digits.
    return np.float32(1e4) + rng.integers(-3, 4, (n, d)).astype(np.float32) * np.float32(2**-10)


def _ties(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    return rng.integers(-1, 2, (n, d)).astype(np.float32)


def _duplicates(rng: np.random.Generator, n: int, d: int) -> npt.NDArray[np.float32]:
    few = np.random.default_rng(d).normal(size=(7, d)).astype(np.float32)
    return few[rng.integers(0, 7, n)]


HOSTILE: dict[str, Callable[[np.random.Generator, int, int], FloatArray]] = {
    "tiny distances far from the origin": _far,
    "ties": _ties,
    "duplicates": _duplicates,
}
