"""Banks of codes: learned from the first pictures, kept by all that changes a bank, and checked as everything that it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss.bank import bank as bank_module
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.codes import CODES
from spade_faiss.bank.facts import facts_of
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, hash_file
from spade_faiss.core.store import Store
from spade_faiss.features.layout import prepare
from spade_faiss.workflows.verify import verify
from tests.support.banks import ABC, COARSE, DE, F, PowerCutError, batch, fail, files, forget_mappings, make_bank
from tests.support.damage import flip
from tests.support.manifests import edit_manifest

CODED: dict[str, Any] = {"dtype": "int8", "numbers": 4}


def coded(path: Path) -> Bank:
    """A bank of six images in three shards; of the second level, five channels are stored as four numbers."""
    bank = make_bank(path, **CODED)
    for part in (ABC, DE, F):
        bank.append(part)
    return bank


def plain(layout: dict[str, Any]) -> None:
    """Make a layout of codes in a manifest one of float16."""
    layout.update(dtype="float16", numbers=None)
    for level in layout["levels"]:
        level["channels"] = level.pop("extracted", level["channels"])


def levels_of(bank: Bank, rows: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    return dict(bank.read(np.array(rows)).levels)


def assert_same(found: dict[str, Any], expected: Any) -> None:
    assert set(found) == set(expected)
    for name, maps in found.items():
        np.testing.assert_array_equal(maps, expected[name])


def test_a_bank_of_codes_holds_what_its_codes_say(tmp_path: Path) -> None:
    bank = coded(tmp_path / "bank")
    for opened in (bank, Bank.open(tmp_path / "bank")):
        codes = opened.codes
        assert codes is not None
        for row, part in enumerate([ABC[:1], ABC[1:2], ABC[2:], DE[:1], DE[1:], F]):
            encoded = codes.encode(prepare(part, opened.layout))
            for level in opened.layout.levels:
                found = opened.level_map(level.name, row)
                assert (found.dtype.name, found.shape) == ("int8", level.stored_shape)
                np.testing.assert_array_equal(found, encoded.levels[level.name][0])
                np.testing.assert_array_equal(opened.vectors_of_map(level.name, row), levels_of(opened, [row])[level.name][0])
    # The first shard is what its codes were learned from: nothing of it is cut off, and a query of it is the same.
    assert_same(levels_of(bank, [0, 1, 2]), bank.prepared(ABC).levels)
    assert bank.level_map(COARSE.name, 0).shape == (3, 3, 4)
    assert bank.layout.image_bytes == 4 * 6 + 5 * 7 * 3 + 3 * 3 * 4
    entry = bank.manifest.codes
    assert entry is not None
    assert (entry.pictures, [loss.level for loss in entry.losses]) == (3, ["blocks.1", "blocks.2"])
    assert (facts_of(bank)["store"], facts_of(bank)["codes"]["pictures"]) == ("pca4-int8", 3)


def test_an_empty_bank_of_codes_has_none_yet(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", **CODED)
    assert bank.codes is None
    assert not (bank.path / CODES).exists()
    assert Bank.open(bank.path).codes is None
    assert verify(bank.path, deep=True).problems == ()
    # What a query would be compared with is not known: it stays as it is.
    assert_same(dict(bank.prepared(ABC).levels), prepare(ABC, bank.layout).levels)


def test_codes_stay_while_a_bank_changes(tmp_path: Path) -> None:
    bank = coded(tmp_path / "bank")
    before, learned = levels_of(bank, [0, 2, 4, 5]), (bank.path / CODES).read_bytes()
    bank.remove(["b", "d"])
    assert_same(levels_of(bank, [0, 1, 2, 3]), before)
    bank.restore(["b"])
    bank.remove(["b"])
    done = bank.compact()
    assert done.dropped == 2
    assert len(bank.manifest.shards) == 1
    assert_same(levels_of(bank, [0, 1, 2, 3]), before)
    bank.append(batch("g"))
    assert bank.level_map("blocks.1", 4).dtype == np.int8
    assert (bank.path / CODES).read_bytes() == learned
    assert verify(bank.path, deep=True).problems == ()
    # With all of its pictures gone, it still has the codes, and what comes next is encoded by them.
    bank.remove(["a", "c", "e", "f", "g"])
    bank.compact()
    assert len(Bank.open(bank.path)) == 0
    bank.append(ABC)
    assert_same(levels_of(Bank.open(bank.path), [0, 1, 2]), bank.prepared(ABC).levels)
    assert (bank.path / CODES).read_bytes() == learned


def test_a_power_cut_before_the_first_commit_leaves_an_empty_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(tmp_path / "bank", **CODED)
    with monkeypatch.context() as patched:
        patched.setattr(bank_module, "write_manifest", fail)
        with pytest.raises(PowerCutError):
            bank.append(ABC)
    assert (bank.path / CODES).exists()
    opened = Bank.open(bank.path)
    assert (len(opened), opened.codes) == (0, None)
    opened.append(DE)  # other pictures: the codes that were left are of no use
    entry = opened.manifest.codes
    assert entry is not None
    assert entry.pictures == 2
    assert_same(levels_of(Bank.open(bank.path), [0, 1]), opened.prepared(DE).levels)


def test_codes_may_be_learned_before_a_picture_is_stored(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", **CODED)
    bank.learn_prepared(prepare(ABC, bank.layout))
    entry = Bank.open(bank.path).manifest.codes
    assert entry is not None
    assert (len(bank), entry.pictures) == (0, 3)
    bank.append(DE)
    assert Bank.open(bank.path).manifest.codes == entry
    assert_same(dict(bank.prepared(ABC).levels), coded(tmp_path / "other").prepared(ABC).levels)
    assert verify(bank.path, deep=True).problems == ()
    with pytest.raises(InputError, match="has learned its codes; there is nothing to learn"):
        bank.learn_prepared(prepare(F, bank.layout))
    with pytest.raises(InputError, match="stores float32, no codes; there is nothing to learn"):
        make_bank(tmp_path / "plain").learn_prepared(ABC)


def test_a_bank_without_codes_is_what_it_was(tmp_path: Path) -> None:
    """Byte for byte, but for the time and versions: an older version reads it, too."""
    bank = make_bank(tmp_path / "bank", dtype="float16")
    bank.append(ABC)
    written = json.loads((bank.path / "manifest.json").read_text())
    assert "codes" not in written
    assert "numbers" not in written["layout"]
    assert all("extracted" not in level for level in written["layout"]["levels"])
    assert "numbers" not in bank.layout.named()
    assert sorted(files(bank.path)) == ["features/000001.h5", "manifest.json"]


def test_a_bank_is_asked_for_as_it_stores(tmp_path: Path) -> None:
    bank = coded(tmp_path / "bank")
    assert len(Bank.open_or_create(bank.path, bank.layout)) == 6
    whole = replace(bank.layout, numbers=None)
    with pytest.raises(InputError, match="has store='pca4-int8', asked for 'int8'; use the bank's setting"):
        Bank.open_or_create(bank.path, whole)
    with pytest.raises(InputError, match="has store='pca4-int8', asked for 'float16'"):
        Bank.open_or_create(bank.path, replace(whole, dtype="float16"))


def replaced(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Other codes in the place of a bank's, which its manifest says are its own."""
    file = path / CODES
    with h5py.File(file) as opened:
        arrays = {name: opened[name][...] for name in opened.attrs["arrays"].decode().split("\n")}
    change(arrays)
    from spade_faiss.core.arrays import write_arrays

    file.unlink()
    write_arrays(file, arrays, attributes={"schema": 1})
    entry = vars(FileEntry.of(file, hash_file(file)))
    edit_manifest(path / "manifest.json", lambda content: content["codes"].update(entry))


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("no codes of a level", lambda found: found.pop("level/blocks.2/scale"), "it has no codes of level 'blocks.2'"),
    (
        "a level of its own",
        lambda found: found.update({"level/x/scale": np.ones(1, np.float32)}),
        "level/x/scale, which is of no",
    ),
    ("no basis", lambda found: found.pop("level/blocks.2/basis"), "basis of level 'blocks.2' is None"),
    ("a basis too many", lambda found: found.update({"level/blocks.1/basis": np.eye(2, 3, dtype=np.float32)}), "expected none"),
    (
        "too many numbers",
        lambda found: found.update({"level/blocks.1/scale": np.ones(9, np.float32)}),
        r"\(9,\), expected \(3,\)",
    ),
    ("infinite steps", lambda found: found.update({"level/blocks.1/scale": np.full(3, np.inf, np.float32)}), "must be above 0"),
    ("a long basis", lambda found: found["level/blocks.2/basis"].__imul__(2), "must be of orthonormal rows"),
]


