"""A real Chromium for tests of the dashboard's page, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from pgserver import in_ci
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Error, Page, Request, async_playwright

__all__ = ["Watch", "browser", "require_chromium"]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")

OF_PLOTLY = "Applying inline style violates"
"""plotly.js brings the styles of its maps, which the page does not use, and may not put into it."""


def require_chromium() -> str:
    """The system's Chromium; skips the test without one, or fails it under ``CI``."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is not None:
        return found
    reason = "no Chromium is installed by the system (Debian: apt-get install chromium)"
    if in_ci():
        pytest.fail(f"{reason}, and CI may skip nothing")
    pytest.skip(reason)


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A running Chromium."""
    path = require_chromium()
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield running
        await running.close()


class Watch:
    """What must not happen on a page, whatever a test does there.

    Attributes:
        errors: exceptions of scripts, and what the browser complains of on its console.
        elsewhere: addresses of requests that left this machine.
        requests: addresses of all requests.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.requests: list[str] = []
        context.on("request", self._request)
        context.on("page", self._page)

    def _page(self, page: Page) -> None:
        page.on("pageerror", self._error)
        page.on("console", self._console)
        page.on("websocket", lambda socket: self._address(socket.url))

    def _request(self, request: Request) -> None:
        self._address(request.url)

    def _address(self, url: str) -> None:
        self.requests.append(url)
        if urlsplit(url).hostname not in LOOPBACK and not url.startswith(("data:", "about:")):
            self.elsewhere.append(url)

    def _error(self, error: Error) -> None:
        self.errors.append(str(error))

    def _console(self, message: ConsoleMessage) -> None:
        text = message.text
        # A connection that is lost, and an answer that refuses something, are noted there by the browser itself.
        expected = (OF_PLOTLY, "Failed to load resource", "WebSocket connection to")
        if message.type in ("error", "warning") and not text.startswith(expected):
            self.errors.append(text)

    def check(self) -> None:
        """Asserts that nothing of it happened so far."""
        assert not self.errors, self.errors
        assert not self.elsewhere, self.elsewhere
