"""The answer to one statement as a dict, as ``process({"operation": "execute"})`` and the router give it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg

from raypg.core.sql import classify
from raypg.core.sqlstate import error_category
from raypg.errors import (
    ConfigError,
    OutcomeUnknownError,
    QueryTimeoutError,
    StatementNotAllowedError,
    TransactionRolledBackError,
    UnavailableError,
)
from raypg.row import Row, row_type

__all__ = ["answer_to", "arguments_of", "rows_with"]

_FETCH_MODES = ("one", "all", "many")


async def answer_to(
    query: str, fetch_mode: str, run: Callable[[], Awaitable[tuple[Sequence[Row], str]]]
) -> dict[str, Any]:
    """Let *run* run *query*, and tell what came of it.

    Args:
        fetch_mode: ``one``, ``all`` or ``many``.
        run: gives its rows and its command tag.

    Returns:
        ``{success, data, error, execution_time_ms, …}``. Rows as a list of dicts; with ``fetch_mode="one"`` one dict or
        ``None``; a statement without rows gives ``[{"rows_affected": n}]``. What the server says against the statement
        comes back as ``{success: False, data: None, error, error_type, error_category, sqlstate, …}``.

    Raises:
        ConfigError: an unknown *fetch_mode*.
        UnavailableError: the database cannot be used now.
    """
    if fetch_mode not in _FETCH_MODES:
        raise ConfigError(f"fetch_mode={fetch_mode!r}: must be 'one', 'all' or 'many'")
    started = time.perf_counter()
    answer: dict[str, Any] = {"success": True, "data": None, "error": None}
    try:
        rows, status = await run()
    except UnavailableError:
        raise
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError, TypeError, OverflowError) as error:
        answer |= _failure(error)
    except (QueryTimeoutError, OutcomeUnknownError, StatementNotAllowedError, TransactionRolledBackError) as error:
        answer |= _failure(error)
    else:
        affected = answer["rows_affected"] = _affected(status)
        if fetch_mode == "all" and rows:
            answer["data"] = [dict(row.items()) for row in rows]
        else:
            answer["data"] = _data(query, rows, affected, fetch_mode)
    answer["execution_time_ms"] = (time.perf_counter() - started) * 1000
    return answer


def arguments_of(params: Any) -> tuple[Any, ...]:
    """The parameters of a request.

    Raises:
        ConfigError: they are no list or tuple.
    """
    if params is None:
        return ()
    if isinstance(params, list | tuple):
        return tuple(params)
    raise ConfigError(f"params must be a list or tuple of values for $1, $2 …, not {type(params).__name__}")


def rows_with(names: tuple[str, ...] | None, plain: Sequence[tuple[Any, ...]] | None) -> list[Row]:
    """Rows of plain tuples."""
    return list(map(row_type(names or ()), plain)) if plain else []


def _data(query: str, rows: Sequence[Row], affected: int | None, fetch_mode: str) -> Any:
    if not rows and affected is not None and not classify(query).returning:
        return [{"rows_affected": affected}]
    if fetch_mode == "one":
        return dict(rows[0].items()) if rows else None
    return [dict(row.items()) for row in rows]


def _affected(status: str) -> int | None:
    """The count in the command tag of a statement that changes rows (``INSERT 0 3``, ``UPDATE 2``)."""
    if status.startswith("SELECT"):
        return None
    command, _, count = status.rpartition(" ")
    if count.isdigit() and command.split(" ")[0] in ("INSERT", "UPDATE", "DELETE", "MERGE", "COPY"):
        return int(count)
    return None if status.startswith(("FETCH", "SHOW", "VALUES", "EXPLAIN")) else 0


def _failure(error: Exception) -> dict[str, Any]:
    sqlstate = getattr(error, "sqlstate", None)
    timed_out = isinstance(error, TimeoutError)
    return {
        "success": False,
        "error": str(error),
        "error_type": type(error).__name__,
        "error_category": error_category(sqlstate, connecting=False, timed_out=timed_out),
        "sqlstate": sqlstate,
    }
