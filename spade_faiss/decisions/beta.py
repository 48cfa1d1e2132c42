"""Quantiles of the beta distribution: those of scipy.special, whose import takes as long as a picture takes to score."""

from __future__ import annotations

import math

# Where a factor no longer changes a product, and what stands for a denominator of 0.
_PRECISION, _TINY = 1e-15, 1e-300


def beta_quantile(a: float, b: float, p: float) -> float:
    """The number below which a share p of Beta(a, b) lies; a and b are at least 1."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:  # until no number is between the two
        if beta_share(a, b, middle) < p:
            low = middle
        else:
            high = middle
    return high


def beta_share(a: float, b: float, x: float) -> float:
    """The share of Beta(a, b) that lies below x: the regularized incomplete beta function, which is `betainc` in SciPy.

    Source: its continued fraction, https://dlmf.nist.gov/8.17.E22, from its beginning on (Lentz, "Generating Bessel functions
    in Mie scattering calculations using continued fractions", 1976).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where it converges slowly
        return 1 - beta_share(b, a, 1 - x)
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or _TINY)
    fraction, m = d, 1
    while True:
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + term * d) or _TINY)
            c = (1 + term / c) or _TINY
            fraction *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
        m += 1
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a * fraction
