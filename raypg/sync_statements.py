"""Cursors and prepared statements for callers without an event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
from asyncpg.types import Attribute, Type

from raypg import background
from raypg.cursor import CursorFactory, at_least_one
from raypg.prepared import PreparedStatement
from raypg.row import Row

if TYPE_CHECKING:
    from raypg.sync import SyncConnection


class SyncCursor:
    """What ``connection.cursor(…)`` returns on a lease of ``pool.sync``: a plain iterator over rows, opened when it is
    first used; also with ``fetch(n)``, ``fetchrow()`` and ``forward(n)``. Errors as :class:`raypg.cursor.Cursor`."""

    def __init__(self, factory: CursorFactory) -> None:
        self._cursor, self._prefetch = factory.parts()
        self._rows: deque[Row] = deque()

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if not self._rows:
            self._rows.extend(background.run(lambda: self._cursor.fetch(self._prefetch)))
        if self._rows:
            return self._rows.popleft()
        raise StopIteration

    def fetch(self, n: int, *, timeout: float | None = None) -> list[Row]:
        """The next *n* rows; fewer, or none, at the end."""
        at_least_one("n", n)
        rows = self._taken(n)
        if len(rows) < n:
            rows += background.run(lambda: self._cursor.fetch(n - len(rows), timeout=timeout))
        return rows

    def fetchrow(self, *, timeout: float | None = None) -> Row | None:
        """The next row, or ``None`` at the end."""
        rows = self.fetch(1, timeout=timeout)
        return rows[0] if rows else None

    def forward(self, n: int, *, timeout: float | None = None) -> int:
        """Skip *n* rows; returns how many there were."""
        at_least_one("n", n)
        skipped = len(self._taken(n))
        if skipped < n:
            skipped += background.run(lambda: self._cursor.forward(n - skipped, timeout=timeout))
        return skipped

    def close(self) -> None:
        """Close it before its transaction ends. Twice does nothing."""
        self._rows.clear()
        background.run(self._cursor.close)

    def _taken(self, most: int) -> list[Row]:
        """Rows of the portion at hand."""
        return [self._rows.popleft() for _ in range(min(most, len(self._rows)))]


class SyncPreparedStatement:
    """See :class:`raypg.prepared.PreparedStatement`."""

    def __init__(self, statement: PreparedStatement) -> None:
        self._statement = statement

    def get_query(self) -> str:
        """The SQL text."""
        return self._statement.get_query()

    def get_parameters(self) -> tuple[Type, ...]:
        """The types of ``$1``, ``$2`` … when it was prepared."""
        return self._statement.get_parameters()

    def get_attributes(self) -> tuple[Attribute, ...]:
        """Names and types of its columns when it was prepared; empty if it returns no rows."""
        return self._statement.get_attributes()

    def fetch(self, *args: Any, timeout: float | None = None) -> list[Row]:
        """Run it and return all its rows."""
        return background.run(lambda: self._statement.fetch(*args, timeout=timeout))

    def fetchrow(self, *args: Any, timeout: float | None = None) -> Row | None:
        """Run it and return its first row, or ``None``."""
        return background.run(lambda: self._statement.fetchrow(*args, timeout=timeout))

    def fetchval(self, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Run it and return one value of its first row, or ``None``."""
        return background.run(lambda: self._statement.fetchval(*args, column=column, timeout=timeout))

    def execute(self, *args: Any, timeout: float | None = None) -> str:
        """Run it and return its command tag."""
        return background.run(lambda: self._statement.execute(*args, timeout=timeout))

    def executemany(self, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run it for each row of *args*; all or none of them take effect."""
        background.run(lambda: self._statement.executemany(args, timeout=timeout))

    def cursor(self, *args: Any, prefetch: int = 50, timeout: float | None = None) -> SyncCursor:
        """A cursor over its rows."""
        return SyncCursor(self._statement.cursor(*args, prefetch=prefetch, timeout=timeout))


@dataclass(frozen=True, slots=True)
class SyncListener:
    """Calls a callback with the connection that its owner knows. Equal to another for the same callback."""

    connection: SyncConnection
    callback: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.callback):
            raise asyncpg.InterfaceError(f"expected a callable, got {self.callback!r}")

    def __call__(self, _: object, pid: int, channel: str, payload: str) -> Any:
        return self.callback(self.connection, pid, channel, payload)
