"""What banks survive, from durability.json, and whether calibrations keep their promise, from calibration.json."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.pages.text import Figures, interval, markdown_table, mebibytes, percent

_MODES = {"split": "split", "leave_one_out": "leave one out", "groups": "leave out all exposures of a part"}


def durability(figures: Figures) -> str:
    """Kills, full disks, damaged files, readers beside a writer, and what adding costs."""
    found = figures["durability"]
    kills, fills, fuzz, readers, add = (found[name] for name in ("kills", "fills", "fuzz", "readers", "add"))
    faults = sum(len(part["faults"]) for part in (kills, fills, fuzz, readers))
    hit = ", ".join(f"{name} {count}" for name, count in sorted(kills["hit"].items()))
    again = add["build_s"] + add["index_s"]
    lines = [
        f"- Kills: {kills['count']} at random instants ({hit}), each followed by `verify --deep` and the same command again.",
        f"- Full disks: {fills['full']} of {fills['runs']} runs on a disk with little room ran out of it.",
        f"- Damage: of {fuzz['mutants']} damaged files {fuzz['refused']} were refused, and {fuzz['equal']} read as before.",
        f"- Readers: {readers['readers']} beside a writer that added {readers['added']} images and compacted; they returned "
        f"{readers['results']} results from {readers['generations_seen']} generations.",
        f"- Images that were lost, torn or wrong in any of these: {faults}.",
        f"- Adding {add['added']} images to {add['images']} takes {1000 * add['add_s']:.0f} ms, writes "
        f"{mebibytes(add['bytes_written'])} and rewrites {add['shards_rewritten']} shards; updating the index takes "
        f"{1000 * add['update_s']:.0f} ms. Building everything again takes {again:.1f} s and writes "
        f"{mebibytes(add['bank_bytes'])} (features given).",
    ]
    return "\n".join(lines)


def calibration(figures: Figures) -> str:
    """Alarms among normal and among defective test images, by the rate asked for; both tests together."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for row in figures["calibration"]["rates"]:
        if row["test"] == "both":
            false, detected = row["false_alarms"], row["detected"]
            cell = f"{percent(false['rate'])} ({interval(false)}); {100 * detected['rate']:.0f}"
            rows.setdefault((row["set"], _MODES[row["mode"]], row["bank"], row["calibration"]), []).append(cell)
    asked = sorted({row["alpha"] for row in figures["calibration"]["rates"]})
    header = ("set", "calibration", "bank", "n", *(f"alpha {100 * alpha:g} %" for alpha in asked))
    return markdown_table(header, ((*of, *cells) for of, cells in rows.items()))


def calibration_facts(figures: Figures) -> str:
    """Rates on simulated features and on the sets' own splits, and what calibrating costs."""
    found = figures["calibration"]
    fdr = found["simulation"]["fdr"]
    lines = [*_simulated(found["simulation"])]
    lines.append(
        f"- `--fdr {fdr['asked']:g}` on the same features, with {fdr['normal']} normal images and {fdr['outliers']} outliers "
        f"per batch: {percent(fdr['false_share'])} % of the alarms were false on average "
        f"(± {percent(1.96 * fdr['false_share_error'])}), and {100 * fdr['found']:.0f} % of the outliers were found."
    )
    for name in dict.fromkeys(row["set"] for row in found["official"]):
        parts = []
        for mode, text in _MODES.items():
            rows = [row for row in found["official"] if (row["set"], row["mode"]) == (name, mode)]
            if not rows:
                continue
            rates = (f"{percent(row['normal']['rate'])} ({interval(row['normal'])})" for row in rows if row["alpha"] >= 0.05)
            parts.append(f"{text}, n={rows[0]['calibration']}: {', '.join(rates)}")
        lines.append(f"- On the published split of {name}, false alarms in % at alpha 5 and 10 %: {'; '.join(parts)}.")
    for row in found["cost"]:
        lines.append(
            f"- Calibrating {row['n']} of {row['normals']} images (efficientnet_lite0's shapes) takes {row['total_s']:.1f} s "
            f"and {mebibytes(row['peak_bytes'])} at the peak, of which {mebibytes(row['start_bytes'])} at the start "
            f"(`--memory {row['memory']}`)."
        )
    return "\n".join(lines)


def _simulated(simulation: Figures) -> Iterable[str]:
    yield (
        f"- Simulated exchangeable features, {simulation['repetitions']} repetitions with {simulation['tested']} test images "
        "each: false alarms in % at alpha 5 %, by the image score, by the map's maximum, and by both together:"
    )
    asked = [row for row in simulation["rows"] if row["alpha"] == 0.05]
    for mode, bank in dict.fromkeys((row["mode"], row["bank"]) for row in asked):
        rows = {row["test"]: row for row in asked if (row["mode"], row["bank"]) == (mode, bank)}
        rates = ", ".join(f"{percent(rows[test]['rate'])} ({interval(rows[test])})" for test in ("image", "map", "both"))
        n = rows["image"]["calibration"]
        most = percent(math.floor(0.05 * (n + 1) + 1e-9) / (n + 1))
        closest = f"(the closest rate that so many images can give is {most})"
        yield f"    - {_MODES[mode]}, {bank} images in the bank, n={n} {closest}: {rates}"
    firsts = [row for row in simulation["rows"] if row["mode"] == "split"]
    inside = sum(row["first"]["interval"][0] <= row["alpha"] <= row["first"]["interval"][1] for row in firsts)
    yield (
        "- With one test image per repetition, which makes the counts binomial, the promised rate of `split` "
        f"lies in {inside} of {len(firsts)} 95 % intervals."
    )
