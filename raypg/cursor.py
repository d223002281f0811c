"""Cursors on a leased connection: rows in portions, as asyncpg's ``connection.cursor()``."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg import background
from raypg.calling import send
from raypg.checks import check_statement, check_timeout
from raypg.errors import LeaseLostError
from raypg.packing import pack
from raypg.row import Row, row_type

if TYPE_CHECKING:
    from raypg.lease import LeasedConnection

_CLOSING = 0  # number of a message that nobody waits for, and nobody cancels

_names = itertools.count(1)


class CursorFactory:
    """What ``connection.cursor(…)`` returns: iterate over it with ``async for``, or await it for a :class:`Cursor`.

    Args:
        prefetch: rows in a portion when iterated over; each portion is one message to the worker.
        timeout: seconds for each portion.

    Raises:
        asyncpg.InterfaceError: *prefetch* is no positive number.
    """

    def __init__(
        self, connection: LeasedConnection, query: str, args: tuple[Any, ...], prefetch: int, timeout: float | None
    ) -> None:
        check_statement(query)
        check_timeout(timeout)
        self._prefetch = at_least_one("prefetch", prefetch)
        self._cursor = (connection, query, args, timeout)

    def parts(self) -> tuple[Cursor, int]:
        """A cursor that is not open yet, and how many rows to fetch at a time."""
        return Cursor(*self._cursor), self._prefetch

    def __aiter__(self) -> CursorIterator:
        return CursorIterator(*self.parts())

    def __await__(self) -> Generator[Any, None, Cursor]:
        return self._open().__await__()

    async def _open(self) -> Cursor:
        cursor, _ = self.parts()
        await cursor._open(0)
        return cursor


class Cursor:
    """A cursor that stands in the result of a query; it ends with its transaction.

    Raises:
        asyncpg.NoActiveSQLTransactionError: when opened outside of a transaction.
        asyncpg.InvalidCursorNameError: its transaction is over, or it was closed.
        asyncpg.InterfaceError: a step failed or was cancelled, so that nobody knows where it stands.
    """

    def __init__(self, connection: LeasedConnection, query: str, args: tuple[Any, ...], timeout: float | None) -> None:
        self._connection = connection
        self._query = query
        self._args = args
        self._timeout = timeout
        self._name = next(_names)
        self._opened = False
        self._ended = False
        self._broken = False

    def __del__(self) -> None:
        # Forgotten half way, by a `break` say. Only the background loop may talk to Ray from here.
        if getattr(self, "_opened", False) and not self._ended and self._connection._ended is None:
            handle = self._connection._channel.handle
            message = pack((self._connection._token, _CLOSING, self._name, ("close",), None))
            background.soon(lambda: send(handle.lease_cursor, message))

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open" if self._opened else "not open"
        return f"<Cursor of {self._connection!r}, {state}>"

    async def fetch(self, n: int, *, timeout: float | None = None) -> list[Row]:
        """The next *n* rows; fewer, or none, at the end. *timeout* in seconds."""
        at_least_one("n", n)
        check_timeout(timeout)
        if self._ended:
            return []
        if not self._opened:
            return await self._open(n, timeout)
        rows, names, self._ended = await self._step(("fetch", n), timeout)
        return list(map(row_type(names), rows)) if rows else []

    async def fetchrow(self, *, timeout: float | None = None) -> Row | None:
        """The next row, or ``None`` at the end."""
        rows = await self.fetch(1, timeout=timeout)
        return rows[0] if rows else None

    async def forward(self, n: int, *, timeout: float | None = None) -> int:
        """Skip *n* rows; returns how many there were."""
        at_least_one("n", n)
        check_timeout(timeout)
        if self._ended:
            return 0
        if not self._opened:
            await self._open(0, timeout)
        skipped: int = await self._step(("forward", n), timeout)
        self._ended = skipped < n
        return skipped

    async def close(self) -> None:
        """Close it before its transaction ends. Twice does nothing."""
        if self._opened and not self._ended and self._connection._ended is None:
            self._ended = True
            with contextlib.suppress(LeaseLostError):
                await self._connection._in_turn(None, "lease_cursor", self._name, ("close",), None)
        self._ended = True

    async def _open(self, count: int, timeout: float | None = None) -> list[Row]:
        """Open it, and fetch the first *count* rows in the same message."""
        self._opened = True
        rows, names, self._ended = await self._step(("open", self._query, self._args, count), timeout)
        return list(map(row_type(names), rows)) if rows else []

    async def _step(self, step: tuple[Any, ...], timeout: float | None) -> Any:
        if self._broken:
            raise asyncpg.InterfaceError(
                "the cursor failed or was interrupted before, and where it stands is unknown: open another"
            )
        try:
            limit = self._timeout if timeout is None else timeout
            return await self._connection._in_turn(self._query, "lease_cursor", self._name, step, limit)
        except BaseException:
            self._broken = True
            raise


class CursorIterator:
    """``async for row in connection.cursor(…)``: fetches a portion whenever the last one is used up."""

    def __init__(self, cursor: Cursor, prefetch: int) -> None:
        self._cursor = cursor
        self._prefetch = prefetch
        self._rows: deque[Row] = deque()

    def __aiter__(self) -> CursorIterator:
        return self

    async def __anext__(self) -> Row:
        if not self._rows:
            self._rows.extend(await self._cursor.fetch(self._prefetch))
        if self._rows:
            return self._rows.popleft()
        raise StopAsyncIteration


def at_least_one(name: str, value: object) -> int:
    """*value*, as asyncpg wants it.

    Raises:
        asyncpg.InterfaceError: it is no positive number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise asyncpg.InterfaceError(f"{name} must be a whole number greater than zero, not {value!r}")
    return value
