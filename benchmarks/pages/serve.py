"""What the server holds under load, from serve.json, beside what was aimed at; and the tables of its API."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.text import Figures, markdown_table, mebibytes

# What the project aims at: this share of the throughput of `score`.
SHARE = 0.85


def load(figures: Figures) -> str:
    """Throughput beside `score`, and latency by the number of clients."""
    rows = _rows(figures, "load")
    if not rows:
        return _NOT_MEASURED
    speed = next(row for row in rows if row["what"] == "throughput")
    share = speed["share"]
    verdict = "reached" if share["median"] >= SHARE else "missed"
    lines = [
        f"- {speed['pictures']} pictures from {speed['clients']} clients: {speed['served_per_s']['median']:.1f} a second, "
        f"`score` of the same folder in turn {speed['score_per_s']['median']:.1f}. Share {share['median']:.2f} "
        f"({share['min']:.2f} to {share['max']:.2f} in {len(share['runs'])} rounds); the aim of {SHARE} is {verdict}.",
        f"- Pictures that were lost, answered twice, or got another verdict than by `score`: {len(speed['faults'])}.",
        "",
    ]
    found = [
        (_who(row["clients"]), row["n"], *(f"{row[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms")))
        for row in rows
        if row["what"] == "latency"
    ]
    return "\n".join(lines) + "\n" + markdown_table(("clients", "pictures", "p50, ms", "p95, ms", "p99, ms"), found)


def memory(figures: Figures) -> str:
    """The memory of the server over many requests."""
    rows = _rows(figures, "memory")
    if not rows:
        return _NOT_MEASURED
    (row,) = rows
    sizes = row["resident_bytes"]
    table = markdown_table(("requests", "resident"), [(count, mebibytes(size)) for count, size in sizes])
    slope = row["bytes_per_request_second_half"]
    return f"{table}\n\nOver the second half it grows by {slope:.0f} bytes a request."


def held(figures: Figures) -> str:
    """Kills, feedback, and generated requests."""
    lines = []
    for row in _rows(figures, "kills"):
        again = row["recovery_s"]
        lines.append(
            f"- **Kills**: {row['kills']} with SIGKILL at random instants under load, while people answered {row['feedbacks']} "
            f"pictures; {row['answered']} verdicts were acknowledged, and the bank came to generation {row['generation']}. "
            f"Ready again after {again['median']:.1f} s (at most {again['max']:.1f}). Verdicts that were lost or changed, "
            f"pictures that were scored twice, files that were left, problems that `verify --deep` found: {len(row['faults'])}."
        )
    for row in _rows(figures, "feedback"):
        told = row["as_served"]
        lines.append(
            f"- **Feedback**: {row['feedbacks']} pictures answered `normal` while {row['requests']} were scored, and "
            f"{row['taken_back']} taken back; {row['failed']} requests failed. The server changed over {row['changes']} times, "
            f"{row['change_s']['median']:.1f} s each. Afterwards {row['compared']} pictures score against the bank, by `exact` "
            f"and by its own recipe with the index built anew, to the bit as against a bank built anew from the same "
            f"{row['in_the_bank']} normals; differences and other faults: {len(row['faults'])}. As they were served, by an "
            f"index that was trained on the first normals and extended, scores differ by at most "
            f"{100 * told['largest_relative_difference']:.2f} %, and {told['alarms_that_differ']} verdicts."
        )
    for row in _rows(figures, "schema"):
        statuses = ", ".join(f"{status}: {count}" for status, count in row["statuses"].items())
        lines.append(
            f"- **Requests of schemathesis**: {row['cases']} over {row['operations']} operations, half of them such as the "
            f"document forbids ({statuses}); answers by a bug, or that the document does not allow: {len(row['faults'])}."
        )
    return "\n".join(lines) or _NOT_MEASURED


def operations(_: Figures) -> str:
    """What the API answers, from its OpenAPI document."""
    parts = []
    document = _document()
    by_tag: dict[str, list[tuple[str, ...]]] = {}
    for path, found in document["paths"].items():
        for method, operation in found.items():
            (tag,) = operation["tags"]
            text = " ".join(operation["description"].split())
            by_tag.setdefault(tag, []).append((f"`{method.upper()} {path}`", f"{operation['summary']}. {text}"))
    for tag, rows in by_tag.items():
        parts.append(f"## {tag.capitalize()}\n\n" + markdown_table(("request", "what it does"), rows))
    return "\n\n".join(parts)


def picture_fields(_: Figures) -> str:
    """The fields of a picture, and of what is in it."""
    parts = []
    schemas = _document()["components"]["schemas"]
    for name, title in _SHOWN.items():
        rows = [
            (f"`{field}`", _type(found), found.get("description", "")) for field, found in schemas[name]["properties"].items()
        ]
        parts.append(
            f"### {title}\n\n{schemas[name]['description'].splitlines()[0]}\n\n{markdown_table(('field', 'type', ''), rows)}"
        )
    return "\n\n".join(parts)


_NOT_MEASURED = "Not measured yet."
_SHOWN = {
    "PictureModel": "A picture",
    "RegionModel": "A region",
    "NearestModel": "A nearest normal",
    "PatchModel": "A matched patch",
    "LaterModel": "`now`",
    "AnswerModel": "An answer",
    "ChangeModel": "A change",
    "BankModel": "A bank",
    "FeedbackModel": "Feedback",
}


def _rows(figures: Figures, section: str) -> list[Any]:
    found: list[Any] = figures["serve"].get(section, {"rows": []})["rows"]
    return found


def _who(clients: int) -> str:
    return str(clients) if clients else "none: `Detector.score` in a loop"


def _document() -> dict[str, Any]:
    """The OpenAPI document of the routes; no bank is opened for it."""
    from fastapi import FastAPI

    from spade_faiss.serve.web import api, operations

    app = FastAPI(title="spade-faiss")
    app.include_router(api.router)
    app.include_router(operations.router)
    found: dict[str, Any] = app.openapi()
    return found


def _type(field: dict[str, Any]) -> str:
    """The type of a field, in a word."""
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2].removesuffix("Model").lower()
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array" and "items" in field:
        return f"list of {_type(field['items'])}"
    return str(field.get("format") or field.get("type", "object"))
