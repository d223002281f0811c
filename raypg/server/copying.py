"""COPY of a query's result on a leased connection, fetched by its holder in pieces.

At most two pieces are here at a time: the one that waits to be fetched, and the one that fills. Then nothing more is
read from the socket, and the server waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from raypg.core.copy_text import copy_query, literal, with_literals
from raypg.core.sql_text import quoted_name
from raypg.errors import LeaseLostError, QueryTimeoutError, StatementNotAllowedError
from raypg.server.connection import STEP, ServerConnection
from raypg.server.describe import describe

if TYPE_CHECKING:
    from raypg.server.engine import Engine
    from raypg.server.leases import Lease

Described: TypeAlias = "list[tuple[str, int, str, bool]]"
"""(name, OID of its type, name of its type, whether that is an array), of each column of a result."""


class CopyOut:
    """One COPY of one lease.

    Args:
        query: whose result is copied, see :func:`raypg.core.copy_text.copy_query`.
        connection: the lease's.
        piece: bytes after which a piece is full.
    """

    def __init__(self, query: str, connection: ServerConnection, piece: int) -> None:
        self._query = query
        self._connection = connection
        self._piece = piece
        self._ready: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
        self._parts: list[bytes] = []
        self._size = 0
        self._unwanted = False
        self.task: asyncio.Task[Any] | None = None
        self.waited = 0.0

    async def run(self, raw: asyncpg.Connection) -> str:
        """Run it to its end; its command tag. Pieces are full messages: each holds whole rows."""
        status: str = await raw.copy_from_query(self._query, output=self._take, format="binary")
        if self._parts:
            await self._put()
        return status

    async def _take(self, data: bytes) -> None:
        if self._unwanted:
            return  # until the server has heard that it is cancelled
        self._parts.append(data)
        self._size += len(data)
        if self._size >= self._piece:
            await self._put()

    async def _put(self) -> None:
        piece = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self._size = [], 0
        began = time.monotonic()
        if not self._unwanted:
            await self._ready.put(piece)
        took = time.monotonic() - began
        self.waited += took
        self._connection.held_up += took

    async def next(self) -> bytes | None:
        """The next piece; ``None`` at the end.

        Raises:
            What :meth:`LeaseTable.run` does.
        """
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
        self._unwanted = True
        self._parts.clear()
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
    native: frozenset[int],
    timeout: float | None,
) -> Described:
    """Begin to copy the result of *sql* on the lease *token*; it goes on by :func:`fetch`.

    Args:
        key: number in front of each row, see :mod:`raypg.core.copy_binary`.
        piece: bytes of a piece, about.
        native: OIDs of the types that are wanted as the server sends them; all others are wanted as text.

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
    copy = lease.copy = CopyOut(copy_query(text, casts, key), lease.connection, piece)
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


async def fetch(engine: Engine, token: str, timeout: float | None) -> bytes | None:
    """The next piece of the COPY of the lease *token*; ``None`` at its end.

    Args:
        timeout: seconds until it must be there; ``command_timeout`` of the pool by default.

    Raises:
        QueryTimeoutError: it was not, and the COPY was cancelled.
        LeaseLostError, asyncpg.PostgresError, …: as a statement on a lease.
    """
    lease = engine.leases.find(token)
    copy = lease.copy
    timeout = engine.config.command_timeout if timeout is None else timeout
    if copy is None:
        raise LeaseLostError("no stream is open on this lease")
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
