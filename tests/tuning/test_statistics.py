"""Statistics of options, on numbers that were worked out by hand and on data whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from spade_faiss.core.errors import InputError
from spade_faiss.scoring.metrics import localization_metrics
from spade_faiss.tuning.statistics import (
    FPR_LIMIT,
    LEAST_TELLING,
    Trials,
    choose,
    image_differences,
    map_areas,
    map_differences,
)


def trials(normal: Any, spoilt: Any, areas: Any = None, groups: Any = None, **settings: Any) -> Trials:
    normal, spoilt = np.asarray(normal, np.float64), np.asarray(spoilt, np.float64)
    areas = np.full(spoilt.shape, np.nan) if areas is None else np.asarray(areas, np.float64)
    owner = np.arange(spoilt.shape[1]) % normal.shape[1] if groups is None else np.asarray(groups)
    return Trials(
        normal=normal, spoilt=spoilt, areas=areas, normal_group=np.arange(normal.shape[1]), spoilt_group=owner, **settings
    )


def test_rates_by_hand() -> None:
    found = trials([[1, 2, 3, 4], [4, 4, 4, 4]], [[2.5, 9, 0], [4, 5, 3]])
    np.testing.assert_array_equal(found.rates(), [[0.5, 1, 0], [0.5, 1, 0]])
    with pytest.raises(InputError, match="have shapes"):
        trials([[1, 2]], [[1], [2]])


def test_a_rate_is_the_auroc() -> None:
    rng = np.random.default_rng(0)
    normal, spoilt = rng.normal(0, 1, (3, 50)).round(1), rng.normal(1, 1, (3, 70)).round(1)
    for option, rate in enumerate(trials(normal, spoilt).rates().mean(axis=1)):
        labels = np.repeat([0, 1], [50, 70])
        assert rate == pytest.approx(roc_auc_score(labels, np.concatenate([normal[option], spoilt[option]])))


def test_what_all_find_and_what_none_finds_says_nothing() -> None:
    normal = [[1, 2, 3, 4, 5]] * 2
    #          all find, some miss, none finds, alike
    spoilt = [[9, 9, 0.5, 4.5], [9, 3.5, 1.5, 4.5]]
    found = trials(normal, spoilt)
    assert found.found().tolist() == [True, True, False, True]
    assert found.telling_images().tolist() == [False, True, False, False]
    assert trials(normal, spoilt, least_found=0.0).telling_images().tolist() == [False, True, True, False]
    areas = [[0.9, 0.4, 0.1, np.nan], [0.9, 0.6, 0.9, 0.5]]
    assert trials(normal, spoilt, areas).telling_maps().tolist() == [False, True, False, False]


def test_a_defect_is_found_by_those_that_show_it_and_missed_by_the_others() -> None:
    """In the mean over both it would be noise: 0.6 and 1."""
    normal, spoilt, areas = [[1, 2, 3, 4, 5]] * 2, [[3.5, 9], [9, 9]], [[0.0, 0.5], [0.8, 0.5]]
    assert trials(normal, spoilt, areas, least_found=0.9).found().tolist() == [False, True]
    seen = np.array([[False, True], [True, True]])
    found = trials(normal, spoilt, areas, least_found=0.9, seen=seen)
    assert found.found().tolist() == [True, True]
    assert found.telling_images().tolist() == found.telling_maps().tolist() == [True, False]
    assert image_differences(found, 0).difference.tolist() == pytest.approx([0, (1 - 0.6) / 2])
    assert map_differences(found, 0).difference.tolist() == pytest.approx([0, 0.4])


def test_differences_by_hand() -> None:
    found = image_differences(trials([[1, 2, 3, 4, 5]] * 2, [[9, 9, 9, 9], [9, 4.5, 9, 9]]), base=0)
    np.testing.assert_allclose(found.value, [1, 0.95])
    np.testing.assert_allclose(found.difference, [0, -0.05])
    assert found.telling == 1
    assert not found.sure.any()
    assert found.low[1] <= -0.05 <= found.high[1] <= 0
    maps = map_differences(trials([[1, 2]] * 2, [[9, 9], [9, 9]], [[0.5, 0.5], [0.7, 0.4]]), base=0)
    np.testing.assert_allclose(maps.value, [0.5, 0.55])
    np.testing.assert_allclose(maps.difference, [0, 0.05])
    nothing = map_differences(trials([[1, 2]], [[9, 9]]), base=0)
    assert np.isnan(nothing.value).all()
    assert nothing.telling == 0
    assert not nothing.sure.any()


def paired(gain: float, options: int = 12, *, map_gain: float = 0.0, seed: int = 0) -> Trials:
    """Options that score 30 pictures and 8 copies of each with noise of their own; the last is better by a gain."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(0, 1, (1, 30)) + rng.normal(0, 0.3, (options, 30))
    spoilt = rng.normal(1.5, 1.0, (1, 240)) + rng.normal(0, 0.3, (options, 240))
    areas = np.clip(rng.normal(0.6, 0.2, (1, 240)) + rng.normal(0, 0.05, (options, 240)), 0, 1)
    spoilt[-1] += gain
    areas[-1] = np.clip(areas[-1] + map_gain, 0, 1)
    if gain == 0 and map_gain:  # ranks exactly as the default does
        normal[-1], spoilt[-1] = normal[0], spoilt[0]
    return trials(normal, spoilt, areas, np.arange(240) // 8)


def names(options: int = 12) -> list[str]:
    return [f"option {number}" for number in range(options)]


def test_the_surely_better_option_is_chosen_and_no_other() -> None:
    chosen = choose(paired(1.0), names(), default=0)
    assert chosen.option == chosen.by_image == 11
    assert "option 11 tells" in chosen.reason
    by_map = choose(paired(0.0, map_gain=0.1), names(), default=0)
    assert by_map.option == by_map.by_map == 11
    assert by_map.by_image == 0
    assert "of a defect's pixels" in by_map.reason


def test_where_nothing_is_better_the_default_stays() -> None:
    """Of twelve options that are noise, some look better; at the level of 95 % nearly none may be chosen."""
    chosen = [choose(paired(0.0, seed=seed), names(), default=0).option for seed in range(40)]
    assert sum(option != 0 for option in chosen) <= 6
    tied = choose(trials([[1, 2, 3, 4, 5]] * 3, [[9, 4.5, 3.5] * 20] * 3), names(3), default=1)
    assert tied.option == 1
    assert "stays" in tied.reason


def test_trivial_spoils_decide_nothing() -> None:
    """An option that finds what all find with a larger margin is not better."""
    normal, spoilt = np.tile(np.arange(20.0), (2, 1)), np.full((2, 200), 100.0)
    spoilt[1] *= 50
    chosen = choose(trials(normal, spoilt), names(2), default=0)
    assert chosen.option == 0
    assert "differ on only 0" in chosen.reason


def test_few_telling_spoils_are_no_evidence() -> None:
    normal = [np.arange(20.0)] * 2
    rows = [[99.0] * 40, [99.0] * 40]
    rows[0][: LEAST_TELLING - 1] = [13.5] * (LEAST_TELLING - 1)
    assert choose(trials(normal, rows), names(2), default=0).option == 0
    rows[0][:30] = [13.5] * 30
    assert choose(trials(normal, rows), names(2), default=0).option == 1


def test_what_is_not_allowed_is_not_chosen() -> None:
    allowed = np.ones(12, np.bool_)
    allowed[11] = allowed[0] = False
    assert choose(paired(1.0), names(), default=0, allowed=allowed).option == 0


def test_an_option_that_ranks_better_and_maps_worse_is_not_chosen() -> None:
    assert choose(paired(1.0, map_gain=-0.3), names(), default=0).option == 0


def test_areas_are_those_of_aupro() -> None:
    rng = np.random.default_rng(3)
    maps = rng.normal(0, 1, (6, 20, 20)).astype(np.float32)
    masks = np.zeros((6, 20, 20), np.bool_)
    for number, mask in enumerate(masks[:4]):
        mask[3 : 8 + number, 4:9] = True
        maps[number][mask] += 1
    areas = map_areas(maps[:4], masks[:4], maps[~masks])
    assert areas.mean() == pytest.approx(localization_metrics(masks, maps, fpr_limit=FPR_LIMIT).aupro, abs=0.002)
    assert np.isnan(map_areas(maps[4:], masks[4:], maps[~masks])).all()


def test_resamples_are_of_pictures() -> None:
    """Copies of one picture are no independent evidence: the interval is wider than if they were."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(12), 20)
    areas = np.stack([np.full(240, 0.5), np.clip(0.5 + rng.normal(0.02, 0.1, 12)[owner], 0, 1)])
    scores = np.tile(np.arange(12.0), (2, 1)), np.full((2, 240), 20.0)
    by_picture = map_differences(trials(*scores, areas, owner), base=0)
    alone = Trials(
        normal=scores[0], spoilt=scores[1], areas=areas, normal_group=np.arange(12), spoilt_group=12 + np.arange(240)
    )
    by_copy = map_differences(alone, base=0)
    assert by_picture.high[1] - by_picture.low[1] > 2 * (by_copy.high[1] - by_copy.low[1])
