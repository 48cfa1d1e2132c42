"""The benchmark's machinery: points are kept and resumed, indexes are graded, reports need nothing but results."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.__main__ import main
from benchmarks.sweep import charts, embeddings, page, store
from benchmarks.sweep.charts import Dot
from benchmarks.sweep.embeddings import Grower, looks_of, open_base
from benchmarks.sweep.points import ImagePoint, PeerPoint, PixelPoint, Point, expand, load_sweep, point_id, point_of
from benchmarks.sweep.rows import rows_of
from benchmarks.sweep.run import here, run
from benchmarks.sweep.sets import Places, pixel_set
from benchmarks.sweep.store import Raw
from spade_faiss.core.errors import DependencyError, InputError

SWEEPS = Path(__file__).parents[2] / "benchmarks" / "sweeps"
DIM, REAL, TESTS = 24, 220, 40


def cloud(seed: int, count: int) -> npt.NDArray[np.float32]:
    """Embeddings on a curved sheet of six dimensions, and a little noise."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(count, 6)) * np.array([3, 2, 1.5, 1, 0.7, 0.5])
    mixing = np.random.default_rng(0).normal(size=(6, DIM))
    noise = 0.05 * rng.normal(size=(count, DIM))
    found: npt.NDArray[np.float32] = np.maximum(2 + np.tanh(latent @ mixing / 3) + noise, 0).astype(np.float32)
    return found


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """Where the embeddings of a real set are made up."""

    def made_up(name: str, places: Places) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        tests = cloud(2, TESTS)
        defective = np.arange(TESTS) % 2 == 1
        tests[defective] *= 1.1
        return cloud(1, REAL), tests, defective

    monkeypatch.setattr(embeddings, "embeddings_of", made_up)
    return Places(None, tmp_path / "scratch")


def image(factory: str, *, set: str = "elpv-grown", n: int = 600, query: str = "", rerank: int = 0) -> ImagePoint:
    return ImagePoint(set=set, n=n, factory=factory, query=query, rerank=rerank, k=5)


def test_every_list_of_a_sweep_stands_for_each_of_its_values(tmp_path: Path) -> None:
    assert list(expand({"a": [1, 2], "b": {"c": [3, 4], "d": 5}})) == [
        {"a": a, "b": {"c": c, "d": 5}} for a in (1, 2) for c in (3, 4)
    ]
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "- {kind: image, set: elpv, n: [10, 20], factory: Flat}\n- {kind: image, factory: Flat, n: 20, set: elpv}\n"
    )
    points = load_sweep(path)
    assert [point.n for point in points if isinstance(point, ImagePoint)] == [10, 20], "a point is named once"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a list"),
        ("- {kind: images, set: elpv}", "not one of image"),
        ("- {kind: image, set: elpv, n: 10, factory: Flat, nprobe: 3}", "unknown key 'nprobe'"),
        ("- {kind: image, set: elpv, factory: Flat}", "missing key 'n'"),
    ],
)
def test_what_is_no_sweep_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_sweep(path)


def test_a_points_name_is_that_of_its_settings() -> None:
    one = {"kind": "pixel", "set": "lite0", "recipe": "ivf", "k": 5, "query": {"nprobe": 2}, "build": {"lists": 8}}
    point, same = point_of(one, ""), point_of(dict(reversed(one.items())), "")
    assert point_id(point) == point_id(same)
    assert isinstance(point, PixelPoint)
    other = replace(point, query={"nprobe": 3})
    assert point_id(point) != point_id(other)
    assert point.build_key == other.build_key
    assert point.loaded().build.settings == {"lists": 8}
    assert point.loaded().query.settings == {"nprobe": 2}


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_sweeps_are_sweeps(path: Path) -> None:
    for point in load_sweep(path):
        if isinstance(point, PixelPoint):
            point.loaded()


def test_a_point_survives_its_file(tmp_path: Path) -> None:
    raw = Raw(image("Flat"), {"ids": np.arange(700).reshape(7, 100), "some times": np.array([0.5])}, {"machine": {"cpu": "x"}})
    path = store.write(tmp_path, raw)
    found = store.read(path)
    assert (found.point, found.facts) == (raw.point, raw.facts)
    for name, array in raw.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    assert [path.name for path in tmp_path.iterdir()] == [f"{point_id(raw.point)}.h5"]
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = 99
    with pytest.raises(InputError, match="no point of schema"):
        store.read(path)
    path.write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        store.read(path)


