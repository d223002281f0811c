"""The database goes away while somebody watches: named within two seconds, however it goes, and so is its return."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import aiohttp
import pytest
from pgserver import main_server
from pools import own_pool
from watching import least, watch

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


async def test_a_server_that_goes_away_is_named_and_so_is_its_return(dashboard: str, victim: EmbeddedServer) -> None:
    """Nobody uses the pools meanwhile. One of 2 connections has none to look with: there, workers tell."""
    settings = {"connect_timeout": 2.0, "circuit_breaker_recovery_timeout": 1.0}
    async with (
        own_pool(victim, max_connections=4, **settings) as pool,
        own_pool(victim, max_connections=2, **settings) as small,
        aiohttp.ClientSession(dashboard) as http,
    ):
        viewer = await watch(http, "")

        def light(state: dict[str, Any], name: str) -> dict[str, Any]:
            known = state["pools"].get(name)
            return known["lights"]["database"] if known else {"level": "", "text": ""}

        def all_is_well(state: dict[str, Any]) -> bool:
            return all(light(state, name)["level"] == "ok" for name in (pool.name, small.name))

        def is_away(state: dict[str, Any], name: str) -> bool:
            return "does not answer" in light(state, name)["text"]

        async def killed() -> float:
            await viewer.until(all_is_well)
            began = time.monotonic()
            await asyncio.to_thread(victim.kill)
            try:
                await viewer.until(lambda state: is_away(state, pool.name) and is_away(state, small.name))
                took = time.monotonic() - began
                await viewer.until(lambda state: light(state, pool.name)["level"] == "critical")
                verdict = viewer.state["pools"][pool.name]["verdict"]
                assert verdict["level"] == "critical"
                assert verdict["text"].startswith("Database: the database does not answer")
            finally:
                await asyncio.to_thread(victim.start)
            print(f"the return of a server that was killed was seen after {await viewer.until(all_is_well):.2f} s")
            return took

        async def frozen() -> float:
            processes = processes_of(victim)
            try:
                for process in processes:
                    os.kill(process, signal.SIGSTOP)
                took = await viewer.until(lambda state: is_away(state, pool.name))
                await viewer.until(lambda state: light(state, pool.name)["level"] == "critical")
            finally:
                for process in processes:
                    os.kill(process, signal.SIGCONT)
            await viewer.until(all_is_well)
            return took

        for gone in (killed, frozen):
            took = await least(gone, NAMED_WITHIN)
            print(f"a server that was {gone.__name__} was named after {took:.2f} s")
            assert took < NAMED_WITHIN
