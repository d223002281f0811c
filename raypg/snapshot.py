"""One view of the database for many readers: a transaction that exports its snapshot and stays open for them.

Source: PostgreSQL manual, "Snapshot Synchronization Functions": a snapshot can be imported only while the transaction
that exported it is open.
"""

from __future__ import annotations

import asyncio
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


_TABLES = """
SELECT c.oid, coalesce(pg_catalog.pg_relation_filenode(c.oid), 0)
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid = l.relation
WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation'
  AND c.oid >= 16384 AND c.relkind IN ('r', 'p', 'm', 'v', 'f')
"""
"""The tables that this transaction has locked, and the number of each one's file. Below 16384 are the server's own
(PostgreSQL manual, "System Catalog Initial Data")."""

_CHANGED = f"""
WITH locked AS ({_TABLES}), known AS (SELECT * FROM unnest($1::oid[], $2::oid[]) AS t(oid, file))
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
FROM (
    SELECT oid FROM known WHERE oid NOT IN (SELECT oid FROM locked)
    UNION ALL SELECT oid FROM known WHERE coalesce(pg_catalog.pg_relation_filenode(oid), 0) <> file
    UNION ALL SELECT oid FROM locked WHERE oid NOT IN (SELECT oid FROM known)
) changed
JOIN pg_catalog.pg_class c USING (oid) JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LIMIT 1
"""
"""A table of the snapshot that is not one of those any more that this transaction has locked, is one only now, or lies
in another file. ``pg_class`` is read as of the snapshot: a table that is new, such as tomorrow's partition, is not in
it, and has no rows there. ``pg_relation_filenode`` tells what is now."""

_NO_SNAPSHOT = (
    asyncpg.InvalidParameterValueError,
    asyncpg.UndefinedObjectError,
    asyncpg.ObjectNotInPrerequisiteStateError,
)
"""What SET TRANSACTION SNAPSHOT fails with when the transaction that exported it has ended."""


class Snapshot:
    """A snapshot and the lease that holds it. Sent to another process it is its name, and what it shows.

    It ends with :meth:`end`, with this object, or after its time, whichever comes first. It takes one connection, and
    while it is there PostgreSQL cannot vacuum what it shows.

    Args:
        query: reads what the snapshot is for.
        tables: those that *query* read before the snapshot was taken, and their files.

    Attributes:
        connection: what holds it; ``None`` if it has ended, and in other processes.
    """

    def __init__(
        self, name: str, connection: LeasedConnection | None, query: str, tables: tuple[list[int], list[int]]
    ) -> None:
        self.name = name
        self.connection = connection
        self._query = query
        self._tables = tables

    def __reduce__(self) -> tuple[Any, ...]:
        return Snapshot, (self.name, None, self._query, self._tables)

    def __repr__(self) -> str:
        return f"<Snapshot {self.name}>"

    @classmethod
    async def take(cls, pool: WorkflowConnectionPool, seconds: float, query: str) -> Snapshot:
        """Export a snapshot that can be imported for *seconds*, to read what *query* does.

        Raises:
            UnavailableError: no connection is to be had.
            asyncpg.PostgresError: the server does not understand *query*.
        """
        async with pool.transaction(readonly=True) as before:
            await before.execute(f"EXPLAIN {query}")
            tables = await before.fetch(_TABLES)
        connection = await PoolTransaction(pool._dispatcher, BEGIN, None, seconds, pool._users_name).__aenter__()
        name: str = await connection.fetchval(_EXPORT, str(idle_limit(seconds)))
        return cls(name, connection, query, ([oid for oid, _ in tables], [file for _, file in tables]))

    @staticmethod
    @contextlib.asynccontextmanager
    async def read(
        pool: WorkflowConnectionPool, snapshot: Snapshot | None, seconds: float, by_pages: bool
    ) -> AsyncIterator[LeasedConnection]:
        """A transaction of *pool* that sees *snapshot*; without one, what is committed when it begins.

        Args:
            seconds: for which it may wait for its connection, and then last.
            by_pages: whether it reads a range of pages.

        Raises:
            SnapshotLostError: the snapshot has ended, or does not show what its query reads now.
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
                if snapshot is None:
                    raise
                raise SnapshotLostError(
                    f"the snapshot of this read has ended: give it more time (timeout=) or do without "
                    f"(consistent=False); PostgreSQL says: {error}"
                ) from None
            if snapshot is not None:
                await snapshot._check(connection)
            yield connection

    async def _check(self, connection: LeasedConnection) -> None:
        """Lock what is to be read, and see that it is what this snapshot shows.

        TRUNCATE, and an ALTER TABLE that writes a table anew, leave nothing in it for older snapshots (PostgreSQL
        manual, "Concurrency Control: Caveats"), VACUUM FULL and CLUSTER move its rows to other pages; and which
        partitions a table has, or which table has a name, no snapshot tells.
        """
        await connection.execute(f"EXPLAIN {self._query}")
        changed = await connection.fetchval(_CHANGED, *self._tables)
        if changed is not None:
            raise SnapshotLostError(
                f"{changed} is no longer as the snapshot of this read shows it: it was emptied, written anew, renamed "
                "or dropped meanwhile, or has become or ceased to be a partition (TRUNCATE, VACUUM FULL, CLUSTER, "
                "ALTER TABLE, DROP TABLE): read again"
            )

    async def is_good(self) -> bool:
        """Whether it can still be read, and shows what there is."""
        try:
            async with self.questions() as connection:
                await self._check(connection)
        except (RaypgError, asyncpg.PostgresError):
            return False
        return True

    @contextlib.asynccontextmanager
    async def questions(self) -> AsyncIterator[LeasedConnection]:
        """The connection that holds it, for questions to the same view. What they lock is free afterwards: who waits
        for a lock on a table, for as long as this is there, would keep all other readers waiting (PostgreSQL manual,
        "Explicit Locking": rolling back to a savepoint releases the locks since then).

        Raises:
            SnapshotLostError: it has ended.
        """
        if self.connection is None:
            raise SnapshotLostError("the snapshot of this read has ended")
        savepoint = self.connection.transaction()
        await savepoint.start()
        try:
            yield self.connection
        finally:
            with contextlib.suppress(RaypgError, asyncpg.PostgresError):  # it has ended, and its locks
                await asyncio.shield(savepoint.rollback())

    async def end(self) -> None:
        """End it. Twice does nothing."""
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.release()
