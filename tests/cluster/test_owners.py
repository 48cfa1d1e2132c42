"""Owners search shards of a bank: what they find together is what one process finds, to the bit, and a lost one is replaced."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.cluster.owned_detector import OwnedDetector
from spade_faiss.cluster.owner import OwnedBank
from spade_faiss.cluster.owners import Owners, open_owners
from spade_faiss.cluster.session import connect, import_ray
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import BankError, ClusterError, InputError
from spade_faiss.core.settings import Method, ReportOptions, Run
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores
from spade_faiss.search.recipe import load_recipe
from spade_faiss.workflows.score import score_folder
from tests.support.oracle import Features, bank_of, batch_of, levels_of, product
from tests.support.product_banks import bank_of_products, shots

N, DIM, INPUT, SHARDS = 23, 6, (28, 36), [4, 3, 5, 2, 4, 3]
SHAPES = {"fine": (7, 9, 16), "mid": (7, 9, 5), "coarse": (3, 5, 24)}


@pytest.fixture(scope="module")
def normals() -> Features:
    """Of which some are the same, so that there are ties between images and in them."""
    made = product(1, N, SHAPES, DIM)
    for maps in made.levels.values():
        maps[17], maps[5] = maps[2], maps[11]
        maps[3, 1] = maps[3, 0]
    made.embedding[17] = made.embedding[2]
    return made


@pytest.fixture(scope="module")
def queries(normals: Features) -> FeatureBatch:
    made = product(2, 6, SHAPES, DIM, defect=True)
    for name, maps in made.levels.items():
        maps[0] = normals.levels[name][2]  # at distance 0, twice
    made.embedding[0] = normals.embedding[2]
    return batch_of(made, [f"query {i}" for i in range(6)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, normals: Features) -> Path:
    bank = bank_of(tmp_path_factory.mktemp("owned") / "bank", normals, input_size=INPUT, shards=SHARDS)
    bank.remove([bank.ids[6], bank.ids[20]])
    build_index(bank, load_recipe("clusters"))
    return bank.path


@contextmanager
def owned(cluster: str, detector: Detector, replicas: int = 1) -> Iterator[OwnedDetector]:
    """The same detector, whose bank owners search."""
    run = Run(cluster=cluster, replicas=replicas)
    with connect(cluster) as session:
        bank = OwnedBank(
            bank=detector.bank,
            recipe=detector.recipe,
            method=detector.method,
            memory="100MB",
            threads=session.cpus,
            replicas=replicas,
        )
        with open_owners(session, bank) as owners:
            yield OwnedDetector(detector.bank, detector.recipe, detector.method, run, None, owners)


def same(one: Scores, other: Scores) -> None:
    for name in ("image_score", "maps", "statistics", "neighbor_ids", "neighbor_dist"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name, dist in one.level_dist.items():
        np.testing.assert_array_equal(dist, other.level_dist[name])
        np.testing.assert_array_equal(one.nearest[name], other.nearest[name])


def test_owners_find_what_one_process_finds_after_a_loss_too(
    cluster: str, folder: Path, queries: FeatureBatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What travels is per image at most its features times the owners that it visits, and its answers."""
    alone = Detector.open(folder, method=Method(k_image=3, k_gallery=4, kappa=2))
    expected, ray = alone.score_features(queries), import_ray()
    with owned(cluster, alone, replicas=2) as together:
        same(expected, together.score_features(queries))
        traffic = together.owners.traffic
        owners, images, locations = 2, len(queries), sum(height * width for height, width, _ in SHAPES.values())
        rows = images * 4 * 8 * len(SHAPES)  # which rows of the gallery to search, and for which images
        assert 0 < traffic.sent <= owners * (images * alone.bank.layout.image_bytes + rows)
        # Two distances, a row and a location for each location; and the nearest images.
        answers = images * (locations * (2 * 4 + 4 + 4) + len(SHAPES) * 16 + 3 * 16)
        assert 0 < traffic.received <= owners * answers
        assert traffic.moved == 0
        same(alone.score_rows([0, 2, 7, 11]), together.score_rows([0, 2, 7, 11]))
        names = list(together.owners.names.values())
        ray.kill(ray.get_actor(names[0]))
        with caplog.at_level(logging.WARNING):
            same(expected, together.score_features(queries))
            same(expected, together.score_features(queries))
        assert together.owners.traffic.moved == 1
        assert "its shards move to others" in caplog.text
        ray.kill(ray.get_actor(names[1]))
        with pytest.raises(ClusterError, match="all nodes that held shards"):
            together.score_features(queries)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("clusters", Method(k_image=3, k_gallery=ALL, kappa=2)),
        ("exact", Method(k_image=3, k_gallery=3, levels=("fine", "mid+coarse"), localize="flagged", flag_above=1.5)),
        ("exact", Method(k_image=3, k_gallery=3, level_weights=(0.5, 2.0, 1.0))),
    ],
    ids=["clusters", "joined and flagged", "weighted"],
)
@pytest.mark.slow
def test_every_exact_recipe(cluster: str, folder: Path, queries: FeatureBatch, recipe: str, method: Method) -> None:
    alone = Detector.open(folder, recipe=recipe, method=method)
    with owned(cluster, alone) as together:
        same(alone.score_features(queries), together.score_features(queries))
        same(alone.score_rows([0, 2, 7, 11]), together.score_rows([0, 2, 7, 11]))


