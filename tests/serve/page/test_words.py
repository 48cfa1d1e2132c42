"""Numbers and changes in words."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spade_faiss.serve.history.records import Change, utc_now
from spade_faiss.serve.web.page.looking import local_path
from spade_faiss.serve.web.page.words import effect, p_text, percent, score_text, size_text


def change(*gone: str, left: int = 0, **more: Any) -> Change:
    return Change(
        id="c",
        bank="weave",
        generation_before=1,
        generation_after=2,
        changed=utc_now(),
        cause="1 answered normal",
        alarms_gone=gone,
        alarms_left=left,
        **more,
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0048, "0.0048"), (0.01, "0.010"), (0.314, "0.31"), (1.0, "1.0"), (3e-9, "< 0.0001"), (None, "–"), (math.nan, "–")],
)
def test_p_values_have_two_digits(value: float | None, text: str) -> None:
    assert p_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01, "1.0 %"), (0.0043, "0.43 %"), (0.186, "19 %"), (1, "100 %"), (0, "0 %"), (0.9996, "100 %"), (None, "–")],
)
def test_shares_are_percent(value: float | None, text: str) -> None:
    assert percent(value).replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("value", "text"), [(13.1234, "13.12"), (0.012345, "0.01235"), (5123.4, "5123"), (0, "0"), (None, "–")]
)
def test_scores_have_four_digits(value: float | None, text: str) -> None:
    assert score_text(value) == text


def test_a_change_says_what_became_of_alarms() -> None:
    assert effect(change("me", left=2), "me") == "this alarm is gone; 2 alarms stay."
    assert effect(change("me", "a"), "me") == "this alarm is gone, and 1 older one."
    assert effect(change(*"abcdefg", "me"), "me") == "this alarm is gone, and 7 older ones."
    assert effect(change("a", left=1), "me") == "1 other alarm is gone; 1 alarm stays."
    assert effect(change(), "me") == "no alarm is gone."
    assert effect(change("a", "b")) == "2 alarms are gone."


def test_sizes_are_words() -> None:
    assert [size_text(size) for size in (64_000_000, 1_500, 12, 2_500_000_000)] == ["64 MB", "1.5 kB", "12 bytes", "2.5 GB"]


@pytest.mark.parametrize(
    "text", ["//evil.example", "https://evil.example", "/\\evil.example", "\\\\evil", "evil", "/a\nb", "/\t/evil", ""]
)
def test_nobody_is_led_to_another_site(text: str) -> None:
    assert local_path(text) == "/"
    assert local_path("/banks/a%2Fb?x=1") == "/banks/a%2Fb?x=1"
