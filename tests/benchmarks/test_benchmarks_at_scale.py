"""What banks of millions take on paper: numbers that are worked out by hand, and what must hold of all."""

from __future__ import annotations

import pytest

from benchmarks.at_scale import NODES, NORMALS, Node, Rates, estimate

RATES = Rates(
    forward_s=0.1, search_s=0.05, row_s=1e-8, image_bytes=1_000_000, embedding_bytes=4000, answer_bytes=30_000, neighbors=5
)
NODE = Node(cores=10, memory_bytes=100_000_000_000, network_bytes_s=1e9, disk_bytes_s=2e9, dollars_h=3.6)


def test_by_hand() -> None:
    found = estimate(1_000_000, 10, RATES, NODE)
    assert found.bank_bytes == 10**12
    # 1e6 images * 0.1 s / 100 cores = 1000 s; writing takes 1e12 / (10 * 1e9) = 100 s.
    assert found.extract_h == pytest.approx(1000 / 3600)
    assert found.extract_dollars == pytest.approx(10.0)  # 10 nodes * 0.001 dollars a second * 1000 s
    assert found.owner_bytes == 400_000_000
    assert found.fits
    assert found.mapped_share == pytest.approx(0.5)  # 10 * 50 GB of 1 TB
    # To 10 owners an embedding each; to 5 the maps, and 30 kB back.
    assert found.sent_bytes == 10 * 4000 + 5 * (996_000 + 30_000)
    # Cores: (0.1 + 0.05 + 1e6 * 1e-8) / 100 = 1.6 ms; network: 2 * 5.17e6 / 1e10 = 1.03 ms; disks: 5e6 * 0.5 / 2e10 = 0.1 ms.
    assert found.images_s == pytest.approx(625)
    assert found.bound == "forward"
    assert found.day_dollars == pytest.approx(1600 * 0.01)


def test_the_image_index_becomes_the_bound() -> None:
    assert estimate(100_000_000, 10, RATES, NODE).bound == "image index"  # 1e8 * 1e-8 = 1 s of a core


def test_the_network_becomes_the_bound() -> None:
    slow = Node(cores=10, memory_bytes=100_000_000_000, network_bytes_s=1e8, disk_bytes_s=2e9, dollars_h=3.6)
    assert estimate(1_000_000, 10, RATES, slow).bound == "network"


def test_the_disks_become_the_bound() -> None:
    slow = Node(cores=10, memory_bytes=1_000_000_000, network_bytes_s=1e9, disk_bytes_s=1e8, dollars_h=3.6)
    assert estimate(1_000_000, 10, RATES, slow).bound == "disks"


def test_more_nodes_are_faster_and_hold_less() -> None:
    for normals in NORMALS:
        found = [estimate(normals, nodes, RATES) for nodes in NODES]
        assert found[0].images_s < found[1].images_s < found[2].images_s
        assert found[0].owner_bytes > found[1].owner_bytes > found[2].owner_bytes
        assert found[0].extract_h > found[2].extract_h
