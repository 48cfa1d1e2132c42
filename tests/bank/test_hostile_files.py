"""Each fault of the list "Banks from somebody else" by itself: what is refused, in which words, and what stays as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss import Detector, verify
from spade_faiss.bank.backbone import backbone_of
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.origin import Origin
from spade_faiss.bank.shards import write_shard
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import BankError, InputError, NotFoundError, SpadeError
from spade_faiss.core.extraction import Preprocess, Source
from spade_faiss.core.settings import Method, Run
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index, update_indexes
from spade_faiss.report.normals import NormalPictures
from spade_faiss.search.recipe import Build, Recipe
from spade_faiss.workflows.info import info
from tests.support.attacks import ARRAYS, outside_of, record, watched
from tests.support.banks import COARSE, FINE, INPUT, batch, forget_mappings, make_bank
from tests.support.damage import HNSW, IVF, bank_with_indexes, encoded_file, sign_shard, trained_file
from tests.support.image_files import noise, save
from tests.support.manifests import edit_manifest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bank_with_indexes(tmp_path_factory.mktemp("hostile") / "bank")


@pytest.fixture
def path(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bank"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return outside_of(tmp_path)


def replaced(place: Path, target: Path) -> None:
    """A link in the place of a file or a folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


# ---- links

USES: dict[str, Callable[[Path], object]] = {
    "info": info,
    "verify": verify,
    "score": lambda path: Detector.open(path, recipe=HNSW).score_features(batch("q")),
    "add": lambda path: Bank.open(path).append(batch("new")),
    "remove": lambda path: Bank.open(path).remove(["a"]),
    "compact": lambda path: Bank.open(path).compact(),
    "index": lambda path: update_indexes(Bank.open(path)),
    "create": lambda path: Bank.create(path, Layout(levels=(FINE,), embedding_dim=6, input_size=INPUT)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "name",
    [
        *(
            "manifest.json",
            ".lock",
            ".writer.json",
            ".readers",
            ".readers/1-0123456789abcdef",
            "features",
            "features/000001.h5",
        ),
        *("indexes", "indexes/hnsw", "indexes/hnsw/index.json", "indexes/hnsw/.lock", "indexes/hnsw/.writer.json"),
        *("indexes/ivf/gallery", "indexes/ivf/gallery/trained-000.h5", "calibration", "calibration/0123456789abcdef.json"),
    ],
)
@pytest.mark.parametrize("target", ["text.txt", "folder", "nothing"])
def test_a_link_is_refused_by_name_and_nothing_outside_changes(
    path: Path, outside: Path, use: str, name: str, target: str
) -> None:
    """Faults: `.readers`, `.writer.json`, `features`, `indexes/NAME`, its `gallery`, `calibration` and `.lock` are links."""
    replaced(path / name, outside / target)
    before = watched(outside)
    with pytest.raises(SpadeError, match=f"{name} is a link"):
        USES[use](path)
    assert watched(outside) == before
    assert (path / name).is_symlink()


@pytest.mark.parametrize("name", [".writer.json", ".lock", ".readers", "features", "manifest.json"])
def test_a_link_that_appears_while_the_bank_is_open_is_refused_by_the_next_write(path: Path, outside: Path, name: str) -> None:
    bank = Bank.open(path)
    replaced(path / name, outside / "folder" if name in (".readers", "features") else outside / "text.txt")
    before = watched(outside)
    writes: list[Callable[[], object]] = [lambda: bank.append(batch("new")), lambda: bank.remove(["a"]), bank.compact]
    for write in writes:
        with pytest.raises(BankError, match=f"{name} is a link"):
            write()
    assert watched(outside) == before


def test_the_path_of_the_bank_may_be_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    bank = Bank.open(tmp_path / "link")
    bank.append(batch("new"))
    update_indexes(bank)
    assert verify(tmp_path / "link", deep=True).problems == ()


def test_what_has_a_second_name_outside_stays_as_it_is_there(path: Path, outside: Path) -> None:
    """A hard link cannot be told from a file: nothing is written over, and no time is set."""
    names = [".lock", ".writer.json", "features/000001.h5", "manifest.json"]
    for number, name in enumerate(names):
        other = outside / f"{number}"
        if (path / name).exists():
            shutil.copyfile(path / name, other)  # of another time than the manifest says
            (path / name).unlink()
        else:
            other.write_text("{}")
        os.link(other, path / name)
    before = watched(outside)
    bank = Bank.open(path)
    bank.append(batch("new"))
    bank.remove(["a"])
    bank.compact()
    assert watched(outside) == before


@pytest.mark.parametrize("name", ["manifest.json", "features/000001.h5", "indexes/hnsw/index.json", ".writer.json", ".lock"])
def test_a_pipe_keeps_nobody_waiting(path: Path, name: str) -> None:
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    for use in USES.values():
        with pytest.raises(SpadeError, match=f"{name} is a pipe"):
            use(path)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        *(("add", name) for name in (".lock", ".writer.json")),
        *(("index", f"indexes/{name}") for name in ("hnsw/.lock", "hnsw/.writer.json", "ivf/.lock")),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_named(path: Path, use: str, name: str) -> None:
    (path / name).unlink(missing_ok=True)
    (path / name).mkdir()
    with pytest.raises(BankError, match=rf"{name} is a folder, expected a file; remove it"):
        USES[use](path)


def test_a_file_in_the_place_of_a_folder_is_named(path: Path) -> None:
    replaced(path / "indexes" / "ivf" / "gallery", path)  # removes what is there
    (path / "indexes" / "ivf" / "gallery").unlink()
    (path / "indexes" / "ivf" / "gallery").write_text("x")
    with pytest.raises(BankError, match="gallery is a file, expected a folder; remove it"):
        USES["index"](path)


def test_folders_with_the_names_of_leftovers_are_left_alone(path: Path) -> None:
    names = [
        ".spade-1.tmp",
        "features/.spade-1.tmp",
        "features/more.h5",
        "indexes/hnsw/more.faiss",
        "indexes/ivf/gallery/more.h5",
    ]
    for name in names:
        (path / name / "inner").mkdir(parents=True)
    bank = Bank.open(path)
    bank.append(batch("new"))
    bank.remove(["new"])
    bank.compact()
    update_indexes(bank, rebuild=True)
    assert all((path / name / "inner").is_dir() for name in names)


@pytest.mark.parametrize("sha256", ["../../../../../outside/x", "/tmp/x", "x" * 64, "A" * 64, "0" * 63])
def test_a_checksum_is_no_path(path: Path, outside: Path, sha256: str) -> None:
    """The names of encoded files are made of those of shards."""
    before = watched(outside)
    edit_manifest(path / "manifest.json", lambda content: content["shards"][0].update(sha256=sha256))
    with pytest.raises(BankError, match="is no checksum"):
        Bank.open(path)
    assert watched(outside) == before


@pytest.mark.parametrize("file", ["..", ".", "../x.h5", "a\\b.h5", "C:x.h5", "-x", "", "x" * 200, "\ud800", "a\0b"])
def test_a_name_is_no_path(path: Path, file: str) -> None:
    edit_manifest(path / "manifest.json", lambda content: content["shards"][0].update(file=file))
    with pytest.raises(BankError, match="cannot be the record of a file"):
        Bank.open(path)


# ---- values of manifests


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["layout"].update(pool=10**9 + 1), "pool=1000000001 is too large: 15 covers the largest map"),
        (lambda content: content["layout"].update(input_size=[10**6, 10**6]), "input_size=.* is more than"),
        (lambda content: content["shards"].append(content["shards"][0]), "it lists shard 000001.h5 twice"),
        (lambda content: content["shards"][0].update(count=1 << 62), "cannot hold"),
        (lambda content: content["shards"][0].update(count=1 << 62, bytes=(1 << 63) - 1), "more than"),
        (lambda content: content["shards"][0].update(bytes=1 << 70), "cannot be the record of a file"),
        (lambda content: content["layout"]["levels"][0].update(channels=1 << 60), "cannot hold"),
        (lambda content: content["layout"].update(embedding_dim=1 << 20), "cannot hold"),
        (lambda content: content.update(generation=-1), "generation"),
        (lambda content: content.update(generation=1 << 60), "generation"),
        (lambda content: content.update(generation=0), "it lists shards, but no commit"),
        (lambda content: content.update(weights_file=["x" * 10**6]), "weights_file"),
        (lambda content: content["history"][0].update(images="x" * 10**6), "images"),
    ],
)
def test_a_signed_manifest_that_no_bank_has_is_refused_in_one_short_line(
    path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit_manifest(path / "manifest.json", change)
    for use in ("info", "verify", "score", "add"):
        with pytest.raises(BankError, match=said) as caught:
            USES[use](path)
        assert len(str(caught.value)) < 1500


def test_settings_of_a_bank_without_shards_are_bounded_too(path: Path) -> None:
    """No file says how long its embeddings would be."""

    def change(content: dict[str, Any]) -> None:
        content["shards"] = []
        content["layout"].update(embedding_dim=1 << 40)

    edit_manifest(path / "manifest.json", change)
    with pytest.raises(BankError, match="embedding_dim=1099511627776 is more than 1048576"):
        Bank.open(path)


def test_a_value_as_long_as_the_manifest_is_cut_off_in_messages(path: Path) -> None:
    edit_manifest(path / "manifest.json", lambda content: content["shards"][0].update(removed=list(range(10**5))))
    with pytest.raises(BankError, match=r"removed are \(0, 1, 2,.*\.\.\. \(\d+ characters\)") as caught:
        Bank.open(path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_json_that_is_nested_deep_is_refused_wherever_it_becomes_too_deep(path: Path, depth: int) -> None:
    """Reading, hashing and showing it each stop at another depth."""
    (path / "manifest.json").write_text('{"format": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(BankError, match=r"manifest\.json is damaged"):
        Bank.open(path)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(path: Path, text: str) -> None:
    file = path / "indexes" / "ivf" / "gallery.json"
    content = json.loads(file.read_text())
    file.write_text(file.read_text().replace(f'"build_s": {content["build_s"]}', f'"build_s": {text}'))
    with pytest.raises(BankError, match="is not finite"):
        info(path)


def test_a_manifest_that_is_too_long_is_not_parsed(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"[" + b"[]," * (3 << 20) + b"[]]")
    with pytest.raises(BankError, match="more than the 8388608 that such a file may have"):
        Bank.open(path)


@pytest.mark.parametrize("part", [b"[],", b'{"":[]},', b"[" * 900 + b"]" * 900 + b","])
def test_a_manifest_of_lists_is_not_parsed(path: Path, part: bytes) -> None:
    """They would take forty times as much memory as the file is long."""
    (path / "manifest.json").write_bytes(b"[" + part * ((8 << 20) // len(part) - 1) + b"0]")
    with pytest.raises(BankError, match="lists and mappings, more than 32768"):
        Bank.open(path)


def test_an_index_of_another_recipe_is_not_written_to(path: Path) -> None:
    edit_manifest(path / "indexes" / "hnsw" / "index.json", lambda content: content.update(recipe="ivf"))
    with pytest.raises(BankError, match="it is of recipe 'ivf', its folder is not"):
        update_indexes(Bank.open(path))


def test_a_calibration_with_absurd_numbers_is_refused(path: Path) -> None:
    from spade_faiss.workflows.calibrate import calibrate

    calibrate(Detector.open(path, method=Method(k_image=1, k_gallery=1)))
    (file,) = (path / "calibration").iterdir()
    text = file.read_text()
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda content: content["pixels"]["counts"].__setitem__(0, 10**30),
        lambda content: content.update(available=10**30),
        lambda content: content.update(generation=-1),
        lambda content: content["image_score"].__setitem__(0, 1e300),
    ]
    for change in changes:
        edit_manifest(file, change)
        with pytest.raises(BankError, match="a calibration"):
            stored_calibrations(Bank.open(path))
        file.write_text(text)


# ---- values of shards


def used_up(path: Path) -> None:
    Detector.open(path, method=Method(k_image=2, k_gallery=5)).score_features(batch("q"))


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (what, name)
        for what in ("big-endian", "compressed", "chunked", "virtual", "external", "a soft link", "huge", "of doubles")
        for name in ("image/embedding", f"level/{FINE.name}", "image/valid")
        if (what, name) != ("big-endian", "image/valid")  # single bytes have no order
    ],
)
def test_arrays_that_we_do_not_write_are_refused(path: Path, what: str, name: str) -> None:
    """Faults: a virtual dataset that points to another HDF5 file, big-endian maps."""
    index = 1 if name == "image/valid" else 0
    sign_shard(path, lambda file: ARRAYS[what](file, name), index)
    (problem,) = verify(path, deep=True).problems
    assert "is damaged" in problem
    with pytest.raises(BankError, match=r"00000\d\.h5 is damaged"):
        used_up(path)


def test_text_of_variable_length_is_refused_before_it_is_read(path: Path) -> None:
    """Fault "variable-length text of 2^29 entries": it kept the process busy and took all memory."""

    def change(file: h5py.File) -> None:
        del file["image/path"]
        file.create_dataset("image/path", (1 << 29,), h5py.string_dtype(), chunks=(1 << 20,))

    sign_shard(path, change)
    with pytest.raises(BankError, match=r"000001\.h5 is damaged"):
        Bank.open(path).image_path("a")


def test_texts_are_no_longer_than_a_path_can_be(path: Path) -> None:
    """A report repeats an id dozens of times."""
    with pytest.raises(InputError, match="takes 32769 bytes, at most 32768"):
        Bank.open(path).append(batch("x" * ((1 << 15) + 1)))

    def change(file: h5py.File) -> None:
        del file["image/id"]
        file["image/id"] = np.array([b"x" * 40_000 + b"%d" % number for number in range(3)])

    sign_shard(path, change)
    with pytest.raises(BankError, match="image/id is"):
        used_up(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_embeddings_that_cannot_be_compared_are_refused(path: Path, value: float) -> None:
    """Fault "embedding of 3e38"."""
    part = batch("x", "y")
    part.embedding[1, 0] = value
    entry = write_shard(path / "features" / "000009.h5", part)
    edit_manifest(path / "manifest.json", lambda content: content["shards"].append({**vars(entry), "removed": []}))
    (problem,) = verify(path, deep=True).problems
    assert "000009.h5 holds embeddings that are not finite, or beyond 2e+16" in problem
    with pytest.raises(BankError, match="holds embeddings that are not finite, or beyond 2e\\+16"):
        Detector.open(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_maps_that_cannot_be_compared_are_found_by_a_deep_look(path: Path, value: float) -> None:
    """Fault "NaN in maps ... accepted by `verify --deep`"."""
    part = batch("x", "y")
    part.levels[COARSE.name][1, 0, 0, 0] = value
    entry = write_shard(path / "features" / "000009.h5", part)
    edit_manifest(path / "manifest.json", lambda content: content["shards"].append({**vars(entry), "removed": []}))
    (problem,) = verify(path, deep=True).problems
    assert f"000009.h5 holds maps of level {COARSE.name!r} that are not finite, or beyond 2e+16" in problem


@pytest.mark.parametrize("ids", [["x", "x"], ["x", "d"], ["x", "b"]])  # in itself, of another shard, of a removed image
def test_an_id_that_occurs_twice_is_refused_wherever_ids_are_read(path: Path, ids: list[str]) -> None:
    """Fault "ids twice in a shard"."""
    entry = write_shard(path / "features" / "000009.h5", replace(batch("x", "y"), ids=ids))
    edit_manifest(path / "manifest.json", lambda content: content["shards"].append({**vars(entry), "removed": []}))
    uses: list[Callable[[], object]] = [
        lambda: used_up(path),
        lambda: Bank.open(path).append(batch("new")),
        lambda: Bank.open(path).remove(["a"]),
    ]
    for use in uses:
        with pytest.raises(BankError, match="1 ids occur more than once"):
            use()


# ---- indexes of maps

LISTS = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 2}))
COMPACT = Recipe(name="compact", build=Build(gallery="compact", settings={"dims": 2}))
HISTORY = Recipe(name="history", build=Build(gallery="history", settings={"lists": 2}))
CLUSTERS = Recipe(name="clusters", build=Build(gallery="clusters"))
GLOBAL = Recipe(name="global", build=Build(gallery="global_index", settings={"dims": 2, "lists": 2}))
NAN32, NAN16 = np.float32(np.nan), np.float16(np.nan)


def changed(array: Any, place: int, value: Any) -> Any:
    found = array.copy()
    found.reshape(-1)[place] = value
    return found


@pytest.mark.parametrize(
    ("recipe", "file", "name", "change", "said"),
    [
        (LISTS, "trained", "centroids", lambda a: a[:1], "centroids is"),
        (LISTS, "trained", "centroids", lambda a: a.astype(np.float64), "centroids is"),
        (LISTS, "trained", "centroids", lambda a: changed(a, 0, NAN32), "not finite"),
        (LISTS, "encoded", "order", lambda a: changed(a, 0, 1 << 31), "each of 35 locations once"),
        (LISTS, "encoded", "order", lambda a: changed(a, 0, int(a.reshape(-1)[1])), "each of 35 locations once"),
        (LISTS, "encoded", "order", lambda a: a[:, :-1], "order is"),
        (LISTS, "encoded", "order", lambda a: a[:-1], "images"),
        (LISTS, "encoded", "order", lambda a: a.reshape(-1), "images"),
        (LISTS, "encoded", "order", lambda a: a.astype(np.int64), "order is"),
        (LISTS, "encoded", "starts", lambda a: changed(a, 1, 1 << 31), "starts do not lead from 0 to 35"),
        (LISTS, "encoded", "starts", lambda a: changed(a, 2, 1), "starts do not lead from 0 to 35"),
        (COMPACT, "trained", "components", lambda a: a.T.copy(), "components is"),
        (COMPACT, "trained", "scale", lambda a: a * 0, "scale is 0"),
        (COMPACT, "trained", "mean", lambda a: changed(a, 0, NAN32), "not finite"),
        (COMPACT, "encoded", "codes", lambda a: changed(a, 0, NAN16), "not finite"),
        (COMPACT, "encoded", "codes", lambda a: a[..., :-1], "codes is"),
        (HISTORY, "trained", "centroids", lambda a: a[:-1], "centroids is"),
        (HISTORY, "encoded", "list", lambda a: changed(a, 0, 255), "a location is in list 255 of 2"),
        (HISTORY, "encoded", "list", lambda a: a.astype(np.int8), "list is"),
        (CLUSTERS, "trained", "centers", lambda a: a[:, :-1], "centers is"),
        (CLUSTERS, "trained", "centers", lambda a: changed(a, 0, NAN32), "not finite"),
        (CLUSTERS, "encoded", "cluster", lambda a: changed(a, 3, 1 << 30), "cluster does not name one of"),
        (CLUSTERS, "encoded", "cluster", lambda a: changed(a, 3, -1), "cluster does not name one of"),
        (CLUSTERS, "encoded", "cluster", lambda a: a.astype(np.int64), "cluster is"),
        (CLUSTERS, "encoded", "distance", lambda a: changed(a, 0, NAN32), "not finite"),
        (CLUSTERS, "encoded", "distance", lambda a: changed(a, 0, -1), "distance holds values below 0"),
        (GLOBAL, "trained", "centroids", lambda a: a[:, :-1], "centroids is"),
        (GLOBAL, "trained", "alike", lambda a: changed(a, 0, NAN32), "not finite"),
        (GLOBAL, "trained", "components", lambda a: a[:1], "components is"),
        (GLOBAL, "encoded", "sizes", lambda a: changed(a, 0, 1 << 30), "sizes counts"),
        (GLOBAL, "encoded", "sizes", lambda a: a[:1], "sizes is"),
        (GLOBAL, "encoded", "codes", lambda a: a[:-8], "codes is"),
        (GLOBAL, "encoded", "codes", lambda a: a.astype(np.int8), "codes is"),
        (GLOBAL, "encoded", "step", lambda a: a[:-16], "step is"),
        (GLOBAL, "encoded", "half_sq_norm", lambda a: a.astype(np.float64), "half_sq_norm is"),
        (GLOBAL, "encoded", "id", lambda a: a[:-1], "id is"),
    ],
)
def test_what_a_method_cannot_have_stored_is_refused(
    tmp_path: Path, recipe: Recipe, file: str, name: str, change: Callable[[Any], Any], said: str
) -> None:
    """Fault "index and gallery arrays with wrong shapes and values, checksums made right again": raw tracebacks."""
    bank = make_bank(tmp_path / "bank")
    bank.append(batch("a", "b", "c", "d"))
    build_index(bank, recipe)
    level = COARSE if recipe is COMPACT else FINE  # only there, channels are many enough for components
    gallery = bank.path / "indexes" / recipe.name / "gallery"
    (stored,) = gallery.glob("trained-*.h5" if file == "trained" else "000-*.h5")
    del bank
    forget_mappings()
    data = stored.read_bytes()
    stored.unlink()
    stored.write_bytes(data)
    with h5py.File(stored, "r+") as opened:
        before = opened[f"{level.name}/{name}"][...]
        del opened[f"{level.name}/{name}"]
        opened[f"{level.name}/{name}"] = change(before)
    record(tmp_path / "bank", stored)
    with pytest.raises(
        BankError, match=f"{stored.name} is damaged: .*{said}.*; rebuild it with: spade-faiss index .*--rebuild"
    ):
        Detector.open(tmp_path / "bank", recipe=recipe, method=Method(k_image=2, k_gallery=ALL)).score_features(batch("q"))
    (problem,) = verify(tmp_path / "bank", deep=True).problems
    assert said in problem
    update_indexes(Bank.open(tmp_path / "bank"), rebuild=True)
    assert verify(tmp_path / "bank", deep=True).problems == ()


@pytest.mark.parametrize("recipe", [LISTS, COMPACT, HISTORY, CLUSTERS], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_no_index_is_built_of_maps_that_cannot_be_compared(tmp_path: Path, recipe: Recipe, value: float) -> None:
    bank = make_bank(tmp_path / "bank")
    bank.append(batch("a", "b", "c", "d"))
    part = batch("x", "y")
    for level in (FINE, COARSE):
        part.levels[level.name][1, 0, 0, 0] = value
    entry = write_shard(bank.path / "features" / "000009.h5", part)
    edit_manifest(bank.path / "manifest.json", lambda content: content["shards"].append({**vars(entry), "removed": []}))
    with pytest.raises(BankError, match=r"holds maps of level .* not finite, or beyond 2e\+16; find .* verify .* --deep"):
        build_index(Bank.open(bank.path), recipe)


@pytest.mark.parametrize("file", ["index", "gallery"])
def test_an_index_that_miscounts_a_shard_is_right_after_what_the_message_says(path: Path, file: str) -> None:
    name = {"index": "hnsw", "gallery": "ivf"}[file]
    edit_manifest(path / "indexes" / name / f"{file}.json", lambda content: content["shards"][0].update(count=4))
    (problem,) = verify(path).problems
    assert f"--recipe {name} --rebuild" in problem
    update_indexes(Bank.open(path), rebuild=True)
    assert verify(path, deep=True).problems == ()


@pytest.mark.parametrize("file", [trained_file, encoded_file])
def test_arrays_of_no_level_are_refused_or_left_alone(path: Path, file: Callable[[Path], Path]) -> None:
    stored = file(path)
    with h5py.File(stored, "r+") as opened:
        opened["more"] = np.zeros(3, np.uint8)
        opened.attrs["arrays"] = np.bytes_("\n".join(sorted([*opened.attrs["arrays"].decode().split("\n"), "more"])))
    record(path, stored)
    try:
        Detector.open(path, recipe=IVF, method=Method(k_image=2, k_gallery=4)).score_features(batch("q"))
    except BankError as error:
        assert "'more', which is of no level" in str(error)  # noqa: PT017  # what is not read may stay


# ---- pictures of normal images

PIXELS = Preprocess(resize=16, size=16)


def bank_of_pictures(folder: Path, picture: Path | str, sha256: str) -> Bank:
    source = Source(backbone="net", weights_sha256="ab12", preprocess=PIXELS)
    bank = make_bank(folder / "bank", source=source)
    bank.append(batch("a", paths=[str(picture)], sha256=[sha256] if sha256 else [], root="/", source=source))
    return bank


def test_a_picture_is_shown_only_where_its_checksum_is_known_and_right(tmp_path: Path) -> None:
    """Fault "`image/path` in a shard names any picture of the user": it was embedded in the report."""
    from spade_faiss.core.files import hash_file

    picture = save(noise(16, 16), tmp_path / "secret.png")
    shown = NormalPictures(bank_of_pictures(tmp_path / "1", picture, hash_file(picture)))("a")
    assert shown.picture is not None
    (tmp_path / "link.png").symlink_to(picture)  # of the user's
    assert NormalPictures(bank_of_pictures(tmp_path / "2", tmp_path / "link.png", hash_file(picture)))("a").picture is not None
    for number, digest in enumerate(["", "0" * 64, "x"]):
        shown = NormalPictures(bank_of_pictures(tmp_path / f"no{number}", picture, digest))("a")
        assert shown.picture is None
        assert "checksum" in str(shown) or "has changed since the bank took it" in str(shown)


@pytest.mark.parametrize(
    "name", ["pipe", "/dev/zero", "/dev/null", "/proc/self/mem", "text.txt", "folder", "gone", "huge", "a" * 300]
)
def test_no_other_file_is_read_waited_for_or_quoted(tmp_path: Path, name: str) -> None:
    """Faults: "other files: their first bytes; a FIFO hangs, /dev/zero eats the memory"."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.txt").write_text("SECRET")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    for number, digest in enumerate(["", "0" * 64]):
        shown = NormalPictures(bank_of_pictures(tmp_path / f"{number}", tmp_path / name, digest))("a")
        assert shown.picture is None
        assert "SECRET" not in str(shown)


# ---- the backbone


def bank_from(folder: Path, backbone: str, weights: str | None = None, *, size: int = 64) -> Bank:
    source = Source(backbone=backbone, weights_sha256="ab12", preprocess=Preprocess(resize=size, size=size))
    layout = Layout(levels=(FINE, COARSE), embedding_dim=6, input_size=(64, 64), dtype="float32")
    return Bank.create(folder / "bank", layout, Origin(source=source, weights_file=weights))


@pytest.mark.parametrize("name", ["timm:hf-hub:somebody/model", "timm:local-dir:/etc", "timm:../../x", "hf-hub:x/y", "x", ""])
def test_a_bank_names_no_network_from_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"timm has no model|was made with your own backbone"):
        backbone_of(bank_from(tmp_path, name), None, Run())


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/proc/kmsg", "empty", "folder", "gone", "a\0b", "\ud800", "x" * 10**5])
def test_recorded_weights_are_a_file_or_are_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    with pytest.raises(NotFoundError, match="is gone or no file; pass --weights FILE") as caught:
        backbone_of(bank_from(tmp_path, "resnet18", os.path.join(tmp_path, name)), None, Run())  # noqa: PTH118
    assert len(str(caught.value)) < 1500


def test_recorded_weights_that_are_something_else_are_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("SECRET " * 10)
    with pytest.raises(InputError, match="is no state dict of tensors alone") as caught:
        backbone_of(bank_from(tmp_path, "resnet18", str(tmp_path / "text.txt")), None, Run())
    assert "SECRET" not in str(caught.value)


def test_inputs_of_another_size_than_the_maps_are_refused(tmp_path: Path) -> None:
    """Their features would take memory that no file of the bank accounts for."""
    with pytest.raises(BankError, match=r"inputs of \(64, 64\) pixels, its settings say 9000 x 9000"):
        backbone_of(bank_from(tmp_path, "resnet18", size=9000), None, Run())
