"""The engine against SPADE written out in float64, and against the arithmetic of the implementation that people know."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.ndimage import gaussian_filter

from spade_faiss import Detector, Scores
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from tests.support import oracle
from tests.support.detectors import open_detector
from tests.support.oracle import Expected, Features, bank_of, batch_of, product

# Odd sizes on purpose: no level is a multiple of another, nor the input of any.
SHAPES = {"fine": (29, 31, 6), "middle": (15, 16, 8), "coarse": (7, 9, 10)}
INPUT = (117, 126)
SMALL_SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
SMALL_INPUT = (40, 43)
DIM = 20


@cache
def seven() -> Features:
    return product(1, 7, SHAPES, DIM)


@cache
def sixty() -> Features:
    return product(2, 60, SMALL_SHAPES, DIM)


@cache
def queries() -> Features:
    return product(3, 2, SHAPES, DIM, defect=True)


@cache
def small_queries() -> Features:
    return product(4, 4, SMALL_SHAPES, DIM, defect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two banks, each in several shards."""
    folder = tmp_path_factory.mktemp("banks")
    bank_of(folder / "seven", seven(), input_size=INPUT, shards=[3, 1])
    bank_of(folder / "sixty", sixty(), input_size=SMALL_INPUT, shards=[17, 25])
    return folder


def agree(scores: Scores, expected: Expected, *, atol: float = 0.0) -> None:
    """All outputs to 1e-4 of each value; `atol` is in units of the L2 distance."""
    close(scores.image_score, expected.image_score)
    close(scores.neighbor_dist, expected.neighbor_dist)
    # By name only where the distance tells the images apart: image 4 is image 3.
    ids = np.array(oracle.names(100))[expected.neighbor_rows]
    tied = np.isclose(expected.neighbor_dist[:, 1:], expected.neighbor_dist[:, :-1], rtol=1e-5)
    alone = ~np.pad(tied, ((0, 0), (1, 0))) & ~np.pad(tied, ((0, 0), (0, 1)))
    alone[:, -1] = False  # its twin may be the next
    np.testing.assert_array_equal(scores.neighbor_ids[alone], ids[alone])
    assert scores.level_dist.keys() == expected.level_dist.keys()
    for found, values in [
        (scores.maps, expected.maps),
        *((scores.level_dist[x], expected.level_dist[x]) for x in scores.level_dist),
    ]:
        if scores.distance == "l2" or not atol:
            close(found, values, atol)
        else:
            close(np.sqrt(found), np.sqrt(values), atol)


def close(found: npt.NDArray[Any], expected: npt.NDArray[Any], atol: float = 0.0) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)


def rounding(features: Features) -> float:
    """What float32 does to a distance of vectors that were interpolated, which is the error of the vectors themselves."""
    return 2e-7 * max(float(np.linalg.norm(maps, axis=-1).max()) for maps in features.levels.values())


@cache
def galleries(name: str, k_gallery: int, fusion: str) -> dict[str, oracle.Doubles]:
    """The three smallest squared distances, which every kappa and distance of a test shares."""
    bank, query = (seven(), queries()) if name == "seven" else (sixty(), small_queries())
    sq_dist = np.stack([oracle.sq_distances(bank.embedding, q) for q in query.embedding])
    return oracle.pixel_sq_distances(bank, query, sq_dist.argsort(axis=1, kind="stable")[:, :k_gallery], 3, fusion)


@pytest.mark.parametrize("distance", ["l2", "squared_l2"])
@pytest.mark.parametrize("fusion", ["mean", "concat"])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize(
    "case",
    [("seven", 1, 1), ("seven", 5, 5), ("seven", 7, 1), ("seven", 1, 5), ("sixty", 50, 50), ("sixty", 1, 50), ("sixty", 50, 5)],
)
def test_the_detector_computes_the_definition(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, int, int],
    kappa: int,
    fusion: str,
    distance: str,
) -> None:
    name, k_image, k_gallery = case
    bank, query = (seven(), queries()) if name == "seven" else (sixty(), small_queries())
    method: dict[str, Any] = {
        "k_image": k_image,
        "k_gallery": k_gallery,
        "kappa": kappa,
        "fusion": fusion,
        "distance": distance,
    }
    found = {level: dist[..., :kappa] for level, dist in galleries(name, k_gallery, fusion).items()}
    monkeypatch.setattr(oracle, "pixel_sq_distances", lambda *_: found)
    expected = oracle.spade(bank, query, input_size=INPUT if name == "seven" else SMALL_INPUT, **method)
    scores = open_detector(folder / name, **method).score_features(batch_of(query))
    assert scores.distance == distance
    agree(scores, expected, atol=rounding(bank) if fusion == "concat" else 0.0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("pool", "normalize"), [(3, "none"), (1, "l2"), (5, "l2")])
