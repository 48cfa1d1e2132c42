"""Options are made from the dataclasses that declare settings: one field is one option, wherever the dataclass is used."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints
from unittest.mock import MagicMock

import pytest

from spade_faiss import cli
from spade_faiss.bank.bank import Bank
from spade_faiss.cli import options
from spade_faiss.cli.options import Commands, add_settings, read_settings
from spade_faiss.core.declaring import setting
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Decision, Method, ReportOptions, Run
from spade_faiss.scoring.detector import Detector


@dataclass(frozen=True, kw_only=True)
class WiderMethod(Method):
    """Today's method, and settings that nobody has declared yet."""

    softness: float = setting(0.5, "how soft the score is", metavar="S")
    edge_mode: str = setting("keep", "what becomes of the edges", choices=("keep", "drop"))
    most: int | None = setting(None, "the largest score", metavar="N")
    either: str | int = setting("1", "a number as text", kind=str)
    loud: bool = setting(False, "say it aloud")
    internal: int = 7


def parser_of(cls: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_settings(parser, cls)
    return parser


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Option -> what argparse knows of it."""
    return {option: action for action in parser._actions for option in action.option_strings}


def help_of(action: argparse.Action) -> str:
    """The help text of an option as it is printed."""
    formatter = argparse.ArgumentParser()._get_formatter()
    return formatter._expand_help(action)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser, of the whole command line."""
    (subparsers,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)


# ---- one more field is one more option


def test_a_new_field_has_an_option_with_its_help_default_choices_and_type() -> None:
    actions = actions_of(parser_of(WiderMethod))
    softness, edge_mode, most, either, loud = (
        actions[option] for option in ("--softness", "--edge-mode", "--most", "--either", "--loud")
    )
    assert (help_of(softness), softness.default, softness.type, softness.metavar) == (
        "how soft the score is (default: 0.5)",
        argparse.SUPPRESS,
        float,
        "S",
    )
    assert (help_of(edge_mode), edge_mode.default, edge_mode.choices) == (
        "what becomes of the edges (default: keep)",
        argparse.SUPPRESS,
        ("keep", "drop"),
    )
    # Without a default there is none to show; the type is that of the field, or the one that was named.
    assert (help_of(most), most.type) == ("the largest score", int)
    assert (either.default, either.type) == (argparse.SUPPRESS, str)
    assert (help_of(loud), loud.default, loud.nargs) == ("say it aloud", argparse.SUPPRESS, 0)
    # A field that is not declared by `setting` has none.
    assert "--internal" not in actions


def test_the_value_of_a_new_option_arrives() -> None:
    parser = parser_of(WiderMethod)
    assert read_settings(parser.parse_args([]), WiderMethod) == WiderMethod()
    words = ["--softness", "0.25", "--edge-mode", "drop", "--most", "3", "--either", "x", "--loud", "--kappa", "2"]
    assert read_settings(parser.parse_args(words), WiderMethod) == WiderMethod(
        softness=0.25, edge_mode="drop", most=3, either="x", loud=True, kappa=2
    )


@pytest.mark.parametrize("words", [["--softness", "very"], ["--edge-mode", "blur"], ["--most", "1.5"], ["--loud", "yes"]])
def test_a_value_that_does_not_fit_a_new_option_is_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser_of(WiderMethod).parse_args(words)
    capsys.readouterr()


def test_a_new_field_reaches_the_detector_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the dataclass names it: neither the command, nor what lies between it and the library."""
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(options, "Method", WiderMethod)
    bank = MagicMock()
    bank.usual.recipe, bank.usual.method = "exact", WiderMethod(edge_mode="drop")
    monkeypatch.setattr(Bank, "open", lambda _: bank)
    monkeypatch.setattr(Detector, "open", lambda bank, **settings: opened.append(settings))
    words = ["score", "new/", "--bank", "b", "--out", "o", "--softness", "0.25", "--k-image", "3"]
    arguments = cli._parser().parse_args(words)
    options.open_detector(arguments)
    (settings,) = opened
    assert settings["method"] == WiderMethod(
        softness=0.25, k_image=3, edge_mode="drop"
    )  # what is not given is as the bank has it


def test_options_of_only_some_fields() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, Run, only=("device", "memory"))
    assert set(actions_of(parser)) == {"-h", "--help", "--device", "--memory"}
    # The others have their defaults.
    assert read_settings(parser.parse_args(["--memory", "1GiB"]), Run) == Run(memory="1GiB")


# ---- every setting has its option


def settings_of(cls: type) -> dict[str, Any]:
    """Name -> default of each field that is declared by `setting`, those of nested dataclasses included."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        kind = get_type_hints(cls)[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            found |= settings_of(kind)
        elif "help" in field.metadata:
            found[field.name] = field.default
    return found


LOCALIZING = {"localize", "flag_above"}

# Command -> the settings that it takes: a dataclass, and the fields of it that the command has no use for.
TAKES: dict[str, list[tuple[type, set[str]]]] = {
    "fit": [(Extraction, set()), (Run, {"memory", "product", "replicas"})],
    "extract": [(Extraction, set()), (Run, {"memory", "product", "replicas"})],
    "add": [(Run, {"memory", "replicas"})],
    "score": [(Method, set()), (Run, {"group_by", "products"}), (Decision, set()), (ReportOptions, set())],
    "evaluate": [(Method, set()), (Run, {"group_by", "products"}), (Decision, set()), (ReportOptions, set())],
    "calibrate": [(Method, {*LOCALIZING, "score"}), (Run, {"products"})],
    "suspects": [
        (Method, {*LOCALIZING, "score", "image_scores"}),
        (Run, {"every", "group_by", "max_skipped", "engine", "roi", "products", "cluster", "replicas"}),
        (ReportOptions, {"overlays"}),
    ],
}


@pytest.mark.parametrize("command", TAKES)
def test_every_setting_has_its_option_with_its_default(command: str) -> None:
    actions = actions_of(commands()[command])
    for cls, unused in TAKES[command]:
        declared = settings_of(cls)
        assert declared.keys() > unused or not unused
        for name, default in declared.items():
            option = f"--{'no-' if default is True else ''}{name.replace('_', '-')}"
            assert (option in actions) == (name not in unused), (command, option)
            if name not in unused:
                # Only what is given is in the namespace; the rest is at its default, or as the bank or its preset has it.
                assert (actions[option].dest, actions[option].default) == (name, argparse.SUPPRESS), (command, option)


@pytest.mark.parametrize("cls", [Extraction, Method, Decision, ReportOptions, Run])
def test_every_settings_dataclass_is_taken_by_a_command(cls: type) -> None:
    taken = {name for takes in TAKES.values() for of, unused in takes if of is cls for name in settings_of(of).keys() - unused}
    assert taken == settings_of(cls).keys()


def test_help_texts_of_settings_say_what_they_are() -> None:
    """No text is the rest of a sentence that its option begins."""
    for cls in (Extraction, Method, Decision, ReportOptions, Run):
        for action in actions_of(parser_of(cls)).values():
            assert action.help
            assert not action.help.startswith(("of ", "that ")), action.help


def test_a_command_declares_its_help_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="p")
    Commands(parser).add("sing", lambda arguments: ({}, ""), "sing a song", "p sing --json")
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["sing", "--help"])
    printed = capsys.readouterr().out
    assert "Sing a song." in printed
    assert printed.endswith("example: p sing --json\n")
    arguments = parser.parse_args(["sing", "--json", "--quiet", "--debug"])
    assert (arguments.json, arguments.quiet, arguments.debug) == (True, True, True)
