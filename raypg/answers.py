"""The answer to one statement as a dict, as ``process({"operation": "execute"})`` and the router give it."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Any, TypeAlias

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

__all__ = ["answer_to", "arguments_of", "check_fetch_mode", "is_told"]

Outcome: TypeAlias = "tuple[Any, tuple[str, ...] | None]"
"""((rows as plain tuples or None, command tag), column names): of a statement that was run for both, see
:data:`raypg.messages.BOTH`."""

_FETCH_MODES = ("one", "all", "many")
_TOLD = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    ValueError,
    TypeError,
    OverflowError,
    QueryTimeoutError,
    OutcomeUnknownError,
    StatementNotAllowedError,
    TransactionRolledBackError,
)


async def answer_to(query: str, fetch_mode: str, running: Awaitable[Outcome]) -> dict[str, Any]:
    """Wait for what *query* gives, and tell what came of it.

    Args:
        fetch_mode: ``one``, ``all`` or ``many``, see :func:`check_fetch_mode`.

    Returns:
        See :func:`_answer_of` and :func:`_failure_of`.

    Raises:
        UnavailableError: the database cannot be used now.
    """
    started = time.perf_counter()
    try:
        outcome = await running
    except Exception as error:
        if not is_told(error):
            raise
        return _failure_of(error, time.perf_counter() - started)
    return _answer_of(query, fetch_mode, outcome, time.perf_counter() - started)


def check_fetch_mode(fetch_mode: object) -> None:
    """Refuse what is none.

    Raises:
        ConfigError: it is none.
    """
    if fetch_mode not in _FETCH_MODES:
        raise ConfigError(f"fetch_mode={fetch_mode!r}: must be 'one', 'all' or 'many'")


def is_told(error: Exception) -> bool:
    """Whether what a statement has raised when it ran is an answer, and not raised."""
    return isinstance(error, _TOLD) and not isinstance(error, UnavailableError)


def _answer_of(query: str, fetch_mode: str, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """``{success, data, error, rows_affected, execution_time_ms}``.

    Rows as a list of dicts; with ``fetch_mode="one"`` one dict or ``None``; a statement without rows gives
    ``[{"rows_affected": n}]``.
    """
    (rows, status), names = outcome
    affected = None if status.startswith("SELECT") else _affected(status)
    data: Any
    if not rows:
        if affected is not None and not classify(query).returning:
            data = [{"rows_affected": affected}]
        else:
            data = None if fetch_mode == "one" else []
    elif fetch_mode == "one":
        data = dict(zip(names or (), rows[0], strict=True))
    else:
        data = [dict(zip(names or (), row, strict=True)) for row in rows]
    return {
        "success": True,
        "data": data,
        "error": None,
        "rows_affected": affected,
        "execution_time_ms": seconds * 1000,
    }


def _failure_of(error: Exception, seconds: float) -> dict[str, Any]:
    """What the server says against a statement: ``{success: False, data: None, error, error_type, error_category,
    sqlstate, execution_time_ms}``."""
    sqlstate = getattr(error, "sqlstate", None)
    timed_out = isinstance(error, TimeoutError)
    return {
        "success": False,
        "data": None,
        "error": str(error),
        "error_type": type(error).__name__,
        "error_category": error_category(sqlstate, connecting=False, timed_out=timed_out),
        "sqlstate": sqlstate,
        "execution_time_ms": seconds * 1000,
    }


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


def _affected(status: str) -> int | None:
    """The count in the command tag of a statement that changes rows (``INSERT 0 3``, ``UPDATE 2``)."""
    command, _, count = status.rpartition(" ")
    if count.isdigit() and command.split(" ")[0] in ("INSERT", "UPDATE", "DELETE", "MERGE", "COPY"):
        return int(count)
    return None if status.startswith(("FETCH", "SHOW", "VALUES", "EXPLAIN")) else 0
