"""One bank of several products beside a bank for each, from products.json."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.text import Figures, markdown_table
from spade_faiss.decisions.conformal import rate_interval


def table(figures: Figures) -> str:
    """What names the products, what is found, and false alarms, by product."""
    found = figures["products"]
    rows: list[dict[str, Any]] = found["rows"]
    if not rows:
        return "*Not measured yet.*"
    lines = [
        (
            row["set"],
            row["normals"],
            f"{row['right']} of {row['images']}",
            f"{row['least_confidence']:.2f}",
            *(_both(row, metric) for metric in ("auroc", "pixel_auroc", "aupro")),
            f"{_with_interval(row)} / {_percent(row['false_alarms_alone'])}",
            *(f"{_percent(row[f'{name}_of_normal'])} / {_percent(row[f'{name}_of_defective'])}" for name in ("low_p", "none")),
        )
        for row in rows
    ]
    right, images = (sum(row[name] for row in rows) for name in ("right", "images"))
    worst = max(row["alone"]["auroc"] - row["one_bank"]["auroc"] for row in rows)
    machine = found["machine"]
    named = ("set", "normals", "product named rightly", "least confidence", "image AUROC", "pixel AUROC", "AUPRO")
    header = (
        *named,
        "false alarms (95 % interval)",
        "`p_none` at most 0.01, normal / defective",
        "said to show none, normal / defective",
    )
    return (
        f"{markdown_table(header, lines)}\n\n"
        f"Where there are two numbers with a stroke, the first is of the one bank, the second of a bank of the set alone. The "
        f"product was named rightly for {right} of {images} test pictures ({100 * right / images:.2f} %); image AUROC is lower "
        f"by at most {max(0.0, worst):.3f}. Naming the product took {found['product_ms']:.1f} ms of "
        f"{found['one_bank_ms']:.0f} ms a picture; the bank has {sum(row['normals'] for row in rows)} normal ones. "
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} threads that other work shared, faiss-cpu "
        f"{machine['faiss-cpu']}."
    )


def left_out(figures: Figures) -> str:
    """What a bank says of pictures of a product that it does not have."""
    rows: list[dict[str, Any]] = figures["products"]["left_out"]
    if not rows:
        return "*Not measured yet.*"
    lines = [
        (row["set"], f"{row['told']} of {row['images']}", f"{row['median_p']:.4f}", f"{row['median_confidence']:.2f}")
        for row in rows
    ]
    return markdown_table(("product that the bank does not have", "told", "median `p_none`", "median confidence"), lines)


def _both(row: dict[str, Any], metric: str) -> str:
    return f"{row['one_bank'][metric]:.3f} / {row['alone'][metric]:.3f}"


def _with_interval(row: dict[str, Any]) -> str:
    n = row["normal_tests"]
    low, high = rate_interval(round(n * row["false_alarms"]), n)
    return f"{_percent(row['false_alarms'])} ({100 * low:.1f} to {100 * high:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
