"""The command line: parse, one library call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from spade_faiss._version import __version__
from spade_faiss.cli import advice, banks, doctor, scores, upkeep, verdicts
from spade_faiss.cli.options import Commands
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.text import printable

# What was done is kept, and the same command does the rest.
_GOING_ON = ("fit", "extract", "add", "index")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error we can name, 2 for wrong usage, 128 + n for signal n."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setFormatter(_OneLine("%(levelname)s %(message)s"))
    logging.getLogger("spade_faiss").setLevel(logging.DEBUG if arguments.debug else logging.NOTSET)
    try:
        with _signals_as_interrupts():
            numbers, lines, *failed = arguments.run(arguments)
    except (SpadeError, OSError) as error:
        if arguments.debug:
            raise
        print(f"spade-faiss: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"spade-faiss: interrupted; {printable(_what_remains(arguments))}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, _Ended) else signal.SIGINT)
    # JSON escapes all that gives orders to a terminal, except DEL.
    text = json.dumps(numbers, default=str).replace("\x7f", "\\u007f") if arguments.json else "\n".join(map(printable, lines))
    print(text)
    return int(any(failed))


def _what_remains(arguments: argparse.Namespace) -> str:
    """What is true after a command was interrupted."""
    if arguments.command in _GOING_ON:
        return "run the same command again to go on"
    untouched = f"{out} shows what it showed before; " if (out := getattr(arguments, "out", None)) else ""
    return f"{untouched}the same command starts anew"


class _Ended(KeyboardInterrupt):
    """A signal that ends the process, as Ctrl-C does: what is open is cleared first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, _: FrameType | None) -> None:
    raise _Ended(number)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Raise `_Ended` on SIGTERM and SIGHUP, unless whoever runs the process has other plans for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class _OneLine(logging.Formatter):
    """Messages on one line, without orders to the terminal; tracebacks stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's own name
        return printable(super().formatMessage(record))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


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
