"""Lines of CSV files that neither a spreadsheet nor a terminal takes for an order, and that programs read exactly.

The text of a cell is one line: control and other invisible characters are written as \\n, \\x1b, \\u202e, a backslash as two.
Text that a spreadsheet would take for a formula, or that begins with an apostrophe, gets an apostrophe before it, as OWASP
advises; a semicolon or a bar that is a separator somewhere, before what would be a formula then, is written as \\x3b or \\x7c.
`read_text` undoes all of it. Numbers are written as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from spade_faiss.core.text import escape_exactly, printable, unescape

# What spreadsheets take for the beginning of a formula, in either width.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_APOSTROPHE = "'"
_BEFORE_FORMULA = re.compile(rf"[;|](?=\s*[{re.escape(''.join(_FORMULA))}])")
# A cell with one of these is quoted: in some countries, spreadsheets separate cells by semicolons, or by tabs.
_SEPARATORS = frozenset(',;\t|"\r\n')


def text_cell(text: str) -> str:
    """The cell for a name or other text."""
    if not _BEFORE_FORMULA.search(text):
        return defused(escape_exactly(text))
    parts = _BEFORE_FORMULA.split(text)
    separators = [*(f"\\x{ord(found[0]):02x}" for found in _BEFORE_FORMULA.finditer(text)), ""]
    doubled = (printable(part.replace("\\", "\\\\")) for part in parts)
    return defused("".join(part + separator for part, separator in zip(doubled, separators, strict=True)))


def read_text(cell: str) -> str:
    """The text that `text_cell` was given."""
    return unescape(cell.removeprefix(_APOSTROPHE))


def defused(text: str) -> str:
    """Text of one line, after an apostrophe if a spreadsheet would take it for a formula."""
    return _APOSTROPHE + text if text.lstrip().startswith((*_FORMULA, _APOSTROPHE)) else text


def csv_line(cells: Iterable[object]) -> str:
    """A line of a CSV file; text is quoted where it holds what separates cells somewhere."""
    return ",".join(_quoted(str(cell)) for cell in cells) + "\r\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if _SEPARATORS & set(text) else text
