"""A router in asyncpg's words: what the pool's own ``fetch`` and the others are, each where its statement belongs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from raypg import messages
from raypg.row import Row, row_type

__all__ = ["RouterStatements"]


class RouterStatements(ABC):
    """``fetch``, ``fetchrow``, ``fetchval`` and ``execute``."""

    async def fetch(
        self,
        query: str,
        *args: Any,
        session_id: str | None = None,
        max_staleness: float | None = None,
        after: str | None = None,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> list[Row]:
        """Run a statement where it belongs, and return all its rows.

        Args:
            query, args, timeout, settings: as of :meth:`raypg.WorkflowConnectionPool.fetch`.
            session_id, max_staleness, after: as of :meth:`raypg.QueryRouterNode.process`. ``max_staleness=None`` is the
                router's own.

        Raises:
            asyncpg.PostgresError: what the server says of the statement, as asyncpg's own class.
            StatementNotAllowedError: it begins or ends a transaction, and there is no session for that.
            TransactionRolledBackError: COMMIT of a transaction in which a statement had failed.
            QueryTimeoutError, OutcomeUnknownError, ResultLostError, UnavailableError: as for the pool.
            ConfigError, LeaseLostError: as for :meth:`raypg.QueryRouterNode.process`.
        """
        rows, names = await self._ask(messages.FETCH, query, args, session_id, max_staleness, after, timeout, settings)
        return list(map(row_type(names), rows)) if rows else []

    async def fetchrow(
        self,
        query: str,
        *args: Any,
        session_id: str | None = None,
        max_staleness: float | None = None,
        after: str | None = None,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Row | None:
        """Run a statement and return its first row, or ``None``. As :meth:`fetch`."""
        rows, names = await self._ask(messages.ROW, query, args, session_id, max_staleness, after, timeout, settings)
        return row_type(names)(rows[0]) if rows else None

    async def fetchval(
        self,
        query: str,
        *args: Any,
        column: int = 0,
        session_id: str | None = None,
        max_staleness: float | None = None,
        after: str | None = None,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Any:
        """Run a statement and return one value of its first row, or ``None``. As :meth:`fetch`."""
        rows, _ = await self._ask(messages.ROW, query, args, session_id, max_staleness, after, timeout, settings)
        return rows[0][column] if rows else None

    async def execute(
        self,
        query: str,
        *args: Any,
        session_id: str | None = None,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> str:
        """Run a statement and return its command tag, such as ``INSERT 0 1``. As :meth:`fetch`."""
        status, _ = await self._ask(messages.STATUS, query, args, session_id, None, None, timeout, settings)
        return str(status)

    @abstractmethod
    async def _ask(
        self,
        mode: int,
        query: str,
        args: Any,
        session_id: str | None,
        max_staleness: float | None,
        after: str | None,
        timeout: float | None,
        settings: Mapping[str, str] | None,
    ) -> tuple[Any, Any]:
        """Run a statement where it belongs; see :data:`raypg.messages.FETCH` and the others for what comes back."""
