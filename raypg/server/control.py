"""The control connection: one connection of the cap that belongs to the Pool actor, opened when it is needed.

It counts and ends backends. What it may end is proven to be ours: the application name begins with a nonce of the
worker's life (a user's own name may follow), same role, and the very backend that was seen, by process id *and* start
time, since process ids are used again.

Behind a pooler nothing is ours in that sense: the backends are the pooler's, which knows when a client is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeAlias

import asyncpg

from raypg.core.limits import Limits
from raypg.server import activity
from raypg.server.connect import Connector
from raypg.server.connection import ServerConnection

Backend: TypeAlias = "tuple[int, Any]"
"""(process id, start time): process ids are used again."""

_BACKENDS = """
SELECT pid, backend_start FROM pg_catalog.pg_stat_activity
WHERE backend_type = 'client backend' AND usename = current_user
  AND pg_catalog.starts_with(application_name || ':', $1 || ':')
"""

_TERMINATE = """
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
WHERE pid = $1 AND backend_start = $2 AND usename = current_user
"""

_LIMITS = """
WITH other AS (
  SELECT usename, datname FROM pg_catalog.pg_stat_activity
  WHERE backend_type = 'client backend'
    AND (usename = current_user AND pg_catalog.starts_with(application_name, $1)) IS NOT TRUE
)
SELECT current_setting('max_connections')::int AS max_connections,
       current_setting('superuser_reserved_connections')::int
           + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
       (SELECT count(*) FROM other)::int AS others,
       CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END AS role,
       (SELECT count(*) FROM other WHERE usename = current_user)::int AS role_others,
       CASE WHEN rolsuper THEN -1 ELSE datconnlimit END AS database,
       (SELECT count(*) FROM other WHERE other.datname = current_database())::int AS database_others,
       extract(epoch FROM current_setting('authentication_timeout')::interval)::float8 AS authentication_timeout
FROM pg_catalog.pg_roles, pg_catalog.pg_database d
WHERE rolname = current_user AND d.datname = current_database()
"""

_OURS = """
SELECT pid, backend_start, application_name FROM pg_catalog.pg_stat_activity
WHERE backend_type = 'client backend' AND usename = current_user
  AND pg_catalog.starts_with(application_name, $1)
"""

AGAIN = 0.1
"""Seconds between two looks. Backends count as gone when two looks in a row show none: one that had just accepted its
client when that died may appear once more."""


class Control:
    """Runs control queries one at a time over a connection of its own."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._connection: ServerConnection | None = None
        self._lock = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether there is one now."""
        return self._connection is not None

    async def _fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        async with self._lock:
            connection = await self._opened()
            records: list[asyncpg.Record] = await connection.raw.fetch(sql, *arguments, timeout=10.0)
            connection.last_used = time.monotonic()
            return records

    async def open(self) -> None:
        """Open the connection, if it is not open.

        Raises:
            ConnectError: the server cannot be reached.
        """
        async with self._lock:
            await self._opened()

    async def _opened(self) -> ServerConnection:
        if self._connection is not None and not await self._connection.is_alive():
            self._connection.abandon()
            self._connection = None
        if self._connection is None:
            self._connection = await self._connector.open()
        return self._connection

    async def _pooled(self) -> bool:
        if self._connector.pooler is None:
            async with self._lock:
                await self._opened()  # tells
        return self._connector.pooler != "off"

    async def limits(self, prefix: str) -> Limits | None:
        """The server's own limits on connections, and how many others use; ``None`` behind a pooler, which has its own.

        Args:
            prefix: what the application name of each of our connections begins with.

        Raises:
            ConnectError: the server cannot be reached.
        """
        if await self._pooled():
            return None
        return Limits(**(await self._fetch(_LIMITS, prefix))[0])

    async def activity(self, prefix: str) -> dict[str, Any]:
        """Who waits for whom now; see :func:`raypg.server.activity.describe`.

        Args:
            prefix: what the application name of each of our connections begins with.

        Raises:
            ConnectError: the server cannot be reached.
        """
        return activity.describe(await self._fetch(activity.QUERY, prefix, activity.MOST_BLOCKED))

    async def backends(self, name: str) -> list[Backend]:
        """(process id, start time) of the client backends of the life of a worker that *name* is of."""
        return [(record["pid"], record["backend_start"]) for record in await self._fetch(_BACKENDS, name)]

    async def gone(self, pids: list[int]) -> list[int]:
        """Those of *pids* that are no client backend any more; behind a pooler all, for they count its clients."""
        if await self._pooled():
            return pids
        alive = await self._fetch(
            "SELECT pid FROM pg_catalog.pg_stat_activity "
            "WHERE pid = any($1::int[]) AND backend_type = 'client backend'",
            pids,
        )
        return sorted(set(pids) - {record["pid"] for record in alive})

    async def end_backends(self, name: str, timeout: float) -> tuple[int, bool]:
        """End the backends of a dead worker and wait until the server no longer shows them.

        Returns:
            (how many have gone, whether none is left). Behind a pooler none is touched or counted.
        """
        return await self._end(lambda: self.backends(name), timeout)

    async def end_orphans(self, prefix: str, living: Collection[str], timeout: float) -> tuple[int, bool]:
        """End the backends of this pool that belong to no worker that is known to live; returns as ``end_backends``.

        Args:
            prefix: what the application name of each of our connections begins with.
            living: application names of the workers that live, without the user's part; control is always among them.
        """
        own = self._connector.base_name

        async def orphans() -> list[Backend]:
            return [
                (record["pid"], record["backend_start"])
                for record in await self._fetch(_OURS, prefix)
                if (name := ":".join(record["application_name"].split(":")[:4])) not in living and name != own
            ]

        return await self._end(orphans, timeout)

    async def _end(self, look: Callable[[], Awaitable[list[Backend]]], timeout: float) -> tuple[int, bool]:
        if await self._pooled():
            return 0, True
        until = asyncio.get_running_loop().time() + timeout
        seen: set[Backend] = set()
        clear = 0
        while True:
            backends = await look()
            clear = 0 if backends else clear + 1
            seen.update(backends)
            if clear == 2:
                return len(seen), True
            for pid, started in backends:
                await self._fetch(_TERMINATE, pid, started)
            if asyncio.get_running_loop().time() > until:
                return len(seen) - len(backends), False
            await asyncio.sleep(AGAIN)

    async def rest(self, now: float, seconds: float) -> None:
        """Close the connection if nobody has used it for so many *seconds*."""
        connection = self._connection
        if connection is not None and not self._lock.locked() and now - connection.last_used > seconds:
            async with self._lock:
                self._connection = None
                await connection.close()

    async def close(self) -> None:
        """Close the connection."""
        async with self._lock:
            if self._connection is not None:
                await self._connection.close()
                self._connection = None
