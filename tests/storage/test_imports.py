"""Without a URL, nothing of this is there: no package is imported, nothing is asked."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from spade_faiss.core.errors import DependencyError
from spade_faiss.storage import stores
from spade_faiss.storage.url import parse_url
from tests.support.banks import batch, make_bank

CODE = """
import sys
import spade_faiss
from spade_faiss.bank.bank import Bank
bank = Bank.open(sys.argv[1])
bank.remove(["a"])
assert bank.name == sys.argv[1]
print([name for name in ("fsspec", "obstore", "boto3", "s3fs") if name in sys.modules])
"""


def test_a_bank_in_a_folder_imports_nothing(tmp_path: Path) -> None:
    make_bank(tmp_path / "parts.bank").append(batch("a", "b"))
    words = [sys.executable, "-c", CODE, str(tmp_path / "parts.bank")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x", "obstore"), ("ftp://host/x", "fsspec")])
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=rf"{url} takes {package}, .*: pip install 'spade-faiss\[s3\]'"):
        stores.open_store(parse_url(url))
