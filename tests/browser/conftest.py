"""One database that may be harmed, one pool under load, one dashboard and one browser for all tests of the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import chromium
import pytest
import pytest_asyncio
from breakers import becomes
from desk import Desk, Watched
from pgserver import main_server
from playwright.async_api import Browser, Page, ViewportSize, expect
from pools import unique_name
from shop import TABLES, open_shop

from raypg import WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

CAP = 8

expect.set_options(timeout=15_000)


@pytest.fixture(scope="session")
def victim() -> Iterator[EmbeddedServer]:
    """A server for these tests alone, that they stop and start."""
    chromium.require_chromium()
    with main_server({"max_connections": "40"}) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def watched(ray_cluster: Any, victim: EmbeddedServer) -> AsyncIterator[Watched]:
    """A pool under load, and its dashboard."""
    direct = await asyncpg.connect(**victim.parameters)
    await direct.execute(TABLES)
    await direct.close()
    pool = WorkflowConnectionPool(
        name=unique_name("shop"),
        **victim.parameters,
        max_connections=CAP,
        workers=1,
        connect_timeout=2.0,
        circuit_breaker_recovery_timeout=1.0,
        circuit_breaker_ramp=1.0,
        enable_monitoring=True,
        monitoring_port=0,
    )
    await pool.process({"operation": "initialize"})
    try:
        async with open_shop(pool):
            started = await pool.process({"operation": "start_monitoring"})
            yield Watched(pool, victim, started["dashboard_url"].rstrip("/") + "/")
            await pool.process({"operation": "stop_monitoring"})
    finally:
        await pool.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(victim: EmbeddedServer) -> AsyncIterator[Browser]:
    async with chromium.browser() as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def desk(browser: Browser, watched: Watched) -> AsyncIterator[Desk]:
    """One page for all tests that need none of their own: loading the library of charts takes a while."""
    context = await browser.new_context(viewport=ViewportSize(width=1280, height=900), color_scheme="light")
    watch = chromium.Watch(context)
    page = await context.new_page()
    await page.goto(watched.address)
    yield Desk(page, watch)
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def page(desk: Desk, watched: Watched) -> AsyncIterator[Page]:
    """The page, live, with all well; afterwards nothing has happened on it that must not."""
    if not watched.server.running:
        await asyncio.to_thread(watched.server.start)
    await becomes(watched.pool, "closed")
    await expect(desk.page.locator("#link")).to_have_text("Live")
    yield desk.page
    desk.watch.check()
