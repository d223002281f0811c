"""Prepared statements on a leased connection: checked by the server when they are made, run whenever wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from asyncpg.types import Attribute, Type

from raypg.cursor import CursorFactory
from raypg.row import Row

if TYPE_CHECKING:
    from raypg.lease import LeasedConnection


class PreparedStatement:
    """What ``connection.prepare(query)`` gives: a statement that the server has found good.

    It runs as calls on its connection do, where asyncpg keeps statements prepared. So it outlives changes of its
    tables, at which a statement held by asyncpg itself fails for ever.
    """

    def __init__(
        self,
        connection: LeasedConnection,
        query: str,
        parameters: tuple[Type, ...],
        attributes: tuple[Attribute, ...],
    ) -> None:
        self._connection = connection
        self._query = query
        self._parameters = parameters
        self._attributes = attributes

    def __repr__(self) -> str:
        return f"<PreparedStatement {self._query!r} of {self._connection!r}>"

    def get_query(self) -> str:
        """The SQL text."""
        return self._query

    def get_parameters(self) -> tuple[Type, ...]:
        """The types of ``$1``, ``$2`` … when it was prepared."""
        return self._parameters

    def get_attributes(self) -> tuple[Attribute, ...]:
        """Names and types of its columns when it was prepared; empty if it returns no rows."""
        return self._attributes

    async def fetch(self, *args: Any, timeout: float | None = None) -> list[Row]:
        """Run it and return all its rows."""
        return await self._connection.fetch(self._query, *args, timeout=timeout)

    async def fetchrow(self, *args: Any, timeout: float | None = None) -> Row | None:
        """Run it and return its first row, or ``None``."""
        return await self._connection.fetchrow(self._query, *args, timeout=timeout)

    async def fetchval(self, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Run it and return one value of its first row, or ``None``."""
        return await self._connection.fetchval(self._query, *args, column=column, timeout=timeout)

    async def execute(self, *args: Any, timeout: float | None = None) -> str:
        """Run it and return its command tag."""
        return await self._connection.execute(self._query, *args, timeout=timeout)

    async def executemany(self, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run it for each row of *args*; all or none of them take effect."""
        await self._connection.executemany(self._query, args, timeout=timeout)

    def cursor(self, *args: Any, prefetch: int = 50, timeout: float | None = None) -> CursorFactory:
        """A cursor over its rows; see :meth:`LeasedConnection.cursor`."""
        return self._connection.cursor(self._query, *args, prefetch=prefetch, timeout=timeout)
