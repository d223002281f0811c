"""Who holds a lease, as it is told."""

from __future__ import annotations

import io
import os
from typing import Any

import ray
from pools import status_of_all
from rich.console import Console
from waiting import eventually

from raypg import WorkflowConnectionPool, cli_pools


async def owner(pool: WorkflowConnectionPool, backend: int) -> dict[str, Any]:
    """The one who holds the connection with that backend."""
    status = await status_of_all(pool)
    (lease,) = [one["lease"] for one in status["connections"].values() if one["backend_pid"] == backend]
    assert lease["node"] == ray.get_runtime_context().get_node_id()
    assert lease["job"] == ray.get_runtime_context().get_job_id()
    assert 0 <= lease["age"] < 60
    return dict(lease)


async def shown(pool: WorkflowConnectionPool, backend: int) -> str:
    """The line of `raypg status` about it."""

    async def lines() -> list[str]:  # none of a worker that does not answer in time
        text = io.StringIO()
        (known,) = await cli_pools._all_figures([pool.name])
        cli_pools._show(Console(width=200, file=text), known)
        return [line for line in text.getvalue().splitlines() if f" {backend} " in line]

    (line,) = await eventually(lines)
    return str(line)


async def in_async(pool: WorkflowConnectionPool) -> tuple[dict[str, Any], str, int]:
    """What is told of a lease of the caller's own."""
    async with pool.acquire() as connection:
        return await owner(pool, connection.backend_pid), await shown(pool, connection.backend_pid), os.getpid()
