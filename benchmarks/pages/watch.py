"""What becomes of pictures that arrive, from watch.json."""

from __future__ import annotations

from benchmarks.pages.text import Figures


def facts(figures: Figures) -> str:
    """What was lost and doubled, how fast it is beside `score`, and how long a picture takes that comes alone."""
    if "watch" not in figures:
        return "No figures are committed yet: `python -m benchmarks.watch --data DATA --out benchmarks/results` makes them."
    found = figures["watch"]
    bursts, alone, throughput, machine = (found[name] for name in ("bursts", "alone", "throughput", "machine"))
    hook, latency = bursts["webhook"], alone["rename_to_webhook_ms"]
    stops = ", ".join(f"{stop['signal']} (exit code {stop['code']}, {stop['seconds']:.1f} s)" for stop in bursts["stops"])
    lines = [
        f"- {bursts['pictures']} pictures in bursts of {bursts['bursts_of']}, {bursts['starts']} starts, ended by {stops}: "
        f"{bursts['lines']} lines in the folder, {bursts['lost']} lost, {bursts['doubled']} doubled.",
        f"- The webhook got {hook['requests']} requests and refused every tenth: {hook['lost']} verdicts lost, "
        f"{hook['sent_again']} sent again after they had been taken.",
        f"- {throughput['pictures']} pictures that lie there, `watch --once` beside `score`, by turns: "
        f"{throughput['times_of_score']:.2f} times as fast (whole commands, median of {len(throughput['seconds']['watch'])}).",
        f"- {alone['pictures']} pictures, {alone['a_second']:g} a second, `--settle-s {alone['settle_s']:g}`: "
        f"from the rename to the verdict at the webhook p50 {latency['p50']:.0f} ms, p95 {latency['p95']:.0f} ms, "
        f"p99 {latency['p99']:.0f} ms.",
    ]
    return "\n".join(lines) + (
        f"\n\n{machine['cores']} cores of {machine['cpu']}, {machine['date']}; other programs ran at the same time (load "
        f"{machine['load']:.0f} at the start), so that times are upper limits."
    )
