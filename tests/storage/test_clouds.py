"""What Google's storage and Azure's do otherwise than S3 does: what was seen there, on the server of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import obstore
import pytest

from spade_faiss.storage.cloud import CloudStore
from spade_faiss.storage.url import parse_url
from tests.support.object_storage import Server


def test_what_is_gone_already_is_passed_over_where_the_storage_says_so(
    bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 deletes what there is not without a word; the others answer 404, and leave what comes after it."""
    delete = obstore.delete

    def strict(store: obstore.store.ObjectStore, paths: str | Sequence[str]) -> None:
        for path in [paths] if isinstance(paths, str) else paths:
            obstore.head(store, path)
            delete(store, path)

    monkeypatch.setattr(obstore, "delete", strict)
    objects = server.objects(f"{bucket}/results")
    for name in ("a", "b", "d"):
        objects[name] = b"old"
    CloudStore(parse_url(f"{bucket}/results")).delete(["a", "c", "d"])
    assert objects.names() == ["b"]
