"""Which cluster is meant, what is imported for it, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from spade_faiss.cluster import session
from spade_faiss.cluster.session import RETRIES, Session, connect
from spade_faiss.core.cluster_address import Address, parse_address
from spade_faiss.core.errors import ClusterError, DependencyError, InputError
from spade_faiss.core.settings import Run


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("auto", Address(ray="auto")),
        ("local:12", Address(ray=None, workers=12)),
        ("ray://head.example:10001", Address(ray="ray://head.example:10001")),
        ("ray://[::1]:10001", Address(ray="ray://[::1]:10001")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "local", "local:0", "local:-1", "local:1.5", "ray://", "ray://a", "ray://a:0", "ray://a:70000", "http://a:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InputError, match=r"local:N for N workers on this machine"):
        parse_address(text)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'spade-faiss\[cluster\]'"), connect("local:1"):
        pass


def test_ray_is_imported_for_a_cluster_alone() -> None:
    """Neither the package nor the modules that may work on a cluster import it."""
    code = """
import sys, spade_faiss
from spade_faiss import evaluate, extract, fit, score_folder
print("ray" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_numbered_card_is_none_of_a_cluster() -> None:
    with pytest.raises(InputError, match="each worker is given one: use cuda"):
        Session(1).options("cuda:1")
    assert Session(2).options("cuda")["num_gpus"] == 1
    assert "num_gpus" not in Session(2).options("cpu")


def test_a_wrong_cluster_is_no_setting() -> None:
    with pytest.raises(InputError, match="is no cluster"):
        Run(cluster="somewhere")


@pytest.mark.parametrize(
    ("said", "failures", "tries"),
    [
        ("Initialization failure from server: it is a zombie", 2, 3),
        ("Initialization failure from server: it is a zombie", 99, RETRIES + 1),
        ("ray client connection timeout", 99, 1),
    ],
)
def test_a_client_that_ray_has_not_served_asks_again(
    monkeypatch: pytest.MonkeyPatch, said: str, failures: int, tries: int
) -> None:
    """Ray starts a process for each client, and on a busy node it sometimes ends at once."""
    asked = []

    def init(**options: object) -> None:
        asked.append(options["address"])
        if len(asked) <= failures:
            raise ConnectionError(said)

    ray = SimpleNamespace(
        init=init, is_initialized=lambda: False, shutdown=lambda: None, nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}]
    )
    monkeypatch.setattr(session, "import_ray", lambda: ray)
    monkeypatch.setattr(session, "_PAUSE_S", 0.0)
    if failures < RETRIES + 1:
        with connect("ray://head:10001") as found:
            assert found.cpus == 2
    else:
        with pytest.raises(ClusterError, match=said), connect("ray://head:10001"):
            pass
    assert asked == ["ray://head:10001"] * tries
