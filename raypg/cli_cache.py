"""``raypg cache``: which tables' changes are told to caches, whoever makes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rich.console import Console

from raypg import cache_watch, cluster
from raypg.cli_pools import connect
from raypg.errors import ConfigError, PoolNotFoundError
from raypg.pool import WorkflowConnectionPool, get_pool


def watch(tables: Sequence[str], pool: str | None, address: str, *, on: bool) -> None:
    """Watch *tables*, or do so no longer; say which are watched now."""
    connect(address)
    handle = _pool(pool)

    async def work() -> list[str]:
        if tables:
            await (cache_watch.watch if on else cache_watch.unwatch)(handle, tables)
        return await cache_watch.watched(handle)

    watched = asyncio.run(work())
    Console().print(f"{handle.name}: watched are {', '.join(watched) or 'no tables'}", highlight=False)


def _pool(name: str | None) -> WorkflowConnectionPool:
    """The pool of that name; if none is given, the only one that runs."""
    if name is None:
        running = cluster.running_pools()
        if not running:
            raise PoolNotFoundError("", running)
        if len(running) > 1:
            raise ConfigError(f"say which pool with --pool: there are {', '.join(running)}")
        name = running[0]
    return get_pool(name)
