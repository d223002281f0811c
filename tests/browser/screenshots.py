"""Takes the pictures of the dashboard that the README shows: a real pool under load, its server stopped, the dark.

Run as ``make screenshots``; they are written to docs/. It takes some minutes, for the charts to have something to show.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import asyncpg
import chromium
import ray
from pgserver import main_server
from playwright.async_api import Browser, Page, ViewportSize, expect
from shop import TABLES, open_shop

from raypg import WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

DOCS = Path(__file__).parents[2] / "docs"
LARGEST = 300 * 1024
"""Bytes of a picture."""

WARM_UP = 100.0
"""Seconds before the first picture; the charts reach back two minutes."""

PATIENCE = 120_000
"""Milliseconds for everything: a machine that runs all of it has much to do."""

DRAWN = """() => [...document.querySelectorAll(".plot")].every(plot => {
  const {top, bottom} = plot.getBoundingClientRect();
  return bottom < 0 || top > innerHeight || plot.querySelector(".scatterlayer path, .barlayer path, .xtick") !== null;
})"""
"""Whether every chart that can be seen has something in it."""

SETTINGS = {
    "workers": 2,
    "connect_timeout": 2.0,
    "enable_monitoring": True,
    "monitoring_port": 0,
}


async def main() -> None:
    expect.set_options(timeout=PATIENCE)
    DOCS.mkdir(exist_ok=True)
    with main_server({"max_connections": "100"}) as orders, main_server() as analytics:
        pools = [await started("orders", orders, 20), await started("analytics", analytics, 10)]
        async with open_shop(pools[0], visitors=12, sellers=8), open_shop(pools[1], visitors=2, sellers=1):
            url = (await pools[0].process({"operation": "start_monitoring"}))["dashboard_url"]
            await asyncio.sleep(WARM_UP)  # for the lines to have a length
            async with chromium.browser() as browser:
                await take_all(browser, f"{url}#pool=orders", orders)
            await pools[0].process({"operation": "stop_monitoring"})
        for pool in pools:
            await pool.close()


async def started(name: str, server: EmbeddedServer, connections: int) -> WorkflowConnectionPool:
    direct = await asyncpg.connect(**server.parameters)
    await direct.execute(TABLES)
    await direct.close()
    pool = WorkflowConnectionPool(name=name, **server.parameters, max_connections=connections, **SETTINGS)
    await pool.process({"operation": "initialize"})
    return pool


async def take_all(browser: Browser, address: str, server: EmbeddedServer) -> None:
    light = await opened(browser, address, "light", 1280, 1180)
    await expect(light.locator("#verdict-level")).to_have_text("OK")
    await take(light, "dashboard.png")
    dark = await opened(browser, address, "dark", 1280, 1180)
    holder = await asyncpg.connect(**server.parameters, server_settings={"application_name": "psql"})
    async with holder.transaction():
        await holder.execute("LOCK TABLE shop.stock IN ACCESS EXCLUSIVE MODE")
        await expect(dark.locator("[data-light=database] .light-text")).to_contain_text("waits")
        await asyncio.sleep(5.0)  # for it to have lasted
        await dark.evaluate("scrollTo(0, document.getElementById('waits').offsetTop - 70)")
        await take(dark, "dashboard-dark.png")
    await dark.close()
    await holder.close()
    await expect(light.locator("[data-light=database]")).to_have_attribute("data-level", "ok")
    server.kill()
    await expect(light.locator("[data-light=breaker] .light-text")).to_contain_text("open")
    await asyncio.sleep(8.0)
    await expect(light.locator("[data-light=alerts]")).to_have_attribute("data-level", "critical")
    await take(light, "dashboard-broken.png")


async def opened(browser: Browser, address: str, theme: str, width: int, height: int) -> Page:
    size = ViewportSize(width=width, height=height)
    context = await browser.new_context(viewport=size, color_scheme=theme)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE)
    page = await context.new_page()
    await page.goto(address)
    await page.get_by_role("button", name="2 min").click()
    await expect(page.locator("#plot-connections .main-svg").first).to_be_visible(timeout=60_000)
    return page


async def take(page: Page, name: str) -> None:
    file = DOCS / name
    await page.bring_to_front()
    await page.wait_for_function(DRAWN)
    await asyncio.sleep(1.5)  # two frames
    await page.screenshot(path=file, timeout=PATIENCE)
    size = file.stat().st_size
    print(f"{file.relative_to(DOCS.parent)}: {size / 1024:.0f} kB")
    if size > LARGEST:
        sys.exit(f"{file} has more than {LARGEST // 1024} kB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="raypg-ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False, _temp_dir=directory)
        try:
            asyncio.run(main())
        finally:
            ray.shutdown()
