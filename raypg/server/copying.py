"""COPY of a query's result on a leased connection, fetched by its holder in pieces.

At most ``PIECES`` pieces are here at a time: two that are lent to the holder, the one that waits to be fetched, and
the one that fills. Then nothing more is read from the socket, and the server waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import weakref
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from raypg.core.copy_text import copy_query, literal, with_literals
from raypg.core.sql_text import quoted_name
from raypg.errors import LeaseLostError, QueryTimeoutError, StatementNotAllowedError
from raypg.lent_memory import LentMemory, Place, here
from raypg.packing import OutOfBand
from raypg.server.connection import STEP, ServerConnection
from raypg.server.describe import describe

if TYPE_CHECKING:
    from raypg.server.engine import Engine
    from raypg.server.leases import Lease

Described: TypeAlias = "list[tuple[str, int, str, bool]]"
"""(name, OID of its type, name of its type, whether that is an array), of each column of a result."""

PIECES = 4
"""Those of a stream that are here at a time, at most."""

MORE = 1 << 19
"""Bytes by which a piece may be larger than was asked for, since it ends with a message; rarely more."""

SHORT = 1 << 16
"""Bytes up to which a result is passed on as it comes, and memory is not kept."""

ENOUGH = 200_000
"""Bytes that are worth to be woken up for in a longer result; uvloop reads no more than 256,000 at a time."""

PAUSE = 0.002
"""Seconds in which more may arrive."""

LENT = 100_000
"""Bytes from which on a piece is lent: to pass on less with the answer, as Ray does, costs less."""

SPARE_BYTES = 48 << 20
"""Bytes of memory that are kept for further pieces, in parts of at least ``SHORT``."""

FILLED_BYTES = 40 << 20
"""Bytes of all pieces that are here together, about: where many streams are open, their pieces are smaller."""

LEAST_PIECE = 1 << 18
"""Bytes of the first piece of a stream, so that its reader can begin; each may have twice as many as the one before it.
No piece is made smaller than this for others."""


class _Memory:
    """Memory for pieces, used again by all streams of this process: to ask the system for new memory for each costs
    more than the copying.

    Attributes:
        streams: those that have pieces here.
    """

    def __init__(self) -> None:
        self._spare: list[_Space] = []
        self.streams: weakref.WeakSet[CopyOut] = weakref.WeakSet()

    def share(self, wanted: int) -> int:
        """Bytes that a piece of one of the streams may have, at most those that are *wanted*."""
        if len(self.streams) < 2:
            return wanted
        return min(wanted, max(LEAST_PIECE, FILLED_BYTES // (PIECES * len(self.streams))))

    def take(self, least: int) -> _Space:
        """At least that many bytes, with anything in them."""
        while self._spare:
            found = self._spare.pop()
            if len(found) >= least:
                return found
        if least >= LENT and here() is not None:
            with contextlib.suppress(OSError):  # there are no more files to be had, say
                return LentMemory(least)
        return _OwnMemory(least)

    def give(self, memory: _Space) -> None:
        """Nobody looks at this any more."""
        if len(memory) >= SHORT and len(memory) + sum(map(len, self._spare)) <= SPARE_BYTES:
            self._spare.append(memory)


class _OwnMemory:
    """Memory that cannot be lent."""

    def __init__(self, size: int) -> None:
        self.bytes = memoryview(bytearray(size))

    def __len__(self) -> int:
        return len(self.bytes)


_Space: TypeAlias = _OwnMemory | LentMemory

_memory = _Memory()


class CopyOut:
    """One COPY of one lease.

    Args:
        query: whose result is copied, see :func:`raypg.core.copy_text.copy_query`.
        connection: the lease's.
        piece: bytes after which a piece is full, at most.
        lends: whether the holder can read our memory, see :mod:`raypg.lent_memory`.
    """

    def __init__(self, query: str, connection: ServerConnection, piece: int, lends: bool) -> None:
        self._query = query
        self._connection = connection
        self._piece = piece
        self._full = min(piece, LEAST_PIECE)
        self._lends = lends
        self._ready: asyncio.Queue[tuple[_Space, int]] = asyncio.Queue(maxsize=1)
        self._filling: _Space = _OwnMemory(0)
        self._is_long = False
        self._size = 0
        self._lent: deque[tuple[_Space, int]] = deque()
        self._unwanted = False
        self.task: asyncio.Task[Any] | None = None
        self.waited = 0.0
        _memory.streams.add(self)

    async def run(self, raw: asyncpg.Connection) -> str:
        """Run it to its end; its command tag. Pieces are full messages: each holds whole rows."""
        status: str = await raw.copy_from_query(self._query, output=self._take, format="binary")
        if self._size:
            await self._put()
        return status

    async def _take(self, data: bytes) -> None:
        if self._unwanted:
            return  # until the server has heard that it is cancelled
        end = self._size + len(data)
        if end > len(self._filling):
            # Another one, since this one cannot grow as long as anything looks at it.
            whole = self._full + MORE
            larger = _memory.take(max(end, whole if self._is_long else min(8 * end, whole)))
            larger.bytes[: self._size] = self._filling.bytes[: self._size]
            _memory.give(self._filling)
            self._filling = larger
        self._filling.bytes[self._size : end] = data
        self._size = end
        if end >= self._full:
            await self._put()
        elif end > SHORT and len(data) < ENOUGH:
            # The server sends 8 kB at a time, and to be woken up for each costs more than to copy it. Nothing is read
            # from the socket meanwhile, so that more comes in one go.
            await asyncio.sleep(PAUSE)

    async def _put(self) -> None:
        piece = self._filling, self._size
        self._filling, self._size, self._is_long = _OwnMemory(0), 0, True
        self._full = _memory.share(min(2 * self._full, self._piece))
        began = time.monotonic()
        if not self._unwanted:
            await self._ready.put(piece)
        took = time.monotonic() - began
        self.waited += took
        self._connection.held_up += took

    async def next(self) -> OutOfBand | Place | None:
        """The next piece; ``None`` at the end. It may be looked at until the call after the next one.

        Raises:
            What :meth:`LeaseTable.run` does.
        """
        if len(self._lent) == 2:
            _memory.give(self._lent.popleft()[0])
        piece = await self._next()
        if piece is None:
            _memory.streams.discard(self)
            return None
        self._lent.append(piece)
        return self._sent(*piece)

    def again(self) -> OutOfBand:
        """The last piece as a part of the answer, and so from now on: what was lent cannot be read."""
        self._lends = False
        memory, size = self._lent[-1]
        return OutOfBand(memory.bytes[:size])

    def _sent(self, memory: _Space, size: int) -> OutOfBand | Place:
        if self._lends and size >= LENT and isinstance(memory, LentMemory):
            return memory.place(size)
        return OutOfBand(memory.bytes[:size])

    async def _next(self) -> tuple[_Space, int] | None:
        assert self.task is not None
        if self._ready.empty() and not self.task.done():
            getting = asyncio.ensure_future(self._ready.get())
            try:
                await asyncio.wait((getting, self.task), return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    return getting.result()
            finally:
                getting.cancel()
        if not self._ready.empty():
            return self._ready.get_nowait()
        await self.task
        return None

    def stop(self) -> None:
        """Nobody wants the rest. What is under way is thrown away, or a full queue would hold up the end."""
        _memory.streams.discard(self)
        self._unwanted = True
        self._size = 0
        with contextlib.suppress(asyncio.QueueEmpty):
            self._ready.get_nowait()


async def begin(
    engine: Engine,
    token: str,
    number: int,
    sql: str,
    arguments: tuple[Any, ...],
    key: int,
    piece: int,
    native: Mapping[int, int | None],
    reader: tuple[str, ...] | None,
    timeout: float | None,
) -> Described:
    """Begin to copy the result of *sql* on the lease *token*; it goes on by :func:`fetch`.

    Args:
        key: number in front of each row if the first column has no fixed width, see :mod:`raypg.core.copy_binary`.
        piece: bytes of a piece, about.
        native: OIDs of the types that are wanted as the server sends them, with their width if all values have the
            same; all others are wanted as text.
        reader: where the holder's process is, see :func:`raypg.lent_memory.here`.

    Raises:
        StatementNotAllowedError: it returns no columns, or too many to be named.
        asyncpg.InterfaceError: another COPY is open on this lease.
        LeaseLostError, QueryTimeoutError, asyncpg.PostgresError, …: as a statement on a lease.
    """
    lease = engine.leases.find(token)
    if lease.copy is not None and lease.copy.task is not None and not lease.copy.task.done():
        raise asyncpg.InterfaceError("another stream is open on this connection: read it to its end, or close it")
    prepare = functools.partial(_prepare, sql=sql, arguments=arguments)
    columns: Described
    (columns, text), _ = await engine.run_leased(token, number, STEP, sql, prepare, timeout)
    casts = ["" if oid in native else "text[]" if is_array else "text" for _, oid, _, is_array in columns]
    needs_key = native.get(columns[0][1]) is None
    lends = reader is not None and reader == here()
    copy = lease.copy = CopyOut(copy_query(text, casts, key if needs_key else None), lease.connection, piece, lends)
    copy.task = asyncio.get_running_loop().create_task(_copied(engine, lease, number, sql, copy))
    copy.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # told by `next`, if anybody asks
    return columns


async def _copied(engine: Engine, lease: Lease, number: int, sql: str, copy: CopyOut) -> None:
    started = engine.now()
    error: BaseException | None = None
    try:
        tag, _ = await engine.leases.run(lease.token, number, STEP, sql, copy.run, None)
        engine.figures.rows += int(tag.split()[-1])  # COPY and a number
    except BaseException as problem:
        error = problem
        raise
    finally:
        # The time that its reader took is not the server's.
        engine.figures.ran(engine.now() - started - copy.waited, error is not None, sql, error)


async def fetch(engine: Engine, token: str, timeout: float | None, again: bool) -> OutOfBand | Place | None:
    """The next piece of the COPY of the lease *token*; ``None`` at its end. Its memory is used again from the call
    after the next one on.

    Args:
        timeout: seconds until it must be there; ``command_timeout`` of the pool by default.
        again: give the last piece once more, since it could not be read where it was.

    Raises:
        QueryTimeoutError: it was not, and the COPY was cancelled.
        LeaseLostError, asyncpg.PostgresError, …: as a statement on a lease.
    """
    lease = engine.leases.find(token)
    copy = lease.copy
    timeout = engine.config.command_timeout if timeout is None else timeout
    if copy is None:
        raise LeaseLostError("no stream is open on this lease")
    if again:
        return copy.again()
    try:
        return await asyncio.wait_for(copy.next(), timeout)
    except TimeoutError:
        if copy.task is not None and copy.task.done():
            raise
        await stop(engine, token)
        raise QueryTimeoutError(
            f"the next part of the result took longer than its timeout of {timeout:g} s; it was cancelled", timeout
        ) from None


async def stop(engine: Engine, token: str) -> None:
    """End the COPY of the lease *token* before its end, and wait until the server has."""
    lease = engine.leases.find(token)
    copy, lease.copy = lease.copy, None
    if copy is None or copy.task is None:
        return
    copy.stop()
    if not copy.task.done():
        lease.connection.cancel("caller")
        await asyncio.wait((copy.task,))


async def _prepare(raw: asyncpg.Connection, sql: str, arguments: tuple[Any, ...]) -> tuple[Described, str]:
    """(what is known of the columns, the text with its parameters in it)."""
    parameters, attributes = await describe(raw, sql)
    if not attributes:
        raise StatementNotAllowedError("a statement without columns cannot be read as Arrow")
    if len(arguments) != len(parameters):
        raise asyncpg.InterfaceError(
            f"the server expects {len(parameters)} argument{'' if len(parameters) == 1 else 's'} for this query, "
            f"{len(arguments)} {'was' if len(arguments) == 1 else 'were'} passed"
        )
    if parameters:
        kinds = [_name_of(kind) for kind in parameters]
        asked = ", ".join(f"${number}::{kind}::pg_catalog.text" for number, kind in enumerate(kinds, 1))
        (row,) = await (await raw.prepare(f"SELECT {asked}", name="")).fetch(*arguments)
        sql = with_literals(sql, [literal(text, kind) for text, kind in zip(row, kinds, strict=True)])
    return [(a.name, a.type.oid, a.type.name, a.type.kind == "array") for a in attributes], sql


def _name_of(kind: Any) -> str:
    """The name of a type, as SQL."""
    name = quoted_name(kind.schema, kind.name.removesuffix("[]"))
    return f"{name}[]" if kind.kind == "array" else name
