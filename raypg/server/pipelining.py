"""Several statements in one write to the server, each with a Sync of its own: pipeline mode, over asyncpg.

asyncpg waits for each answer before it sends the next statement; most of the time of a point read then goes into system
calls and into waking the other side. Here several are written at once. Each ends with its own Sync, so each is its own
transaction, with its own snapshot, clock and error, exactly as if it had been sent alone.
Source: PostgreSQL manual, "Pipelining" in the chapter on the flow of protocol messages.

asyncpg's protocol object serves one statement at a time, so each place in the pipeline has one of its own. What they
write goes to the connection's socket; what comes back is cut at each ReadyForQuery and handed to them in turn.
Encoding, decoding and errors stay asyncpg's.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

import asyncpg
from asyncpg.protocol import Protocol

from raypg.server import _asyncpg

logger = logging.getLogger(__name__)

Prepared: TypeAlias = "tuple[Any, Sequence[Any], int]"
"""(prepared statement, see :meth:`Pipeline.prepared`; its parameters; most rows to return, 0 for all)."""

Told: TypeAlias = "Callable[[int, Any, BaseException | None], None]"
"""Called with the index of a statement, ``(records, command tag)``, and its error; one of the last two is ``None``."""

_HEADER = struct.Struct("!BI")
_READY_FOR_QUERY = ord("Z")
_PARAMETER_STATUS = ord("S")

_FATAL = b"VFATAL\0"
"""What is in a message with which the server ends the connection: its severity, in no language (since 9.6)."""

_LAST_WORDS = 16_384
"""Bytes at the end of what comes, in which such a message is looked for: it is the last one. To search all that a COPY
sends took as long as asyncpg takes to read it."""

_GREETING = b"R\x00\x00\x00\x08\x00\x00\x00\x00Z\x00\x00\x00\x05I"
"""AuthenticationOk and ReadyForQuery: what a protocol object must have heard before it serves statements."""


class Pipeline:
    """Runs prepared statements on one connection together.

    For the life of the connection it stands between the socket and asyncpg's own protocol. While no run is under way,
    asyncpg may use the connection as ever.

    Args:
        raw: the connection, idle. While a run is under way nobody else may use it, except to send a cancel request.
    """

    def __init__(self, raw: asyncpg.Connection) -> None:
        self._raw = raw
        self._protocol = raw._protocol  # the connection forgets it when it is closed
        self._owner = _Owner(raw)
        self._outlet = _Outlet()
        self._places: list[Protocol] = []
        self._waiting: list[tuple[int, Protocol, Coroutine[Any, Any, Any]]] = []
        self._next = 0  # whose answer comes next, as an index into _waiting
        self._left = 0  # bytes of the message at hand that are still to come
        self._ends = False  # whether that message is a ReadyForQuery
        self._rest = b""  # of a message whose beginning alone is here
        self._told: Told | None = None
        self._over: asyncio.Future[None] | None = None
        self.may_have_ended = False
        """Whether what came may hold the server's last words, which asyncpg drops when it waits for no answer. The
        socket says so only later, and a statement written meanwhile would be lost without a word, as by a crash."""
        raw._transport.set_protocol(self)

    def prepared(self, sql: str) -> Any:
        """The prepared statement for *sql*, if this connection has it ready, or ``None``."""
        return _asyncpg.cached_statement(self._raw, sql)

    async def run(self, statements: Sequence[Prepared], told: Told) -> None:
        """Send *statements* and return when all are answered, or the connection is lost.

        Args:
            told: called for each, in order of their answers; must not raise.
        """
        while len(self._places) < len(statements):
            self._places.append(self._new_place())
        waiting: list[tuple[int, Protocol, Coroutine[Any, Any, Any]]] = []
        for index, (prepared, arguments, most) in enumerate(statements):
            place = self._places[index]
            work = place.bind_execute(prepared, arguments, "", most, True, None)
            try:
                # Driven by hand, as there is nothing to wait for before the answer is here: no task for each.
                work.send(None)
            except Exception as error:  # a value that its type does not take: nothing was written
                told(index, None, error)
            else:
                waiting.append((index, place, work))
        if not waiting:
            return
        self._waiting, self._next, self._left, self._ends, self._rest = waiting, 0, 0, False, b""
        self._told = told
        self._over = asyncio.get_running_loop().create_future()
        try:
            self._raw._transport.write(self._outlet.take())
            await self._over
        except BaseException:
            self._raw.terminate()  # answers are on their way that nobody could tell apart any more
            raise
        finally:
            self._told = self._over = None

    def _new_place(self) -> Protocol:
        raw = self._raw
        loop = asyncio.get_running_loop()
        place = Protocol(raw._addr, loop.create_future(), raw._params, raw._protocol.get_record_class(), loop)
        place.set_connection(self._owner)
        place.connection_made(self._outlet)
        place.data_received(_GREETING)
        self._outlet.take()  # its startup message
        return place

    # --- as the protocol of the socket ---

    def data_received(self, data: bytes) -> None:
        """Cut what the server sends at each ReadyForQuery, and give each statement its answer."""
        if self._over is None:
            self._connection_hears(data)
            return
        if self._rest:
            data, self._rest = self._rest + data, b""
        begin, end = 0, len(data)
        position, ends = self._left, self._ends  # the end of the message at hand
        while position <= end:
            if ends:
                self._hear(data[begin:position])
                self._answered()
                begin, ends = position, False
            if end - position < _HEADER.size:
                break
            kind, size = _HEADER.unpack_from(data, position)
            if kind == _PARAMETER_STATUS:
                if end - position <= size:
                    break
                # The connection must know too: a reload of the server's configuration may tell in the midst of a run.
                self._protocol.data_received(data[position : position + size + 1])
            ends = kind == _READY_FOR_QUERY
            position += size + 1
        if position < end:
            self._rest = data[position:]
            end = position
        self._left, self._ends = position - end, ends
        if begin < end:
            self._hear(data[begin:end])

    def _hear(self, data: bytes) -> None:
        if self._next < len(self._waiting):
            self._waiting[self._next][1].data_received(data)
        else:
            self._connection_hears(data)

    def _connection_hears(self, data: bytes) -> None:
        """It is for the connection itself; it may be the last that comes."""
        if data.find(_FATAL, -_LAST_WORDS) >= 0:
            self.may_have_ended = True
        self._protocol.data_received(data)

    def _answered(self) -> None:
        if self._next >= len(self._waiting):
            return
        self._next += 1
        self._tell(self._next - 1)
        if self._next == len(self._waiting):
            self._finish()

    def _tell(self, number: int) -> None:
        index, _, work = self._waiting[number]
        result: Any = None
        failure: BaseException | None = None
        try:
            work.send(None)
        except StopIteration as stop:
            records, status, _ = stop.value
            result = records, status.decode() if status else ""
        except Exception as error:
            failure = error
        if self._told is not None:
            try:
                self._told(index, result, failure)
            except Exception:
                logger.exception("internal error while an answer was passed on")

    def _finish(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the connection, and then all that have no answer."""
        self._protocol.connection_lost(error)
        first = self._next
        self._next = len(self._waiting)
        for number in range(first, len(self._waiting)):
            self._waiting[number][1].connection_lost(error)
            self._tell(number)
        self._finish()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Not called: the connection stands before a run begins."""

    def eof_received(self) -> bool | None:
        """As asyncpg's own protocol."""
        return self._protocol.eof_received()  # type: ignore[no-any-return]

    def pause_writing(self) -> None:
        """As asyncpg's own protocol."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """As asyncpg's own protocol."""
        self._protocol.resume_writing()


class _Outlet:
    """The transport of the places: collects what they write."""

    def __init__(self) -> None:
        self._written = bytearray()

    def take(self) -> bytes:
        written = bytes(self._written)
        self._written.clear()
        return written

    def write(self, data: Any) -> None:
        self._written += data

    def writelines(self, parts: Sequence[Any]) -> None:
        for part in parts:
            self._written += part

    def get_extra_info(self, _: str) -> None:
        return None

    def abort(self) -> None:
        """The socket is not the places' to close."""

    def pause_reading(self) -> None:
        """Nor to stop."""

    def resume_reading(self) -> None:
        """Nor to start."""


class _Owner:
    """What the places see of their connection."""

    def __init__(self, raw: asyncpg.Connection) -> None:
        self._config = raw._config
        self._process_log_message = raw._process_log_message
        self._process_notification = raw._process_notification

    def _cleanup(self) -> None:
        """The connection's own protocol sees to that."""
