"""README does what it says: its commands and programs run, its tables are those of the committed results."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks.gpu import DOCS, plans
from benchmarks.gpu import filled as filled_docs
from benchmarks.pages import MEASURED, README, ROOT, filled, measured
from spade_faiss.cli import main
from spade_faiss.core.settings import DEFAULT_BACKBONE
from spade_faiss.search.recipe import recipe_names

TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_commands_and_programs_run(
    dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset_folder / "train" / "good", tmp_path / "good")
    shutil.copytree(dataset_folder / "test" / "spot", tmp_path / "new")
    shutil.copytree(dataset_folder, tmp_path / "dataset")
    (tmp_path / "newly-good" / "line3").mkdir(parents=True)
    shutil.copy(sorted((dataset_folder / "test" / "good").iterdir())[0], tmp_path / "newly-good" / "line3" / "0017.png")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "spade-faiss"
        assert main(words) == 0, capsys.readouterr().err
    for name in ("report.html", "report.json", "scores.csv", "regions.csv", "scores.h5", "overlays", "drift.html"):
        assert (tmp_path / "results" / name).exists()
    programs = blocks("python")
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, "README", "exec"), {})
    assert "(16, 16)" in capsys.readouterr().out.replace("(1, 16, 16)", "(16, 16)")


def test_tables_are_those_of_the_results() -> None:
    assert filled(TEXT) == TEXT, "run: python -m benchmarks.pages"


def test_the_plans_of_cards_are_computed() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert len(plans().splitlines()) == 2 + 3 * 3
    assert filled_docs(text) == text, "run: python -m benchmarks.gpu --docs"


def test_the_advice_is_that_of_the_results() -> None:
    assert MEASURED.read_text(encoding="utf-8") == measured(), "run: python -m benchmarks.pages"


def test_plots_are_there() -> None:
    plots = re.findall(r"!\[[^]]*\]\(([^)]*)\)", TEXT)
    assert len(plots) == 2
    for plot in plots:
        assert (ROOT / plot).read_text(encoding="utf-8").startswith("<svg")


def test_every_recipe_is_named() -> None:
    for name in (*recipe_names(), DEFAULT_BACKBONE):
        assert f"`{name}`" in TEXT, name
