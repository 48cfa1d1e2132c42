"""The page on tuning: regrets, means and aims by hand-made figures."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import tuning

Row = dict[str, Any]


def option(name: str, spoilt: float, **real: float) -> Row:
    return {"name": name, "spoilt": {kind: {"value": spoilt} for kind in ("image", "maps")}, "real": real}


def figures() -> Row:
    options = [
        option("default", 0.5, image_auroc=0.9, pixel_auroc=0.95, aupro=0.8),
        option("chosen", 0.7, image_auroc=0.98, pixel_auroc=0.94, aupro=0.85),
        option("best", 0.6, image_auroc=1.0, pixel_auroc=0.97, aupro=0.83),
    ]
    spoils = {"pictures": 40, "copies": 240, "found": 120}
    seconds = {"cpu": 100.0, "clock": 60.0, "load": 1.0}
    one = {
        "set": "one",
        "normals": 50,
        "default": "default",
        "chosen": "chosen",
        "options": options,
        "spoils": spoils,
        "s": seconds,
    }
    only_labels = [option("default", 0.5, image_auroc=0.9), option("other", 0.4, image_auroc=0.89)]
    two = {**one, "set": "two", "chosen": "default", "options": only_labels}
    beside = {"set": "one", "search": "PatchCore 1 %", "image_auroc": 0.97, "pixel_auroc": 0.93, "aupro": 0.84}
    return {"tuning": {"rows": [one, two]}, "whole_bank": {"patchcore": {"rows": [beside]}}}


def test_regret_is_what_the_best_option_is_ahead() -> None:
    table = tuning.table(figures())
    assert "| one (50) | 0.900 | 0.980 | 1.000 | best | 0.020 (0.100) | 1.00 | 0.970 |" not in table  # ranks differ
    assert "| one (50) | 0.900 | 0.980 | 1.000 | best | 0.020 (0.100) | 0.50 | 0.970 |" in table
    assert "| two (50) | 0.900 | 0.900 | 0.900 | default | 0.000 (0.000) | 1.00 | – |" in table
    assert "| mean | 0.900 | 0.940 | 0.950 |  | 0.010 (0.050) |  | – |" in table
    assert table.count("| one (50) |") == 3
    assert table.count("| two (50) |") == 1  # it has no masks


def test_aims_say_what_is_missed() -> None:
    lines = tuning.aims(figures()).splitlines()
    assert lines[0].endswith("0.0100; the aim is 0.01 (met).") or "(missed)" in lines[0]
    assert "one (pixel AUROC -0.010)" in lines[2]
    assert "0.9800 tuned, 0.9700 by PatchCore 1 % (above)" in lines[3]
    assert "0.9400 tuned, 0.9300" in lines[4]


def test_choices_name_the_default() -> None:
    table = tuning.choices(figures())
    assert "| one | chosen | 240 of 40 | 120 | 100 s | 60 s at a load of 1 |" in table
    assert "| two | the default |" in table


def test_nothing_measured_is_said() -> None:
    empty: Row = {"tuning": {"rows": []}, "whole_bank": {"patchcore": {"rows": []}}}
    assert {part(empty) for part in (tuning.table, tuning.aims, tuning.choices)} == {"No set was measured yet."}
