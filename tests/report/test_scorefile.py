"""Score files: what goes in comes out, nothing is half-written, damage is an error."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss.core.errors import InputError, NotFoundError, SpadeError
from spade_faiss.report.scorefile import ScoreFile, ScoreWriter
from tests.support.scores import leftovers, make_scores, part, write_scores


def content(path: Path) -> tuple[object, ...]:
    with ScoreFile.open(path) as file:
        arrays: list[Any] = [
            file.image_score,
            file.map_score,
            file.top_score,
            file.peak,
            file.neighbor_dist,
            *file.match.values(),
            *file.maps(),
        ]
        texts = (file.ids, file.neighbor_ids.tolist(), list(file.match), file.grid, file.size, file.distance, file.settings)
        return (*texts, *[(array.dtype, array.shape, array.tobytes()) for array in arrays])


def test_round_trip(tmp_path: Path) -> None:
    scores = make_scores()
    with ScoreFile.open(write_scores(tmp_path / "s.h5", scores, settings='{"k": "ä"}')) as file:
        assert list(file.ids) == scores.ids
        assert file.neighbor_ids.tolist() == scores.neighbor_ids.tolist()
        assert len(file) == len(scores)
        assert (file.size, file.distance, file.settings) == ((20, 24), "l2", '{"k": "ä"}')
        assert file.grid == {"layer2": (6, 7), "layer10": (3, 3)}
        assert list(file.match) == ["layer2", "layer10"]
        for name in ("image_score", "map_score", "neighbor_dist", "peak"):
            np.testing.assert_array_equal(getattr(file, name), getattr(scores, name))
            assert getattr(file, name).dtype == getattr(scores, name).dtype
        np.testing.assert_array_equal(np.stack(list(file.maps())), scores.maps)
        np.testing.assert_array_equal(file.map(3), scores.maps[3])
    with pytest.raises(InputError, match="closed"):
        file.map(0)


def test_match_is_that_of_the_cell_under_the_strongest_pixel(tmp_path: Path) -> None:
    scores = make_scores(40)
    with ScoreFile.open(write_scores(tmp_path / "s.h5", scores)) as file:
        for level, nearest in scores.nearest.items():
            for i, (y, x) in enumerate(scores.peak):
                cell = nearest[i, int(y * nearest.shape[1] / 20), int(x * nearest.shape[2] / 24)]
                assert file.match[level][i].tolist() == [cell["neighbor"], cell["y"], cell["x"], cell["row"]]
            assert file.match[level].dtype == np.int32


def test_uneven_batches_equal_one_batch(tmp_path: Path) -> None:
    scores = make_scores(23)
    assert content(write_scores(tmp_path / "a.h5", scores, batch=5)) == content(write_scores(tmp_path / "b.h5", scores))


def test_batches_may_be_empty_and_an_empty_file_can_be_read(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "s.h5") as writer:
        writer.append(part(make_scores(), slice(0, 0)))
    with ScoreFile.open(tmp_path / "s.h5") as file:
        assert (len(file), file.neighbor_ids.shape, list(file.maps())) == (0, (0, 3), [])


def test_maps_are_stored_one_a_chunk_and_as_float32(tmp_path: Path) -> None:
    with h5py.File(write_scores(tmp_path / "s.h5", make_scores())) as file:
        assert (file["maps"].chunks, file["maps"].dtype) == ((1, 20, 24), np.float32)
        assert file.attrs["schema"] == 2


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path) -> None:
    before = content(write_scores(tmp_path / "s.h5", make_scores(4)))

    def interrupted() -> None:
        with ScoreWriter(tmp_path / "s.h5") as writer:
            writer.append(make_scores(8))
            assert len(leftovers(tmp_path)) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path / "s.h5") == before
    assert leftovers(tmp_path) == ["s.h5"]


def test_a_writer_without_a_batch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no batch"), ScoreWriter(tmp_path / "s.h5"):
        pass
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "squared_l2"}, "distance=squared_l2"),
        ({"maps": np.zeros((8, 9, 9), np.float32)}, r"size=\(9, 9\)"),
        ({"nearest": {}}, "levels={}"),
        ({"neighbor_ids": np.full((8, 2), "a"), "neighbor_dist": np.zeros((8, 2), np.float32)}, "neighbors=2"),
        ({"image_score": np.zeros(7, np.float32)}, "do not fit"),
        ({"ids": ["nul\0"] * 8}, "NUL"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    scores = make_scores()
    changed = replace(scores, **change)  # type: ignore[arg-type]

    def append_both() -> None:
        with ScoreWriter(tmp_path / "s.h5") as writer:
            writer.append(scores)
            writer.append(changed)

    with pytest.raises(InputError, match=message):
        append_both()
    assert leftovers(tmp_path) == []


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="JSON"):
        ScoreWriter(tmp_path / "s.h5", "{not json")
    with pytest.raises(InputError, match="not open"):
        ScoreWriter(tmp_path / "s.h5").append(make_scores())


def test_damage_is_an_error_that_names_the_file_and_never_another_score(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.h5", make_scores(4))
    good, data, bad = content(path), path.read_bytes(), tmp_path / "bad.h5"
    for length in range(0, len(data), 997):
        bad.write_bytes(data[:length])
        with pytest.raises(SpadeError, match=re.escape(str(bad))):
            content(bad)
    errors = 0
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 300):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        bad.write_bytes(flipped)
        try:
            assert content(bad) == good
        except SpadeError:
            errors += 1
    assert errors > 200


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="none"):
        ScoreFile.open(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with h5py.File(write_scores(tmp_path / "next.h5", make_scores()), "a") as file:
        file.attrs["schema"] = 3
    for name, message in (
        ("text.h5", "damaged"),
        ("other.h5", "schema None"),
        ("next.h5", "schema 3, this version reads 2"),
    ):
        with pytest.raises(SpadeError, match=message):
            ScoreFile.open(tmp_path / name)


def test_a_file_of_before_top_scores_is_read(tmp_path: Path) -> None:
    """Results of last year are compared with today's by `drift`."""
    scores = make_scores(5)
    path = write_scores(tmp_path / "s.h5", scores)
    with h5py.File(path, "r+") as file:
        del file["top_score"]
    with ScoreFile.open(path) as found:
        assert np.isnan(found.top_score).tolist() == [True] * 5
        np.testing.assert_array_equal(found.map_score, scores.map_score)


