"""Manifests that say something else than what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spade_faiss.core.signed_json import hash_json
from tests.support.banks import forget_mappings


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Edit a manifest, of a bank, an index or a network; `sign`: give it the checksum of what it now says."""
    content = json.loads(path.read_text())
    change(content)
    if sign:
        content.pop("sha256", None)
        content["sha256"] = hash_json(content)
    path.write_text(json.dumps(content))
    forget_mappings()