def test_a_run_resumes_and_goes_on_after_a_failure(places: Places, tmp_path: Path) -> None:
    points: list[Point] = [image("Flat"), image("no such index"), image("IVF8,Flat", query="nprobe=2"), image("IVF8,Flat")]
    out, said = tmp_path / "out", list[str]()
    failed = run(points, out, places, here(out, places), said.append)
    assert failed == [points[1]]
    assert any("FAILED" in line and "no such index" in line for line in said)
    assert len(list(out.glob("*.h5"))) == 3
    assert not list((places.scratch / "image_indexes").iterdir()), "an index goes after its last point"
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    asked: list[Point] = []
    run(points, out, places, lambda _, point: asked.append(point), said.append)
    assert {point_id(point) for point in asked} == {point_id(points[1])}, "what is there is left alone"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_the_truth_is_brute_force_in_float64(places: Places) -> None:
    base = open_base("elpv-grown", 600, 30, places)
    rows = base.rows.astype(np.float64)
    every = np.sort(np.linalg.norm(rows[None] - base.xq[:, None].astype(np.float64), axis=-1), axis=1)
    np.testing.assert_allclose(base.truth, every[:, : base.truth.shape[1]], rtol=1e-12)
    assert (base.truth[:, 0] > 1e-3).all(), "no query is a row of the base"
    assert 0 < base.defective.sum() < len(base.xq)
    larger = open_base("elpv-grown", 900, 30, places)
    np.testing.assert_array_equal(larger.rows[:600], base.rows)
    with pytest.raises(InputError, match="elpv-grown"):
        open_base("elpv", REAL + 1, 30, places)


def test_what_is_grown_looks_like_what_it_was_made_from() -> None:
    real, tests = cloud(1, 1000), cloud(2, 100)
    grown = np.asarray(Grower(real).block(0)[:1000], np.float32)
    ours, theirs = looks_of(grown, tests), looks_of(real, tests)
    np.testing.assert_allclose(ours["spectrum"], theirs["spectrum"], atol=0.06)
    np.testing.assert_allclose(ours["dimension"], theirs["dimension"], rtol=0.35)
    noise = np.random.default_rng(0).normal(real.mean(), real.std(), real.shape).astype(np.float32)
    assert looks_of(noise, tests)["dimension"][1] > 1.5 * theirs["dimension"][1], "plain noise would not pass"
    assert len(np.unique(np.concatenate([grown, real]), axis=0)) == 2000


