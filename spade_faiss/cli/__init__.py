"""The command line: parse, one library call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from spade_faiss._version import __version__
from spade_faiss.cli import advice, banks, doctor, scores, serve, tuning, upkeep, verdicts, watch
from spade_faiss.cli.options import Commands
from spade_faiss.cli.streams import open_closed_streams, write_error, write_output
from spade_faiss.cli.text import to_json
from spade_faiss.core.copies import named
from spade_faiss.core.declaring import changed
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.memory import is_out_of_memory
from spade_faiss.core.text import printable
from spade_faiss.diagnostics.limits import check_libraries_fit
from spade_faiss.features.forward.choice import is_installed, usable_engines

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# What was done is kept, and the same command does the rest.
_GOING_ON = ("fit", "extract", "add", "index", "convert", "tune")
# These compute.
_COMPUTING = (*_GOING_ON, "score", "watch", "evaluate", "calibrate", "suspects", "doctor", "serve")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for an error; 2 for wrong usage; 128 + n if signal n ended it, and 141 if nobody reads its output,
        as shells count SIGPIPE.
    """
    open_closed_streams()
    try:
        arguments = _parser().parse_args(argv)
    except OSError as error:
        return _output_failed(error, {})
    return _run(arguments)


def _loads_torch(arguments: argparse.Namespace) -> bool:
    """Whether a command loads torch; `auto` takes it only where nothing else runs networks."""
    if not is_installed("torch"):
        return False
    engine = getattr(arguments, "engine", "torch")
    return (
        arguments.command in ("fit", "extract", "tune")
        or engine == "torch"
        or (engine == "auto" and not usable_engines("float32"))
    )


def _run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setFormatter(_OneLine("%(levelname)s %(message)s"))
    logging.getLogger("spade_faiss").setLevel(logging.DEBUG if arguments.debug else logging.NOTSET)
    signals = _Signals()
    try:
        from spade_faiss.storage.cache import chosen_cache, trim_cache, use_cache  # not for --help

        with _signals_as_interrupts(signals):
            if arguments.command in _COMPUTING:
                check_libraries_fit(torch=_loads_torch(arguments))
            given = {name: getattr(arguments, name) for name in ("cache", "cache_bytes") if name in arguments}
            use_cache(changed(chosen_cache(), {**given, "progress": not arguments.quiet}))
            numbers, lines, *failed = arguments.run(arguments)
            trim_cache()
        # What lies in the copy of something at a URL is called by that.
        output = named(to_json(numbers) if arguments.json else "\n".join(map(printable, lines)))
    except (KeyboardInterrupt, Exception) as error:
        if signals.received or isinstance(error, KeyboardInterrupt):
            write_error(f"interrupted; {_what_remains(arguments)}")
            return 128 + (signals.received or signal.SIGINT)
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
            f"there is not enough memory ({_line(error)}); allow the process more, or ask for less (--memory, --size, --kappa)"
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


def _what_remains(arguments: argparse.Namespace) -> str:
    """What is true after a command was interrupted."""
    if arguments.command in (*_GOING_ON, "watch"):
        return "run the same command again to go on"
    untouched = f"{out} shows what it showed before; " if (out := getattr(arguments, "out", None)) else ""
    return f"{untouched}the same command starts anew"


class _Ended(KeyboardInterrupt):
    """A signal that ends the process, as Ctrl-C does: what is open is cleared first."""


class _Signals:
    """Which signal ended a command. Some libraries make another error of what is raised while they are imported."""

    received = 0

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.received = number
        raise _Ended


@contextmanager
def _signals_as_interrupts(signals: _Signals) -> Iterator[None]:
    """Raise `_Ended` on SIGINT, SIGTERM and SIGHUP, unless whoever runs the process has other plans for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = {number: handler for number, handler in before.items() if handler in usual}
    for number in ours:
        signal.signal(number, signals)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


class _OneLine(logging.Formatter):
    """Messages on one line, without orders to the terminal; tracebacks stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's own name
        return printable(named(super().formatMessage(record)))


class _Parser(argparse.ArgumentParser):
    """A parser that raises OSError if help cannot be written; the original says nothing then."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

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
    tuning.register(commands)
    upkeep.register(commands)
    scores.register(commands)
    watch.register(commands)
    verdicts.register(commands)
    serve.register(commands)
    advice.register(commands)
    doctor.register(commands)
    return parser
