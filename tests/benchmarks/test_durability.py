"""In small what `python -m benchmarks.durability` does at length: kills, full disks, damaged files, readers beside a writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import durability
from spade_faiss import Bank


@pytest.mark.slow
def test_killed_at_random_instants_nothing_that_was_committed_is_lost(tmp_path: Path) -> None:
    found = durability.kill(20, tmp_path, seed=4)
    assert found.faults == []
    assert found.count >= 20
    assert len(found.hit) >= 4, "kills hit several kinds of steps"


def test_a_disk_that_fills_up_is_said_and_the_state_before_is_intact(tmp_path: Path) -> None:
    found = durability.fill(6, tmp_path, seed=5)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["faults"] == []
    assert found["full"] > 0


def test_damaged_files_load_with_the_same_content_or_are_refused(tmp_path: Path) -> None:
    found = durability.fuzz(60, tmp_path, seed=6)
    assert found["faults"] == []
    assert found["refused"] > found["equal"]


def test_readers_beside_a_writer_see_committed_generations_only(tmp_path: Path) -> None:
    found = durability.read_beside(55, tmp_path, readers=2, base=10)
    assert found["faults"] == []
    assert found["results"] > 0


def test_adding_writes_nothing_again(tmp_path: Path) -> None:
    found = durability.add_cost(500, 3, tmp_path)
    assert found["shards_rewritten"] == 0
    assert found["bytes_written"] < 0.02 * found["bank_bytes"]


def test_what_these_tests_look_for_they_find(tmp_path: Path) -> None:
    """A loss, a damage and a change are named: else all of the above could pass over them."""
    folder = tmp_path / "bank"
    durability._append(folder, 0, 6, 2)
    before = durability.content(folder)
    assert list(durability._faults(folder, "append", before)) == []
    bank = Bank.open(folder)
    bank.remove(["image 3"])
    assert list(durability._faults(folder, "remove", before)) == []
    assert list(durability._faults(folder, "append", before)) == ["lost ['image 3']"]
    assert list(durability._faults(folder, "compact", before)) == ["lost ['image 3']"]
    bank.compact()
    assert list(durability._faults(folder, "remove", before)) == ["lost ['image 3']"]
    (shard,) = (folder / "features").glob("*.h5")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (fault,) = durability._faults(folder, "index", {})
    assert "has changed since it was written" in fault
