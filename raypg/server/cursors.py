"""Cursors of a lease: portals of the extended protocol, which asyncpg's own cursors are.

Not DECLARE and FETCH: those take SELECT and VALUES only, and each would put a text of its own into asyncpg's cache of
prepared statements. And a portal can be closed by the protocol, which is no error if it is gone already, or the
transaction has failed: so who breaks off a loop may be noticed late without harm to the next transaction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from raypg.portable import plain_rows
from raypg.server import _asyncpg
from raypg.server.connection import STEP

if TYPE_CHECKING:
    from raypg.server.engine import Engine

Step: TypeAlias = "tuple[Any, ...]"
"""``("open", sql, arguments, count)``, ``("fetch", count)``, ``("forward", count)`` or ``("close",)``."""

Portion: TypeAlias = "tuple[list[tuple[Any, ...]], tuple[str, ...] | None, bool]"
"""(rows, column names, whether the cursor is at its end and closed)."""


class OpenCursor:
    """One cursor of one lease."""

    def __init__(self, sql: str, arguments: tuple[Any, ...]) -> None:
        self.sql = sql
        self._arguments = arguments
        self._cursor: Any = None

    async def open(self, raw: asyncpg.Connection, count: int) -> Portion:
        """Bind the portal, and fetch the first *count* rows (none if 0)."""
        if not raw.is_in_transaction():
            raise asyncpg.NoActiveSQLTransactionError(
                "a cursor lives inside a transaction: use `async with connection.transaction():` around it"
            )
        # Without a name: the portal keeps the plan, and nothing is left for a pooler's next user to stumble over.
        statement = await raw.prepare(self.sql, name="")
        self._cursor = await statement.cursor(*self._arguments)
        return await self.fetch(raw, count) if count else ([], None, False)

    async def fetch(self, raw: asyncpg.Connection, count: int) -> Portion:
        """The next *count* rows. Fewer mean that there are no more; the portal is closed then."""
        _check_transaction(raw)
        records = await self._cursor.fetch(count)
        ended = len(records) < count
        if ended:
            await _asyncpg.close_portal(self._cursor)
        return plain_rows(records), (tuple(records[0].keys()) if records else None), ended

    async def forward(self, raw: asyncpg.Connection, count: int) -> int:
        """Skip *count* rows; how many there were."""
        _check_transaction(raw)
        skipped: int = await self._cursor.forward(count)
        if skipped < count:
            await _asyncpg.close_portal(self._cursor)
        return skipped

    async def close(self, raw: asyncpg.Connection) -> None:
        """Close the portal; the end of its transaction has done so already."""
        if self._cursor is not None and raw.is_in_transaction():
            await _asyncpg.close_portal(self._cursor)


def _check_transaction(raw: asyncpg.Connection) -> None:
    if not raw.is_in_transaction():
        raise asyncpg.InvalidCursorNameError("the cursor is closed: its transaction is over")


async def step(engine: Engine, token: str, number: int, name: int, step: Step, timeout: float | None) -> Any:
    """Do one step of the cursor *name* of the lease *token*; *number* as for a statement.

    Returns:
        A :data:`Portion` for ``open`` and ``fetch``, a count for ``forward``.

    Raises:
        asyncpg.NoActiveSQLTransactionError: there is no transaction to open it in.
        asyncpg.InvalidCursorNameError: it is closed.
        LeaseLostError, QueryTimeoutError, asyncpg.PostgresError, …: as a statement on a lease.
    """
    lease = engine.leases.find(token)
    what, *arguments = step
    work: Callable[[asyncpg.Connection], Coroutine[Any, Any, Any]]
    if what == "open":
        sql, parameters, count = arguments
        cursor = lease.cursors[name] = OpenCursor(sql, parameters)
        work = functools.partial(cursor.open, count=count)
    else:
        known = lease.cursors.get(name)
        if known is None:
            if what == "close":
                return None
            raise asyncpg.InvalidCursorNameError("the cursor is closed")
        cursor = known
        work = functools.partial(getattr(cursor, what), **({} if what == "close" else {"count": arguments[0]}))
    if what == "close":
        del lease.cursors[name]
        if not lease.connection.raw.is_in_transaction():
            return None
    try:
        started = engine.now()
        answer, _ = await engine.run_leased(token, number, STEP, cursor.sql, work, timeout)
        if what == "fetch":
            engine.figures.portion(engine.now() - started, len(answer[0]))
        elif what == "open":
            engine.figures.rows += len(answer[0])
    except BaseException:
        lease.cursors.pop(name, None)  # where it stands is unknown; its transaction has failed, or its lease is gone
        raise
    ended = answer[2] if isinstance(answer, tuple) else what == "forward" and answer < arguments[0]
    if ended:
        lease.cursors.pop(name, None)
    return answer
