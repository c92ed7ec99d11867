"""Headless Chromium for tests of HTML pages. Everything that a page says or asks for is written down."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


class Elements(HTMLParser):
    """The elements of a page in order: the tag and the attributes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@dataclass
class Heard:
    """What happened beside what was asked for."""

    messages: list[str] = field(default_factory=list)
    """Warnings and errors on the console, and exceptions that nothing caught."""
    requests: list[str] = field(default_factory=list)
    """Requests other than for the page itself and for data that it holds."""
    dialogs: list[str] = field(default_factory=list)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser; the test is skipped, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium: make setup-system installs it")
    with playwright.sync_playwright() as api:
        # Root may not have a sandbox; the pages are our own.
        chromium = api.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def opened(chromium: Any, page: Path, **options: Any) -> Iterator[tuple[Any, Heard]]:
    """A tab that shows a file, in a context of its own with these options."""
    context = chromium.new_context(**options)
    context.set_default_timeout(60_000)
    tab, heard = context.new_page(), Heard()
    tab.on("console", lambda message: message.type in ("warning", "error") and heard.messages.append(message.text))
    tab.on("pageerror", lambda error: heard.messages.append(str(error)))
    tab.on("dialog", lambda dialog: (heard.dialogs.append(dialog.message), dialog.dismiss()))
    tab.on(
        "request",
        lambda request: (
            request.url.startswith(("data:", "blob:"))
            or request.url == page.as_uri()
            or heard.requests.append(request.url)
        ),
    )
    try:
        tab.goto(page.as_uri())
        yield tab, heard
    finally:
        context.close()
