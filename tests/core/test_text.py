"""Text from elsewhere on a terminal: one line, nothing invisible, nothing lost."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.core.text import escape_exactly, is_hidden, printable, unescape

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT)
def test_what_is_printed_is_one_line_of_visible_characters(text: str) -> None:
    shown = printable(text)
    assert not any(map(is_hidden, shown))
    assert len((shown + "x").splitlines()) == 1
    shown.encode("utf-8")


@given(ANY_TEXT)
def test_what_is_escaped_exactly_reads_back(text: str) -> None:
    assert unescape(escape_exactly(text)) == text
    assert not any(map(is_hidden, escape_exactly(text)))


def test_what_orders_terminals_and_readers_around_is_hidden() -> None:
    orders = [
        *map(chr, range(32)),
        *map(chr, range(0x7F, 0xA0)),
        *"\u200e\u200f\u202a\u202e\u2066\u2069\u061c\ufeff\u2028\u2029",
    ]
    assert all(map(is_hidden, orders))
    assert not any(map(is_hidden, "a ä 日本 \xa0\u202f\u3000 é e\u0301 🙂"))
    assert unicodedata.category("\u202f") == "Zs"  # a space of macOS's names for screenshots


def test_escapes() -> None:
    assert printable("a\nb\x1b[31m\u202e\udce9") == r"a\nb\x1b[31m\u202e\udce9"
    assert printable(r"C:\new") == r"C:\new"
    assert escape_exactly(r"C:\new") == r"C:\\new"
