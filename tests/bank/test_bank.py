"""The bank: what was committed is read back bit for bit, whatever happened in between; what is damaged is refused."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spade_faiss.bank import bank as bank_module
from spade_faiss.bank import shards
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.origin import Origin
from spade_faiss.core import arrays
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess, Source
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout, prepare
from tests.support.banks import COARSE, DIM, FINE, SOURCE, assert_holds, batch, files, make_bank


def shard_path(bank: Bank, index: int) -> Path:
    return bank.path / "features" / bank.manifest.shards[index].file


# ---- what goes in comes out


@st.composite
def batches_of_any_shape(draw: st.DrawFn) -> tuple[Layout, list[FeatureBatch]]:
    sizes = st.integers(1, 4)
    names = draw(st.lists(st.sampled_from(["a", "layer1", "Ebene é", "b.c", "x y"]), min_size=1, max_size=3, unique=True))
    levels = tuple(
        Level(name, channels=draw(sizes), stride=draw(sizes), height=draw(sizes), width=draw(sizes)) for name in names
    )
    dtype = draw(st.sampled_from(["float16", "float32"]))
    layout = Layout(levels=levels, embedding_dim=draw(sizes), input_size=(draw(sizes), draw(sizes)), dtype=dtype)
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
    ids = draw(st.lists(text, min_size=1, max_size=6, unique=True))
    cuts = sorted(draw(st.sets(st.integers(1, len(ids)))) | {len(ids)})
    # Below 65520, where float16 ends.
    values = st.floats(-65000, 65000, width=32)

    def arrays(*shape: int) -> npt.NDArray[np.float32]:
        return draw(hnp.arrays(np.float32, shape, elements=values))

    parts = [ids[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)]
    return layout, [
        FeatureBatch(
            part,
            arrays(len(part), layout.embedding_dim),
            {level.name: arrays(len(part), *level.shape) for level in levels},
        )
        for part in parts
    ]


@settings(max_examples=25)
@given(batches_of_any_shape())
def test_a_round_trip_is_the_identity(made: tuple[Layout, list[FeatureBatch]]) -> None:
    layout, batches = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bank")
        written = Bank.open_or_create(path, layout)
        for part in batches:
            written.append(part)
        for bank in (written, Bank.open(path)):
            assert bank.layout == layout
            assert bank.generation == len(batches) == len(bank.manifest.shards)
            assert_holds(bank, *batches, dtype=layout.dtype)


def test_ids_and_paths_keep_every_character(tmp_path: Path) -> None:
    names = ['quote".png', "new\nline", "tab\t, comma", "日本語/ü.png", "\N{SNAKE}", " ", "\\", "'", "a" * 5000, "{}"]
    bank = make_bank(tmp_path / "b")
    bank.append(batch(*names, paths=names, sha256=[f"{n}" for n in range(len(names))], root="/r ü"))
    reopened = Bank.open(tmp_path / "b")
    assert reopened.ids == names
    assert reopened.image_path("\N{SNAKE}") == Path("/r ü/\N{SNAKE}")
    assert reopened.sha256_of == {name: f"{n}" for n, name in enumerate(names)}


def test_images_without_files_have_no_path_and_no_checksum(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a"))
    bank.append(batch("b", paths=["b.png"], sha256=["12"], root="/r"))
    assert bank.image_path("a") is None
    assert bank.image_path("b") == Path("/r/b.png")
    assert bank.sha256_of == {"b": "12"}
    assert bank.image_folders() == {Path("/r")}


def test_the_folders_of_the_pictures(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a", "b", "c", paths=["a.png", "x/b.png", "x/c.png"], sha256=["1", "2", "3"], root="/r"))
    bank.append(batch("d", "e", paths=["../d.png", "/e.png"], sha256=["4", "5"], root="/r"))
    expected = {bank.image_path(name): name for name in bank.ids}
    assert bank.image_folders() == {path.parent for path in expected if path is not None}
    assert bank.image_folders() == {Path("/r"), Path("/r/x"), Path("/r/.."), Path("/")}
    bank.remove(["a", "e"])
    assert bank.image_folders() == {Path("/r/x"), Path("/r/..")}


def test_embeddings_come_in_any_order_and_by_shard(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    parts = [batch("a", "b", "c"), batch("d"), batch("e", "f")]
    for part in parts:
        bank.append(part)
    whole = np.concatenate([part.embedding for part in parts])
    rows = np.array([5, 0, 3, 3, 2])
    found = bank.embedding(rows)
    np.testing.assert_array_equal(found, whole[rows])
    found[:] = 0  # a copy: the caller may do what it likes
    np.testing.assert_array_equal(bank.embedding(rows), whole[rows])
    blocks = [bank.embeddings_of_shard(index) for index in range(3)]
    assert [len(block) for block in blocks] == [3, 1, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert bank.embedding(np.array([], np.int64)).shape == (0, DIM)
    for row in (-1, 6):
        with pytest.raises(IndexError, match=f"row {row} of a bank of 6 rows"):
            bank.embedding(np.array([row]))
        with pytest.raises(IndexError, match=f"row {row} of a bank of 6 rows"):
            bank.level_map(FINE.name, row)


def test_maps_are_views_of_the_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy, no HDF5 call, no lock in the query path; and nobody can write through a view."""
    parts = [batch("a", "b", "c"), batch("d")]
    bank = make_bank(tmp_path / "b")
    for part in parts:
        bank.append(part)
    bank = Bank.open(tmp_path / "b")
    first = bank.level_map(FINE.name, 1)
    bank.level_map(FINE.name, 3)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("HDF5 was called")

    monkeypatch.setattr(h5py, "File", refuse)
    again = bank.level_map(FINE.name, 1)
    assert np.shares_memory(first, again)
    neighbor = bank.level_map(FINE.name, 2)
    assert neighbor.__array_interface__["data"][0] - first.__array_interface__["data"][0] == first.nbytes
    for view in (again, bank.level_map(COARSE.name, 3), bank.embeddings_of_shard(0)):
        assert view.flags.c_contiguous
        assert view.flags.aligned
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
        owner: Any = view
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert isinstance(owner.base.obj if isinstance(owner.base, memoryview) else owner.base, mmap.mmap)
    with pytest.raises(ValueError):
        again.flags.writeable = True
    np.testing.assert_array_equal(bank.level_map(COARSE.name, 3), parts[1].levels[COARSE.name][0])


