"""What `benchmarks.gpu_proof` found on cards: which lines have run on which of them, and how fast they were."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.pages.text import Figures, markdown_table

# Lines that only a card runs, and what runs them: a test that is marked `gpu`, or a step.
LINES = (
    ("`search/accelerator.py`: pinned memory, the copying stream and its events", "test_the_same_bits_as_on_the_cpu"),
    ("`search/accelerator.py`: asking for free memory", "test_a_detector_on_a_card"),
    ("`search/accelerator.py`, `search/engines/torch.py`: smaller steps where the card's memory ends", "test_memory_that_ends"),
    ("`search/engines/products.py`: bfloat16 products with float32 sums", "test_bfloat16_finds_the_same"),
    ("`index/gpu.py`: copying an index to the card, and searching it there", "test_an_image_index_on_a_card"),
    ("`features/backbone.py`: the network on the card", "test_a_backbone_on_a_card"),
    ("`diagnostics/`: the properties of the card, its self-test and speed", "doctor"),
)
_STEPS = {
    "exactness": "the torch search beside float64",
    "tests": "`pytest -m gpu`",
    "doctor": "`spade-faiss doctor --device cuda`",
    "speed": "the torch search beside the CPU",
    "forward": "forward passes",
}
_NONE = "Nothing has run on a card yet."


def load(folder: Path) -> list[Figures]:
    """What was found on each card, in the order of their names.

    Raises:
        ValueError: for the results of a dry run, which prove nothing of a card.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        figures: Figures = json.loads(path.read_bytes())
        if figures["dry_run"]:
            raise ValueError(f"{path} holds the results of a dry run: delete it")
        found.append(figures)
    return found


def summary(figures: Figures) -> str:
    """README's sentence."""
    if not figures["cards"]:
        text = "**Nothing has run on a GPU yet.** The exact search for cards is torch code that is tested on the CPU;"
    else:
        cards = ", ".join(f"{_name(card)} ({_passed(card)} of {len(card['steps'])} steps passed)" for card in figures["cards"])
        text = f"**`make gpu-proof` has run on {len(figures['cards'])} kind(s) of GPU**: {cards};"
    return f"- {text} [the page on GPUs](docs/how-to/gpu.md) says which lines have run on which card."


def lines(figures: Figures) -> str:
    """A row for each line that only a card runs, a column for each card."""
    cards = figures["cards"]
    if not cards:
        return f"{_NONE}\n\n" + markdown_table(("lines", "run by"), ((text, f"`{by}`") for text, by in LINES))
    header = ("lines", "run by", *map(_name, cards))
    return markdown_table(header, ((text, f"`{by}`", *(_ran(card, by) for card in cards)) for text, by in LINES))


def results(figures: Figures) -> str:
    """For each card what the steps found, and how fast it was."""
    return "\n\n".join(_results(card) for card in figures["cards"]) or _NONE


def _results(card: Figures) -> str:
    machine, steps = card["machine"], card["steps"]
    versions = machine["versions"]
    about = (
        f"**{_name(card)}**, on {card['date']}, driver {machine['driver'] or 'unknown'}, torch {versions['torch']}, CUDA "
        f"{machine['torch_cuda']}; beside it {machine['cpu']} with {machine['threads']} threads (kernel: {machine['kernel']}); "
        f"commit {card['commit']}."
    )
    states = markdown_table(
        ("step", "state", "found"),
        ((_STEPS[name], _state(step), _found(name, step["rows"])) for name, step in steps.items()),
    )
    parts = [about, states]
    if rows := steps.get("speed", {}).get("rows"):
        engines = list(dict.fromkeys(row["engine"] for row in rows))
        ms = {(row["maps"], row["k"], row["batch"], row["engine"]): row["ms_per_image"] for row in rows}
        points = list(dict.fromkeys((row["maps"], row["k"], row["batch"]) for row in rows))
        header = ("maps of", "neighbors", "images at a time", *(f"{engine}, ms an image" for engine in engines))
        parts.append(
            markdown_table(header, ((*point, *(_number(ms.get((*point, engine))) for engine in engines)) for point in points))
        )
    if rows := [row for row in steps.get("forward", {}).get("rows", []) if "ms_per_image" in row]:
        header = ("network", "images at a time", "precision", "ms an image", "largest difference from the CPU")
        parts.append(
            markdown_table(
                header,
                (
                    (
                        row["network"],
                        row["batch"],
                        row["precision"],
                        _number(row["ms_per_image"]),
                        f"{row['largest_difference']:.0e}",
                    )
                    for row in rows
                ),
            )
        )
    return "\n\n".join(parts)


def _name(card: Figures) -> str:
    return str(card["machine"]["card"]["name"])


def _passed(card: Figures) -> int:
    return sum(step["state"] == "passed" for step in card["steps"].values())


def _ran(card: Figures, by: str) -> str:
    """Whether a test or a step has run on a card: all cases of a test must have passed."""
    if by in card["steps"]:
        state: str = card["steps"][by]["state"]
        return {"passed": "ran", "not run": "not run"}.get(state, state)
    cases = [row for row in card["steps"].get("tests", {}).get("rows", []) if row["test"].partition("[")[0] == by]
    outcomes = {row["outcome"] for row in cases}
    if "failed" in outcomes:
        return "failed"
    if outcomes == {"passed"}:
        return "ran"
    reasons = ", ".join(dict.fromkeys(row["reason"] for row in cases if "reason" in row))
    return f"not run: {reasons}" if reasons else "not run"


def _state(step: Figures) -> str:
    return f"{step['state']}: {_one_line(step['error'])}" if step["error"] else str(step["state"])


def _found(name: str, rows: list[Figures]) -> str:
    """What a step found, in a few words."""
    if not rows:
        return "–"
    if name == "exactness":
        worst = max(row["largest_error"] for row in rows)
        return f"{sum(row['queries'] for row in rows):,} queries, squared distances right to {worst:.0e}"
    if name == "tests":
        return _counts(row["outcome"] for row in rows)
    if name == "doctor":
        return _counts(row["state"] for row in rows)
    if name == "speed":
        return f"distances within {max(row['from_cpu'] for row in rows):.0e} of the CPU's"
    return "; ".join(dict.fromkeys(f"{row['network']}: {row['not_run']}" for row in rows if "not_run" in row)) or "–"


def _counts(values: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return ", ".join(f"{count} {value}" for value, count in counts.items())


def _number(ms: Any) -> str:
    return "–" if ms is None else f"{ms:.2f}" if ms < 10 else f"{ms:.0f}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:200]
