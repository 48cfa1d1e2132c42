"""README and the documentation do what they say: their commands and programs run, their generated parts are up to date."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

import spade_faiss
from benchmarks.pages.fill import DOCS, GENERATED, README, RESULTS, ROOT, filled, names_in, pages
from benchmarks.pages.measured import MEASURED, measured
from spade_faiss.cli import main
from spade_faiss.core.extraction import DEFAULT_BACKBONE
from spade_faiss.search.recipe import recipe_names

TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}
# `console` and `text` are for what a test cannot run: installing, containers, cards, output, outlines.
LANGUAGES = {"sh", "python", "console", "text", "yaml"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
# What a page that is executed leaves in its folder.
LEAVES = {
    "README.md": [
        f"results/{name}" for name in ("report.html", "report.json", "scores.csv", "regions.csv", "scores.h5", "overlays")
    ],
    "docs/tutorial/first-report.md": ["results/overlays", "evaluated/report.html"],
    "docs/how-to/calibrate.md": ["results/drift.html", "results/regions.csv"],
    "docs/how-to/maintain-a-bank.md": ["suspects/report.html"],
    "docs/how-to/region-of-interest.md": ["results/overlays"],
    "docs/how-to/many-products.md": ["results/report.html", "results-weave/scores.csv", "plant.bank/products"],
    "docs/how-to/choose-a-recipe.md": ["parts.bank/indexes/ivf/gallery.json"],
}
PRINTS = {
    "docs/tutorial/own-features.md": "(1, 16, 16)",
    "docs/reference/images.md": "['camera 1', 'camera 2']",
    "docs/how-to/region-of-interest.md": "64",
}


def blocks(name: str) -> list[tuple[str, str]]:
    """The commands and programs of a page, in their order."""
    return [(language, body) for language, body in BLOCK.findall(TEXTS[name]) if language in ("sh", "python")]


@pytest.fixture
def folder(dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the folders of images that pages speak of."""
    shutil.copytree(dataset_folder / "train" / "good", tmp_path / "good")
    shutil.copytree(dataset_folder / "test" / "good", tmp_path / "good2")
    shutil.copytree(dataset_folder / "test" / "spot", tmp_path / "new")
    shutil.copytree(dataset_folder / "train" / "good", tmp_path / "products" / "weave")
    shutil.copytree(dataset_folder / "test" / "spot", tmp_path / "products" / "felt")
    shutil.copytree(dataset_folder, tmp_path / "dataset")
    (tmp_path / "newly-good" / "line3").mkdir(parents=True)
    shutil.copy(sorted((dataset_folder / "test" / "good").iterdir())[0], tmp_path / "newly-good" / "line3" / "0017.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in TEXTS if blocks(name)])
@pytest.mark.slow
def test_commands_and_programs_run(name: str, folder: Path, fitted_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not re.search(r"\bfit\W+good/\W+bank\W+parts\.bank", TEXTS[name]):  # a page that makes no bank has one
        shutil.copytree(fitted_bank, folder / "parts.bank")
    for language, body in blocks(name):
        if language == "python":
            exec(compile(body, name, "exec"), {})
            continue
        for line in body.splitlines():
            program, *words = shlex.split(line)
            assert program == "spade-faiss"
            assert main(words) == 0, capsys.readouterr().err
    assert [path for path in LEAVES.get(name, []) if not (folder / path).exists()] == []
    assert PRINTS.get(name, "") in capsys.readouterr().out


def test_enough_is_executed() -> None:
    assert {*LEAVES, *PRINTS} <= {name for name in TEXTS if blocks(name)}


def test_every_block_says_what_it_is() -> None:
    assert {language for text in TEXTS.values() for language, _ in BLOCK.findall(text)} <= LANGUAGES


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if names_in(text)])
@pytest.mark.slow
def test_generated_parts_are_up_to_date(name: str) -> None:
    assert filled(TEXTS[name]) == TEXTS[name], "run: python -m benchmarks.pages"


def test_everything_that_is_generated_stands_on_one_page() -> None:
    assert sorted(name for text in TEXTS.values() for name in names_in(text)) == sorted(GENERATED)


def test_the_plans_of_cards_are_all_there() -> None:
    assert len(GENERATED["plans"]({}).splitlines()) == 2 + 3 * 3


def test_the_advice_is_that_of_the_results() -> None:
    assert MEASURED.read_text(encoding="utf-8") == measured(), "run: python -m benchmarks.pages"


def test_every_plot_is_shown() -> None:
    plots = {path.name for path in (RESULTS / "sweep").glob("*.svg")}
    shown = re.findall(r"!\[[^]]+\]\(sweep/([^)]+)\)", TEXTS["docs/benchmarks/approximate.md"])
    assert len(plots) > 20
    assert sorted(shown) == sorted(plots)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 180
    targets = [target for target in LINK.findall(text) if not target.startswith("https://")]
    assert len(targets) > 30
    assert [target for target in targets if not (README.parent / target).is_file()] == []


def test_pictures_are_small() -> None:
    pictures = [path for path in (DOCS / "images").iterdir() if path.is_file()]
    assert len(pictures) >= 1
    assert [path.name for path in pictures if path.stat().st_size > 150_000] == []


def test_recipes_and_public_names_have_a_place() -> None:
    for name in (*recipe_names(), DEFAULT_BACKBONE):
        assert any(f"`{name}`" in text for text in TEXTS.values()), name
    listed = re.findall(r"^::: spade_faiss\.[\w.]*?(\w+)$", TEXTS["docs/reference/python.md"], re.MULTILINE)
    assert sorted(listed) == sorted(spade_faiss.__all__)
