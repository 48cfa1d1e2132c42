"""The commands that keep a bank: what they print, what they change, how they fail."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from tests.support.banks import batch, files, make_bank
from tests.support.oracle import bank_of, product
from tests.support.pictures import NORMALS, TEST_NORMALS

COMMANDS = ("add", "remove", "restore", "compact", "verify", "suspects")


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command fails with."""
    assert main([*map(str, words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("spade-faiss: error: ")]
    return line.removeprefix("spade-faiss: error: ")


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Eight images in three shards."""
    features = product(1, 8, {"fine": (5, 6, 4)}, 8)
    return bank_of(tmp_path / "parts.bank", features, input_size=(20, 24), shards=[3, 2]).path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    last = capsys.readouterr().out.rstrip().split("\n\n")[-1]
    assert last.startswith(f"example: spade-faiss {command}")


@pytest.mark.parametrize(
    "words",
    [
        ["add", "images"],
        ["remove", "a"],
        ["restore", "a"],
        ["compact"],
        ["verify"],
        ["suspects", "b"],
        ["suspects", "b", "--out", "o", "--shown", "many"],
        ["index", "b", "--update", "--recipe", "ivf"],
        ["verify", "b", "--deepest"],
    ],
)
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)


@pytest.mark.parametrize(
    "words",
    [
        ["remove", "a", "--bank", "{none}"],
        ["restore", "a", "--bank", "{none}"],
        ["compact", "{none}"],
        ["verify", "{none}"],
        ["suspects", "{none}", "--out", "{none}/out"],
        ["index", "{none}", "--update"],
    ],
)
def test_a_bank_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    none = tmp_path / "none.bank"
    assert error_of(capsys, *(word.format(none=none) for word in words)).startswith(f"there is no bank at {none}")
    assert not none.exists()


def test_a_life_of_a_bank(fitted_bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From added images to a compacted bank, with the numbers for programs and the text for people."""
    bank = Path(shutil.copytree(fitted_bank, tmp_path / "weave.bank"))
    more = Path(shutil.copytree(dataset_folder / "test" / "good", tmp_path / "more"))
    for number, path in enumerate(sorted(more.iterdir())):
        path.rename(more / f"new {number}.png")
    shutil.copy(dataset_folder / "train" / "good" / "003.png", more / "again.png")
    run_json(capsys, "index", bank, "--recipe", "hnsw")

    added = run_json(capsys, "add", more, "--bank", bank)
    assert (added["images"], added["added"], added["present"]) == (NORMALS + TEST_NORMALS, TEST_NORMALS, 0)
    assert added["duplicates"] == [{"id": "again.png", "of": "003.png"}]
    assert (added["removed"], added["skipped"]) == ([], [])
    text = run(capsys, "add", more, "--bank", bank)
    assert f"added 0, already there {TEST_NORMALS}, skipped 0" in text
    assert "left out again.png: it is the same image as 003.png" in text

    info = run_json(capsys, "info", bank)
    (index,) = info["indexes"]
    assert (index["indexed"], index["unindexed"], index["tombstones"]) == (NORMALS, TEST_NORMALS, 0)
    assert "add the images that are not indexed yet: spade-faiss index" in run(capsys, "info", bank)
    (updated,) = run_json(capsys, "index", bank, "--update")["built"]
    assert (updated["recipe"], updated["done"]) == ("hnsw", {"image": f"added {TEST_NORMALS} images to it"})
    (updated,) = run_json(capsys, "index", bank, "--update")["built"]
    assert updated["done"] == {"image": "is up to date"}
    assert "not indexed yet" not in run(capsys, "info", bank)

    removed = run_json(capsys, "remove", "new 1.png", "000.png", "--bank", bank)
    assert (removed["done"], removed["images"], removed["removed"]) == (2, NORMALS + TEST_NORMALS - 2, 2)
    left_out = run_json(capsys, "add", more, "--bank", bank)
    assert (left_out["added"], left_out["present"], left_out["removed"]) == (0, TEST_NORMALS - 1, ["new 1.png"])
    assert "left out 1 that were removed from the bank before: new 1.png" in run(capsys, "add", more, "--bank", bank)
    restored = run_json(capsys, "restore", "new 1.png", "--bank", bank)
    assert (restored["done"], restored["removed"]) == (1, 1)

    info = run_json(capsys, "info", bank)
    assert info["removed"] == ["000.png"]
    assert [(event["action"], event["images"]) for event in info["history"]] == [
        ("add", NORMALS),
        ("add", TEST_NORMALS),
        ("remove", 2),
        ("restore", 1),
    ]
    text = run(capsys, "info", bank)
    assert f"{NORMALS + TEST_NORMALS - 1} normal images, 1 removed ones until it is compacted, generation 4" in text
    assert "restore 1 images, generation 4" in text

    compacted = run_json(capsys, "compact", bank)
    assert (compacted["dropped"], compacted["images"], compacted["removed"]) == (1, NORMALS + TEST_NORMALS - 1, 0)
    assert compacted["bytes"] < compacted["bytes_before"]
    assert 0 < compacted["bytes_written"] <= compacted["bytes"]
    (updated,) = run_json(capsys, "index", bank, "--update")["built"]
    assert updated["done"]["image"].startswith("built anew: ")
    assert run_json(capsys, "verify", bank, "--deep")["problems"] == []
    ids = Bank.open(bank).ids
    assert ids == [f"{n:03d}.png" for n in range(1, NORMALS)] + [f"new {n}.png" for n in range(TEST_NORMALS)]


def test_remove_and_restore_in_words(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "remove", "image 0", "image 3", "--bank", bank)
    assert f"{bank}: removed 2 of image 0, image 3; 6 normal images are left" in text
    assert f"spade-faiss restore ID --bank {bank}" in text
    assert f"spade-faiss compact {bank}" in text
    assert "restored 1 of image 3, image 4; 7 normal images" in run(capsys, "restore", "image 3", "image 4", "--bank", bank)


def test_ids_come_from_a_file_too(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "ids.txt"
    for text in ("image 1\nimage 4\n", "\ufeffimage 1\r\n\r\nimage 4\r\nimage 1", "image 4\nimage 1\n\n\n"):
        listed.write_bytes(text.encode())
        done = run_json(capsys, "remove", "--list", listed, "--bank", bank)
        assert (done["done"], done["images"]) == (2, 6)
        assert run_json(capsys, "restore", "--list", listed, "image 1", "--bank", bank)["done"] == 2
    assert run_json(capsys, "remove", "image 0", "--list", listed, "--bank", bank)["done"] == 3


def test_every_character_but_a_line_break_of_a_listed_id_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One a line: lines end where an editor ends them, not at each character that Unicode calls a separator."""
    names = [" leading", "trailing ", "ü 日本", "a\x0bb", "a\x1cb", "a\u2028b", "a\x85b", "a\tb"]
    made = make_bank(tmp_path / "bank")
    made.append(batch(*names, "other"))
    listed = tmp_path / "ids.txt"
    listed.write_bytes("\n".join(names).encode())
    assert run_json(capsys, "remove", "--list", listed, "--bank", made.path)["done"] == len(names)
    assert Bank.open(made.path).ids == ["other"]


def test_ids_that_are_not_there_change_nothing(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(bank)
    for command in ("remove", "restore"):
        said = error_of(capsys, command, "image 1", "image 99", "../x", "--bank", bank)
        assert "does not hold 2 of these images" in said
        assert "the first is 'image 99'" in said
        said = error_of(capsys, command, "--bank", bank)
        assert said == "no image was named; give ids, --list FILE with one a line, or --product NAME in a bank of several"
        assert "none.txt" in error_of(capsys, command, "--list", tmp_path / "none.txt", "--bank", bank)
        (tmp_path / "empty.txt").touch()
        assert "no image was named" in error_of(capsys, command, "--list", tmp_path / "empty.txt", "--bank", bank)
        (tmp_path / "latin.txt").write_bytes("fü".encode("latin-1"))
        assert "does not hold 1" in error_of(capsys, command, "--list", tmp_path / "latin.txt", "--bank", bank)
    assert files(bank) == before


def test_compact_says_what_it_did_and_what_to_do_about_the_indexes(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dropped 0 removed images" in run(capsys, "compact", bank)
    run(capsys, "index", bank, "--recipe", "hnsw")
    run(capsys, "remove", "image 2", "--bank", bank)
    text = run(capsys, "compact", bank)
    assert "dropped 1 removed images" in text
    assert f"its indexes do not hold the shards that were written: spade-faiss index {bank} --update" in text
    again = run(capsys, "compact", bank)
    assert "written 0" in again
    assert "--update" not in again


def test_update_without_an_index_says_so(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "index", bank, "--update")["built"] == []
    assert "there is nothing to update" in run(capsys, "index", bank, "--update")


def test_update_rebuilds_everything_when_asked_to(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "index", bank, "--recipe", "hnsw")
    recipe = bank.parent / "small.yaml"
    recipe.write_text("name: small\nbuild:\n  gallery: ivf\n  settings:\n    lists: 2\n")
    run(capsys, "index", bank, "--recipe", recipe)
    built = run_json(capsys, "index", bank, "--update", "--rebuild")["built"]
    assert [(item["recipe"], list(item["done"].values())) for item in built] == [
        ("hnsw", ["built anew: asked for"]),
        ("small", ["built anew: asked for"]),
    ]
    text = run(capsys, "index", bank, "--update")
    assert text.count("is up to date") == 2
    info = run(capsys, "info", bank)
    assert "index      hnsw: HNSW32, 8 images indexed" in info
    assert "index      small: ivf lists=2" in info


@pytest.mark.parametrize("deep", [(), ("--deep",)])
def test_verify_exits_with_0_or_1(bank: Path, capsys: pytest.CaptureFixture[str], deep: tuple[str, ...]) -> None:
    run(capsys, "index", bank, "--recipe", "hnsw")
    found = run_json(capsys, "verify", bank, *deep)
    assert (found["images"], found["shards"], found["indexes"], found["problems"]) == (8, 3, 1, [])
    assert f"{bank}: 8 images in 3 shards, 1 indexes: nothing is wrong" in run(capsys, "verify", bank, *deep)
    shard = sorted((bank / "features").iterdir())[1]
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (index,) = (bank / "indexes" / "hnsw").glob("*.faiss")
    index.unlink()
    assert main(["verify", str(bank), *deep]) == 1
    said = capsys.readouterr().out
    assert f"{bank}: 8 images in 3 shards, 1 indexes: 2 problems" in said
    assert shard.name in said
    assert index.name in said
    assert main(["verify", str(bank), "--json", *deep]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2
    assert shard.name in error_of(capsys, "remove", "image 0", "--bank", bank)


def test_suspects_end_to_end(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = run_json(capsys, "suspects", bank, "--out", out, "--shown", "3", "--k-image", "2", "--k-gallery", "2")
    assert (found["out"], found["images"], len(found["suspects"])) == (str(out), 8, 3)
    with (out / "suspects.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines[:3]] == [item["id"] for item in found["suspects"]]
    assert len(lines) == 8
    text = run(capsys, "suspects", bank, "--out", out, "--k-image", "2", "--k-gallery", "2", "--quiet")
    assert "8 normal images, each scored against the others; the least normal:" in text
    assert found["suspects"][0]["id"] in text
    assert f"spade-faiss remove ID --bank {bank}" in text
    assert (out / "report.html").is_file()
    # What it names can be taken out as it is named.
    worst = found["suspects"][0]["id"]
    assert run_json(capsys, "remove", worst, "--bank", bank)["done"] == 1
    after = run_json(capsys, "suspects", bank, "--out", out, "--k-image", "2", "--k-gallery", "2")
    assert worst not in [item["id"] for item in after["suspects"]]
    assert "has 6 others, k=7" in error_of(capsys, "suspects", bank, "--out", out, "--k-image", "7")


def test_add_needs_the_banks_own_backbone(
    bank: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = dataset_folder / "test" / "good"
    assert "was made by another extractor; hand it features" in error_of(capsys, "add", good, "--bank", bank)
    assert "there is no bank at" in error_of(capsys, "add", good, "--bank", tmp_path / "none")
    assert "does not exist" in error_of(capsys, "add", tmp_path / "none", "--bank", bank)


def test_the_history_of_a_long_life_is_shown_at_its_end(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Bank.open(bank)
    for _ in range(8):
        opened.remove(["image 1"])
        opened.restore(["image 1"])
    info = run_json(capsys, "info", bank)
    assert len(info["history"]) == 19
    text = run(capsys, "info", bank)
    assert text.count("  history    ") == 10
    assert "generation 19" in text
    assert "generation 3\n" not in text
    assert info["readers"] == [3]
