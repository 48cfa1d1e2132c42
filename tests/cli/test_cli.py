"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from spade_faiss.core.files import hash_file
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.text import is_hidden
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.search.recipe import recipe_names
from tests.support.pictures import weave

COMMANDS = (
    *("fit", "extract", "index", "info", "add", "remove", "restore", "compact", "verify", "suspects", "score", "evaluate"),
    *("calibrate", "drift", "doctor", "recommend", "serve", "watch"),
)
# SPADE as its paper has it: results do not change with the preset that is taken unasked.
SMALL = ("--backbone", "efficientnet_lite0", "--resize", "72", "--size", "64", "--preset", "spade")


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["score", "--help"], ["doctor", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    heavy = "{'torch', 'torchvision', 'faiss', 'numpy', 'scipy', 'h5py', 'matplotlib', 'PIL', 'yaml', 'jinja2', 'tqdm'}"
    code = f"""
import sys
from spade_faiss.cli import main
try:
    main({words})
except SystemExit as stop:
    assert stop.code == 0
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_ends_with_an_example(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    last = capsys.readouterr().out.rstrip().split("\n\n")[-1]
    assert last.startswith(f"example: spade-faiss {' '.join(command)}")


@pytest.mark.parametrize(
    "words", [[], ["unknown"], ["fit"], ["fit", "images"], ["score", "x", "--bank", "b", "--kappa", "many"]]
)
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)


def test_an_error_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "none.bank")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("spade-faiss: error: there is no bank")
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spade_faiss", "info", str(tmp_path / "none.bank"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "NotFoundError: there is no bank" in done.stderr


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spade_faiss.workflows.fit.fit", interrupt)
    assert main(["fit", "images", "--bank", "b"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_fit_then_info_then_fit_again(dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bank = dataset_folder / "train" / "good", tmp_path / "parts.bank"
    count = len(list(good.iterdir()))
    fitted = run_json(capsys, "fit", good, "--bank", bank, *SMALL, "--normalize", "l2")
    assert (fitted["images"], fitted["added"], fitted["present"], fitted["skipped"], fitted["index"]) == (
        count,
        count,
        0,
        [],
        None,
    )
    info = run_json(capsys, "info", bank)
    assert (info["images"], info["normalize"], info["source"]["backbone"]) == (count, "l2", "efficientnet_lite0")
    again = run_json(capsys, "extract", good, "--bank", bank, *SMALL, "--normalize", "l2")
    assert (again["added"], again["present"]) == (0, count)
    assert main(["info", str(bank)]) == 0
    assert f"{count} normal images" in capsys.readouterr().out


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_fit_and_info_say_how_many_bits_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int) -> None:
    """Nobody gave the depth: whoever knows the camera sees whether it was found right."""
    rng, good = np.random.default_rng(bits), tmp_path / "good"
    good.mkdir()
    for number in range(6):
        values = weave(rng)[..., 0].astype(np.uint16) << (bits - 8)
        Image.fromarray(values).save(good / f"{number}.png")
    out = run_text(capsys, "fit", good, "--bank", tmp_path / "b", *SMALL, "--no-calibrate")
    assert f"of 16 bits, {bits} are used (if the camera gives another number, make a new bank with --bit-depth)" in out
    assert f"{bits} of 16 bits" in run_text(capsys, "info", tmp_path / "b")


def test_other_settings_than_the_banks_are_refused_with_both_values(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    before = (bank / "manifest.json").read_bytes()
    words = ["fit", str(dataset_folder / "train/good"), "--bank", str(bank), *SMALL, "--resize-mode", "letterbox"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "'crop'" in error
    assert "'letterbox'" in error
    assert (bank / "manifest.json").read_bytes() == before


def test_index_builds_what_a_recipe_needs(fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    assert run_json(capsys, "index", bank, "--recipe", "exact")["built"] == []
    (built,) = run_json(capsys, "index", bank, "--recipe", "hnsw")["built"]
    assert (built["recipe"], built["done"]) == ("hnsw", {"image": "built"})
    (file,) = (bank / "indexes" / "hnsw").glob("*.faiss")
    assert built["bytes"] == file.stat().st_size
    assert [item["recipe"] for item in run_json(capsys, "info", bank)["indexes"]] == ["hnsw"]


def test_score_writes_everything(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "results"
    test = dataset_folder / "test"
    done = run_json(capsys, "score", test, "--bank", fitted_bank, "--out", out, "--overlays", "--k-image", "3")
    with ScoreFile.open(out / "scores.h5") as scores, (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
        assert done["images"] == len(scores) == len(rows) == len(list(test.rglob("*.png")))
        assert [row["id"] for row in rows] == list(scores.ids)
        np.testing.assert_array_equal(np.array([row["image_score"] for row in rows], np.float32), scores.image_score)
        np.testing.assert_allclose(scores.neighbor_dist[:, :3].mean(axis=1), scores.image_score, rtol=1e-6)
        assert scores.neighbor_ids.shape[1] == 5  # the larger of k_image and k_gallery
        assert json.loads(scores.settings)["k_image"] == 3
        for record in scores.ids:
            with Image.open(out / "overlays" / f"{record}.png") as overlay:
                assert overlay.size == (64, 64)
    report = json.loads((out / "report.json").read_bytes())
    assert report["metrics"] is None
    assert [item["id"] for item in report["scores"]] == [row["id"] for row in rows]
    page = (out / "report.html").read_text()
    assert all(row["id"] in page for row in rows)
    assert "AUROC" not in page


def test_score_takes_one_image_and_a_list(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((dataset_folder / "test").rglob("*.png"))
    one = run_json(capsys, "score", images[0], "--bank", fitted_bank, "--out", tmp_path / "one")
    several = run_json(capsys, "score", *images[:3], "--bank", fitted_bank, "--out", tmp_path / "several")
    assert (one["images"], several["images"]) == (1, 3)


def test_unreadable_images_are_named_and_limited(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    shutil.copytree(dataset_folder / "test" / "good", folder)
    (folder / "broken.png").write_bytes(b"not an image")
    words = ("score", folder, "--bank", fitted_bank, "--out", tmp_path / "results")
    done = run_json(capsys, *words)
    assert [item["id"] for item in done["skipped"]] == ["broken.png"]
    assert main([*map(str, words), "--max-skipped", "0"]) == 1
    assert "broken.png" in capsys.readouterr().err


def test_nothing_is_written_for_an_empty_folder(fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for words in (
        ("fit", tmp_path / "empty", "--bank", tmp_path / "b", *SMALL),
        ("score", tmp_path / "empty", "--bank", fitted_bank, "--out", tmp_path / "out"),
        ("evaluate", tmp_path / "empty", "--bank", fitted_bank, "--out", tmp_path / "out"),
    ):
        assert main([*map(str, words)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
    assert capsys.readouterr().out == ""


def test_no_progress_where_stderr_is_no_terminal(dataset_folder: Path, fitted_bank: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spade_faiss", "score", str(dataset_folder / "test"), "--bank", str(fitted_bank)]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "report.html" in done.stdout


def test_every_option_arrives(dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank, out = tmp_path / "b", tmp_path / "out"
    extraction = {
        "--store": "float32",
        "--normalize": "l2",
        "--pool": "3",
        "--precision": "bfloat16",
        "--resize-mode": "letterbox",
    }
    words = [word for pair in extraction.items() for word in pair]
    run_json(capsys, "fit", dataset_folder / "train/good", "--bank", bank, *SMALL, *words)
    info = run_json(capsys, "info", bank)
    source = info["source"]
    assert (info["dtype"], info["normalize"], info["pool"], info["input_size"]) == ("float32", "l2", 3, [64, 64])
    assert (source["precision"], source["preprocess"]["resize_mode"]) == ("bfloat16", "letterbox")
    asked = {"k_image": 2, "k_gallery": 3, "kappa": 4, "fusion": "concat", "distance": "squared_l2", "sigma": 1.5}
    words = [str(word) for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    run_json(capsys, "evaluate", dataset_folder, "--bank", bank, "--out", out, *words, "--shown", "3")
    report = json.loads((out / "report.json").read_bytes())
    assert {name: report["method"][name] for name in asked} == asked
    # One card in each of the three groups.
    assert (out / "report.html").read_text().count('id="card-') == 3
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == [Path(row["id"]).parent.name for row in rows]
    assert [row["rank"] for row in rows] == [str(item["rank"]) for item in report["scores"]]
    assert [float(row["map_score"]) for row in rows] == pytest.approx([item["map_score"] for item in report["scores"]])


def test_results_do_not_go_into_the_images(fitted_bank: Path, dataset_folder: Path, tmp_path: Path) -> None:
    images = shutil.copytree(dataset_folder / "test", tmp_path / "images")
    words = ["score", str(images), "--bank", str(fitted_bank)]
    assert main([*words, "--out", str(images / "results")]) == 1
    assert not (images / "results").exists()
    (tmp_path / "file").touch()
    assert main([*words, "--out", str(tmp_path / "file")]) == 1
    assert main([*words, "--out", str(tmp_path / "out"), "--shown", "-1"]) == 1


# Recipes with gallery indexes, settings that change from query to query, budgets


@pytest.fixture
def copied_bank(fitted_bank: Path, tmp_path: Path) -> Path:
    """The bank, to build indexes in."""
    return Path(shutil.copytree(fitted_bank, tmp_path / "copy.bank"))


@pytest.fixture
def one_image(dataset_folder: Path) -> Path:
    return sorted((dataset_folder / "test" / "spot").iterdir())[0]


def run_text(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def run_error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr of a command that fails, without its prefix."""
    assert main([*map(str, words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("spade-faiss: error: ")
    return captured.err.removeprefix("spade-faiss: error: ").rstrip()


def build(capsys: pytest.CaptureFixture[str], bank: Path, recipe: str, *words: object) -> dict[str, Any]:
    """What `index` says that it built for one recipe."""
    (built,) = run_json(capsys, "index", bank, "--recipe", recipe, *words)["built"]
    assert isinstance(built, dict)
    return built


def encoded_files(bank: Path, recipe: str) -> dict[str, tuple[int, bytes]]:
    """Files of vectors that were built for a recipe: when, and what is in them."""
    folder = bank / "indexes" / recipe
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.h5")}


def test_index_says_what_it_built_and_builds_it_once(copied_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("index", copied_bank, "--recipe", "ivf", "--quiet")
    first = run_json(capsys, *words)
    built = encoded_files(copied_bank, "ivf")
    size = sum(len(content) for _, content in built.values())
    (shard,) = (copied_bank / "features").iterdir()
    of_shard = f"{hash_file(shard)[:16]}.h5"
    assert sorted(built) == [f"gallery/000-{of_shard}", "gallery/trained-000.h5"]
    assert set(first) == {"bank", "images", "bank_bytes", "built"}
    assert (first["bank"], first["images"], first["bank_bytes"]) == (str(copied_bank), 24, shard.stat().st_size)
    (done,) = first["built"]
    assert set(done) == {"recipe", "done", "bytes_before", "bytes", "time"}
    assert (done["recipe"], done["done"]) == ("ivf", {"gallery": "built"})
    assert (done["bytes_before"], done["bytes"]) == (0, size)
    assert done["time"]["total_s"] > 0
    # Again: nothing is learned or encoded.
    (again,) = run_json(capsys, *words)["built"]
    assert encoded_files(copied_bank, "ivf") == built
    assert again["done"] == {"gallery": "is up to date"}
    assert (again["bytes_before"], again["bytes"]) == (size, size)
    text = run_text(capsys, *words)
    assert re.match(rf"{re.escape(str(copied_bank))}: index 'ivf' over 24 images, \d+\.\d\d s\n", text)
    assert re.search(r"gallery  ivf lists=64, train_vectors=50000: \S+ \S+, is up to date$", text, re.MULTILINE)
    assert encoded_files(copied_bank, "ivf") == built
    # Anew: to the same result, in other files.
    (anew,) = run_json(capsys, *words, "--rebuild")["built"]
    assert anew["done"] == {"gallery": "built anew: asked for"}
    rebuilt = encoded_files(copied_bank, "ivf")
    assert sorted(rebuilt) == [f"gallery/001-{of_shard}", "gallery/trained-001.h5"]
    for name, (_, content) in built.items():
        assert rebuilt[name.replace("000", "001", 1)][1] == content


def test_update_brings_all_that_was_built_up_to_date(copied_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("index", copied_bank, "--update")
    assert run_json(capsys, *words)["built"] == []
    assert run_text(capsys, *words) == f"no index was built beside {copied_bank}: there is nothing to update\n"
    assert not (copied_bank / "indexes").exists()
    for recipe in ("hnsw", "ivf"):
        build(capsys, copied_bank, recipe)
    bank = Bank.open(copied_bank)
    late = bank.read(np.arange(3))
    bank.append(replace(late, ids=["late 0", "late 1", "late 2"]))
    updated = run_json(capsys, *words)
    assert updated["images"] == 27
    assert [(item["recipe"], item["done"]) for item in updated["built"]] == [
        ("hnsw", {"image": "added 3 images to it"}),
        ("ivf", {"gallery": "added 3 images to it"}),
    ]
    assert all(item["bytes"] > item["bytes_before"] for item in updated["built"])
    text = run_text(capsys, *words)
    assert text.count("is up to date") == 2
    assert f"{copied_bank}: index 'hnsw' over 27 images" in text
    # Rows are the images that are there: a removed one is no reason to build, and does not count.
    bank.remove(["late 1"])
    again = run_json(capsys, *words)
    assert (again["images"], [item["done"] for item in again["built"]]) == (
        26,
        [{"image": "is up to date"}, {"gallery": "is up to date"}],
    )
    anew = run_json(capsys, *words, "--rebuild")["built"]
    assert [list(item["done"].values()) for item in anew] == [["built anew: asked for"]] * 2
    with pytest.raises(SystemExit, match="2"):
        main(["index", str(copied_bank), "--update", "--recipe", "ivf"])


def test_a_recipe_that_needs_no_index_says_so(copied_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in ("exact", "location"):
        text = run_text(capsys, "index", copied_bank, "--recipe", recipe)
        assert text == f"recipe {recipe!r} needs no index: {copied_bank} can be searched as it is\n"
    assert not (copied_bank / "indexes").exists()


def test_info_lists_what_is_built(copied_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run_json(capsys, "info", copied_bank)
    assert (before["indexes"], before["galleries"]) == ([], [])
    assert "  index " not in run_text(capsys, "info", copied_bank)
    sizes = {name: build(capsys, copied_bank, name)["bytes"] for name in ("hnsw", "ivf", "compact")}
    info = run_json(capsys, "info", copied_bank)
    (image,) = info["indexes"]
    whole = {"indexed": 24, "unindexed": 0, "tombstones": 0, "generation": 1}
    assert image == {"recipe": "hnsw", "image": "HNSW32", "bytes": sizes["hnsw"], **whole}
    for item, name in zip(info["galleries"], ("compact", "ivf"), strict=True):
        assert (item["recipe"], item["gallery"], item["bytes"]) == (name, name, sizes[name])
        assert {key: item[key] for key in whole} == whole
    assert info["galleries"][1]["settings"] == {"lists": 64, "train_vectors": 50_000}
    lines = [line.split()[1:] for line in run_text(capsys, "info", copied_bank).splitlines() if line.startswith("  index ")]
    assert [line[:2] for line in lines] == [["hnsw:", "HNSW32,"], ["compact:", "compact"], ["ivf:", "ivf"]]
    # Of images that came and went since, it says how each index stands to them.
    bank = Bank.open(copied_bank)
    bank.append(replace(bank.read(np.arange(3)), ids=["late 0", "late 1", "late 2"]))
    bank.remove([bank.ids[5], bank.ids[7], "late 1"])
    info = run_json(capsys, "info", copied_bank)
    assert (info["images"], info["removed"]) == (24, sorted(bank.removed))
    since = {"indexed": 22, "unindexed": 2, "tombstones": 2, "generation": 1}
    for item in (*info["indexes"], *info["galleries"]):
        assert {key: item[key] for key in since} == since
    text = run_text(capsys, "info", copied_bank)
    assert text.count("22 images indexed, 2 not indexed yet, 2 tombstones of removed images") == 3
    assert f"spade-faiss index {copied_bank} --update" in text


def test_score_before_index_says_what_to_run(
    copied_bank: Path, one_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("score", one_image, "--bank", copied_bank, "--out", tmp_path / "out", "--recipe", "ivf")
    error = run_error(capsys, *words)
    command = f"spade-faiss index {copied_bank} --recipe ivf"
    assert error.endswith(f"build it with: {command}")
    assert not (tmp_path / "out").exists()
    run_text(capsys, *command.split()[1:])
    run_text(capsys, *words)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_of_ours_scores_with_its_defaults(
    recipe: str, copied_bank: Path, one_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = run_json(capsys, "index", copied_bank, "--recipe", recipe)["built"]
    assert [item["recipe"] for item in built] == ([] if recipe in ("exact", "location") else [recipe])
    out = tmp_path / "out"
    run_json(capsys, "score", one_image, "--bank", copied_bank, "--recipe", recipe, "--out", out)
    report = json.loads((out / "report.json").read_bytes())
    assert report["method"]["recipe"]["name"] == recipe
    assert report["scores"][0]["map_score"] > 0


def test_the_whole_bank_is_searched_through_clusters(
    copied_bank: Path, one_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_json(capsys, "index", copied_bank, "--recipe", "clusters")
    reports = {}
    for recipe in ("exact", "clusters"):
        words = ("score", one_image, "--bank", copied_bank, "--recipe", recipe, "--k-gallery", "all")
        text = run_text(capsys, *words, "--out", tmp_path / recipe)
        assert ("Passed over as too far to be nearest: " in text) == (recipe == "clusters")
        reports[recipe] = json.loads((tmp_path / recipe / "report.json").read_bytes())
    assert reports["clusters"]["scores"] == reports["exact"]["scores"]
    assert reports["exact"]["passed_over"] == {}
    shares = reports["clusters"]["passed_over"]
    assert list(shares) == [level.name for level in Bank.open(copied_bank).layout.levels]
    assert all(0 < share < 1 for share in shares.values())


def test_settings_of_a_query_arrive(
    copied_bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_json(capsys, "index", copied_bank, "--recipe", "ivf")
    built = encoded_files(copied_bank, "ivf")
    score = ("score", dataset_folder / "test", "--bank", copied_bank)
    run_json(capsys, *score, "--out", tmp_path / "exact")
    exact = json.loads((tmp_path / "exact" / "report.json").read_bytes())
    above = sorted(item["image_score"] for item in exact["scores"])[5]
    chosen = ("--recipe", "ivf", "--set", "nprobe=2", "--memory", "1GiB", "--localize", "flagged", "--flag-above", above)
    done = run_json(capsys, *score, *chosen, "--out", tmp_path / "out", "--overlays")
    assert done["images"] == 11
    report = json.loads((tmp_path / "out" / "report.json").read_bytes())
    method = report["method"]
    assert method["recipe"]["name"] == "ivf"
    assert method["recipe"]["query"] == {"image": "", "settings": {"nprobe": 2}}
    assert (method["localize"], method["flag_above"]) == ("flagged", above)
    assert method["search"] in (tmp_path / "out" / "report.html").read_text()
    assert sum(report["memory"][name] for name in ("working_bytes", "cache_bytes")) <= parse_bytes("1GiB")
    assert [item["image_score"] for item in report["scores"]] == [item["image_score"] for item in exact["scores"]]
    for item, of_exact in zip(report["scores"], exact["scores"], strict=True):
        assert (item["map_score"] is None) == (item["image_score"] <= above)
        # An approximate search misses nearer vectors; it does not invent any.
        assert item["map_score"] is None or item["map_score"] >= of_exact["map_score"] * (1 - 1e-3)
    assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 5
    # With all of its lists it is exact. The last of the same name counts.
    everywhere = ("--recipe", "ivf", "--set", "nprobe=2", "--set", "nprobe=64")
    run_json(capsys, *score, *everywhere, "--out", tmp_path / "everywhere")
    found = json.loads((tmp_path / "everywhere" / "report.json").read_bytes())
    assert [item["map_score"] for item in found["scores"]] == pytest.approx([item["map_score"] for item in exact["scores"]])
    assert encoded_files(copied_bank, "ivf") == built


def test_the_image_index_has_settings_of_a_query_too(
    copied_bank: Path, one_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_json(capsys, "index", copied_bank, "--recipe", "hnsw")
    score = ("score", one_image, "--bank", copied_bank, "--recipe", "hnsw", "--out", tmp_path / "out", "--set")
    run_json(capsys, *score, "image=efSearch=32")
    method = json.loads((tmp_path / "out" / "report.json").read_bytes())["method"]
    assert method["recipe"]["query"]["image"] == "efSearch=32"
    assert "FAISS does not take the query parameters 'efSeach=32'" in run_error(capsys, *score, "image=efSeach=32")


@pytest.mark.parametrize(
    ("recipe", "assignment", "message"),
    [
        ("ivf", "nprob=2", "unknown key 'nprob'; known are nprobe"),
        ("ivf", "lists=2", "unknown key 'lists'; known are nprobe"),
        ("ivf", "nprobe=many", "nprobe='many' is of type str, expected int"),
        ("ivf", "nprobe=2.5", "nprobe=2.5 is of type float, expected int"),
        ("ivf", "nprobe=0", "nprobe=0 must be an integer of at least 1"),
        ("ivf", "nprobe=[", "nprobe"),
        ("compact", "rerank=-1", "rerank=-1 must be an integer of at least 1"),
        ("location", "radius=x", "radius='x' is of type str, expected int"),
        ("exact", "nprobe=2", "unknown key 'nprobe'"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_and_named(
    recipe: str,
    assignment: str,
    message: str,
    fitted_bank: Path,
    one_image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether or not the recipe's index was built before."""
    words = ("score", one_image, "--bank", fitted_bank, "--recipe", recipe, "--set", assignment, "--out", tmp_path / "out")
    assert message in run_error(capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("assignment", ["nprobe", "=2", "nprobe="])
def test_a_setting_without_name_or_value_is_wrong_usage(
    assignment: str, fitted_bank: Path, one_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", str(one_image), "--bank", str(fitted_bank), "--out", str(tmp_path / "out"), "--set", assignment]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err.endswith(f"argument --set: {assignment!r} is not NAME=VALUE\n")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--memory", "10kB"), "is too small: scoring image by image takes"),
        (("--memory", "much"), "memory='much' is not a size; write for example 500MB or 2GiB"),
        (("--localize", "flagged"), "localize='flagged' needs flag_above"),
        (("--localize", "flagged", "--flag-above", "nan"), "localize='flagged' needs flag_above"),
        (("--flag-above", "3"), "flag_above=3.0 does nothing with localize='all'"),
    ],
)
def test_budgets_and_thresholds_that_do_not_work(
    option: tuple[str, ...],
    message: str,
    fitted_bank: Path,
    one_image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("score", one_image, "--bank", fitted_bank, "--out", tmp_path / "out")
    assert message in run_error(capsys, *words, *option)
    assert not (tmp_path / "out").exists()


def test_the_memory_that_an_error_names_is_enough(
    fitted_bank: Path, one_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("score", one_image, "--bank", fitted_bank, "--out", tmp_path / "out", "--memory")
    named = re.search(r"takes ([^;]*);", run_error(capsys, *words, "10kB"))
    assert named is not None
    assert run_json(capsys, *words, named[1])["images"] == 1


def test_an_evaluation_of_flagged_images_alone_is_refused(
    fitted_bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evaluate", dataset_folder, "--bank", fitted_bank, "--out", tmp_path / "out", "--localize")
    for option in (("none",), ("flagged", "--flag-above", "3")):
        assert f"localize={option[0]!r} leaves images without a map" in run_error(capsys, *words, *option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{list: 9}", "recipe 'mine': build: settings: unknown key 'list'; known are lists, train_vectors"),
        ("{lists: many}", "recipe 'mine': build: settings: lists='many' is of type str, expected int"),
        ("{lists: 0}", "recipe 'mine': build: settings: lists=0 must be an integer of at least 1"),
        # The coarsest level has 24 x 16 vectors.
        ("{lists: 500}", "lists=500 is more than the 384 vectors of level"),
    ],
)
def test_settings_in_a_recipe_of_ones_own_that_do_not_fit(
    settings: str, message: str, copied_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nbuild: {{gallery: ivf, settings: {settings}}}\n")
    assert message in run_error(capsys, "index", copied_bank, "--recipe", recipe)


def test_a_recipe_of_ones_own_is_built_and_queried(
    copied_bank: Path, one_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nbuild: {gallery: ivf, settings: {lists: 9}}\nquery: {settings: {nprobe: 3}}\n")
    text = run_text(capsys, "index", copied_bank, "--recipe", recipe)
    assert "index 'mine' over 24 images" in text
    assert "gallery  ivf lists=9, train_vectors=50000" in text
    (found,) = run_json(capsys, "info", copied_bank)["galleries"]
    assert (found["recipe"], found["settings"]["lists"]) == ("mine", 9)
    score = ("score", one_image, "--bank", copied_bank, "--recipe", recipe, "--out", tmp_path / "out")
    run_json(capsys, *score)
    method = json.loads((tmp_path / "out" / "report.json").read_bytes())["method"]
    assert method["recipe"]["query"]["settings"] == {"nprobe": 3}
    # What is built is not what the file says any more.
    recipe.write_text("name: mine\nbuild: {gallery: ivf, settings: {lists: 8}}\n")
    error = run_error(capsys, *score)
    assert "'lists': 9" in error
    assert "'lists': 8" in error
    assert "spade-faiss index" in error


MODULES = {"fit": "banks", "score": "scores", "verify": "upkeep"}


@pytest.fixture
def as_from_a_terminal() -> Iterator[None]:
    """Signals end a command, as they do in a terminal: tests that run in the background are begun with some of them ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fit", "images", "--bank", "b"), "run the same command again to go on"),
        (("score", "images", "--bank", "b", "--out", "r"), "r shows what it showed before; the same command starts anew"),
        (("verify", "b"), "the same command starts anew"),
    ],
)
@pytest.mark.parametrize(("number", "code"), [(None, 130), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_says_what_is_true_of_the_command(
    words: tuple[str, ...],
    said: str,
    number: int | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fault: Ctrl-C in `score` said "run the same command again to go on", and SIGTERM cleared nothing."""
    cleared = []

    def interrupt(*_: object, **__: object) -> None:
        try:
            if number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleared.append(True)

    monkeypatch.setattr(f"spade_faiss.cli.{MODULES[words[0]]}._{words[0]}", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    assert main(words) == code
    assert capsys.readouterr().err == f"spade-faiss: interrupted; {said}\n"
    assert cleared == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_library_is_imported_is_no_bug(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a signal in the import of onnxruntime ended as ImportError, which was reported as a bug."""

    def interrupt(*_: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except BaseException:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr("spade_faiss.cli.upkeep._verify", interrupt)
    assert main(["verify", "b"]) == code
    assert capsys.readouterr().err == "spade-faiss: interrupted; the same command starts anew\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_names_give_a_terminal_no_orders(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """Fault: control characters of file names reached the terminal, and a newline made a second line."""
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(sorted((dataset_folder / "test" / "good").iterdir())[0], new / "fine.png")
    names = ["broken\n0 alarms of 1 images.png", "\x1b[2J.png", "\x9b31m.png", "pay\u202egnp.png", "\x7f.png"]
    for name in names:
        (new / name).write_bytes(b"no image")
    out = tmp_path / "out\x1b[2J"
    words = ["score", str(new), "--bank", str(fitted_bank), "--out", str(out), *(["--json"] if as_json else [])]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert not any(is_hidden(character) for text in printed for character in text.replace("\n", ""))
    if as_json:
        assert sorted(item["id"] for item in json.loads(printed.out)["skipped"]) == sorted(names)
    else:
        assert sum(line.startswith("  skipped") for line in printed.out.splitlines()) == len(names)
        assert r"  skipped broken\n0 alarms of 1 images.png: " in printed.out
    assert main([*words, "--max-skipped", "0"]) == 1
    assert main(["score", str(new / "\x1b[2J.png"), "--bank", "\x1b[31mb", "--out", "o"]) == 1
    with pytest.raises(SystemExit):
        main(["score", "--no\x1b[31m"])
    logging.getLogger("spade_faiss.x").warning("about %s", names[0] + names[1])
    printed = capsys.readouterr()
    assert not any(is_hidden(character) for text in printed for character in text.replace("\n", ""))
    assert r"WARNING about broken\n0 alarms" in printed.err
