"""The page on clusters says what was measured, and says so where something differs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cluster import same_banks, write_pictures
from benchmarks.pages import cluster as page
from benchmarks.pages.fill import load_figures
from tests.support.banks import ABC, DE, F, batch, make_bank

MACHINE = {"date": "2026-11-30", "cores": 2, "cpu": "some"}


def test_what_differs_stands_out() -> None:
    row = {"set": "bottle", "normals": 209, "nodes": 2, "same_bank": True, "same_calibration": True, "same_scores": False}
    row |= {"scored": 83, "rounds": 3, "load": 0.25}
    row |= {"cpu_s": 110.0, "alone_cpu_s": 100.0}
    # One of the time when it was not measured what of it is whose.
    table = page.equal({"cluster": {"equality": [{**row, "workers_cpu_s": 60.0, "ray_cpu_s": 5.0}, row]}})
    assert "| bottle (209, 83) | 2 | same | same | **different** | 110 | 60 | 5 | 100 | 1.10 | 3 | 0.2 |" in table
    assert "| **different** | 110 | – | – | 100 |" in table


def test_what_is_added_is_told_apart() -> None:
    """99 seconds more for 80 more of one process, and what the smaller set takes beside 30 times that."""
    sets = (("large", 150.0, 110.0), ("small", 51.0, 30.0))
    rows = [{"set": name, "nodes": 2, "cpu_s": cpu, "alone_cpu_s": alone} for name, cpu, alone in sets]
    said = page.overhead({"cluster": {"equality": [*rows, {**rows[0], "nodes": 4}]}})
    assert "2 nodes: from small to large, each CPU second of one process becomes 1.24; the line" in said
    assert "leaves 14 s for the four commands" in said
    assert "4 nodes" not in said


def test_losses_are_counted() -> None:
    row = {"loss": "node", "command": "extract", "outcome": "lost", "same": True, "left_over": False}
    row["went_on"] = False
    rows = [row, {**row, "loss": "worker", "same": False, "went_on": True}, {**row, "outcome": "ended"}]
    figures = {"cluster": {"machine": MACHINE, "losses": {"rows": rows}, "memory": []}}
    said = page.facts(figures)
    assert "3 seeded ones, of which 2 hit the command in its work (node in extract 1, worker in extract 1)" in said
    assert "or files that were left over: 1." in said
    assert said.endswith("parts of a command that was lost: 1.")


def test_owners_are_compared_with_one_process() -> None:
    row = {"nodes": 4, "recall": 1.0, "same": True, "ms": 31.4, "alone_ms": 20.2}
    row |= {"sent_bytes": 512 * 1024, "bound_bytes": 1024 * 1024, "received_bytes": 2048}
    assert "| 4 | 1 | yes | 31 | 20 | 512 KiB | 1024 KiB | 2 KiB |" in page.owners({"cluster": {"owners": {"rows": [row]}}})


def test_rates_come_from_results() -> None:
    found = page.rates(load_figures(), "wide_resnet50_2")
    # 56 x 56 x 256, 28 x 28 x 512 and 14 x 14 x 1024 values of two bytes, and 2048 of four.
    assert found.image_bytes == 2 * (802816 + 401408 + 200704) + 8192
    assert 0.01 < found.search_s < found.forward_s < 1


def test_banks_are_compared_whatever_their_shards(tmp_path: Path) -> None:
    one, other, third = (make_bank(tmp_path / name) for name in ("one", "other", "third"))
    for part in (ABC, DE, F):
        one.append(part)
        third.append(part if part is not F else batch("f", seed=1))
    for name in "abcdef":
        other.append(batch(name))
    assert same_banks(one.path, other.path)
    assert not same_banks(one.path, third.path)


def test_generated_pictures_differ(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 20)
    assert len({path.read_bytes() for path in folder.iterdir()}) == 20
    assert len(list(folder.iterdir())) == 20
