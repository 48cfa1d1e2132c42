"""Names of files and other text from elsewhere, made safe to print: on one line, and without orders to a terminal."""

from __future__ import annotations

import re
import unicodedata

# Control characters, invisible characters that may reorder or hide the text around them, halves of characters, line and
# paragraph separators. Spaces of all widths, and letters of all scripts, are text.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def is_hidden(character: str) -> bool:
    """Whether a character is invisible, gives orders to a terminal, begins a line, or reorders the text around it."""
    return unicodedata.category(character) in _HIDDEN


def escape(character: str) -> str:
    """A character as \\n, \\x1b, \\u202e or \\U000e0001."""
    return character.encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """`text` with every hidden character written as its escape: one line, whatever it holds."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(escape(character) if is_hidden(character) else character for character in text)


def escape_exactly(text: str) -> str:
    """As `printable`, and with each backslash doubled, so that `unescape` gives `text` back."""
    if "\\" not in text and not any(map(is_hidden, text)):
        return text
    return printable(text.replace("\\", "\\\\"))


def unescape(text: str) -> str:
    """The text that `escape_exactly` was given."""
    return re.sub(r"\\(?:[\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})", _unescaped, text)


def _unescaped(found: re.Match[str]) -> str:
    return found[0].encode("ascii").decode("unicode_escape")
