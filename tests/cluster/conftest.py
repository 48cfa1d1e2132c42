"""One cluster of this machine for all tests of the folder: to start one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cluster import plan
from spade_faiss.cluster.session import connect
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.workflows.fit import fit
from tests.support.pictures import write_dataset

# Two workers; a process that is connected already stays so, whatever is asked for.
CLUSTER = "local:2"
SMALL = Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=72, size=64))


@pytest.fixture(scope="package")
def cluster() -> Iterator[str]:
    """What `--cluster` says."""
    with connect(CLUSTER):
        yield CLUSTER


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers get pieces of the few images that tests have."""
    monkeypatch.setattr(plan, "_LEAST_BYTES", 0)


@pytest.fixture(scope="package")
def weave(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labeled set on storage that all workers have. Do not change it."""
    root = tmp_path_factory.mktemp("dataset") / "weave"
    write_dataset(root)
    return root


@pytest.fixture(scope="package")
def whole_bank(weave: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the set's 24 normals that one process made, with the network that it carries. Do not change it."""
    path = tmp_path_factory.mktemp("bank") / "weave.bank"
    fit(weave / "train" / "good", bank=path, preset="spade", extraction=SMALL)
    assert Bank.open(path).manifest.network is not None
    return path