def test_prepared_maps(tmp_path: Path, pool: int, normalize: str, dtype: str) -> None:
    def prepare(features: Features) -> Features:
        levels = {name: oracle.prepared(maps, pool=pool, normalize=normalize) for name, maps in features.levels.items()}
        return Features(features.embedding, {name: maps.astype(dtype) for name, maps in levels.items()})

    bank, query = sixty()[:8], small_queries()
    bank_of(tmp_path / "b", bank, input_size=SMALL_INPUT, dtype=dtype, pool=pool, normalize=normalize)
    scores = Detector.open(tmp_path / "b").score_features(batch_of(query))
    expected = oracle.spade(prepare(bank), prepare(query), input_size=SMALL_INPUT)
    # A value on the edge between two float16 may fall to either side.
    close(scores.maps, expected.maps, atol=rounding(prepare(bank)) if dtype == "float32" else 2e-4)


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_sigma(folder: Path, sigma: float) -> None:
    scores = Detector.open(folder / "sixty", method=Method(sigma=sigma)).score_features(batch_of(small_queries()))
    agree(scores, oracle.spade(sixty(), small_queries(), input_size=SMALL_INPUT, sigma=sigma))


def test_more_neighbors_than_normals_is_an_error(folder: Path) -> None:
    for name in ("k_image", "k_gallery"):
        with pytest.raises(InputError, match=rf"{name}=8 .* number of normal images, 7 "):
            open_detector(folder / "seven", **{name: 8})
    assert Detector.open(folder / "seven", method=Method(k_image=7, k_gallery=7)).method.k_image == 7


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_a_batch_gives_the_numbers_of_its_images(folder: Path, fusion: str) -> None:
    detector = Detector.open(folder / "seven", method=Method(fusion=fusion, kappa=3))
    batch = product(5, 5, SHAPES, DIM, defect=True)
    together = detector.score_features(batch_of(batch))
    for image in range(len(batch)):
        alone = detector.score_features(batch_of(batch[image : image + 1]))
        for name in ("image_score", "maps", "neighbor_dist", "neighbor_ids"):
            same(getattr(together, name)[image], getattr(alone, name)[0])
        for level, dist in together.level_dist.items():
            same(dist[image], alone.level_dist[level][0])


def same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
    if a.dtype.kind == "U":
        np.testing.assert_array_equal(a, b)
    else:
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_nearest_names_the_vector_that_was_measured(folder: Path, fusion: str, kappa: int) -> None:
    bank, query = sixty(), small_queries()
    scores = Detector.open(folder / "sixty", method=Method(fusion=fusion, kappa=kappa, k_image=2)).score_features(
        batch_of(query)
    )
    smallest = galleries("sixty", 5, fusion)
    if fusion == "concat":
        bank, query = oracle.concatenated(bank), oracle.concatenated(query)
    row_of = {name: row for row, name in enumerate(oracle.names(60))}
    for level, nearest in scores.nearest.items():
        assert set(np.unique(nearest["neighbor"])) <= set(range(5))
        for image, y, x in np.ndindex(nearest.shape):
            at = nearest[image, y, x]
            row = row_of[str(scores.neighbor_ids[image, at["neighbor"]])]
            named = bank.levels[level][row, at["y"], at["x"]].astype(np.float64)
            dist = np.linalg.norm(named - query.levels[level][image, y, x])
            assert dist == pytest.approx(np.sqrt(smallest[level][image, y, x, 0]), rel=1e-4, abs=rounding(sixty()))
            if kappa == 1:
                assert dist == pytest.approx(scores.level_dist[level][image, y, x], rel=1e-4, abs=rounding(sixty()))


def tiny_differences() -> Features:
    """Vectors a thousand from the origin, a thousandth from each other: |q|^2 + |x|^2 - 2qx holds no digit of the truth."""
    rng = np.random.default_rng(11)
    levels = {name: (1e3 + 1e-3 * rng.normal(size=(7, *shape))).astype(np.float32) for name, shape in SMALL_SHAPES.items()}
    return Features((1e3 + 1e-2 * rng.normal(size=(7, DIM))).astype(np.float32), levels)