def test_maps_of_pictures_that_were_scored_in_tiles_are_each_of_its_own_size(tmp_path: Path) -> None:
    scores, sizes = make_scores(5), np.array([[20, 24], [7, 24], [20, 3], [1, 1], [12, 9]])
    for found, (height, width) in zip(scores.maps, sizes, strict=True):
        found[height:] = 0
        found[:, width:] = 0
    corners = np.minimum(scores.peak, 2)
    tiled = replace(scores, sizes=sizes, corners=corners)
    with ScoreWriter(tmp_path / "s.h5", tile=(30, 30)) as writer:
        for rows in (slice(0, 2), slice(2, 5)):
            writer.append(replace(part(tiled, rows), sizes=sizes[rows], corners=corners[rows]))
    with ScoreFile.open(tmp_path / "s.h5") as file:
        assert (file.is_tiled, file.size, len(file)) == (True, (30, 30), 5)
        for found, expected, (height, width) in zip(file.maps(), scores.maps, sizes, strict=True):
            np.testing.assert_array_equal(found, expected[:height, :width])
        np.testing.assert_array_equal(file.map_score, scores.map_score)
        np.testing.assert_array_equal(file.peak, scores.peak)
        for level, nearest in scores.nearest.items():
            for i, (y, x) in enumerate(scores.peak - corners):
                cell = nearest[i, int(y * nearest.shape[1] / 30), int(x * nearest.shape[2] / 30)]
                assert file.match[level][i].tolist() == [cell["neighbor"], cell["y"], cell["x"], cell["row"]]
    with pytest.raises(InputError, match="closed"):
        file.map(0)
    with pytest.raises(InputError, match="is of whole images, these scores are not"), ScoreWriter(tmp_path / "w.h5") as writer:
        writer.append(tiled)
    with pytest.raises(InputError, match="is of tiles"), ScoreWriter(tmp_path / "w.h5", tile=(30, 30)) as writer:
        writer.append(scores)
