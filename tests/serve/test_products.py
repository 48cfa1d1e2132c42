"""A server and a watch of a bank of several products: they name the product of a picture, and take it from who knows it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector, Extraction, fit
from spade_faiss.core.settings import Decision
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.features.backbone import Backbone
from spade_faiss.serve.history.records import RecentScore
from spade_faiss.serve.station.station import _drifts, _strongest
from spade_faiss.watch.judge import Judge
from tests.serve.conftest import PNG, Serve
from tests.support.pictures import save_png, weave, with_spot
from tests.support.watching import read_lines, watching


def felt(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Gray, with a fine grain."""
    return rng.normal(180, 8, (80, 96, 1)).repeat(3, axis=2).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Path:
    """A bank of `weave` and of plain `felt`; beside it a new picture of each, and spoilt felt. Do not change it."""
    root, rng = tmp_path_factory.mktemp("products"), np.random.default_rng(3)
    for number in range(21):
        save_png(weave(rng), root / "good" / "weave" / f"{number:02d}.png")
        save_png(felt(rng), root / "good" / "felt" / f"{number:02d}.png")
    save_png(weave(rng), root / "new" / "weave.png")
    save_png(felt(rng), root / "new" / "felt.png")
    save_png(with_spot(felt(rng), rng)[0], root / "new" / "spoilt.png")
    fit(
        root / "good",
        bank=root / "bank",
        preset="spade",
        extraction=Extraction(backbone=backbone, products="folder", dtype="float32"),
    )
    return root


def wait(what: Callable[[], Any]) -> Any:
    until = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def test_a_server_names_the_product_and_takes_it(serve: Serve, products: Path, tmp_path: Path) -> None:
    line = serve(bank=Path(shutil.copytree(products / "bank", tmp_path / "bank")))
    for name in ("weave", "felt"):
        found = line.score(products / "new" / f"{name}.png")
        assert (found["product"], found["alarm"]) == (name, False)
        assert found["confidence"] > 0.9
        assert found["p_none"] > 0.02
        assert all(normal["id"].startswith(f"{name}/") for normal in found["nearest"])
        page = line.client.get(f"/pictures/{found['id']}", headers={"accept": "text/html"})
        assert f"Product {name}, confidence" in page.text
    wrong = line.client.post(
        "/v1/banks/weave/score?product=felt", content=(products / "new" / "weave.png").read_bytes(), headers=PNG
    ).json()["pictures"][0]["picture"]
    assert (wrong["product"], wrong["confidence"], wrong["alarm"]) == ("felt", None, True)
    assert "named by the sender" in line.client.get(f"/pictures/{wrong['id']}", headers={"accept": "text/html"}).text
    unknown = line.client.post("/v1/banks/weave/score?product=cup", content=b"x", headers=PNG)
    assert unknown.status_code == 422
    assert "weave" in unknown.json()["detail"]
    listed = line.client.get("/v1/banks/weave/pictures.csv").text.splitlines()
    assert listed[0].endswith("product,confidence,p_none")
    assert sum(",felt," in row for row in listed) == 2


def test_what_is_answered_normal_goes_into_its_product(serve: Serve, products: Path, tmp_path: Path) -> None:
    line = serve(bank=Path(shutil.copytree(products / "bank", tmp_path / "bank")))
    before = stored_calibrations(Bank.open(line.bank).part("weave"))
    first = line.score(products / "new" / "spoilt.png")
    assert (first["product"], first["alarm"]) == ("felt", True)
    answer = line.client.post(f"/v1/pictures/{first['id']}/feedback", json={"kind": "normal"}).json()
    wait(lambda: line.client.get(f"/v1/answers/{answer['id']}").json()["state"] == "in the bank")
    bank = Bank.open(line.bank)
    assert f"felt/{first['id']}.png" in bank.part("felt").ids
    assert len(bank.part("weave")) == 21
    assert stored_calibrations(bank.part("weave")) == before, "the other product is as it was"
    wait(lambda: line.station.generation == bank.generation)
    assert len(line.station.served.calibrations["felt"]) == 22
    assert not line.score(products / "new" / "spoilt.png")["alarm"]
    assert line.client.post(f"/v1/answers/{answer['id']}/undo").json()["undone"]
    wait(lambda: line.client.get(f"/v1/answers/{answer['id']}").json()["state"] == "undone")
    assert len(Bank.open(line.bank).part("felt")) == 21


def test_drift_is_tested_by_product(serve: Serve, products: Path, tmp_path: Path) -> None:
    line = serve(bank=Path(shutil.copytree(products / "bank", tmp_path / "bank")), upkeep=False)
    rules = line.station.rules
    assert rules is not None
    scores = []
    for product, factor in (("weave", 1.0), ("felt", 1.5)):
        rule = rules.rule_of(product)
        assert rule is not None
        own = zip(rule.calibration.image_score, rule.calibration.map_score, strict=True)
        scores += [RecentScore(factor * image, factor * by_map, product) for image, by_map in own]
    alone = {drift.calibration.images[0].partition("/")[0]: drift for drift in _drifts(rules, scores)}
    assert (alone["weave"].moved, alone["felt"].moved) == (False, True)
    both = _strongest(list(alone.values()))
    assert both is not None
    assert both.p_value == pytest.approx(2 * alone["felt"].p_value)
    assert _strongest([]) is None
    assert list(_drifts(rules, scores[:10])) == [], "too few pictures"


def test_a_watch_names_the_product(products: Path, tmp_path: Path) -> None:
    routed = Judge(lambda: Detector.open(products / "bank"), Decision(alpha=0.1))
    with watching(products / "new", [f"folder:{tmp_path / 'out'}"], judge=routed, once=True):
        pass
    found = {line["name"]: (line["product"], line["alarm"]) for line in read_lines(tmp_path / "out")}
    assert found == {"weave.png": ("weave", False), "felt.png": ("felt", False), "spoilt.png": ("felt", True)}
    named = Judge(lambda: Detector.open(products / "bank", product="felt"), Decision(alpha=0.1))
    with watching(products / "new", [f"folder:{tmp_path / 'named'}"], judge=named, once=True):
        pass
    assert {line["product"] for line in read_lines(tmp_path / "named")} == {"felt"}