@pytest.mark.parametrize(("change", "message"), [item[1:] for item in HOSTILE], ids=[item[0] for item in HOSTILE])
def test_codes_that_somebody_tampered_with_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    bank = coded(tmp_path / "bank")
    replaced(bank.path, change)
    opened = Bank.open(bank.path)
    with pytest.raises(BankError, match=message):
        opened.read(np.array([0]))
    with pytest.raises(BankError, match=message):
        opened.prepared(ABC)
    with pytest.raises(BankError, match=message):
        opened.append(batch("g"))
    (problem,) = verify(bank.path, deep=True).problems
    assert "codes.h5 is damaged" in problem


def test_damaged_and_missing_codes_are_noticed(tmp_path: Path) -> None:
    bank = coded(tmp_path / "bank")
    file, data = bank.path / CODES, (bank.path / CODES).read_bytes()
    flip(file)
    (problem,) = verify(bank.path).problems
    assert problem.startswith(f"the codes {file} has sha256")
    os.utime(file)  # another time, so that opening looks at the content
    with pytest.raises(BankError, match=r"codes\.h5 has changed since it was written"):
        Bank.open(bank.path)
    file.write_bytes(data[:-1])
    with pytest.raises(BankError, match=r"codes\.h5 has changed since it was written: .* bytes"):
        Bank.open(bank.path)
    file.unlink()
    forget_mappings()
    with pytest.raises(BankError, match=r"codes\.h5, which the manifest names, is missing"):
        Bank.open(bank.path)
    (problem,) = verify(bank.path).problems
    assert "is missing; restore it from a backup, or make the bank anew" in problem
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BankError, match="link"):
        Bank.open(bank.path)


