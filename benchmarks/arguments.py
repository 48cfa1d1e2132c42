"""The arguments that benchmarks on real sets have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def parser_of(doc: str | None, sections: Iterable[str] = (), usual: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Make a parser that takes the folder of the sets, the folder of results, and what of it all is measured.

    Args:
        doc: the docstring of the benchmark.
        sections: the names of what it measures; without any, it is measured as a whole.
        usual: those that are measured unless others are named; all unless given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the real sets, such as mvtec_bottle")
    parser.add_argument("--out", type=Path, required=True, help="the folder that results are written to")
    if sections := list(sections):
        parser.add_argument("--only", nargs="+", choices=sorted(sections), default=list(usual) or sections)
    return parser
