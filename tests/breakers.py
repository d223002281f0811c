"""Looking at a pool's circuit breaker in tests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from waiting import eventually

from raypg import UnavailableError, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer


async def becomes(pool: WorkflowConnectionPool, state: str, timeout: float = 15.0) -> float:
    """Wait until the breaker of *pool* is in *state*; the seconds that took."""
    started = time.monotonic()

    async def is_so() -> bool:
        try:
            return bool((await pool.circuit_breaker.status())["state"] == state)
        except UnavailableError:
            return False  # the Breaker is just being restarted

    await eventually(is_so, timeout=timeout, what=f"the breaker of {pool.name} becomes {state}")
    return time.monotonic() - started


def stands(pool: WorkflowConnectionPool, timeout: float = 20.0) -> dict[str, Any]:
    """``get_status`` as it is now, asked again while the Breaker needs more than its second: the handle has then what
    was known last, or nothing to say."""
    asked = datetime.now(UTC)
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(UnavailableError):
            status = pool.circuit_breaker.get_status()
            if datetime.fromisoformat(status["as_of"]) >= asked:
                return status
        assert time.monotonic() < deadline, f"the breaker of {pool.name} does not answer"


async def transitions(pool: WorkflowConnectionPool) -> list[tuple[str, str]]:
    """(from, to) of the last transitions."""
    status = await asyncio.to_thread(stands, pool)
    return [(change["from"], change["to"]) for change in status["state_transitions"]]


async def closes(pool: WorkflowConnectionPool, server: EmbeddedServer) -> float:
    """Start *server*: the breaker of *pool* closes with the first probe that begins after that, so that one more may
    fail at the most. The seconds that took."""
    await asyncio.to_thread(server.start)
    since = datetime.now(UTC)
    back = await becomes(pool, "closed")
    changes = (await pool.circuit_breaker.status())["state_transitions"]
    later = [change for change in changes if datetime.fromisoformat(change["timestamp"]) > since]
    assert [(change["from"], change["to"]) for change in later].count(("half_open", "open")) <= 1, later
    return back


@contextlib.asynccontextmanager
async def callers(
    pool: WorkflowConnectionPool, count: int, sql: str = "select 1", **options: Any
) -> AsyncIterator[list[tuple[float, float, BaseException | None]]]:
    """*count* coroutines that run *sql* again and again; gives (begun, answered, error) of every call."""
    calls: list[tuple[float, float, BaseException | None]] = []
    running = True

    async def call() -> None:
        while running:
            begun = time.monotonic()
            error: BaseException | None = None
            try:
                await pool.fetchval(sql, **options)
            except Exception as raised:
                error = raised
            calls.append((begun, time.monotonic(), error))
            await asyncio.sleep(0.02)

    tasks = [asyncio.create_task(call()) for _ in range(count)]
    try:
        yield calls
    finally:
        running = False
        await asyncio.gather(*tasks)
