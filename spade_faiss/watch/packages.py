"""The packages that `watch` needs and that are not installed with everything: each is imported where it is used."""

from __future__ import annotations

import importlib
from types import ModuleType

from spade_faiss.core.errors import DependencyError


def import_watchfiles() -> ModuleType:
    """Import watchfiles; raises DependencyError if it is not installed, as the functions below."""
    return _import("watchfiles", "watchfiles", "watching a folder")


def import_httpx() -> ModuleType:
    """Import httpx."""
    return _import("httpx", "httpx", "delivering by HTTP")


def import_mqtt() -> ModuleType:
    """Import the client of paho-mqtt."""
    return _import("paho.mqtt.client", "paho-mqtt", "delivering by MQTT")


def import_av() -> ModuleType:
    """Import PyAV."""
    return _import("av", "av", "reading a camera")


def _import(module: str, package: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{purpose} needs the package {package}; install it with: pip install 'spade-faiss[watch]'"
        ) from error
