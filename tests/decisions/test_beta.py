"""Quantiles of the beta distribution, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from spade_faiss.decisions.beta import beta_quantile, beta_share

SHAPES = [(1, 1), (1, 200), (2, 199), (5, 5), (10, 20_000), (500, 500), (1000, 1), (30_000, 970_001), (500_000, 500_000)]


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_quantiles_are_those_of_scipy(a: int, b: int) -> None:
    for p in (0.025, 0.1, 0.5, 0.9, 0.975):
        assert beta_quantile(a, b, p) == pytest.approx(special.betaincinv(a, b, p), rel=1e-10)


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_shares_are_those_of_scipy(a: int, b: int) -> None:
    for x in np.linspace(0, 1, 23).tolist():
        assert beta_share(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-9, abs=1e-12)


def test_a_quantile_by_hand() -> None:
    assert beta_quantile(1, 2, 0.75) == pytest.approx(0.5, rel=1e-14)  # the share below x is 1 - (1 - x)^2
