"""The database goes away while somebody watches: named within two seconds, however it goes, and so is its return."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import aiohttp
import pytest
from pgserver import main_server
from pools import own_pool
from watching import watch

from raypg.embedded import EmbeddedServer

NAMED_WITHIN = 2.0


@pytest.fixture(scope="module")
def victim() -> Any:
    """A server for these tests alone."""
    with main_server() as server:
        yield server


def processes_of(server: EmbeddedServer) -> list[int]:
    """The server's own process and those of its children."""
    import psutil

    whole = psutil.Process(server.pid)
    return [whole.pid, *(child.pid for child in whole.children(recursive=True))]


@pytest.mark.parametrize(("how", "cap"), [("killed", 4), ("frozen", 4), ("killed", 2)], ids=str)
async def test_a_server_that_goes_away_is_named_and_comes_back(
    dashboard: str, victim: EmbeddedServer, how: str, cap: int
) -> None:
    """Nobody uses the pool meanwhile. One of 2 connections has none to look with: there, workers tell."""
    async with (
        own_pool(victim, max_connections=cap, connect_timeout=2.0, circuit_breaker_recovery_timeout=1.0) as pool,
        aiohttp.ClientSession(dashboard) as http,
    ):
        viewer = await watch(http, "")

        def database(state: dict[str, Any]) -> dict[str, Any]:
            known = state["pools"].get(pool.name)
            return known["lights"]["database"] if known else {"level": "", "text": ""}

        await viewer.until(lambda state: database(state)["level"] == "ok")
        frozen: list[int] = []
        try:
            if how == "killed":
                await asyncio.to_thread(victim.kill)
            else:
                frozen = processes_of(victim)
                for process in frozen:
                    os.kill(process, signal.SIGSTOP)
            took = await viewer.until(lambda state: "does not answer" in database(state)["text"])
            assert viewer.state["pools"][pool.name]["verdict"]["text"].startswith("Database: the database does not")
            await viewer.until(lambda state: database(state)["level"] == "critical")
        finally:
            for process in frozen:
                os.kill(process, signal.SIGCONT)
            if not victim.running:
                await asyncio.to_thread(victim.start)
        back = await viewer.until(lambda state: database(state)["level"] == "ok")
        print(f"a server that was {how} (cap {cap}) was named after {took:.2f} s; its return took {back:.2f} s")
        assert took < NAMED_WITHIN
