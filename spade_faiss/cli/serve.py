"""The command that serves banks: serve."""

from __future__ import annotations

import argparse

from spade_faiss.cli.options import Commands, add_run, add_settings, read_run, read_settings
from spade_faiss.cli.streams import write_output
from spade_faiss.cli.text import Output, to_json
from spade_faiss.core.errors import DependencyError
from spade_faiss.serve.settings import ServeSettings


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    serve = commands.add(
        "serve",
        _serve,
        "answer requests to score pictures, remember verdicts, and learn from what people say of them",
        "spade-faiss serve parts.bank other.bank --port 8000 --data served/ --keep 30d",
    )
    serve.add_argument("banks", nargs="+", metavar="BANK", help="the folder of a bank; it is served by the name of the folder")
    add_settings(serve, ServeSettings)
    add_run(serve, scores=True, masks=False)


def _serve(arguments: argparse.Namespace) -> Output:
    try:
        from spade_faiss.serve.run import serve
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"serving needs the package {error.name}; install it with: pip install 'spade-faiss[serve]'"
        ) from error

    def started(url: str) -> None:
        facts = {"url": url, "data": str(settings.data)}
        write_output(to_json(facts) if arguments.json else f"serving at {url}; end it with Ctrl-C")

    settings = read_settings(arguments, ServeSettings)
    serve(arguments.banks, settings, read_run(arguments), started=started)
    numbers = {"data": str(settings.data), "ended": True}
    return numbers, [f"ended; what was scored is in {settings.data}"]
