"""Large pictures in tiles, from files to a folder of results, by the command line and a network."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import spade_faiss.workflows.extract as extract_module
from spade_faiss import Bank, Detector, Preprocess
from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.loading import load_backbone
from spade_faiss.features.pictures import to_input
from spade_faiss.features.tiles import TileGrid
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.metrics import localization_metrics
from spade_faiss.workflows.extract import extract
from tests.support.networks import TINY, tiny_state
from tests.support.pictures import HEIGHT, NORMALS, WIDTH, save_png, weave

TILES = ["--tile", "64", "--overlap", "16"]


@pytest.fixture(scope="module")
def tiled(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of efficientnet_lite0 in four tiles of each of the set's normals. Copy it before you change it."""
    path = tmp_path_factory.mktemp("tiled") / "bank"
    words = ["--backbone", "efficientnet_lite0", "--preset", "spade", *TILES, "--quiet"]
    assert main(["fit", str(dataset_folder / "train/good"), "--bank", str(path), *words]) == 0
    return path


def test_a_bank_holds_the_tiles_of_its_pictures(tiled: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = Bank.open(tiled)
    assert (len(bank), len(bank.pictures)) == (4 * NORMALS, NORMALS)
    assert bank.manifest.source is not None
    preprocess = bank.manifest.source.preprocess
    assert (preprocess.tile, preprocess.overlap, preprocess.size, preprocess.resize) == (64, 16, 64, None)
    assert bank.layout.input_size == (64, 64)
    corners = [(0, 0), (32, 0), (0, 16), (32, 16)]
    assert bank.tile_places is not None
    assert bank.tile_places[4:8].tolist() == [[*corner, WIDTH, HEIGHT] for corner in corners]
    name = bank.pictures.ids[1]
    assert bank.ids[4:8] == [f"{name}@{left},{top}" for left, top in corners]
    # The features are the network's own of what was cut out.
    pixels = np.asarray(Image.open(dataset_folder / "train/good" / name))
    inputs = np.stack([to_input(pixels[top : top + 64, left : left + 64], preprocess) for left, top in corners])
    embedding, _ = load_backbone("efficientnet_lite0", preprocess=preprocess)(inputs)
    np.testing.assert_allclose(bank.embedding(np.arange(4, 8)), embedding, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    assert main(["info", str(tiled)]) == 0
    text = capsys.readouterr().out
    assert f"{NORMALS} normal images ({4 * NORMALS} entries)" in text
    assert "tiles of 64 x 64 that share 16 pixels or more" in text


def test_results_are_in_the_pictures_own_pixels(tiled: Path, dataset_folder: Path, tmp_path: Path) -> None:
    words = ["--bank", str(tiled), "--out", str(tmp_path / "out"), "--quiet", "--overlays"]
    assert main(["evaluate", str(dataset_folder), *words]) == 0
    numbers = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    with ScoreFile.open(tmp_path / "out/scores.h5") as scores:
        assert scores.is_tiled
        assert scores.size == (64, 64)
        names, maps = scores.ids, list(scores.maps())
        assert {found.shape for found in maps} == {(HEIGHT, WIDTH)}
        np.testing.assert_array_equal(scores.map_score, [found.max() for found in maps])
    detector = Detector.open(tiled)
    direct = detector.score([dataset_folder / name for name in names])
    np.testing.assert_allclose(direct.maps, maps, rtol=1e-4, atol=1e-4)
    masks = np.zeros((len(names), HEIGHT, WIDTH), np.bool_)
    for mask, name in zip(masks, names, strict=True):
        kind, own = name.split("/")[-2:]
        if kind != "good":
            mask[:] = np.asarray(Image.open(dataset_folder / "ground_truth" / kind / own.replace(".png", "_mask.png"))) > 0
    expected = localization_metrics(masks, np.stack(maps))
    assert numbers["metrics"]["pixel"]["auroc"] == pytest.approx(expected.auroc)
    assert numbers["metrics"]["pixel"]["aupro"] == pytest.approx(expected.aupro)
    assert expected.auroc > 0.9
    with (tmp_path / "out/regions.csv").open(encoding="utf-8", newline="") as file:
        regions = list(csv.DictReader(file))
    assert regions
    for region in regions:
        assert region["input_size"] == region["original_size"] == f"{HEIGHT}x{WIDTH}"
        assert region["input_x"] == region["original_x"]
    with Image.open(tmp_path / "out" / next(iter(numbers["overlays"].values()))) as shown:
        assert shown.size == (WIDTH, HEIGHT)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Nearest normal images" in page
    assert "resize mode" not in page.split("Details")[0]


def test_pictures_of_several_sizes(tiled: Path, tmp_path: Path, dataset_folder: Path) -> None:
    """Larger ones, one that is as large as a tile, and one that is smaller: its map is as small as it is."""
    good = np.asarray(Image.open(dataset_folder / "train/good/000.png"))
    sizes = {"large.png": np.tile(good, (2, 3, 1)), "one.png": good[:64, :64], "small.png": good[:30, :70]}
    for name, pixels in sizes.items():
        save_png(pixels, tmp_path / "new" / name)
    words = ["--bank", str(tiled), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["score", str(tmp_path / "new"), *words]) == 0
    with ScoreFile.open(tmp_path / "out/scores.h5") as scores:
        for name, found in zip(scores.ids, scores.maps(), strict=True):
            assert found.shape == sizes[name].shape[:2]
    with h5py.File(tmp_path / "out/scores.h5") as file:
        assert file["maps"].attrs["tile"].tolist() == [64, 64]
        assert {file["maps"][name].shape for name in file["maps"]} == {pixels.shape[:2] for pixels in sizes.values()}
    frames = Detector.open(tiled).score(list(sizes.values()), ids=list(sizes))
    assert frames.sizes is not None
    assert frames.sizes.tolist() == [list(pixels.shape[:2]) for pixels in sizes.values()]


def test_same_place_by_the_command_line(tiled: Path, dataset_folder: Path, tmp_path: Path) -> None:
    bank = Path(shutil.copytree(tiled, tmp_path / "bank"))
    words = ["--tile-neighbors", "same-place", "--quiet"]
    assert main(["calibrate", str(bank), *words]) == 0
    score = ["score", str(dataset_folder / "test/spot"), "--bank", str(bank), "--out", str(tmp_path / "out"), *words]
    assert main(score) == 0
    numbers = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert numbers["method"]["tile_neighbors"] == "same-place"
    assert numbers["calibration"] is not None
    anywhere = Detector.open(bank).score(dataset_folder / "test/spot")
    found = Detector.open(bank, method=Method(tile_neighbors="same-place")).score(dataset_folder / "test/spot")
    assert (found.image_score >= anywhere.image_score).all(), "fewer tiles are searched"
    assert (found.image_score > anywhere.image_score).any()


def test_upkeep_is_by_picture(tiled: Path, tmp_path: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = Path(shutil.copytree(tiled, tmp_path / "bank"))
    name = Bank.open(bank).pictures.ids[3]
    assert main(["remove", name, "--bank", str(bank)]) == 0
    assert f"{NORMALS - 1} normal images ({4 * NORMALS - 4} entries) are left" in capsys.readouterr().out
    assert main(["suspects", str(bank), "--out", str(tmp_path / "suspects"), "--quiet"]) == 0
    with (tmp_path / "suspects/suspects.csv").open(encoding="utf-8", newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == {*Bank.open(tiled).pictures.ids} - {name}
    assert main(["calibrate", str(bank), "--quiet", "--holdout", str(dataset_folder / "test/good")]) == 0
    words = ["--bank", str(bank), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["score", str(dataset_folder / "test/good"), *words]) == 0
    assert main(["drift", str(tmp_path / "out"), "--bank", str(bank), "--quiet"]) == 0
    assert main(["verify", str(bank), "--deep", "--quiet"]) == 0


def test_an_interrupted_extraction_leaves_whole_pictures(
    dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards end between pictures, also where the network takes fewer tiles than a picture has at once."""
    monkeypatch.setattr(extract_module, "BATCH_SIZE", 3)
    monkeypatch.setattr(extract_module, "SHARD_BYTES", 1)
    weights = tmp_path / "tiny.pt"
    import torch

    torch.save(tiny_state(), weights)
    backbone = load_backbone(TINY, weights=weights, preprocess=Preprocess(tile=32, overlap=8))
    calls = iter(range(100))

    class Interrupted(type(backbone)):  # type: ignore[misc]
        def __call__(self, inputs: Any) -> Any:
            if next(calls) == 11:  # in the middle of the second picture
                raise KeyboardInterrupt
            return super().__call__(inputs)

    broken = object.__new__(Interrupted)
    broken.__dict__.update(backbone.__dict__)
    good, per_picture = dataset_folder / "train/good", len(TileGrid(WIDTH, HEIGHT, 32, 8))
    assert per_picture > 3
    with pytest.raises(KeyboardInterrupt):
        extract(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=broken, network=False))
    left = Bank.open(tmp_path / "bank")
    assert 0 < len(left.pictures) < NORMALS
    assert set(left.pictures.sizes.tolist()) == {per_picture}
    done = extract(good, bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone, network=False))
    whole = extract(good, bank=tmp_path / "whole", preset="spade", extraction=Extraction(backbone=backbone, network=False))
    assert done.added == NORMALS - len(left.pictures)
    assert done.bank.ids == whole.bank.ids
    rows = np.arange(len(whole.bank))
    np.testing.assert_allclose(done.bank.embedding(rows), whole.bank.embedding(rows), rtol=1e-4, atol=1e-5)


def test_views_of_tiles_are_refused(dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--backbone", "efficientnet_lite0", "--preset", "spade", *TILES, "--augment", "flip", "--quiet"]
    assert main(["extract", str(dataset_folder / "train/good"), "--bank", str(tmp_path / "bank"), *words]) != 0
    assert "augment='flip' is of whole images, and tile cuts them up" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


def test_a_tiled_bank_takes_no_other_tiles(tiled: Path, dataset_folder: Path) -> None:
    backbone = load_backbone("efficientnet_lite0", preprocess=Preprocess(tile=64, overlap=8))
    with pytest.raises(InputError, match=r"preprocess\.overlap=16, these features with 8"):
        extract(dataset_folder / "train/good", bank=tiled, preset="spade", extraction=Extraction(backbone=backbone))


_MEASURE = """
import sys
from spade_faiss import Detector, score_folder
from spade_faiss.core.settings import Method, Run
from tests.support.memory import watched
# One neighbor: what a picture takes does not depend on it, and the search takes a fifth of the time.
detector = Detector.open(sys.argv[1], method=Method(k_gallery=1), run=Run(memory="1GiB"))
_ = detector.backbone
with watched() as growth:
    results = score_folder(sys.argv[2], bank=detector, out=sys.argv[3])
print(growth.most, detector.plan.batch)
"""


@pytest.mark.slow
def test_a_picture_of_12_megapixels_is_scored_within_1_gib(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def large() -> npt.NDArray[np.uint8]:
        return np.tile(weave(rng), (38, 42, 1))[:3000, :4000]

    for name in ("good/a.png", "new/b.png"):
        save_png(large(), tmp_path / name)
    words = [
        "--backbone",
        "efficientnet_lite0",
        "--preset",
        "spade",
        "--tile",
        "448",
        "--overlap",
        "64",
        "--no-calibrate",
        "--quiet",
    ]
    assert main(["fit", str(tmp_path / "good"), "--bank", str(tmp_path / "bank"), *words]) == 0
    arguments = [str(tmp_path / name) for name in ("bank", "new", "out")]
    done = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=True)
    most, batch = map(int, done.stdout.split())
    assert most < 1 << 30
    assert batch >= 1
    with ScoreFile.open(tmp_path / "out/scores.h5") as scores:
        assert scores.map(0).shape == (3000, 4000)
    with pytest.raises(InputError, match="is too small: scoring tile by tile takes"):
        Detector.open(tmp_path / "bank", run=Run(memory="300MB"))