def test_indexes_are_graded_by_what_they_find(places: Places, tmp_path: Path) -> None:
    points = [
        image("Flat"),
        image("IVF16,Flat", query="nprobe=1"),
        image("IVF16,Flat", query="nprobe=16"),
        image("PQ6x4"),
        image("PQ6x4", rerank=60),
    ]
    out = tmp_path / "out"
    assert not run(points, out, places, here(out, places), lambda _: None)
    rows = {row["label"]: row for row in rows_of(store.read_all(out))}
    flat, one, all_lists = rows["Flat"], rows["IVF16,Flat nprobe=1"], rows["IVF16,Flat nprobe=16"]
    assert flat["recall_1"] == flat["recall_k"] == all_lists["recall_k"] == 1
    assert flat["off_float64"] < 1e-4
    assert one["recall_k"] < 1
    assert one["excess_mean"] > 0
    assert rows["PQ6x4"]["recall_k"] < rows["PQ6x4 rerank=60"]["recall_k"]
    assert rows["PQ6x4 rerank=60"]["off_float64"] < 1e-5 < rows["PQ6x4"]["off_float64"]
    assert flat["times_flat"] == 1
    for row in rows.values():
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert 0 <= row["image_auroc"]["low"] <= row["image_auroc"]["value"] <= row["image_auroc"]["high"] <= 1
    assert flat["image_auroc_difference"] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-6)
    assert rows["PQ6x4"]["disk_bytes_per_image"] < flat["disk_bytes_per_image"] / 4


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the smoke sweep; what they were measured on is gone."""
    folder = tmp_path_factory.mktemp("smoke")
    words = ["run", str(SWEEPS / "smoke.yaml"), "--out", str(folder / "raw"), "--scratch", str(folder / "s"), "--one-process"]
    assert main(words) == 0
    shutil.rmtree(folder / "s")
    return folder


def test_the_report_needs_nothing_but_results(smoke: Path) -> None:
    assert main(["report", str(smoke / "raw"), "--out", str(smoke / "one")]) == 0
    assert main(["report", str(smoke / "raw"), "--out", str(smoke / "two")]) == 0
    text = (smoke / "one" / page.PAGE).read_text()
    assert (smoke / "two" / page.PAGE).read_text() == text
    links = set(re.findall(r'(?:src|href)="([^"]*)"', text))
    assert not [link for link in links if "//" in link], "it opens offline"
    assert {link for link in links if not link.startswith("#")} <= {page.ROWS}
    assert "location radius=2" in text
    assert "faiss-cpu" in text, "the machine is named"
    page.show(page.load(smoke / "one" / page.ROWS), smoke / "one")
    assert (smoke / "one" / page.PAGE).read_text() == text, "rows alone give the same page"


def test_rows_say_what_the_points_found(smoke: Path) -> None:
    rows = {row["label"]: row for row in rows_of(store.read_all(smoke / "raw"))}
    exact = rows["exact"]
    assert exact["recall_1"] == 1
    assert exact["same_maps"]
    assert exact["off_float64"] < 1e-5
    assert rows["location radius=0"]["recall_1"] < rows["location radius=2"]["recall_1"] < 1
    assert rows["ivf lists=8 nprobe=1"]["recall_1"] < rows["ivf lists=8 nprobe=4"]["recall_1"]
    assert rows["ivf lists=8 nprobe=1"]["disk_bytes_per_image"] > 0 == exact["disk_bytes_per_image"]
    assert rows["published"]["extrapolated"]
    assert rows["published"]["off_exact"] < 1e-3
    assert all(row["peak_bytes"] > 0 for row in rows.values())


def test_a_peer_that_rebuilds_finds_what_exact_finds(tmp_path: Path) -> None:
    places, out = Places(None, tmp_path / "scratch"), tmp_path / "out"
    peer = PeerPoint(set="lite0", peer="rebuilt", k=2, normals=6, images=2)
    exact = PixelPoint(set="lite0", recipe="exact", k=2, normals=6, images=2)
    assert not run([peer, exact], out, places, here(out, places), lambda _: None)
    rows = {row["label"]: row for row in rows_of(store.read_all(out))}
    assert rows["rebuilt"]["excess_mean"] == pytest.approx(0, abs=1e-3)
    assert rows["rebuilt"]["recall_1"] > 0.8, "without a direct evaluation, rounding costs some"


def test_patchcore_without_its_environment_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPADE_FAISS_PATCHCORE_PYTHON", raising=False)
    places = Places(None, tmp_path)
    point = PeerPoint(set="lite0", peer="patchcore", k=2, normals=6, images=2)
    with pytest.raises(DependencyError, match="--patchcore-python"):
        here(tmp_path / "out", places)("measure", point)


def test_real_sets_need_their_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data"):
        pixel_set("mvtec_bottle", Places(None, tmp_path))
    with pytest.raises(InputError, match="is not one of"):
        pixel_set("cats", Places(None, tmp_path))
    assert not any((tmp_path / "sets").iterdir()), "no half-made set is left"


def test_fronts_and_knees_by_hand() -> None:
    dots = [Dot(100, 0.5, "a", ""), Dot(50, 0.01, "b", ""), Dot(40, 0.02, "beaten", ""), Dot(1, 0.001, "c", "")]
    front = charts.front_of(dots)
    assert [dot.label for dot in front] == ["a", "b", "c"]
    assert charts.knee_of(front, 1e-6).label == "b"
    assert charts.knee_of(front, 0.1).label == "b", "below the floor, the fastest is as good as any"
    svg = charts.pareto("title", dots, x="speed", y="loss", floor=1e-6)
    assert svg.startswith("<svg")
    assert svg == charts.pareto("title", dots, x="speed", y="loss", floor=1e-6)
    for dot in front:
        assert f">{dot.label}<" in svg


def test_rows_survive_their_file(smoke: Path) -> None:
    rows = rows_of(store.read_all(smoke / "raw"))
    again = page.unpack(json.loads(page.dump(rows)))
    assert [row["id"] for row in again] == [row["id"] for row in rows]
    assert again[0]["machine"]["cpu"] == rows[0]["machine"]["cpu"]