def test_packed_codes_that_somebody_tampered_with_are_refused(tmp_path: Path) -> None:
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda found: found.pop("level/blocks.1/bits"), r"bits of level 'blocks.1' is None, expected \(3,\) of uint8"),
        (lambda found: found.update({"level/blocks.1/bits": np.array([8, 3, 1], np.uint8)}), "1 to 7 each, and 2 bytes"),
        (lambda found: found.update({"level/blocks.1/bits": np.array([0, 5, 7], np.uint8)}), "1 to 7 each, and 2 bytes"),
        (lambda found: found.update({"level/blocks.1/bits": np.array([1, 1, 1], np.uint8)}), "1 to 7 each, and 2 bytes"),
        (lambda found: found.pop("level/blocks.1/basis"), "basis of level 'blocks.1' is None"),
    ]
    for number, (change, message) in enumerate(changes):
        bank = make_bank(tmp_path / f"bank{number}", dtype="int8", bits=4)
        bank.append(ABC)
        replaced(bank.path, change)
        with pytest.raises(BankError, match=message):
            Bank.open(bank.path).read(np.array([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layout: layout["levels"][0].update(packed_bytes=3),
            "packed_bytes=3; by the settings of the bank, pca4-int4, it has 2",
        ),
        (
            lambda layout: layout["levels"][0].pop("packed_bytes"),
            "packed_bytes=None; by the settings of the bank, pca4-int4, it has 2",
        ),
        (lambda layout: layout.update(bits=6), "packed_bytes=2; by the settings of the bank, pca4-int6, it has 3"),
        (lambda layout: layout.pop("bits"), "packed_bytes=2; by the settings of the bank, pca4-int8, it has None"),
        (lambda layout: layout["levels"][1].update(channels=3), "channels=3; by the settings of the bank, pca4-int4, it has 4"),
        (lambda layout: layout["levels"][1].update(roi={"height": 3, "width": 3, "runs": "4 5"}), "roi={.*}; .* it has None"),
    ],
)
def test_levels_that_contradict_the_store_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """They are computed from it: what a manifest says beside that was written by somebody else."""
    bank = make_bank(tmp_path / "bank", **vars(Store.parse("pca4-int4")))
    bank.append(ABC)
    edit_manifest(bank.path / "manifest.json", lambda content: change(content["layout"]))
    with pytest.raises(BankError, match=rf"manifest\.json is damaged: level .* is said to have {message}; restore it from a"):
        Bank.open(bank.path)


