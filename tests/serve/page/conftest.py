"""A server with some pictures in its history, for tests that only look; those that change it make their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import Server, serving

HOSTILE = '"><img src=x onerror=alert(1)>\u202e.png'


@pytest.fixture(scope="package")
def server(fitted_bank: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Five defects and six normals of the set were scored, the first defect under a hostile name. Do not change it."""
    with serving(fitted_bank, tmp_path_factory.mktemp("server")) as found:
        spots = sorted((dataset_folder / "test" / "spot").iterdir())
        found.score(spots, [HOSTILE, *(f"spot {path.name}" for path in spots[1:])])
        found.score(sorted((dataset_folder / "test" / "good").iterdir()))
        yield found


@pytest.fixture
def own_server(fitted_bank: Path, dataset_folder: Path, tmp_path: Path) -> Iterator[Server]:
    """A server with three alarms, for a test alone."""
    with serving(fitted_bank, tmp_path) as found:
        spots = sorted((dataset_folder / "test" / "spot").iterdir())[:3]
        found.score(spots, ["a.png", "b.png", "c.png"])
        yield found
