"""How a worker's engine ends: it drains, so that others take over, and it closes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from raypg.errors import PoolClosedError, WorkerDrainingError
from raypg.portable import pack_error

if TYPE_CHECKING:
    from raypg.server.engine import Engine

CLOSE_GRACE = 2.0
"""Seconds that a closing pool gives to statements that run."""


async def drain(engine: Engine, seconds: float) -> bool:
    """Take no more work, and wait until what is begun is over: statements, leases, messages of pipelines.

    What waits for a connection is refused; it has not run, and goes to another worker. After *seconds* leases are ended
    and statements are cancelled on the server, so that their callers know what became of them.

    Returns:
        Whether it was over in time.
    """
    engine.draining = WorkerDrainingError(f"this worker of pool {engine.config.name!r} takes no more work")
    refusal = pack_error(engine.draining)
    begun = []
    for work in engine.queue.drain():
        if work.begun:
            begun.append(work)
        else:
            work.fail(refusal)
    for work in reversed(begun):
        engine.put_first(work)
    if await _until(engine, lambda: engine.at_rest, seconds):
        return True
    for lease in engine.leases:
        engine.leases.end(lease.token, "its worker was taken away, and drain_timeout was over")
    for connection in engine.connections:
        if connection.busy:
            connection.cancel("drain")
    await _until(engine, lambda: engine.at_rest, CLOSE_GRACE)
    return False


def fail_waiting(engine: Engine, error: Exception) -> None:
    """Fail all that waits for a connection."""
    packed = pack_error(error)
    for work in engine.queue.drain():
        if not engine.is_spare:
            engine.figures.refused(error)
        work.fail(packed)


async def close(engine: Engine, reason: str) -> None:
    """Refuse new work, fail what waits, end all leases, let what runs end (briefly), close the connections."""
    if engine.closed is not None:
        return
    engine.closed = PoolClosedError(reason)
    fail_waiting(engine, engine.closed)
    engine.leases.close()
    if engine.replicas is not None:
        await engine.replicas.close(reason)
    await _until(engine, lambda: engine.connections.idle == engine.connections.total, CLOSE_GRACE)
    with contextlib.suppress(Exception):
        await engine.connections.close()
    # What finished last must have reached its callers before this process is ended.
    await _until(engine, lambda: not engine.untold, CLOSE_GRACE)


async def _until(engine: Engine, condition: Callable[[], bool], seconds: float) -> bool:
    until = engine.now() + seconds
    while not (met := condition()) and engine.now() < until:  # noqa: ASYNC110 - made of many small events
        await asyncio.sleep(0.01)
    return met
