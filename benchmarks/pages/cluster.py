"""What clusters cost and survive, from cluster.json, and what banks of millions take on paper, from rates of other results."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.at_scale import NODES, NORMALS, QUERIES, Node, Rates, estimate
from benchmarks.features import SHAPES
from benchmarks.pages.text import Figures, markdown_table, mebibytes

_NETWORKS = {"wide_resnet50_2": "wrn50", "efficientnet_lite0": "lite0"}
_NEIGHBORS = 5
# A location's answer: its distance, a row and a place.
_ANSWER = 12
# The results are of two threads.
_THREADS = 2


def equal(figures: Figures) -> str:
    """The bank, the calibration and the scores beside those of one process, and CPU seconds."""
    rows = figures["cluster"].get("equality", [])
    header = (
        "set (normal, scored)",
        "nodes",
        "bank",
        "calibration",
        "scores",
        "CPU s",
        "workers",
        "Ray",
        "one process",
        "times",
        "rounds",
        "load",
    )
    return markdown_table(
        header,
        (
            (
                f"{row['set']} ({row['normals']}, {row['scored']})",
                row["nodes"],
                *("same" if row[f"same_{what}"] else "**different**" for what in ("bank", "calibration", "scores")),
                f"{row['cpu_s']:.0f}",
                *(f"{row[name]:.0f}" if name in row else "–" for name in ("workers_cpu_s", "ray_cpu_s")),
                f"{row['alone_cpu_s']:.0f}",
                f"{row['cpu_s'] / row['alone_cpu_s']:.2f}",
                row["rounds"],
                f"{row['load']:.1f}",
            )
            for row in rows
        ),
    )


def overhead(figures: Figures) -> str:
    """What clusters add to the CPU seconds of one process: for each set of commands, and for each of their seconds."""
    rows = figures["cluster"].get("equality", [])
    lines = []
    for nodes in sorted({row["nodes"] for row in rows}):
        mine = sorted((row for row in rows if row["nodes"] == nodes), key=lambda row: row["alone_cpu_s"])
        if len(mine) < 2:  # a line takes two sets
            continue
        less, more = mine[0], mine[-1]
        marginal = (more["cpu_s"] - less["cpu_s"]) / (more["alone_cpu_s"] - less["alone_cpu_s"])
        fixed = less["cpu_s"] - marginal * less["alone_cpu_s"]
        lines.append(
            f"- {nodes} nodes: from {less['set']} to {more['set']}, each CPU second of one process becomes {marginal:.2f}; the "
            f"line through both leaves {fixed:.0f} s for the four commands, however small the set."
        )
    return "\n".join(lines) or "Not measured yet."


def facts(figures: Figures) -> str:
    """Memory of the driver, and what losses changed."""
    found = figures["cluster"]
    machine = found["machine"]
    lines = [f"- Measured on {machine['date']}, {machine['cores']} cores of {machine['cpu']}; all nodes share them."]
    for row in found.get("memory", []):
        lines.append(
            f"- The driver's memory while {row['images']} of {row['pictures']} generated pictures are extracted: "
            f"{mebibytes(row['peak_bytes'])} at the peak."
        )
    if lost := found.get("losses"):
        rows = lost["rows"]
        kinds = Counter(f"{row['loss']} in {row['command']}" for row in rows if row["outcome"] == "lost")
        wrong = sum(not row["same"] or row["left_over"] for row in rows)
        resumed = sum(row["went_on"] for row in rows)
        hit = ", ".join(f"{name} {count}" for name, count in sorted(kinds.items()))
        lines.append(
            f"- Losses: {len(rows)} seeded ones, of which {sum(kinds.values())} hit the command in its work ({hit}); "
            f"banks, indexes, calibrations and scores that differ from those of one process, or files that were left over: "
            f"{wrong}. Runs that went on with parts of a command that was lost: {resumed}."
        )
    return "\n".join(lines)


def owners(figures: Figures) -> str:
    """What owners find, what travels, and milliseconds beside one process."""
    if not (found := figures["cluster"].get("owners")):
        return "Not measured yet."
    header = ("owners", "recall", "same bits", "ms an image", "one process", "sent", "bound", "answered")
    return markdown_table(
        header,
        (
            (
                row["nodes"],
                f"{row['recall']:g}",
                "yes" if row["same"] else "**no**",
                f"{row['ms']:.0f}",
                f"{row['alone_ms']:.0f}",
                *(f"{row[name] / 1024:.0f} KiB" for name in ("sent_bytes", "bound_bytes", "received_bytes")),
            )
            for row in found["rows"]
        ),
    )


def rates(figures: Figures, network: str) -> Rates:
    """What an image takes by a network, from what was measured: the fastest engine, the kernel, and a scan by FAISS."""
    name = _NETWORKS[network]
    shape = SHAPES[name]
    passes = [row for row in figures["deployment"]["passes"]["rows"] if row["backbone"] == network and row["batch"] == 1]
    exact = [row for row in passes if row["engine"].endswith("float32")]
    search = next(row for row in figures["kernel"]["speed"] if row["set"] == name and row["k"] == _NEIGHBORS)
    values = sum(level.height * level.width * level.channels for level in shape.levels)
    embedding = 4 * shape.embedding_dim
    return Rates(
        forward_s=_THREADS * min(row["ms"]["median"] for row in exact) / 1000,
        search_s=_THREADS * search["s_per_image"]["native"]["median"],
        row_s=next(row["row_s"] for row in figures["cluster"]["scan"] if row["shape"] == name),
        image_bytes=2 * values + embedding,
        embedding_bytes=embedding,
        answer_bytes=_ANSWER * sum(level.height * level.width for level in shape.levels),
        neighbors=_NEIGHBORS,
    )


def at_scale(figures: Figures) -> str:
    """Time, bytes, memory and cost of millions of normals on many nodes, on paper."""
    node = Node()
    header = (
        "network",
        "normals",
        "nodes",
        "bank",
        "extract",
        "embeddings a node",
        "maps in memory",
        "images/s",
        "bound",
        "a million",
    )
    lines: list[tuple[Any, ...]] = []
    for network in _NETWORKS:
        for normals in NORMALS:
            for nodes in NODES:
                found = estimate(normals, nodes, rates(figures, network), node)
                lines.append(
                    (
                        network,
                        f"{normals // 10**6} M",
                        nodes,
                        f"{found.bank_bytes / 1e12:.1f} TB",
                        f"{_short(found.extract_h)} h, ${_short(found.extract_dollars)}",
                        f"{_short(found.owner_bytes / 1e9)} GB" + ("" if found.fits else " (too many)"),
                        f"{100 * found.mapped_share:.0f} %",
                        _short(found.images_s),
                        found.bound,
                        f"${_short(found.day_dollars)}",
                    )
                )
    assumed = (
        f"A node is assumed to have {node.cores} cores, {node.memory_bytes >> 30} GiB, {node.network_bytes_s / 1e9:g} GB/s of "
        f"network and {node.disk_bytes_s / 1e9:g} GB/s from storage, for ${node.dollars_h:g} an hour; `a million` is what "
        f"scoring {QUERIES:,} images costs."
    )
    return f"{markdown_table(header, lines)}\n\n{assumed}"


def _short(value: float) -> str:
    """A number to two digits, or to a whole."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
