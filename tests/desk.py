"""What tests of the dashboard look at: the pool that is watched, and the page that watches it."""

from __future__ import annotations

from dataclasses import dataclass

from chromium import Watch
from playwright.async_api import Page

from raypg import WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

__all__ = ["Desk", "Watched"]


@dataclass(frozen=True)
class Watched:
    """What the page shows.

    Attributes:
        url: where the dashboard is, with a slash at the end.
    """

    pool: WorkflowConnectionPool
    server: EmbeddedServer
    url: str

    @property
    def address(self) -> str:
        """Of the page, with this pool chosen."""
        return f"{self.url}#pool={self.pool.name}"


@dataclass(frozen=True)
class Desk:
    """A page of the dashboard, and what must not happen there."""

    page: Page
    watch: Watch
