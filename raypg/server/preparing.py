"""Statements that a new connection prepares before it is used, so that its first callers need not wait for that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Protocol

import asyncpg

from raypg.server import _asyncpg

__all__ = ["Learnt", "prepare"]

PREPARED_WITHIN = 0.1
"""Seconds, at most, that this may hold up a new connection: a table that somebody has locked, say."""


class Learnt(Protocol):
    """Who knows what comes often."""

    def familiar(self) -> list[str]:
        """What a new connection is to prepare."""
        ...


async def prepare(raw: asyncpg.Connection, texts: Iterable[str]) -> None:
    """Prepare *texts* in asyncpg's own cache; what cannot be is left out."""
    loop = asyncio.get_running_loop()
    until, begun = loop.time() + PREPARED_WITHIN, False
    for sql in texts:
        left = until - loop.time()
        if left <= 0:
            break
        begun = True
        try:
            # With a timeout of its own asyncpg cancels it on the server, and the connection stays good.
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError):
                await _asyncpg.prepare(raw, sql, left)
        except TimeoutError:
            break
    if begun:
        # asyncpg has not ended what it began (it sends no Sync): locks on all these tables would be held until somebody
        # uses the connection.
        await raw.execute("SELECT")
