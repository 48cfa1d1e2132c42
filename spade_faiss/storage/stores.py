"""Which library reaches what lies at a URL."""

from __future__ import annotations

import importlib.util

from spade_faiss.core.errors import DependencyError
from spade_faiss.storage.objects import ObjectStore
from spade_faiss.storage.url import CLOUDS, Url

INSTALL = "pip install 'spade-faiss[s3]'"


def open_store(url: Url) -> ObjectStore:
    """Open what lies at a URL.

    Raises:
        DependencyError: if a package is missing that reaches it.
        InputError: for a scheme that nothing reaches.
    """
    if url.scheme in CLOUDS:
        if importlib.util.find_spec("obstore") is None:
            raise DependencyError(f"{url} takes obstore, which is not installed: {INSTALL}")
        from spade_faiss.storage.cloud import CloudStore  # obstore is imported only where there is such a URL

        return CloudStore(url)
    if importlib.util.find_spec("fsspec") is None:
        raise DependencyError(f"{url} takes fsspec, which is not installed: {INSTALL}")
    from spade_faiss.storage.filesystems import FileSystemStore  # likewise

    return FileSystemStore(url)
