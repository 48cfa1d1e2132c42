"""The command line: parse, one library call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from spade_faiss._version import __version__
from spade_faiss.cli import advice, banks, doctor, scores, upkeep, verdicts
from spade_faiss.cli.options import Commands
from spade_faiss.core.errors import SpadeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error we can name, 2 for wrong usage."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("spade_faiss").setLevel(logging.DEBUG if arguments.debug else logging.NOTSET)
    try:
        numbers, text, *failed = arguments.run(arguments)
    except (SpadeError, OSError) as error:
        if arguments.debug:
            raise
        print(f"spade-faiss: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("spade-faiss: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(json.dumps(numbers, default=str) if arguments.json else text)
    return int(any(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
