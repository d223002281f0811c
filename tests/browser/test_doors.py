"""What may be done from the page, by whom, and what is never done: scripts out of SQL, deeds for other sites."""

from __future__ import annotations

import asyncio
import re

import aiohttp
import pytest
from breakers import becomes
from desk import Watched
from playwright.async_api import Browser, Page, expect

from raypg import CircuitBreakerError

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=document.title=1>"


async def test_the_breaker_is_forced_and_released_by_the_form(page: Page, watched: Watched) -> None:
    form = page.locator("#breaker-form")
    await form.get_by_label("Your name").fill("Ada")
    await form.get_by_label("Reason").fill("failover of <db1>")
    await form.get_by_label("Ends after").select_option("300")
    await form.get_by_role("button", name="Force open …").click()
    sure = page.get_by_role("dialog")
    await expect(sure).to_contain_text(watched.pool.name)
    await sure.get_by_role("button", name="Cancel").click()
    await expect(sure).to_be_hidden()
    assert (await watched.pool.circuit_breaker.status())["state"] == "closed"

    await form.get_by_role("button", name="Force open …").click()
    await sure.get_by_role("button", name="Force open").click()
    await expect(form.get_by_role("status")).to_have_text("Forced open.")
    await expect(page.locator("[data-light=breaker] .light-text")).to_have_text(
        re.compile(r"forced open.*failover of <db1> \(by Ada, from 127\.0\.0\.1")
    )
    with pytest.raises(CircuitBreakerError, match="by Ada"):
        await watched.pool.fetchval("SELECT 1")

    await form.get_by_label("Reason").fill("it is over")
    await form.get_by_role("button", name="Release: force closed").click()
    await expect(form.get_by_role("status")).to_have_text("Closed.")
    await becomes(watched.pool, "closed")
    await expect(page.locator("[data-light=breaker]")).to_have_attribute("data-level", "ok")
    await expect(page.locator("#breaker-history")).to_contain_text("it is over (by Ada")


async def test_hostile_sql_is_text(page: Page, watched: Watched) -> None:
    await asyncio.gather(*(watched.pool.fetch(f'SELECT pg_sleep(0.5) AS "{HOSTILE}"') for _ in range(3)))
    row = page.get_by_role("table", name="Statements by fingerprint").get_by_role("row").filter(has_text="<script>")
    await page.get_by_role("button", name="Slowest").click()
    await expect(row).to_contain_text(HOSTILE[:40])
    assert await page.locator("#main script, #main img").count() == 0
    await expect(page).to_have_title(re.compile("raypg$"))
    await page.get_by_role("button", name="Busiest now").click()


async def test_other_sites_may_do_nothing(browser: Browser, watched: Watched) -> None:
    """A page of another origin can neither watch nor act, whatever name it gives this machine."""
    context = await browser.new_context()
    elsewhere = await context.new_page()  # about:blank: a page of nobody
    socket = watched.url.replace("http", "ws") + "ws"
    outcome = await elsewhere.evaluate(
        "url => new Promise(done => { const socket = new WebSocket(url);"
        " socket.onopen = () => done('open'); socket.onerror = () => done('refused') })",
        socket,
    )
    assert outcome == "refused"
    await context.close()

    breaker = f"{watched.url}api/pools/{watched.pool.name}/breaker"
    body = {"action": "force_open", "reason": "mischief", "by": "nobody"}
    async with aiohttp.ClientSession() as session:
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            async with session.post(breaker, json=body, headers=headers) as answer:
                assert answer.status in (403, 421), headers
                assert (await answer.json())["error"]["message"]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(socket, headers=headers)
            assert refused.value.status in (403, 421)
    assert (await watched.pool.circuit_breaker.status())["state"] == "closed"
