"""The ledger of written batches: ``raypg.batches``, and the table of rows that were refused, ``raypg.quarantine``.

A batch's row is written first thing in its own transaction, so that it is there exactly if the batch is. Who writes the
same batch again, after whatever went wrong, waits there for a transaction that may still be open, and finds out.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import asyncpg

from raypg.core.write_state import BatchCounts, is_conflict
from raypg.errors import BatchConflictError, LedgerError
from raypg.messages import FETCH, STATUS
from raypg.server.connection import ServerConnection

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 2.0
"""Seconds to wait for another transaction that has written a batch of this id and has not ended."""

_ADVISORY = 7_238_412_655_001

SCHEMA = f"""
BEGIN;
SELECT pg_catalog.pg_advisory_xact_lock({_ADVISORY});
CREATE SCHEMA IF NOT EXISTS raypg;
CREATE TABLE IF NOT EXISTS raypg.batches (
    pipeline text NOT NULL, batch_id text NOT NULL, PRIMARY KEY (pipeline, batch_id)
);
ALTER TABLE raypg.batches
    ADD COLUMN IF NOT EXISTS hash bytea,
    ADD COLUMN IF NOT EXISTS target text,
    ADD COLUMN IF NOT EXISTS rows bigint,
    ADD COLUMN IF NOT EXISTS duplicates bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS quarantined bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS xid bigint DEFAULT pg_catalog.txid_current(),
    ADD COLUMN IF NOT EXISTS committed_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp();
