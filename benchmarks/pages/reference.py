"""Reference pages that are computed from the code: the command line from its parser, recipes and presets from their files."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from benchmarks.pages.text import markdown_table
from spade_faiss.cli import _parser
from spade_faiss.core.presets import load_preset, preset_names
from spade_faiss.search.protocol import SearchMethod
from spade_faiss.search.recipe import gallery_names, load_recipe, recipe_names

_ROOT = Path(__file__).parents[2]
_COMMON = ("help", "json", "quiet", "debug", "cache", "cache_bytes")


def command_line() -> str:
    """Every command: what it does, how it is called, and its arguments and options."""
    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    common = next(iter(commands.choices.values()))
    options = [action for action in common._actions if action.dest in _COMMON]
    parts = ["## Options of every command", _arguments(options)]
    for name, command in commands.choices.items():
        own = [action for action in command._actions if action.dest not in _COMMON]
        example = str(command.epilog).removeprefix("example: ")
        parts += [f"## {name}", str(command.description), f"```text\n{example}\n```", _arguments(own)]
    return "\n\n".join(part for part in parts if part)


def recipes() -> str:
    """Every recipe: its description, and the rest of its file."""
    return "\n\n".join(_file("indexes", name, load_recipe(name).description) for name in recipe_names())


def presets() -> str:
    """Every preset: its description, and the rest of its file."""
    return "\n\n".join(_file("presets", name, load_preset(name).description) for name in preset_names())


def _file(folder: str, name: str, description: str) -> str:
    lines = (_ROOT / folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("description:"))
    return f"### {name}\n\n{description}\n\n```yaml\n{text}\n```"


def search_settings() -> str:
    """The settings of every search method, with their defaults."""
    parts = []
    for name in gallery_names():
        method: SearchMethod[Any, Any] = importlib.import_module(f"spade_faiss.search.{name}").METHOD
        parts += [f"### {name}", method.definition]
        for kind, cls in (("Build", method.build), ("Query", method.query)):
            fields = dataclasses.fields(cls)
            if fields:
                defaults = ", ".join(f"`{field.name}={field.default}`" for field in fields)
                parts.append(f"**{kind} settings**: {defaults}.\n{' '.join(str(inspect.getdoc(cls)).split())}")
    return "\n\n".join(parts)


def _arguments(actions: list[argparse.Action]) -> str:
    return markdown_table(("argument", "meaning"), ((_name(action), _meaning(action)) for action in actions)) if actions else ""


def _name(action: argparse.Action) -> str:
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    if not action.option_strings:
        return f"`{value}`" + (" …" if action.nargs in ("+", "*") else "")
    name = ", ".join(f"`{option}`" for option in action.option_strings)
    return name if action.nargs == 0 else f"{name} `{value}`" + (" …" if action.nargs in ("+", "*") else "")


def _meaning(action: argparse.Action) -> str:
    help = str(action.help) % {"default": f"`{action.default}`"} if "%(" in str(action.help) else str(action.help)
    help = re.sub(r"\(default: ([^\s)]+)\)$", r"(default: `\1`)", help)
    text = help + ("; required" if action.required and action.option_strings else "")
    return text.replace("<", "&lt;").replace("|", "\\|")
