"""Latencies in a few numbers."""

from __future__ import annotations

from collections.abc import Iterable


def latency_ms(seconds: Iterable[float]) -> dict[str, float]:
    """The median, the 95 % and the 99 % quantile in milliseconds: p50, p95 and p99; nothing without latencies."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{share}": 1000 * ordered[min(len(ordered) - 1, share * len(ordered) // 100)] for share in (50, 95, 99)}
