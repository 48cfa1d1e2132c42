"""The command line: parse, one library call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spade_faiss._version import __version__
from spade_faiss.cli import advice, banks, doctor, scores, upkeep, verdicts
from spade_faiss.cli.options import Commands
from spade_faiss.cli.streams import open_closed_streams, write_error, write_output
from spade_faiss.cli.text import to_json
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.memory import is_out_of_memory

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for an error; 2 for wrong usage; 130 if it was interrupted, and 141 if nobody reads its output, as
        shells count SIGINT and SIGPIPE.
    """
    open_closed_streams()
    try:
        arguments = _parser().parse_args(argv)
    except OSError as error:
        return _output_failed(error, {})
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("spade_faiss").setLevel(logging.DEBUG if arguments.debug else logging.NOTSET)
    try:
        numbers, text, *failed = arguments.run(arguments)
        output = to_json(numbers) if arguments.json else text
    except KeyboardInterrupt:
        write_error("interrupted; run the same command again to go on")
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        write_error(f"error: {_describe(error)}")
        return 1
    try:
        write_output(output)
    except OSError as error:
        return _output_failed(error, numbers)
    return int(any(failed))


def _describe(error: Exception) -> str:
    """Say in a line what went wrong, and what to do."""
    if is_out_of_memory(error) and not isinstance(error, SpadeError):
        return (
            f"there is not enough memory ({_line(error)}); allow the process more, or ask for less (--memory, --crop, --kappa)"
        )
    if isinstance(error, SpadeError | OSError):
        return str(error)
    return (
        f"this is a bug of spade-faiss, please report it ({_line(error)}); run the command again with --debug for a traceback"
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


def _output_failed(error: OSError, numbers: Mapping[str, Any]) -> int:
    """Say what was done by a command whose output nobody can read; return the exit code."""
    closed = isinstance(error, BrokenPipeError)
    where = numbers.get("out") or numbers.get("bank")
    done = f"the command has done its work, see {where}; " if where else ""
    if done or not closed:
        write_error(f"{'' if closed else 'error: '}{done}its output cannot be written: {error.strerror or error}")
    return 141 if closed else 1


class _Parser(argparse.ArgumentParser):
    """A parser that raises OSError if help cannot be written; the original says nothing then."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if message and file is sys.stdout and file is not None:
            write_output(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="spade-faiss",
        description="Find what is wrong in an image by searching in images where nothing is wrong.",
        epilog="example: spade-faiss fit good/ --bank parts.bank && spade-faiss score new/ --bank parts.bank --out results/",
    )
    parser.add_argument("--version", action="version", version=f"spade-faiss {__version__}")
    commands = Commands(parser)
    banks.register(commands)
    upkeep.register(commands)
    scores.register(commands)
    verdicts.register(commands)
    advice.register(commands)
    doctor.register(commands)
    return parser
