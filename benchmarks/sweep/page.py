"""Writes the report: the rows, tables and charts of all results, as one page that opens offline and as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from benchmarks.sweep import scaling, store, tables
from benchmarks.sweep.rows import Row, rows_of
from benchmarks.sweep.tables import Chart, Table
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import write_bytes

ROWS, PAGE = "rows.json", "index.html"
_K = 5


@dataclass(frozen=True)
class Section:
    """A heading, with the words, charts and tables under it."""

    title: str
    words: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


def report(results: Path, out: Path) -> Path:
    """Compute everything from raw results, and write the rows, every chart and the page.

    Raises:
        InputError: if there are no results.
    """
    raws = store.read_all(results)
    if not raws:
        raise InputError(f"{results} holds no results; measure some: python -m benchmarks run SWEEP.yaml --out {results}")
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(raws)
    write_bytes(out / ROWS, dump(rows).encode())
    return show(load(out / ROWS), out)


def show(rows: Sequence[Row], out: Path) -> Path:
    """Write the page and every chart from rows alone."""
    sections = sections_of(rows)
    for section in sections:
        for chart in section.charts:
            write_bytes(out / f"{chart.name}.svg", chart.svg.encode())
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(sections=sections, machines=machines_of(rows), rows=ROWS, count=len(rows))
    write_bytes(out / PAGE, page.encode())
    return out / PAGE


def dump(rows: Sequence[Row]) -> str:
    """Return rows as JSON: a line each, with floats of seven digits, and with the machine named by its number."""
    machines: list[Any] = []
    lines = []
    for row in rows:
        if isinstance(row["machine"], int):
            raise InputError("these rows have been dumped before")
        named = {name: value for name, value in row["machine"].items() if name != "date"} | {"date": row["machine"].get("date")}
        if named not in machines:
            machines.append(named)
        lines.append(json.dumps({**_rounded(row), "machine": machines.index(named)}))
    return '{"machines": ' + json.dumps(machines) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def load(path: Path) -> list[Row]:
    """Read the rows that `dump` wrote, each with its machine."""
    return unpack(json.loads(path.read_bytes()))


def unpack(content: dict[str, Any]) -> list[Row]:
    """Return the rows of a parsed file."""
    return [{**row, "machine": content["machines"][row["machine"]]} for row in content["rows"]]


def sections_of(rows: Sequence[Row]) -> list[Section]:
    """Return the sections of the page, in their order."""
    fronts = [
        front for n in sorted({row["n"] for row in tables.of_kind(rows, "image")}) if (front := tables.image_front(rows, n, _K))
    ]
    # Generated maps with the shapes of efficientnet_lite0 are shown under scaling; the quality is that of real maps.
    tasks = [task for task in tables.pixel_tasks(rows) if task[0] != "lite0"]
    pixel = [front for task in tasks for front in tables.pixel_fronts(rows, *task)]
    looks, peers, exponents = tables.look_table(rows), tables.peer_table(rows), scaling.exponent_table(rows)
    disk = tables.disk_chart(rows)
    memory = [*tables.memory_charts(rows), *([disk] if disk else [])]
    sections = [
        Section(
            "Image level: the nearest normals by embedding",
            tuple(words for _, words in fronts),
            tuple(chart for chart, _ in fronts),
            tuple(tables.image_tables(rows)),
        ),
        Section(
            "Pixel level: the nearest vectors in the neighbors' maps",
            tuple(words for _, words in pixel if words),
            tuple(chart for chart, _ in pixel),
            tuple(tables.pixel_tables(rows)),
        ),
        Section("Peers", (), (), (peers,) if peers else ()),
        Section("Scaling", (), tuple(scaling.scaling_charts(rows)), (exponents,) if exponents else ()),
        Section("Memory and disk", (), tuple(memory)),
        Section("What was searched", (), (), (looks,) if looks else ()),
    ]
    return [section for section in sections if section.charts or section.tables]


def machines_of(rows: Sequence[Row]) -> list[str]:
    """Return a line for each machine that rows were measured on."""
    lines = []
    for row in rows:
        found = row["machine"]
        names = {"date", "cpu", "cores", "python", "threads", "faiss_compile_options", "blas", "environment"}
        packages = ", ".join(f"{name} {value}" for name, value in found.items() if name not in names)
        line = f"{found.get('date')}: {found.get('cpu')}, {found.get('cores')} cores, Python {found.get('python')}, {packages}"
        if line not in lines:
            lines.append(line)
    return lines


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
