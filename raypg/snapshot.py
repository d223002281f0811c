"""One view of the database for many readers: a transaction that exports its snapshot and stays open for them.

Source: PostgreSQL manual, "Snapshot Synchronization Functions": a snapshot can be imported only while the transaction
that exported it is open.
"""

from __future__ import annotations

from typing import Any

import asyncpg

from raypg.errors import RaypgError
from raypg.lease import LeasedConnection
from raypg.pool import WorkflowConnectionPool

READ = {"isolation": "repeatable_read", "readonly": True}
"""The properties of a transaction that may import a snapshot, and of that which exports it."""


class Snapshot:
    """A snapshot and the lease that holds it. Sent to another process it is its name alone.

    It ends with :meth:`end`, with this object, or after its time, whichever comes first. It takes one connection, and
    while it is there PostgreSQL cannot vacuum what it shows.
    """

    def __init__(self, name: str, connection: LeasedConnection | None) -> None:
        self.name = name
        self._connection = connection

    def __reduce__(self) -> tuple[Any, ...]:
        return Snapshot, (self.name, None)

    def __repr__(self) -> str:
        return f"<Snapshot {self.name}>"

    @classmethod
    async def take(cls, pool: WorkflowConnectionPool, seconds: float) -> Snapshot:
        """Export a snapshot that can be imported for *seconds*.

        Raises:
            UnavailableError: no connection is to be had.
        """
        connection = await pool.transaction(**READ, lease_timeout=seconds).__aenter__()  # type: ignore[arg-type]
        # The server would end a transaction that is idle for longer than leases of this pool usually are.
        limit = f"SET LOCAL idle_in_transaction_session_timeout = {int(seconds * 1000) + 30_000}"
        await connection.execute(limit)
        return cls(await connection.fetchval("SELECT pg_catalog.pg_export_snapshot()"), connection)

    async def use(self) -> LeasedConnection | None:
        """The connection that holds it, for more questions to the same view; ``None`` if it has ended."""
        if self._connection is not None:
            try:
                await self._connection.fetchval("SELECT 1")
            except (RaypgError, asyncpg.PostgresError):  # a question before may have failed, and the transaction
                await self.end()
        return self._connection

    async def end(self) -> None:
        """End it. Twice does nothing."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.release()
