"""What became of a statement whose rows cannot be read.

asyncpg reads rows as they come. If one cannot be read (its type was altered, a date is beyond Python's) asyncpg raises
that, and skips what else the server says: the statement may have taken effect, or the server may have refused it after
its first rows, at COMMIT for instance, and both look the same. Callers must know: so a witness listens in.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import asyncpg

from raypg import messages
from raypg.core.sql import classify, shorten
from raypg.errors import OutcomeUnknownError, ResultLostError

T = TypeVar("T")

_WITH_ROWS: Final = frozenset((messages.FETCH, messages.ROW, messages.STATUS, messages.BOTH))
_HEADER: Final = struct.Struct("!BI")
_ERROR, _READY = b"EZ"
_KINDS: Final = frozenset(b"123ACDEGHINSTVWZcdnst")  # PostgreSQL manual, "Message Formats": what a session may hear


def is_needed(mode: int, sql: str, arguments: Any, simple: bool) -> bool:
    """Whether a statement may both do something and return rows that asyncpg reads."""
    if simple or mode not in _WITH_ROWS or (mode == messages.STATUS and not arguments):
        return False
    verdict = classify(sql)
    changes_rows = verdict.command in ("INSERT", "UPDATE", "DELETE", "MERGE")
    return not verdict.retryable and (verdict.returning or not changes_rows)


async def watched(raw: asyncpg.Connection, sql: str, sending: Coroutine[Any, Any, T]) -> T:
    """Wait for *sending*, which sends *sql* and reads its answer.

    Raises:
        ResultLostError: it took effect, but its rows cannot be read.
        asyncpg.PostgresError: the server refused it; also where *sending* could only say that it cannot read the rows.
        OutcomeUnknownError: its rows cannot be read, and what the server said otherwise was not understood.
    """
    witness = Witness(raw)
    try:
        return await sending
    except Exception as error:
        if raw.is_closed() or not _is_of_reading(error):
            raise
        if (refusal := witness.refusal) is not None:
            raise refusal from error
        raise _unread(error, sql, raw.is_in_transaction(), witness.understood) from error
    finally:
        witness.leave()


def _is_of_reading(error: Exception) -> bool:
    """Whether *error* arose when rows were read, so that the statement had been sent. (What is wrong with parameters
    comes as an InterfaceError.)"""
    if isinstance(error, asyncpg.InternalClientError):
        return isinstance(error, asyncpg.OutdatedSchemaCacheError) or "no decoder for composite" in str(error)
    return isinstance(error, ValueError | ArithmeticError | BufferError) and not isinstance(
        error, asyncpg.InterfaceError | asyncpg.PostgresError
    )


def _unread(error: Exception, sql: str, in_transaction: bool, understood: bool) -> Exception:
    why = f"the rows that it returned cannot be read: {error}"
    if not understood:
        return OutcomeUnknownError(f"the server answered the statement, but {why}", shorten(sql))
    remedy = (
        "a type was altered since it was last read, and is known anew for the next call"
        if isinstance(error, asyncpg.OutdatedSchemaCacheError)
        else "let it return such values as text (::text)"
    )
    how = (
        "the statement ran inside the open transaction, which goes on"
        if in_transaction
        else "the statement took effect"
    )
    return ResultLostError(f"{how}, but {why}; {remedy}", shorten(sql))


class Ear:
    """Understands as much of what a server sends as is needed to know whether it refused the last statement.

    Attributes:
        error: fields of the error in the answer to the last statement, by their letters; or ``None``.
        understood: whether that answer was heard to its end, and nothing but messages of the protocol was heard.
    """

    def __init__(self) -> None:
        self.error: dict[str, str] | None = None
        self.understood = False
        self._lost = False
        self._error: dict[str, str] | None = None  # of the answer that is not complete yet
        self._skip = 0  # bytes to come of a message that is of no interest
        self._rest = b""

    def hear(self, data: bytes) -> None:
        """Take in the next bytes; messages may be cut anywhere."""
        data = self._rest + data
        position = self._skip
        while not self._lost and position + _HEADER.size <= len(data):
            kind, size = _HEADER.unpack_from(data, position)
            end = position + 1 + size
            if kind in b"EZ" and end > len(data):
                break
            self._lost = kind not in _KINDS or size < 4
            self.understood = not self._lost and (kind == _READY or (self.understood and kind in b"ANS"))
            if kind == _READY:
                self.error, self._error = self._error, None
            elif kind == _ERROR:
                fields = data[position + _HEADER.size : end].split(b"\0")
                self._error = {field[:1].decode(): field[1:].decode(errors="replace") for field in fields if field}
            position = end
        self._skip = max(position - len(data), 0)
        self._rest = data[position:]


class Witness(asyncio.Protocol):
    """Stands between the socket of a connection and who reads from it, and hears what passes."""

    def __init__(self, raw: asyncpg.Connection) -> None:
        self._ear = Ear()
        self._transport = raw._transport
        self._protocol = raw._transport.get_protocol()
        self._transport.set_protocol(self)

    def leave(self) -> None:
        """Let who read before have the socket again."""
        self._transport.set_protocol(self._protocol)

    @property
    def understood(self) -> bool:
        """Whether it heard whole messages: asyncpg may have had the beginning of one before we came."""
        return self._ear.understood

    @property
    def refusal(self) -> asyncpg.PostgresError | None:
        """The server's error in its answer to the last statement."""
        return None if self._ear.error is None else asyncpg.PostgresError.new(self._ear.error)

    def data_received(self, data: bytes) -> None:
        self._ear.hear(data)
        self._protocol.data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._protocol.connection_lost(error)

    def eof_received(self) -> bool | None:
        result: bool | None = self._protocol.eof_received()
        return result

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()