def flat_regions() -> Features:
    """Two flat halves far apart, so that no center serves both; vectors of a half differ by 1e-4 of their length."""
    rng = np.random.default_rng(12)
    levels = {}
    for name, (height, width, channels) in SMALL_SHAPES.items():
        maps = np.ones((7, height, width, channels))
        maps[:, :, width // 2 :] = -30
        levels[name] = (maps * (1 + 1e-4 * rng.normal(size=maps.shape))).astype(np.float32)
    return Features(rng.normal(size=(7, DIM)).astype(np.float32), levels)


@pytest.mark.parametrize("fusion", ["mean", "concat"])
@pytest.mark.parametrize(("pool", "normalize"), [(1, "none"), (3, "none"), (1, "l2"), (3, "l2")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("data", ["product", "tiny_differences", "flat_regions"])
def test_an_image_that_is_in_its_gallery_scores_zero(
    tmp_path: Path, data: str, dtype: str, pool: int, normalize: str, fusion: str
) -> None:
    normals = {"product": sixty()[:7], "tiny_differences": tiny_differences(), "flat_regions": flat_regions()}[data]
    bank_of(tmp_path / "b", normals, input_size=SMALL_INPUT, shards=[2], dtype=dtype, pool=pool, normalize=normalize)
    detector = Detector.open(tmp_path / "b", method=Method(k_gallery=3, fusion=fusion))
    for part in (normals, normals[4:5]):
        scores = detector.score_features(batch_of(part))
        for dist in (*scores.level_dist.values(), scores.maps, scores.neighbor_dist[:, 0]):
            assert not dist.any()


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_adversarial_data_agrees_with_the_definition(tmp_path: Path, fusion: str) -> None:
    """Where a matrix product would cancel, every distance is still right, not only those of zero."""
    for name, data in {"tiny": tiny_differences(), "flat": flat_regions()}.items():
        bank_of(tmp_path / name, data[:6], input_size=SMALL_INPUT)
        scores = Detector.open(tmp_path / name, method=Method(fusion=fusion)).score_features(batch_of(data[6:]))
        expected = oracle.spade(data[:6], data[6:], input_size=SMALL_INPUT, fusion=fusion)
        if fusion == "mean":
            agree(scores, expected)
        else:
            for level, dist in expected.level_dist.items():
                close(scores.level_dist[level], dist, rounding(data))


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_stored_channels_first(tmp_path: Path, dtype: str, normalize: str) -> None:
    """An extractor that keeps channels first hands over transposed views; they score as their copies do."""
    normals = product(6, 7, {"level": (9, 11, 64)}, DIM)
    bank_of(tmp_path / "b", normals, input_size=SMALL_INPUT, dtype=dtype, normalize=normalize)
    detector = Detector.open(tmp_path / "b", method=Method(k_gallery=3))
    for part in (normals, normals[:1]):
        assert not detector.score_features(batch_of(channels_first(part))).maps.any()


def channels_first(features: Features) -> Features:
    """Equal values that lie in memory as (n, C, H, W)."""
    views = {name: np.ascontiguousarray(np.moveaxis(maps, 3, 1)) for name, maps in features.levels.items()}
    return Features(features.embedding, {name: np.moveaxis(view, 1, 3) for name, view in views.items()})


# byungjae89/SPADE-pytorch, src/main.py at 077c67be21d68a38b4442db7311c87e708728286, lines 107-153, in float64. Its
# pairwise_distance(gallery (100, C, 1, 1), map (1, C, H, W)) meant a distance over dim=1, of differences that eps is added to.
CHUNK = 100
EPS = 1e-6
SPADE_SHAPES = {"layer1": (28, 28, 6), "layer2": (14, 14, 10), "layer3": (7, 7, 14)}


def spade_pytorch_image_scores(train: torch.Tensor, test: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    dist_matrix = torch.sqrt(torch.pow(test.unsqueeze(1) - train.unsqueeze(0), 2).sum(2))
    values, indexes = torch.topk(dist_matrix, k=k, dim=1, largest=False)
    return torch.mean(values, 1), indexes


def spade_pytorch_distances(train: torch.Tensor, test: torch.Tensor, *, eps: float, drop: bool) -> torch.Tensor:
    """(H, W), nearest distances of one image's map (1, C, H, W) in the gallery of the maps (K, C, H, W)."""
    gallery = train.transpose(3, 1).flatten(0, 2).unsqueeze(-1).unsqueeze(-1)
    chunks = len(gallery) // CHUNK if drop else -(-len(gallery) // CHUNK)
    return torch.stack([_chunk_minimum(gallery[CHUNK * i : CHUNK * (i + 1)], test, eps) for i in range(chunks)]).amin(0)


def _chunk_minimum(chunk: torch.Tensor, test: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.sqrt(torch.pow(chunk - test + eps, 2).sum(1)).amin(0)


def spade_pytorch_map(distances: list[torch.Tensor]) -> npt.NDArray[np.float64]:
    upsampled = [
        torch.nn.functional.interpolate(dist[None, None], size=224, mode="bilinear", align_corners=False) for dist in distances
    ]
    return np.asarray(gaussian_filter(torch.cat(upsampled, 0).mean(dim=0).squeeze().numpy(), sigma=4))


def as_spade_pytorch(maps: npt.NDArray[Any]) -> torch.Tensor:
    """Channels first, float64."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(maps, 3, 1))).double()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scores, list[dict[str, Any]]]:
    """Our scores, and for each image SPADE-pytorch's, without its quirks, with each of them, and with both."""
    normals, query = product(21, 9, SPADE_SHAPES, DIM), product(22, 2, SPADE_SHAPES, DIM, defect=True)
    # The last `rows % 100` gallery rows are those of the fifth neighbor's last columns: let the first image's be there alone.
    _, indexes = spade_pytorch_image_scores(torch.from_numpy(normals.embedding), torch.from_numpy(query.embedding), 5)
    query.levels["layer1"][0, 10, 10] = 40
    normals.levels["layer1"][int(indexes[0, 4]), 27, 27] = 40.5
    path = tmp_path_factory.mktemp("compared") / "b"
    bank_of(path, normals, input_size=(224, 224), shards=[4])
    ours = Detector.open(path).score_features(batch_of(query))
    train, test = torch.from_numpy(normals.embedding).double(), torch.from_numpy(query.embedding).double()
    image_scores, indexes = spade_pytorch_image_scores(train, test, 5)
    theirs = []
    for image in range(len(query)):
        result: dict[str, Any] = {"image_score": float(image_scores[image])}
        for name, eps, drop in [("plain", 0.0, False), ("eps", EPS, False), ("dropped", 0.0, True), ("both", EPS, True)]:
            result[name] = [
                spade_pytorch_distances(
                    as_spade_pytorch(normals.levels[level][indexes[image].numpy()]),
                    as_spade_pytorch(query.levels[level][image : image + 1]),
                    eps=eps,
                    drop=drop,
                )
                for level in SPADE_SHAPES
            ]
        theirs.append(result)
    return ours, theirs


def each(compared: tuple[Scores, list[dict[str, Any]]]) -> Iterator[tuple[Any, str, dict[str, npt.NDArray[np.float64]]]]:
    """Our distances, the level's name, and theirs by quirk: image by image and level by level."""
    ours, theirs = compared
    for image, result in enumerate(theirs):
        for index, level in enumerate(SPADE_SHAPES):
            variants = {name: result[name][index].numpy() for name in ("plain", "eps", "dropped", "both")}
            yield ours.level_dist[level][image], level, variants


def test_spade_pytorch_without_its_quirks_is_ours(compared: tuple[Scores, list[dict[str, Any]]]) -> None:
    ours, theirs = compared
    for dist, _, variants in each(compared):
        close(dist, variants["plain"])
    for image, result in enumerate(theirs):
        assert ours.image_score[image] == pytest.approx(result["image_score"], rel=1e-4)
        close(ours.maps[image], spade_pytorch_map(result["plain"]))


def test_spade_pytorch_eps_shifts_every_distance_by_less_than_a_float32(
    compared: tuple[Scores, list[dict[str, Any]]],
) -> None:
    ours, theirs = compared
    for dist, level, variants in each(compared):
        shift = np.abs(variants["eps"] - variants["plain"])
        bound = EPS * np.sqrt(SPADE_SHAPES[level][2])
        assert 0 < shift.max() <= bound * (1 + 1e-6)
        # A vector that is in the gallery is at eps * sqrt(C), not at 0: the flat corner.
        assert (variants["eps"] > 0).all()
        np.testing.assert_allclose(variants["eps"][dist == 0], bound, rtol=1e-6)
        np.testing.assert_allclose(dist, variants["eps"], rtol=1e-4, atol=bound)
    assert any((dist == 0).any() for dist, _, _ in each(compared))
    for image, result in enumerate(theirs):
        assert np.abs(ours.maps[image] - spade_pytorch_map(result["eps"])).max() < 1e-4 * ours.maps[image].max()


def test_spade_pytorch_misses_what_is_in_the_rows_it_drops(compared: tuple[Scores, list[dict[str, Any]]]) -> None:
    ours, theirs = compared
    rows = {level: 5 * height * width % CHUNK for level, (height, width, _) in SPADE_SHAPES.items()}
    assert rows == {"layer1": 20, "layer2": 80, "layer3": 45}
    for dist, _, variants in each(compared):
        assert (variants["dropped"] >= variants["plain"]).all()
        assert (variants["dropped"] >= dist * (1 - 1e-4)).all()
    # The one vector like the query's stands in those rows.
    found, missed = ours.level_dist["layer1"][0, 10, 10], float(theirs[0]["dropped"][0][10, 10])
    assert found == pytest.approx(0.5 * np.sqrt(6), rel=1e-4)
    assert missed > 20 * found
    assert (spade_pytorch_map(theirs[0]["both"]) > ours.maps[0]).any()
