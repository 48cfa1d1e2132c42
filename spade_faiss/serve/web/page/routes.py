"""The routes of the page."""

from __future__ import annotations

from fastapi import FastAPI


def add_page(app: FastAPI) -> None:
    """Add the page to an app; `app.state.service` and `app.state.security` are what it works with."""
