"""Results at a URL appear when they are complete, in place of those before, and leave everything else alone."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.report.output_folder import output_folder
from spade_faiss.report.output_place import check_place
from spade_faiss.storage.cloud import CloudStore
from tests.support.banks import batch, make_bank
from tests.support.object_storage import Server


def write(out: str, *names: str) -> None:
    with output_folder(out, "score") as folder:
        for name in names:
            path = folder.staged / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(folder.run)


def test_results_are_stored_when_they_are_complete(
    bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, objects, order = f"{bucket}/line 3/results", server.objects(f"{bucket}/line 3/results"), list[str]()
    put = CloudStore.put

    def noted(store: CloudStore, name: str, content: bytes | Path) -> None:
        order.append(name)
        put(store, name, content)

    monkeypatch.setattr(CloudStore, "put", noted)
    write(out, "scores.h5", "report.html", "report.json", "overlays/a.png", "overlays/b.png", "regions.csv")
    assert order == ["overlays/a.png", "overlays/b.png", "regions.csv", "scores.h5", "report.json", "report.html"]
    objects["notes.txt"] = objects["overlays/notes.txt"] = b"not ours"
    first = objects["scores.h5"]
    write(out, "scores.h5", "report.html", "report.json", "overlays/b.png")
    assert objects.names() == [
        "notes.txt", "overlays/b.png", "overlays/notes.txt", "report.html", "report.json", "scores.h5",
    ]  # fmt: skip
    assert objects["scores.h5"] != first
    assert len({objects[name] for name in objects.names() if "notes" not in name}) == 1
    assert not list((tmp_path / "cache" / "results").iterdir())  # nothing is left here


def test_a_run_that_fails_changes_nothing(bucket: str, server: Server) -> None:
    out = f"{bucket}/results"
    write(out, "scores.h5", "report.html", "report.json")
    before = server.objects(bucket).contents()
    with pytest.raises(InputError, match=rf"cannot use {out}/scores.h5"), output_folder(out, "score") as folder:
        (folder.staged / "report.html").write_text("half of it")
        raise InputError(f"cannot use {folder.staged / 'scores.h5'}")
    assert server.objects(bucket).contents() == before


def test_other_objects_and_banks_are_no_place_for_results(bucket: str, server: Server) -> None:
    bank = make_bank(f"{bucket}/parts.bank")
    bank.append(batch("a"))
    server.objects(bucket)["pictures/a.png"] = b"a picture"
    for out, why in (
        (f"{bucket}/parts.bank", "lie in one another"),
        (f"{bucket}/parts.bank/results", "lie in one another"),
        (bucket, "lie in one another"),
        (f"{bucket}/pictures", r"holds other objects and no results \(a.png\)"),
    ):
        with pytest.raises(InputError, match=why):
            check_place(out, bank=bank)
    with pytest.raises(InputError, match="lie in one another"):
        check_place(f"{bucket}/new/results", bank=bank, images=[f"{bucket}/new"])
    with pytest.raises(InputError, match="is a bank"):
        write(f"{bucket}/parts.bank", "scores.h5")
    check_place(f"{bucket}/results", bank=bank, images=[f"{bucket}/new"])


def test_results_are_written_by_fsspec(bucket: str) -> None:
    write("memory://shelf/results", "scores.h5", "report.html", "overlays/a.png")
    files = fsspec.filesystem("memory")
    assert sorted(files.find("/shelf/results")) == [
        f"/shelf/results/{name}" for name in ("overlays/a.png", "report.html", "scores.h5")
    ]
