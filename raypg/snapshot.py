"""One view of the database for many readers: a transaction that exports its snapshot and stays open for them.

Source: PostgreSQL manual, "Snapshot Synchronization Functions": a snapshot can be imported only while the transaction
that exported it is open.
"""

from __future__ import annotations

from typing import Any

import asyncpg

from raypg.config import idle_limit
from raypg.errors import RaypgError
from raypg.lease import LeasedConnection, PoolTransaction
from raypg.pool import WorkflowConnectionPool
from raypg.transaction import begin_text

BEGIN = begin_text("repeatable_read", readonly=True, deferrable=False)
"""Begins a transaction that may import a snapshot, and that which exports it."""

SAME_ORDER = "SET LOCAL synchronize_seqscans = off; SET LOCAL max_parallel_workers_per_gather = 0"
"""So that rows come in the same order whenever they are read: Ray makes a block that it has lost by running its task
again. Others' scans of the table, and processes that divide one, would change it (PostgreSQL manual, "Version and
Platform Compatibility"; "Parallel Plans")."""

PAGE_ORDER = "SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off"
"""The same for ranges of pages, with a filter: all other plans, those with bitmaps of indexes too, read pages in their
order."""

_EXPORT = """
SELECT pg_catalog.pg_export_snapshot() AS name, pg_catalog.set_config('idle_in_transaction_session_timeout', $1, true)
"""


class Snapshot:
    """A snapshot and the lease that holds it. Sent to another process it is its name alone.

    It ends with :meth:`end`, with this object, or after its time, whichever comes first. It takes one connection, and
    while it is there PostgreSQL cannot vacuum what it shows.

    Attributes:
        connection: what holds it; ``None`` if it has ended, and in other processes.
    """

    def __init__(self, name: str, connection: LeasedConnection | None) -> None:
        self.name = name
        self.connection = connection

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
        connection = await PoolTransaction(pool._dispatcher, BEGIN, None, seconds, pool._users_name).__aenter__()
        name: str = await connection.fetchval(_EXPORT, str(idle_limit(seconds)))
        return cls(name, connection)

    @staticmethod
    def read(
        pool: WorkflowConnectionPool, snapshot: Snapshot | None, seconds: float, by_pages: bool
    ) -> PoolTransaction:
        """A transaction of *pool* that sees *snapshot*; without one, what is committed when it begins.

        Args:
            seconds: for which it may wait for its connection, and then last.
            by_pages: whether it reads a range of pages.
        """
        begin = BEGIN if snapshot is None else f"{BEGIN}; SET TRANSACTION SNAPSHOT '{snapshot.name}'"
        # Or the server takes what is usual for leases of this pool.
        begin += f"; SET LOCAL idle_in_transaction_session_timeout = {idle_limit(seconds)}; {SAME_ORDER}"
        if by_pages:
            begin += f"; {PAGE_ORDER}"
        return PoolTransaction(pool._dispatcher, begin, seconds, seconds, pool._users_name)

    async def use(self) -> LeasedConnection | None:
        """The connection that holds it, for more questions to the same view; ``None`` if it has ended."""
        if self.connection is not None:
            try:
                await self.connection.fetchval("SELECT 1")
            except (RaypgError, asyncpg.PostgresError):  # a question before may have failed, and the transaction
                await self.end()
        return self.connection

    async def end(self) -> None:
        """End it. Twice does nothing."""
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.release()