@pytest.mark.parametrize("store", ["int4", "pca4-int3"])
def test_a_bank_of_packed_codes_holds_what_its_codes_say(tmp_path: Path, store: str) -> None:
    bank = make_bank(tmp_path / "bank", **vars(Store.parse(store)))
    for part in (ABC, DE, F):
        bank.append(part)
    bank.remove(["b"])
    bank.compact()
    opened = Bank.open(bank.path)
    assert (opened.ids, str(opened.layout.store), facts_of(opened)["store"]) == (["a", "c", "d", "e", "f"], store, store)
    assert opened.codes is not None
    encoded = opened.codes.encode(prepare(DE, opened.layout))
    for level in opened.layout.levels:
        found = opened.level_map(level.name, 2)
        assert (found.dtype.name, found.shape) == ("uint8", level.stored_shape)
        np.testing.assert_array_equal(found, encoded.levels[level.name][0])
        np.testing.assert_array_equal(opened.vectors_of_map(level.name, 2), levels_of(opened, [2])[level.name][0])
    assert verify(bank.path, deep=True).problems == ()
    written = json.loads((bank.path / "manifest.json").read_text())
    assert written["layout"]["bits"] == Store.parse(store).bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("codes"), "hold pca4-int8, and no codes are named"),
        (lambda content: plain(content["layout"]), "names codes, and its shards are said to hold"),
        (lambda content: content["codes"].update(file="features"), "its codes are said to be in features"),
        (lambda content: content["codes"].update(sha256="../../x"), "is no checksum"),
        (lambda content: content["codes"].update(pictures=0), "pictures=0 must be an integer of at least 1"),
        (lambda content: content["codes"]["losses"][0].update(kept=7.0), "expected shares"),
        (lambda content: content["layout"].update(numbers=[3, 2000]), "numbers=2000 is more than a code has"),
        (lambda content: content["layout"].update(numbers=[3, 3]), "is damaged"),
        (lambda content: content["layout"]["levels"][1].update(extracted=4), "extracted=4 must be"),
        (lambda content: content["layout"].update(bits=4), "is damaged"),
        (lambda content: content["layout"].update(bits=9), "bits=9 is more than a packed number takes on average"),
    ],
)
def test_manifests_that_contradict_codes_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    bank = coded(tmp_path / "bank")
    edit_manifest(bank.path / "manifest.json", change)
    with pytest.raises(BankError, match=message):
        Bank.open(bank.path).read(np.array([0]))


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    bank, other = coded(tmp_path / "bank"), make_bank(tmp_path / "other", dtype="float32")
    other.append(ABC)
    file = bank.path / "features" / "000001.h5"
    file.unlink()
    file.write_bytes((other.path / "features" / "000001.h5").read_bytes())
    entry = vars(FileEntry.of(file, hash_file(file)))
    edit_manifest(bank.path / "manifest.json", lambda content: content["shards"][0].update(entry))
    with pytest.raises(BankError, match=r"level/blocks\.1 is .*float32.*, expected .*int8"):
        Bank.open(bank.path).read(np.array([0]))
