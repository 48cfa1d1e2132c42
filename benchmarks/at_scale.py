"""What banks of millions of normal images take on clusters of many nodes: computed from measured rates, not measured.

Everything scales with a few rates: seconds of a core for a forward pass and for the search of an image, bytes of an image's
features, what an owner is sent and answers. `estimate` multiplies them out; which resource is the bound is the largest time.
"""

from __future__ import annotations

from dataclasses import dataclass

NORMALS = (1_000_000, 10_000_000, 100_000_000)
NODES = (8, 64, 512)
# How many pictures are scored in a day, say.
QUERIES = 1_000_000
_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one image takes.

    Args:
        forward_s: seconds of a core for the forward pass.
        search_s: seconds of a core for the search of its neighbors' maps.
        row_s: seconds of a core for a look at one normal's embedding.
        image_bytes: its features in a bank.
        embedding_bytes: its embedding among them.
        answer_bytes: what an owner answers for it.
        neighbors: in how many normal images it is searched.
    """

    forward_s: float
    search_s: float
    row_s: float
    image_bytes: int
    embedding_bytes: int
    answer_bytes: int
    neighbors: int


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node, and its share of what all nodes use together: assumptions, not measurements.

    Args:
        cores: its processors.
        memory_bytes: its memory, of which half holds maps.
        network_bytes_s: bytes a second to and from it.
        disk_bytes_s: bytes a second that it reads from storage.
        dollars_h: its price.
    """

    cores: int = 16
    memory_bytes: int = 128 << 30
    network_bytes_s: float = 1.25e9
    disk_bytes_s: float = 2e9
    dollars_h: float = 0.8


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a bank takes on a cluster.

    Args:
        bank_bytes: the bank.
        extract_h: hours to extract it.
        extract_dollars: what that costs.
        owner_bytes: what an owner holds in memory of embeddings.
        fits: whether it holds them in half of its memory.
        mapped_share: the share of its maps that the other half holds.
        sent_bytes: what travels for an image that is scored, answers included.
        images_s: how many images a second are scored.
        day_dollars: what it costs to score a million.
        bound: what limits the scoring: `forward`, `search`, `image index`, `network` or `disks`.
    """

    bank_bytes: int
    extract_h: float
    extract_dollars: float
    owner_bytes: int
    fits: bool
    mapped_share: float
    sent_bytes: int
    images_s: float
    day_dollars: float
    bound: str


def estimate(normals: int, nodes: int, rates: Rates, node: Node = Node(), replicas: int = 1) -> Estimate:
    """Compute what a bank takes on a cluster, whose nodes each own a share of its shards.

    Args:
        normals: images of the bank.
        nodes: nodes of the cluster.
        rates: what an image takes.
        node: what a node has.
        replicas: how many owners each shard has.
    """
    cores = nodes * node.cores
    bank_bytes = normals * rates.image_bytes
    writing_s = bank_bytes / (nodes * min(node.network_bytes_s, node.disk_bytes_s))
    extract_h = max(normals * rates.forward_s / cores, writing_s) / 3600
    owner_bytes = normals * rates.embedding_bytes * replicas // nodes
    mapped_share = min(1.0, nodes * node.memory_bytes / 2 / (bank_bytes * replicas))
    # All owners look for the nearest images; those of the neighbors for the nearest vectors.
    visited = min(rates.neighbors, nodes)
    sent = nodes * rates.embedding_bytes + visited * (rates.image_bytes - rates.embedding_bytes + rates.answer_bytes)
    # Seconds of the whole cluster for an image, by what it waits for.
    taken = {
        "forward": rates.forward_s / cores,
        "search": rates.search_s / cores,
        "image index": normals * rates.row_s / cores,
        "network": 2 * sent / (nodes * node.network_bytes_s),
        "disks": rates.neighbors * rates.image_bytes * (1 - mapped_share) / (nodes * node.disk_bytes_s),
    }
    # Cores do one thing after the other; the network and the disks work beside them.
    computing = taken["forward"] + taken["search"] + taken["image index"]
    images_s = 1 / max(computing, taken["network"], taken["disks"])
    beside = {"network": taken["network"], "disks": taken["disks"]}
    slowest = max(beside, key=lambda name: beside[name])
    of_cores = max(("forward", "search", "image index"), key=lambda name: taken[name])
    price = nodes * node.dollars_h / 3600
    return Estimate(
        bank_bytes=bank_bytes,
        extract_h=extract_h,
        extract_dollars=extract_h * 3600 * price,
        owner_bytes=owner_bytes,
        fits=owner_bytes <= node.memory_bytes / 2,
        mapped_share=mapped_share,
        sent_bytes=sent,
        images_s=images_s,
        day_dollars=QUERIES / images_s * price,
        bound=slowest if beside[slowest] > computing else of_cores,
    )
