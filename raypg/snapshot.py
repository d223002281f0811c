"""One view of the database for many readers: a transaction that exports its snapshot and stays open for them.

Source: PostgreSQL manual, "Snapshot Synchronization Functions": a snapshot can be imported only while the transaction
that exported it is open.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from raypg.config import idle_limit
from raypg.errors import RaypgError, SnapshotLostError
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


_CHANGED = """
SELECT l.relation::pg_catalog.regclass::text
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_class c ON c.oid = l.relation
WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation'
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
  AND CASE WHEN c.oid IS NULL
      THEN pg_catalog.pg_relation_filenode(l.relation) IS NOT NULL
           AND pg_catalog.pg_index_has_property(l.relation, 'clusterable') IS NULL
      ELSE c.relkind IN ('r', 'm') AND c.relfilenode <> 0
           AND c.relfilenode <> pg_catalog.pg_relation_filenode(l.relation)
      END
LIMIT 1
"""
"""A table that this transaction has locked, and that its snapshot does not show as it is: it lies in another file now,
or is a new one. ``pg_class`` is read as of the snapshot, the functions tell what is now. An index may be new. The
catalogue's own tables may have no number there (PostgreSQL manual, "pg_class")."""

_NO_SNAPSHOT = (
    asyncpg.InvalidParameterValueError,
    asyncpg.UndefinedObjectError,
    asyncpg.ObjectNotInPrerequisiteStateError,
)
"""What SET TRANSACTION SNAPSHOT fails with when the transaction that exported it has ended."""


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
    @contextlib.asynccontextmanager
    async def read(
        pool: WorkflowConnectionPool, snapshot: Snapshot | None, seconds: float, query: str, by_pages: bool
    ) -> AsyncIterator[LeasedConnection]:
        """A transaction of *pool* that sees *snapshot*; without one, what is committed when it begins.

        Args:
            seconds: for which it may wait for its connection, and then last.
            query: what it reads, or another of the same tables.
            by_pages: whether it reads a range of pages.

        Raises:
            SnapshotLostError: the snapshot has ended, or does not show what *query* reads: a table was written anew or
                emptied since (PostgreSQL manual, "Caveats" of concurrency control).
            What a transaction does.
        """
        begin = BEGIN if snapshot is None else f"{BEGIN}; SET TRANSACTION SNAPSHOT '{snapshot.name}'"
        # Or the server takes what is usual for leases of this pool.
        begin += f"; SET LOCAL idle_in_transaction_session_timeout = {idle_limit(seconds)}; {SAME_ORDER}"
        if by_pages:
            begin += f"; {PAGE_ORDER}"
        async with contextlib.AsyncExitStack() as stack:
            transaction = PoolTransaction(pool._dispatcher, begin, seconds, seconds, pool._users_name)
            try:
                connection = await stack.enter_async_context(transaction)
            except _NO_SNAPSHOT as error:
                raise SnapshotLostError(str(error)) from None
            if snapshot is not None:
                await connection.execute(f"EXPLAIN {query}")  # locks what it would read: from now on it stays as it is
                changed = await connection.fetchval(_CHANGED)
                if changed is not None:
                    raise SnapshotLostError(
                        f"{changed} was written anew, emptied or created (by VACUUM FULL, CLUSTER, TRUNCATE or ALTER "
                        "TABLE, say) after the snapshot of this read was taken, which cannot show its rows: read again"
                    )
            yield connection

    async def is_there(self) -> bool:
        """Whether it can still be read, and asked; ends it if not."""
        if self.connection is not None:
            try:
                await self.connection.fetchval("SELECT 1")
            except (RaypgError, asyncpg.PostgresError):
                await self.end()
        return self.connection is not None

    @contextlib.asynccontextmanager
    async def questions(self) -> AsyncIterator[LeasedConnection]:
        """The connection that holds it, for questions to the same view. What they lock is free afterwards: who waits
        for a lock on a table, for as long as this is there, would keep all other readers waiting (PostgreSQL manual,
        "Explicit Locking": rolling back to a savepoint releases the locks since then)."""
        if self.connection is None:
            raise SnapshotLostError("the snapshot of this read has ended")
        savepoint = self.connection.transaction()
        await savepoint.start()
        try:
            yield self.connection
        finally:
            await savepoint.rollback()

    async def end(self) -> None:
        """End it. Twice does nothing."""
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.release()