def test_owners_of_fewer_vectors_than_kappa(cluster: str, folder: Path, queries: FeatureBatch) -> None:
    """Each owner has some of a place's vectors, fewer than kappa; together they have all, and no fewer count as all."""
    same_place = load_recipe("location").with_query({"radius": "0"})
    alone = Detector.open(folder, recipe=same_place, method=Method(k_image=3, k_gallery=3, kappa=2))
    with owned(cluster, alone) as together:
        same(alone.score_features(queries), together.score_features(queries))
        same(alone.score_rows([0, 2, 7, 11]), together.score_rows([0, 2, 7, 11]))
    too_many = Detector.open(folder, recipe=same_place, method=Method(k_image=3, k_gallery=3, kappa=4))
    with pytest.raises(InputError, match="kappa=4 is larger than the smallest window"):
        too_many.score_features(queries)
    with owned(cluster, too_many) as together, pytest.raises(InputError, match="kappa=4 is larger than the smallest number"):
        together.score_features(queries)


def test_owners_of_images_with_regions_of_their_own(
    cluster: str, normals: Features, queries: FeatureBatch, tmp_path: Path
) -> None:
    """How far a window reaches depends on what all owners hold; none of them widens it because it holds too little itself."""
    layout = Layout(levels=tuple(levels_of(normals)), embedding_dim=DIM, input_size=INPUT, dtype="float32", own_rois=True)
    bank = Bank.create(tmp_path / "bank", layout)
    (y, x), rng = np.mgrid[: INPUT[0], : INPUT[1]], np.random.default_rng(3)

    def discs(count: int) -> npt.NDArray[np.bool_]:
        return np.stack([(y - rng.uniform(0, 28)) ** 2 + (x - rng.uniform(0, 36)) ** 2 < 90 for _ in range(count)])

    batch, starts = batch_of(normals, valid=discs(N)), np.cumsum([0, *SHARDS])
    for start, count in zip(starts, SHARDS, strict=False):
        bank.append(batch[start : start + count])
    bank.remove([bank.ids[6], bank.ids[20]])
    asked = replace(queries, valid=discs(len(queries)))
    near = load_recipe("location").with_query({"radius": "0"})
    for recipe, kappa in ((near, 1), (near, 2), (load_recipe("exact"), 2)):
        alone = Detector.open(bank.path, recipe=recipe, method=Method(k_image=3, k_gallery=4, kappa=kappa))
        with owned(cluster, alone) as together:
            same(alone.score_features(asked), together.score_features(asked))
            same(alone.score_rows([0, 2, 7, 11]), together.score_rows([0, 2, 7, 11]))


@pytest.mark.slow
def test_what_an_owner_raises_names_its_node(cluster: str, folder: Path, queries: FeatureBatch, tmp_path: Path) -> None:
    alone = Detector.open(folder, method=Method(k_image=3, k_gallery=5))
    with owned(cluster, alone) as together:
        for shard in (folder / "features").iterdir():
            shard.rename(tmp_path / shard.name)
        try:
            with pytest.raises(BankError, match=r"features/\d+\.h5.*\[owner \d on node [0-9a-f]+\]"):
                together.score_features(queries)
        finally:
            for shard in tmp_path.iterdir():
                shard.rename(folder / "features" / shard.name)


def test_neighbors_of_one_place_are_not_looked_for_by_owners(folder: Path) -> None:
    alone = Detector.open(folder, method=Method(k_image=3, k_gallery=3))
    method = Method(tile_neighbors="same-place")
    with pytest.raises(InputError, match="leave replicas out"):
        OwnedDetector(alone.bank, alone.recipe, method, Run(), None, Owners({}, (), 1))


@pytest.mark.slow
def test_owners_search_one_product(cluster: str, tmp_path: Path) -> None:
    bank = bank_of_products(tmp_path / "bank", {"cap": 12, "pen": 9})
    method = Method(k_image=3, k_gallery=3)
    with pytest.raises(InputError, match="owners search one product"):
        Detector.open(bank, method=method, run=Run(cluster=cluster, replicas=1))
    alone = Detector.open(bank, method=method, product="pen")
    with owned(cluster, alone) as together:
        new = shots("pen", ["new/0", "new/1"], seed=1)
        same(alone.score_features(new), together.score_features(new))


def test_replicas_are_of_a_cluster() -> None:
    with pytest.raises(InputError, match="say on which one"):
        Run(replicas=2)
    with pytest.raises(InputError, match="replicas"):
        Run(cluster="local:2", replicas=0)


@pytest.mark.slow
def test_a_folder_is_scored_by_owners(cluster: str, weave: Path, whole_bank: Path, tmp_path: Path) -> None:
    options = ReportOptions(shown=2)
    score_folder(weave / "test", bank=whole_bank, out=tmp_path / "one", report=options)
    detector = Detector.open(whole_bank, run=Run(cluster=cluster, replicas=2))
    score_folder(weave / "test", bank=detector, out=tmp_path / "many", report=options)
    files = sorted((tmp_path / "many").glob("*/*/scores.h5"))
    with ScoreFile.open(tmp_path / "one" / "scores.h5") as one, ScoreParts.open(files) as parts:
        assert one.ids == parts.ids
        np.testing.assert_array_equal(one.neighbor_ids, parts.neighbor_ids)
        assert all(np.array_equal(*maps) for maps in zip(one.maps(), parts.maps(), strict=True))
    assert len(Bank.open(whole_bank)) == 24
