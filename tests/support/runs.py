"""What a folder of results shows: which run, and that all of it is there."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from spade_faiss.report.scorefile import ScoreFile


def run_shown(out: Path) -> str:
    """The id of the one run that a folder shows; fails if anything of it is missing, or there is anything of another."""
    report = json.loads((out / "report.json").read_bytes())
    run, checksums = report["run"]["id"], report["run"]["sha256"]
    with ScoreFile.open(out / "scores.h5") as scores:
        assert scores.run == run
        assert list(scores.ids) == [item["id"] for item in report["scores"]]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'name="spade-faiss-run" content="(\w+)"', page) == [run]
    files = {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and not path.name.startswith(".spade-")
    }
    assert files == {"report.json", "scores.h5", *checksums}
    for name, checksum in checksums.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == checksum, name
    named = report["overlays"]
    assert {name for name in checksums if name.startswith("overlays/")} == {*named.values()}
    assert len({*named.values()}) == len(named)
    assert named.keys() <= {item["id"] for item in report["scores"]}
    return str(run)
