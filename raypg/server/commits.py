"""What became of a transaction whose COMMIT got no answer.

``pg_xact_status`` can lie after a crash: the number of a transaction whose commit was not flushed is given out once
more. So it is believed only over a connection that was opened before the COMMIT was sent and still lives, for a crash
ends them all. What tells the truth at any time is a row of the transaction's own: if a table ``raypg.batches (pipeline
text, batch_id text, …)`` exists that we may use, one is written there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import asyncpg

from raypg.messages import FETCH, STATUS
from raypg.server import _asyncpg, errand
from raypg.server.connection import ServerConnection
from raypg.server.outcomes import ConnectionLost

if TYPE_CHECKING:
    from raypg.server.engine import Engine

Fate = Literal["committed", "aborted", "unknown"]

PATIENCE = 5.0
"""Seconds in which a backend whose client is gone should have ended by itself; then it is terminated."""

LOOK_EVERY = 0.05
"""Seconds between two looks."""

_BEFORE = """
SELECT pg_catalog.txid_current_if_assigned(), pg_catalog.clock_timestamp(), a.pid, a.backend_start,
       EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = 'raypg' AND c.relname = 'batches'
                 AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
                 AND 2 = (SELECT count(*) FROM pg_catalog.pg_attribute m
                          WHERE m.attrelid = c.oid AND m.attname IN ('pipeline', 'batch_id')
                            AND pg_catalog.has_column_privilege(c.oid, m.attnum, 'SELECT')
                            AND pg_catalog.has_column_privilege(c.oid, m.attnum, 'INSERT')))
FROM pg_catalog.pg_stat_activity a WHERE a.pid = pg_catalog.pg_backend_pid()
"""
_MARK = "INSERT INTO raypg.batches (pipeline, batch_id) VALUES ($1, $2)"
_MARKED = "SELECT 1 FROM raypg.batches WHERE pipeline = $1 AND batch_id = $2"
_SAVEPOINT = "raypg_marker"

_OPENED_BEFORE = """
SELECT backend_start < $1 FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()
"""
_RUNS = "SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE pid = $1 AND backend_start = $2"
_TERMINATE = f"SELECT pg_catalog.pg_terminate_backend(pid) FROM ({_RUNS.replace('count(*)', 'pid')}) AS old"


async def before(engine: Engine, token: str, pipeline: str, batch: str) -> dict[str, Any]:
    """What must be known before the leased transaction *token* commits, to find out afterwards whether it did.

    Raises:
        LeaseLostError, OutcomeUnknownError, asyncpg.PostgresError: as :meth:`LeaseTable.run`.
    """

    async def ask(mode: int, sql: str, *arguments: Any) -> Any:
        return (await engine.leases.run(token, -1, mode, sql, arguments, None))[0]

    ((number, since, pid, started, has_ledger),) = await ask(FETCH, _BEFORE)
    known = {
        "transaction": number,
        "since": since,
        "backend": (pid, started),
        "address": _asyncpg.address(engine.leases.find(token).connection.raw),
        "mark": None,
    }
    if number is not None and has_ledger:
        await ask(STATUS, f"SAVEPOINT {_SAVEPOINT}")
        try:
            await ask(STATUS, _MARK, pipeline, batch)
        except asyncpg.PostgresError:
            await ask(STATUS, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")  # not ours to write, or of another shape
        else:
            known["mark"] = (pipeline, batch)
    return known


async def fate(engine: Engine, job: str, known: dict[str, Any]) -> Fate:
    """What became of the transaction of which *known* tells what :func:`before` found; as far as this worker can say.

    Raises:
        Refused: no connection is to be had.
    """
    if known["transaction"] is None:
        return "committed"  # it has written nothing
    if known["mark"] is not None:

        async def look(connection: ServerConnection) -> Fate:
            return await _by_mark(connection, known)

        return await errand.run(engine, job, look)  # type: ignore[no-any-return]
    until = engine.now() + PATIENCE
    while True:
        found = await _by_status(engine, known)
        if found != "unknown" or engine.now() > until or not any(not c.raw.is_closed() for c in engine.connections):
            return found
        await asyncio.sleep(LOOK_EVERY)


async def _by_mark(connection: ServerConnection, known: dict[str, Any]) -> Fate:
    # While the transaction may still run, that its row is not there says nothing.
    await _ended(connection, known["backend"])
    rows, _ = await connection.run(FETCH, _MARKED, known["mark"])
    return "committed" if rows else "aborted"


async def _ended(connection: ServerConnection, backend: tuple[int, Any]) -> None:
    """Wait until *backend* has ended, which has lost its client; terminate it if it takes long.

    Raises:
        TimeoutError: it does not end.
    """
    loop = asyncio.get_running_loop()
    for remedy in (_TERMINATE, None):
        until = loop.time() + PATIENCE
        while loop.time() < until:
            ((running,),), _ = await connection.run(FETCH, _RUNS, backend)
            if not running:
                return
            await asyncio.sleep(LOOK_EVERY)
        if remedy is not None:
            await connection.run(FETCH, remedy, backend)
    raise TimeoutError(f"backend {backend[0]} does not end")


async def _by_status(engine: Engine, known: dict[str, Any]) -> Fate:
    """Ask the connections that nobody uses now, and that are older than the COMMIT."""
    found: Fate = "unknown"
    idle = []
    while (connection := engine.connections.take_idle()) is not None:
        idle.append(connection)
    for connection in idle:
        try:
            if found == "unknown" and _asyncpg.address(connection.raw) == known["address"]:
                found = await _status(connection, known)
        except (ConnectionLost, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            pass
        finally:
            engine.connections.put_back(connection)
    return found


async def _status(connection: ServerConnection, known: dict[str, Any]) -> Fate:
    if not await connection.is_alive():
        return "unknown"
    ((older,),), _ = await connection.run(FETCH, _OPENED_BEFORE, (known["since"],))
    if not older:
        return "unknown"
    await _ended(connection, known["backend"])
    try:
        ((status,),), _ = await connection.run(
            FETCH, "SELECT pg_catalog.txid_status($1::int8)", (known["transaction"],)
        )
    except asyncpg.InvalidParameterValueError:
        return "aborted"  # a number that was never given out as far as the server knows
    verdicts: dict[str | None, Fate] = {"committed": "committed", "aborted": "aborted"}
    return verdicts.get(status, "unknown")
