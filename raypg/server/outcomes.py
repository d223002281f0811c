"""How a statement can end: rows and tags, lost connections, time limits; and what asyncpg's errors say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg

from raypg import messages
from raypg.errors import QueryTimeoutError
from raypg.portable import plain_rows


class ConnectionLost(Exception):
    """The connection died under a statement; whether it took effect is unknown.

    Args:
        sqlstate: code of the server's FATAL message, or ``None`` if it went without a word.
        sent: False if it is known that the statement was not sent.
    """

    def __init__(self, sqlstate: str | None, sent: bool = True) -> None:
        super().__init__(sqlstate, sent)
        self.sqlstate = sqlstate
        self.sent = sent

    @property
    def by_crash(self) -> bool:
        """Whether the backend crashed: then the statement itself may be what killed it, and must not run again."""
        # A pooler says 08P01 ("server conn crashed?") of every backend that it lost, however that ended.
        return self.sent and (self.sqlstate is None or self.sqlstate in ("57P02", "08P01"))


def outcome_of(mode: int, records: Sequence[asyncpg.Record], status: str) -> tuple[Any, tuple[str, ...] | None]:
    """(payload, column names), as :meth:`ServerConnection.run` returns them, of what the server answered."""
    if mode == messages.STATUS:
        return status, None
    names = tuple(records[0].keys()) if records else None
    rows = plain_rows(records)
    return ((rows, status) if mode == messages.BOTH else rows), names


def timed_out(limit: float | None) -> QueryTimeoutError:
    """The error of a statement that was cancelled after *limit* seconds."""
    return QueryTimeoutError(
        f"the statement took longer than its timeout of {limit:.6g} s and was cancelled; it had no effect", limit
    )


def last_words(error: BaseException) -> str | None:
    """SQLSTATE of the FATAL message with which the server ended the connection, if it said one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, asyncpg.PostgresError) and not isinstance(cause, asyncpg.ConnectionDoesNotExistError):
            return str(cause.sqlstate) if cause.sqlstate else None
        cause = cause.__cause__
    return None
