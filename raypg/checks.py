"""What can be said against a call before anything is sent. A bad call must not travel: others share its message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import asyncpg

from raypg.errors import StatementNotAllowedError


def check_statement(sql: object) -> None:
    """Refuse what the protocol cannot carry: the server or asyncpg would end the session over it.

    Raises:
        TypeError: it is no string.
        StatementNotAllowedError: it holds a NUL character or half a surrogate pair.
    """
    if not isinstance(sql, str):
        raise TypeError(f"the statement must be a str, not {type(sql).__name__}")
    if "\0" in sql:
        raise StatementNotAllowedError("the statement contains a NUL character, which PostgreSQL does not take")
    if not sql.isascii():
        try:
            sql.encode()
        except UnicodeEncodeError as error:
            raise StatementNotAllowedError(
                f"the statement is not valid Unicode: {error.reason} at character {error.start}"
            ) from None


def check_timeout(timeout: object) -> None:
    """As asyncpg's own check.

    Raises:
        ValueError: it is neither None nor a number of seconds.
    """
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout != timeout:
        raise ValueError(f"invalid timeout value: expected non-negative float (got {timeout!r})")


def rows_of(args: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The parameters of an ``executemany`` as tuples.

    Raises:
        asyncpg.DataError: one is no sequence; a dict would silently become its keys.
    """
    rows = []
    for number, row in enumerate(args):
        if not isinstance(row, Sequence):
            raise asyncpg.DataError(
                f"invalid input in executemany() argument sequence element #{number}: "
                f"expected a sequence, got {type(row).__name__}"
            )
        rows.append(tuple(row))
    return rows
