"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss.cli import main
from spade_faiss.report.scorefile import ScoreFile

COMMANDS = ("fit", "extract", "index", "score", "evaluate", "info")
SMALL = ("--backbone", "efficientnet_lite0", "--resize", "72", "--crop", "64")


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'torchvision', 'faiss', 'numpy', 'scipy', 'h5py', 'matplotlib', 'PIL', 'yaml', 'jinja2'}"
    code = f"""
import sys
from spade_faiss.cli import main
try:
    main(["fit", "--help"])
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

    monkeypatch.setattr("spade_faiss.extract.fit", interrupt)
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


def test_other_settings_than_the_banks_are_refused_with_both_values(
    dataset_folder: Path, fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    before = (bank / "manifest.json").read_bytes()
    words = ["fit", str(dataset_folder / "train/good"), "--bank", str(bank), *SMALL, "--framing", "letterbox"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "'crop'" in error
    assert "'letterbox'" in error
    assert (bank / "manifest.json").read_bytes() == before


def test_index_builds_what_a_recipe_needs(fitted_bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = shutil.copytree(fitted_bank, tmp_path / "copy.bank")
    assert run_json(capsys, "index", bank, "--recipe", "exact")["built"] is False
    built = run_json(capsys, "index", bank, "--recipe", "hnsw")
    assert built["built"] is True
    assert built["bytes"] == (bank / "indexes" / "hnsw" / "image.faiss").stat().st_size
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
    extraction = {"--dtype": "float32", "--normalize": "l2", "--pool": "3", "--precision": "bfloat16", "--framing": "letterbox"}
    words = [word for pair in extraction.items() for word in pair]
    run_json(capsys, "fit", dataset_folder / "train/good", "--bank", bank, *SMALL, *words)
    info = run_json(capsys, "info", bank)
    source = info["source"]
    assert (info["dtype"], info["normalize"], info["pool"], info["input_size"]) == ("float32", "l2", 3, [64, 64])
    assert (source["precision"], source["preprocess"]["framing"]) == ("bfloat16", "letterbox")
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
