"""Checks the engines for the forward pass on the network that a bank carries: how far each is from the bank, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.network import open_network, read_probe
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.memory import BATCH_SIZE
from spade_faiss.diagnostics.checks import AMBER, GREEN, RED, Check
from spade_faiss.diagnostics.speed import least_seconds
from spade_faiss.features.forward.choice import usable_engines

# What is faster by less is not worth a setting.
_MUCH = 0.9


def check_forward(path: Path) -> Check:
    """Prove every engine that is installed on the network of a bank, and measure it."""
    try:
        bank = Bank.open(path)
    except (SpadeError, OSError) as error:
        return Check(name="forward pass", state=RED, result=str(error), advice=f"is {path} a bank? spade-faiss info {path}")
    network, source = bank.manifest.network, bank.manifest.source
    if network is None or source is None:
        return Check(name="forward pass", state=GREEN, result="the bank carries no network: torch runs it")
    engines = usable_engines(source.precision)
    if source.precision != "float32":
        engines = tuple(engine for engine in engines if engine == source.engine)
    numbers = {engine: _measured(bank, engine) for engine in engines}
    ran = {engine: found for engine, found in numbers.items() if "problem" not in found}
    if not ran:
        wrong = "; ".join(found["problem"] for found in numbers.values())
        advice = "torch runs it; for a machine without torch: pip install 'spade-faiss[edge]'"
        return Check(name="forward pass", state=AMBER, result=wrong or "no engine is installed", advice=advice, numbers=numbers)
    each = ", ".join(
        f"{engine} {found['ms_single']:.1f} and {found['ms_batch']:.1f} ms, {found['difference']:.1e} apart"
        for engine, found in ran.items()
    )
    fastest = min(ran, key=lambda engine: float(ran[engine]["ms_batch"]))
    is_best = fastest == engines[0] or ran[fastest]["ms_batch"] > _MUCH * ran[next(iter(ran))]["ms_batch"]
    failed = "".join(f"; {found['problem']}" for found in numbers.values() if "problem" in found)
    return Check(
        name="forward pass",
        state=AMBER if failed else GREEN,
        result=f"an image alone and in a batch of {BATCH_SIZE}: {each}; {network.limit:.1e} apart is allowed{failed}",
        advice="" if is_best else f"faster here than what auto takes: --engine {fastest}",
        numbers=numbers,
    )


def _measured(bank: Bank, engine: str) -> dict[str, Any]:
    network, source = bank.manifest.network, bank.manifest.source
    assert network is not None
    assert source is not None
    try:
        backbone = open_network(bank.path, network, source, bank.layout, engine)
        probe = read_probe(bank.path, network, bank.layout)
    except SpadeError as error:
        return {"problem": str(error)}
    batch = np.repeat(probe.inputs, BATCH_SIZE, axis=0)
    return {
        "difference": probe.difference(backbone),
        "ms_single": 1000 * least_seconds(lambda: backbone(probe.inputs)),
        "ms_batch": 1000 * least_seconds(lambda: backbone(batch)) / BATCH_SIZE,
    }
