"""The page that finds pictures by name, date, verdict and answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from starlette.responses import Response

from spade_faiss.core.errors import InputError
from spade_faiss.serve.history.records import Filter, Kind
from spade_faiss.serve.web.page.looking import waiting_of
from spade_faiss.serve.web.page.rendering import render, service_of
from spade_faiss.serve.web.page.words import bank_url

router = APIRouter(include_in_schema=False)

_FOUND = 30


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for on the page of the search, as its form has it."""

    text: str = ""
    verdict: str = ""
    answer: str = ""
    since: str = ""
    until: str = ""
    order: str = "newest"

    @property
    def is_open(self) -> bool:
        """Whether all pictures are asked for."""
        return not (self.text or self.verdict or self.answer or self.since or self.until)

    def filter(self, bank: str, page: int) -> Filter:
        """The same for the history.

        Raises:
            InputError: for a date that is none.
        """
        answered: bool | Kind | None = {"none": False, "any": True}.get(self.answer)
        if self.answer in ("normal", "defect"):
            answered = cast(Kind, self.answer)
        try:
            until = _day(self.until)
            end = None if until is None else until + timedelta(days=1)
        except OverflowError as error:
            raise _no_date(self.until) from error
        return Filter(
            bank=bank,
            alarm={"alarm": True, "normal": False}.get(self.verdict),
            answered=answered,
            text=self.text,
            since=_day(self.since),
            until=end,
            order="p_value" if self.order == "p_value" else "newest",
            page=page,
            size=_FOUND,
        )

    def for_api(self) -> str:
        """The same as a query of the API."""
        wanted = self.filter("", 1)
        asked: dict[str, Any] = {"alarm": wanted.alarm, "answered": wanted.answered, "text": self.text or None}
        asked |= {"since": wanted.since, "until": wanted.until, "order": wanted.order}
        return urlencode({name: _api_value(value) for name, value in asked.items() if value is not None})


@router.get("/banks/{bank}/search")
def search(request: Request, bank: str, text: str = "", verdict: str = "", answer: str = "", page: int = 1) -> Response:
    """Pictures by name, date, verdict and answer; `since`, `until` and `order` are in the query, too."""
    service = service_of(request)
    service.station(bank)
    query = request.query_params
    asked = Asked(
        text=text[:200],
        verdict=verdict,
        answer=answer,
        since=query.get("since", ""),
        until=query.get("until", ""),
        order=query.get("order", "newest"),
    )
    found = service.history.find(asked.filter(bank, min(max(page, 1), 1_000_000)))

    def page_url(number: int) -> str:
        return f"{bank_url(bank)}/search?{urlencode({**vars(asked), 'page': number})}"

    return render(
        request,
        "search",
        title=f"Pictures of {bank}",
        bank=bank,
        asked=asked,
        found=found,
        waiting=waiting_of(service, bank),
        page_url=page_url,
        csv=f"/v1{bank_url(bank)}/pictures.csv?{asked.for_api()}",
    )


def _day(text: str) -> datetime | None:
    """The first moment of a day on the server's clock; None for no day."""
    if not text:
        return None
    try:
        day = date.fromisoformat(text)
        return datetime(day.year, day.month, day.day).astimezone().astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise _no_date(text) from error


def _no_date(text: str) -> InputError:
    return InputError(f"{text[:40]!r} is no date that can be searched for; write it as 2026-01-31")


def _api_value(value: bool | str | datetime) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else value