CREATE UNIQUE INDEX IF NOT EXISTS batches_pkey ON raypg.batches (pipeline, batch_id);
CREATE TABLE IF NOT EXISTS raypg.quarantine (
    pipeline text NOT NULL,
    batch_id text,
    target text NOT NULL,
    row bigint NOT NULL,
    sqlstate text NOT NULL,
    message text NOT NULL,
    data text NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
COMMIT
"""

# Where all tables are published, rows of one that has no identity can be neither changed nor deleted. A ledger has none
# yet if an older raypg or somebody by hand has made it.
_PRIMARY_KEY = "ALTER TABLE raypg.batches ADD CONSTRAINT batches_pkey PRIMARY KEY USING INDEX batches_pkey"
_IDENTITY = "ALTER TABLE raypg.quarantine REPLICA IDENTITY FULL"
# Who waits for the lock that this takes keeps all writers waiting.
_UPGRADE = f"""
BEGIN;
SET LOCAL lock_timeout = '100ms';
SELECT pg_catalog.pg_advisory_xact_lock({_ADVISORY});
{{}};
COMMIT
"""

# By the catalogue, since to_regclass() fails where one may not use the schema.
_TABLES = """
SELECT c.relname::text, CASE c.relname WHEN 'quarantine' THEN c.relreplident <> 'd' ELSE i.indrelid IS NOT NULL OR NOT
           EXISTS (SELECT FROM pg_catalog.pg_class k WHERE k.relnamespace = n.oid AND k.relname = 'batches_pkey') END
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indisprimary
WHERE n.nspname = 'raypg' AND c.relname IN ('batches', 'quarantine')
"""

BEGIN = f"""
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s';
SELECT pg_catalog.set_config('synchronous_commit', 'on', true)
WHERE pg_catalog.current_setting('synchronous_commit') = 'off'
"""

_CLAIM = """
INSERT INTO raypg.batches (pipeline, batch_id, hash, target, rows) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (pipeline, batch_id) DO NOTHING RETURNING 1
"""
_LOOK = "SELECT hash, rows, duplicates, quarantined FROM raypg.batches WHERE pipeline = $1 AND batch_id = $2"
_CORRECT = """
UPDATE raypg.batches SET rows = $3, duplicates = $4, quarantined = $5 WHERE pipeline = $1 AND batch_id = $2
"""
_QUARANTINE = """
INSERT INTO raypg.quarantine (pipeline, batch_id, target, row, sqlstate, message, data)
SELECT $1, $2, $3, bad.* FROM unnest($4::bigint[], $5::text[], $6::text[], $7::text[]) AS bad
"""

# A row that is not committed nobody else can see: these are the transactions that have written any row, and have been
# open for so long. State and age are hidden of those of another role.
_HOLDERS = """
SELECT l.pid, a.application_name, a.state, extract(epoch FROM clock_timestamp() - a.xact_start)::int
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.relation = 'raypg.batches'::regclass AND l.mode = 'RowExclusiveLock' AND l.granted
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND (a.xact_start > clock_timestamp() - $1 * interval '1 second') IS NOT TRUE
ORDER BY a.xact_start LIMIT 3
"""

MISSING = ("42P01", "3F000", "42703", "42P10")
"""There is no such table, schema, column, or unique index: of a table that somebody made by hand."""

FORBIDDEN = "42501"
"""A privilege is missing."""


class Entry(NamedTuple):
    """A batch, as the ledger knows it."""

    pipeline: str
    batch_id: str
    digest: bytes
    target: str
    rows: int


async def ensure(connection: ServerConnection, with_quarantine: bool, upgrade: bool) -> None:
    """Make the tables if they are missing; raises as :func:`create`.

    Args:
        with_quarantine: the one of refused rows is needed too.
        upgrade: give them what those of an older raypg lack. To be tried once: it takes a lock.
    """
    tables = await _tables(connection)
    if "batches" not in tables or (with_quarantine and "quarantine" not in tables):
        await create(connection)
    elif upgrade:
        await _upgrade(connection, tables)


async def create(connection: ServerConnection) -> None:
    """Make the tables that are missing.

    Raises:
        LedgerError: we may not; says what must be granted.
        ConnectionLost, asyncpg.PostgresError: as :meth:`ServerConnection.run`.
    """
    for attempt in range(2):
        try:
            await connection.run(STATUS, SCHEMA, ())
            break
        except asyncpg.PostgresError as error:
            await connection.run(STATUS, "ROLLBACK", ())
            if error.sqlstate == FORBIDDEN:
                raise await forbidden(connection, error) from error
            # Somebody else has just made it: IF NOT EXISTS may look at what was known before our turn came.
            if attempt or not isinstance(error, asyncpg.UniqueViolationError):
                raise
    await _upgrade(connection, await _tables(connection))


async def _tables(connection: ServerConnection) -> dict[str, bool]:
    """The tables of the ledger that exist, and whether their rows have an identity."""
    rows, _ = await connection.run(FETCH, _TABLES, ())
    return dict(map(tuple, rows))


async def _upgrade(connection: ServerConnection, tables: dict[str, bool]) -> None:
    """Give the rows of *tables* an identity. If that cannot be now, most can be done without, and somebody else who
    may do it will."""
    for table, change in (("batches", _PRIMARY_KEY), ("quarantine", _IDENTITY)):
        if tables.get(table, True):
            continue
        try:
            await connection.run(STATUS, _UPGRADE.format(change), ())
        except asyncpg.PostgresError as error:  # not the owner; or another worker was first; or it is being written to
            await connection.run(STATUS, "ROLLBACK", ())
            logger.info("raypg.%s is left without an identity of its rows: %s", table, error)


async def forbidden(connection: ServerConnection, error: asyncpg.PostgresError) -> LedgerError:
    """What to say to somebody who may not use the ledger. Not inside a transaction that has failed."""
    ((user, database),), _ = await connection.run(
        FETCH, "SELECT quote_ident(current_user), quote_ident(current_database())", ()
    )
    return LedgerError(
        f"the ledger of batches, raypg.batches, cannot be used by {user} ({error.args[0]}); to let it be made: "
        f"GRANT CREATE ON DATABASE {database} TO {user}; or, if it exists: GRANT USAGE ON SCHEMA raypg TO {user}; "
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON raypg.batches, raypg.quarantine TO {user}"
    )


async def claim(connection: ServerConnection, entry: Entry) -> BatchCounts | None:
    """Write the row of a batch, as the first statement of its transaction.

    Returns:
        What was written before under this id; ``None`` if nothing was, and the batch is to be written now.

    Raises:
        BatchConflictError: it was something else.
        asyncpg.LockNotAvailableError: another transaction writes it, and does not end.
    """
    while True:
        rows, _ = await connection.run(FETCH, _CLAIM, tuple(entry))
        if rows:
            return None
        rows, _ = await connection.run(FETCH, _LOOK, (entry.pipeline, entry.batch_id))
        if not rows:
            continue  # it was pruned between the two
        stored, count, duplicates, quarantined = tuple(rows[0])
        if is_conflict(stored, entry.digest):
            raise BatchConflictError(entry.pipeline, entry.batch_id, entry.target)
        return BatchCounts(count or 0, duplicates, quarantined, known=True)


async def held(connection: ServerConnection, entry: Entry, seconds: float) -> LedgerError:
    """What to say when another transaction has held a batch for so many *seconds*. Not inside a transaction."""
    rows, _ = await connection.run(FETCH, _HOLDERS, (seconds,))
    holders = [_holder(*row) for row in rows]
    who = f"{'one of ' * (len(holders) > 1)}{', '.join(holders)}" if holders else "nobody that is still there"
    pid = rows[0][0] if len(rows) == 1 else None
    end = "" if pid is None else f", or end it: SELECT pg_terminate_backend({pid})"
    return LedgerError(
        f"batch {entry.batch_id!r} of pipeline {entry.pipeline!r} was not written: another transaction writes it, and "
        f"has not ended for {seconds:g} s; it is held by {who}. Write it again when that has ended{end}"
    )


def _holder(pid: int | None, application: str | None, state: str | None, seconds: int | None) -> str:
    if pid is None:
        return "a prepared transaction (see pg_prepared_xacts)"
    since = "" if state is None or seconds is None else f", {state}, for {seconds} s"
    return f"process {pid} ({application or 'without application_name'}{since})"


async def correct(connection: ServerConnection, entry: Entry, counts: BatchCounts) -> None:
    """Not all rows of the batch were written."""
    await connection.run(
        STATUS, _CORRECT, (entry.pipeline, entry.batch_id, counts.rows, counts.duplicates, counts.quarantined)
    )


async def quarantine(
    connection: ServerConnection,
    pipeline: str,
    batch_id: str | None,
    target: str,
    bad: list[tuple[int, str, str, str]],
) -> None:
    """Store bad rows: (number, SQLSTATE, message, the row as JSON)."""
    columns = [list(column) for column in zip(*bad, strict=True)]
    await connection.run(STATUS, _QUARANTINE, (pipeline, batch_id, target, *columns))
