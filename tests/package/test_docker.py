"""The Docker files agree with the package: its extras, commands and options, and where its metrics are."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from spade_faiss.cli import _parser

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def command_of(service: str) -> list[str]:
    """The words of a service's command, with the defaults of its variables."""
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in COMPOSE["services"][service]["command"]]


@pytest.mark.parametrize("path", sorted(DOCKER.glob("Dockerfile.*")), ids=lambda path: path.suffix[1:])
def test_each_image_installs_extras_that_there_are(path: Path) -> None:
    text = path.read_text()
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*extras.split(",")} <= known.keys()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    (health,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", text, re.MULTILINE)
    assert json.loads(health)
    assert 'ENTRYPOINT ["spade-faiss"]' in text


def test_every_service_has_its_dockerfile_and_its_volumes() -> None:
    named = {*COMPOSE["volumes"]}
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file(), name
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert source.startswith(".") or source in named, volume
        assert {*service.get("secrets", [])} <= COMPOSE["secrets"].keys()
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "reached from this machine alone"


@pytest.mark.parametrize("service", ["serve", "watch"])
def test_commands_are_those_of_the_command_line(service: str) -> None:
    words = command_of(service)
    arguments = _parser().parse_args(words)
    assert arguments.command == service
    assert arguments.token_file == "/run/secrets/token"
    if service == "serve":
        assert (arguments.host, arguments.port, arguments.banks) == ("0.0.0.0", 8000, ["/banks/parts.bank"])
    else:
        assert arguments.to == ["server:http://serve:8000/parts"]
        assert arguments.bank is None


def test_prometheus_asks_the_server_with_its_token() -> None:
    found = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    (job,) = found["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["serve:8000"]}]
    assert job["authorization"]["credentials_file"] == "/run/secrets/token"
    mounted = COMPOSE["services"]["prometheus"]["volumes"]
    assert "./prometheus.yaml:/etc/prometheus/prometheus.yml:ro" in mounted


def test_the_docs_start_what_there_is() -> None:
    text = (ROOT / "docs" / "how-to" / "docker.md").read_text()
    for line in re.findall(r"--profile (\w+)", text):
        assert any(line in service.get("profiles", []) for service in COMPOSE["services"].values())
    for path in re.findall(r"-f (docker/[\w.]+)", text):
        assert (ROOT / path).is_file()
