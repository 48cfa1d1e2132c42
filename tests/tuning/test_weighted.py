"""Standardized levels: weights by the spread of normal pictures, and maps of what was searched already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Detector
from spade_faiss.core.declaring import ALL
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import survey
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.scoring.scores import Scores
from spade_faiss.search.recipe import load_recipe
from spade_faiss.tuning import trials
from spade_faiss.tuning.options import MapOption, Stored
from spade_faiss.tuning.samples import Copies, make_samples
from spade_faiss.tuning.weighted import standardizing_weights
from tests.support.backbones import tiny_backbone
from tests.support.pictures import write_shots

STORED = Stored(pool=3, pool_border="zero")
METHOD = Method(levels=("fine", "coarse"), k_image=3, k_gallery=ALL)


def scores_of(**dist: FloatArray) -> Scores:
    """Scores with these distances; nothing else is looked at."""
    nothing = np.zeros((2, 0), np.float32)
    return Scores(
        ids=["a", "b"],
        image_score=nothing[:, :0],
        maps=nothing[:, None],
        statistics=nothing,
        neighbor_ids=np.zeros((2, 0), np.str_),
        neighbor_dist=nothing,
        level_dist=dist,
        nearest={},
        distance="l2",
    )


def test_weights_are_the_inverse_of_the_spread() -> None:
    rng = np.random.default_rng(0)
    fine = rng.normal(50, 1, (4, 80, 80)).astype(np.float32)
    coarse = rng.normal(3, 0.25, (4, 40, 40)).astype(np.float32)
    batches = [scores_of(fine=fine[at : at + 2], coarse=coarse[at : at + 2]) for at in (0, 2)]
    weights = standardizing_weights(batches)
    assert weights[0] == 1
    assert weights[1] == pytest.approx(fine.std() / coarse.std(), rel=0.01) == pytest.approx(4, rel=0.02)
    some = [replace(each, level_dist={**each.level_dist, "coarse": np.full((2, 4, 4), 7, np.float32)}) for each in batches]
    assert standardizing_weights(some) == (), "a level that does not vary"
    assert standardizing_weights([scores_of(fine=fine[:2])]) == ()
    assert standardizing_weights([scores_of(fine=fine[:2], other=fine[:2])]) == (), "the same spread"


def test_a_weighted_option_is_what_a_detector_of_its_method_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: it is made of what was searched already, and chosen for how a bank will be searched."""
    records = survey(write_shots(tmp_path / "good", "{part}_{shot}.png", 6, 2)).records
    backbone = tiny_backbone()
    samples, kept = make_samples(tmp_path / "w" / "samples", backbone, records, Copies(pictures=4, each=3, seed=0), Run())
    assert kept == records
    layout = Layout(levels=backbone.levels, embedding_dim=backbone.embedding_dim, input_size=backbone.input_size)
    option = MapOption(stored=STORED, recipe="global", method=METHOD)
    found = trials.run_trials(tmp_path / "w", samples, layout, [option], Run())
    plain, weighted = found
    assert plain == option
    weights = weighted.method.level_weights
    assert weights[0] == 1 != weights[1]
    assert found[weighted].weights == weights
    assert weighted.name == f"pool 3; fine coarse; K=all, weights 1/{weights[1]:g}"
    bank = trials._make_bank(tmp_path / "bank", samples, layout, STORED)
    recipe = load_recipe("global").with_levels(METHOD.levels)
    build_index(bank, recipe)
    for each in (plain, weighted):
        detector = Detector(bank, recipe, each.method, Run())
        normal = detector.score_rows(samples.rows.tolist())
        spoilt = detector.score_copies(samples.spoilt, samples.rows[samples.owner].tolist())
        for name in ("knn", "max", "top"):
            np.testing.assert_array_equal(found[each].normal[name], normal.image_scores[name])
            np.testing.assert_array_equal(found[each].spoilt[name], spoilt.image_scores[name])
        np.testing.assert_array_equal(found[each].shown, spoilt.maps[list(samples.shown)].astype(np.float16))
    assert not np.array_equal(found[plain].areas, found[weighted].areas)
    monkeypatch.setattr(trials, "_try", None)  # nothing is tried again
    again = trials.run_trials(tmp_path / "w", samples, layout, [option], Run())
    assert list(again) == [plain, weighted]
    for each in again:
        np.testing.assert_array_equal(again[each].areas, found[each].areas)
        assert (again[each].ms, again[each].bytes, again[each].memory) == (
            found[each].ms,
            found[each].bytes,
            found[each].memory,
        )


def test_one_level_and_levels_that_are_weighted_already_are_tried_as_they_are(tmp_path: Path) -> None:
    records = survey(write_shots(tmp_path / "good", "{part}_{shot}.png", 5, 2)).records
    backbone = tiny_backbone()
    samples, _ = make_samples(tmp_path / "w" / "samples", backbone, records, Copies(pictures=2, each=2, seed=0), Run())
    layout = Layout(levels=backbone.levels, embedding_dim=backbone.embedding_dim, input_size=backbone.input_size)
    methods = [replace(METHOD, levels=("fine+coarse",)), replace(METHOD, level_weights=(1, 2))]
    maps = [MapOption(stored=STORED, recipe="exact", method=replace(method, k_gallery=3)) for method in methods]
    assert list(trials.run_trials(tmp_path / "w", samples, layout, maps, Run())) == maps