def test_arrays_of_a_shard_start_on_a_cache_line(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", dtype="float16")
    bank.append(batch("a", "b", "c"))
    starts = [bank.embeddings_of_shard(0), *(bank.level_map(level.name, 0) for level in (FINE, COARSE))]
    assert [start.__array_interface__["data"][0] % 64 for start in starts] == [0, 0, 0]


def test_a_view_outlives_its_place_in_the_cache(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    parts = [batch(f"i{n}") for n in range(4)]
    for part in parts:
        bank.append(part)
    views = []
    for row in range(4):
        views.append(bank.level_map(FINE.name, row))
        arrays.map_arrays.cache_clear()
        shards.map_shard.cache_clear()
    for view, part in zip(views, parts, strict=True):
        np.testing.assert_array_equal(view, part.levels[FINE.name][0])


def test_another_bank_at_the_same_place_is_not_mixed_up_with_the_first(tmp_path: Path) -> None:
    for seed in (1, 2):
        bank = make_bank(tmp_path / "b")
        bank.append(batch("a", seed=seed))
        assert_holds(bank, batch("a", seed=seed))
        shutil.rmtree(tmp_path / "b")


def test_what_an_open_bank_shows_is_the_state_it_was_opened_in(tmp_path: Path) -> None:
    writer = make_bank(tmp_path / "b")
    writer.append(batch("a"))
    reader = Bank.open(tmp_path / "b")
    assert reader.ids == ["a"]
    writer.append(batch("b"))
    assert_holds(reader, batch("a"))
    # Appending through it brings it up to date.
    reader.append(batch("c"))
    assert_holds(reader, batch("a"), batch("b"), batch("c"))
    writer.append(batch("d"))
    assert_holds(writer, batch("a"), batch("b"), batch("c"), batch("d"))
    assert Bank.open(tmp_path / "b").ids == ["a", "b", "c", "d"]


def test_shards_are_never_written_again(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a"))
    before = files(bank.path)
    bank.append(batch("b"))
    after = files(bank.path)
    assert sorted(after) == ["features/000001.h5", "features/000002.h5", "manifest.json"]
    assert after["features/000001.h5"] == before["features/000001.h5"]
    assert bank.bytes_on_disk == sum(len(content) for name, content in after.items() if name.endswith(".h5"))


def test_appending_does_not_read_the_ids_of_earlier_shards_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a long extraction must not grow with the square of its shards."""
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a"))
    reads: list[str] = []
    texts = shards.Shard.texts

    def counted(self: shards.Shard, field: str) -> list[str]:
        reads.append(field)
        return texts(self, field)

    monkeypatch.setattr(shards.Shard, "texts", counted)
    for name in "bcdef":
        bank.append(batch(name))
    assert reads == []
    assert bank.ids == list("abcdef")
    with pytest.raises(InputError, match="the first is 'd'"):
        bank.append(batch("d"))


# ---- what must not go in


@pytest.mark.parametrize("names", [("b",), ("new", "a"), ("d", "c")])
def test_an_id_that_is_there_already_is_refused_and_nothing_is_lost(tmp_path: Path, names: tuple[str, ...]) -> None:
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a", "b"))
    bank.append(batch("c"))
    before = files(bank.path)
    with pytest.raises(InputError, match="already holds 1 of these images, the first is"):
        bank.append(batch(*names, seed=1))
    assert files(bank.path) == before
    assert_holds(bank, batch("a", "b"), batch("c"))
    bank.append(batch("z"))
    assert_holds(Bank.open(bank.path), batch("a", "b"), batch("c"), batch("z"))


def test_a_batch_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    before = files(bank.path)
    broken = batch("a")
    broken.embedding[0, 0] = np.nan
    with pytest.raises(InputError, match="embedding holds NaN"):
        bank.append(broken)
    assert files(bank.path) == before


def test_ids_and_paths_may_be_arrays(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    names: Any = np.array(["a", "b"])
    bank.append(replace(batch("a", "b"), ids=names, paths=names))
    assert Bank.open(bank.path).ids == ["a", "b"]


def test_create_refuses_a_bank_and_whatever_else_is_there(tmp_path: Path) -> None:
    made = make_bank(tmp_path / "bank")
    made.append(batch("a"))
    before = files(made.path)
    with pytest.raises(InputError, match="already holds a bank"):
        make_bank(tmp_path / "bank")
    assert files(made.path) == before

    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"photographs exists and is not a bank"):
        make_bank(folder)
    assert files(folder) == {"a.png": b"x"}
    with pytest.raises(InputError, match=r"a\.png exists and is not a bank"):
        make_bank(folder / "a.png")

    # Shards whose manifest was lost may be the only copy of something: never write over them.
    (made.path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds shards but no manifest\.json; restore it"):
        make_bank(made.path)
    assert files(made.path) == {name: content for name, content in before.items() if name != "manifest.json"}


def test_create_takes_an_empty_folder_and_what_an_interrupted_creation_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_bank(tmp_path / "empty")
    (tmp_path / "half" / "features").mkdir(parents=True)
    (tmp_path / "half" / ".lock").touch()
    (tmp_path / "half" / TEMPORARY_PATTERN.replace("*", "0123")).write_text("{")
    make_bank(tmp_path / "half").append(batch("a"))
    assert sorted(files(tmp_path / "half")) == ["features/000001.h5", "manifest.json"]
    assert_holds(make_bank(tmp_path / "deeper" / "than" / "that"))


def test_of_two_that_create_the_same_bank_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looks again when it has the lock, so that what the first appended in between is not lost."""
    check, looked = bank_module._check_new, []

    def look(folder: Path) -> None:
        check(folder)
        looked.append(folder)
        if len(looked) == 1:
            make_bank(tmp_path / "b").append(batch("a"))

    monkeypatch.setattr(bank_module, "_check_new", look)
    with pytest.raises(InputError, match="already holds a bank"):
        make_bank(tmp_path / "b")
    assert_holds(Bank.open(tmp_path / "b"), batch("a"))


# ---- what fits a bank


def test_open_or_create_wants_the_same_layout(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a"))
    layout = bank.layout
    assert Bank.open_or_create(tmp_path / "b", layout).layout == layout
    for changed, message in [
        (replace(layout, dtype="float16"), "has store='float32', asked for 'float16'"),
        (replace(layout, normalize="l2"), "has normalize='none', asked for 'l2'"),
        (replace(layout, pool=3), "has pool=1, asked for 3"),
        (replace(layout, input_size=(20, 32)), r"has input_size=\(20, 28\), asked for \(20, 32\)"),
        (replace(layout, embedding_dim=7), "has embedding_dim=6, asked for 7"),
        (replace(layout, levels=(FINE,)), "has levels=.*'blocks.2'.*, asked for .*'blocks.1'"),
    ]:
        with pytest.raises(InputError, match=f"b {message}"):
            Bank.open_or_create(tmp_path / "b", changed)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(SOURCE, backbone="other"), "backbone='net', these features with 'other'"),
        (replace(SOURCE, weights_sha256="cd34"), "weights_sha256='ab12', these features with 'cd34'"),
        (replace(SOURCE, precision="bfloat16"), "precision='float32', these features with 'bfloat16'"),
        (replace(SOURCE, preprocess=Preprocess(resize=80, size=64)), "preprocess.resize=72, these features with 80"),
        (
            replace(SOURCE, preprocess=Preprocess(resize=72, size=64, resize_mode="letterbox")),
            "preprocess.resize_mode='crop', these features with 'letterbox'",
        ),
        (
            replace(SOURCE, preprocess=Preprocess(resize=72, size=64, std=(1.0, 1.0, 1.0))),
            r"preprocess.std=\(0.229, 0.224, 0.225\), these features with \(1.0, 1.0, 1.0\)",
        ),
    ],
)
def test_features_from_another_source_are_refused_with_both_values(tmp_path: Path, other: Source, message: str) -> None:
    made = make_bank(tmp_path / "b", source=SOURCE)
    made.append(batch("a", source=SOURCE))
    bank = Bank.open(tmp_path / "b")
    for refused in (
        lambda: bank.check_source(other),
        lambda: bank.append(batch("b", source=other)),
        lambda: Bank.open_or_create(tmp_path / "b", bank.layout, Origin(source=other)),
    ):
        with pytest.raises(InputError, match=f"was extracted with {message}"):
            refused()
    assert_holds(Bank.open(tmp_path / "b"), batch("a"))
    bank.append(batch("b", source=SOURCE))
    bank.append(batch("c"))  # without a source: the caller knows
    assert Bank.open_or_create(tmp_path / "b", bank.layout, Origin(source=SOURCE)).ids == ["a", "b", "c"]


def test_a_bank_of_another_extractor_takes_features_on_trust_but_is_not_taken_over(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    bank.append(batch("a", source=SOURCE))
    with pytest.raises(InputError, match="holds the features of another extractor, not of 'net'"):
        Bank.open_or_create(bank.path, bank.layout, Origin(source=SOURCE))


def test_prepared_batches_are_appended_as_they_are(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", dtype="float16", normalize="l2", pool=3)
    prepared = prepare(batch("a", "b"), bank.layout)
    bank.append_prepared(prepared)
    twin = make_bank(tmp_path / "twin", dtype="float16", normalize="l2", pool=3)
    twin.append(batch("a", "b"))
    for row in range(2):
        for level in (FINE, COARSE):
            np.testing.assert_array_equal(bank.level_map(level.name, row), prepared.levels[level.name][row])
            np.testing.assert_array_equal(twin.level_map(level.name, row), prepared.levels[level.name][row])
