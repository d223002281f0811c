"""Killing the backends of a pool, in tests."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import asyncpg
from pools import backends_of
from waiting import eventually

from raypg.embedded import EmbeddedServer

SERVING = (
    "select pid from pg_stat_activity where pid = any($1) and backend_start < now() - interval '0.2 s' order by pid"
)


@contextlib.asynccontextmanager
async def killing(
    server: EmbeddedServer, name: str, rng: random.Random, pause: tuple[float, float] = (0.005, 0.05)
) -> AsyncIterator[list[int]]:
    """Kill a random backend of pool *name*, pause for a while [s], and again; gives the list of those killed. One that
    serves, and is not the last of them: with a connection that ends while it begins all who wait would fail."""
    killed: list[int] = []
    connection = await asyncpg.connect(**server.parameters)

    async def victims() -> list[int]:
        pids = [row["pid"] for row in await backends_of(connection, name, control=False)]
        serving = [row["pid"] for row in await connection.fetch(SERVING, pids)]
        return serving if len(serving) > 1 else []

    async def kill() -> None:
        while True:
            if serving := await victims():
                pid = rng.choice(serving)
                if await connection.fetchval("select pg_terminate_backend($1)", pid):
                    killed.append(pid)
            await asyncio.sleep(rng.uniform(*pause))

    await eventually(victims)
    task = asyncio.create_task(kill())
    try:
        yield killed
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        connection.terminate()


AT_REST = """
SELECT bool_and(coalesce(state = 'idle' AND now() - state_change > '200 ms', false))
FROM pg_stat_activity WHERE pid = any($1)
"""
"""Of a backend that is just beginning the state is not known yet."""


async def kill_all(direct: asyncpg.Connection, name: str) -> None:
    """Kill every backend of pool *name*, and wait until they are gone. First all must be at rest: connections that end
    while they begin are failures of the server, and five of these open the breaker."""

    async def at_rest() -> list[int]:
        pids = [row["pid"] for row in await backends_of(direct, name, control=False)]
        return pids if await direct.fetchval(AT_REST, pids) else []

    pids = await eventually(at_rest)
    await direct.execute("select pg_terminate_backend(pid) from unnest($1::int[]) pid", pids)

    async def gone() -> bool:
        return bool(await direct.fetchval("select count(*) from pg_stat_activity where pid = any($1)", pids) == 0)

    await eventually(gone)
