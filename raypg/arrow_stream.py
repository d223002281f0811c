"""Results as Arrow record batches: what ``pool.stream(…)`` and ``connection.stream(…)`` return.

The worker passes on what COPY sends; it becomes Arrow here, in the process that wants it, so that many readers do not
wait for one worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg import background
from raypg.calling import send
from raypg.checks import check_statement, check_timeout
from raypg.core.copy_text import check_query
from raypg.errors import ConfigError, LeaseLostError
from raypg.lent_memory import Place, borrow, here
from raypg.packing import OutOfBand, pack

if TYPE_CHECKING:
    import pyarrow
    from typing_extensions import Buffer

    from raypg.core.arrow_columns import Column
    from raypg.core.copy_binary import CopyDecoder
    from raypg.lease import LeasedConnection, PoolTransaction

BATCH_BYTES = 4 * 1024 * 1024
"""Bytes of PostgreSQL's format that become one record batch, about."""

LEAST_BATCH = 1024
MOST_BATCH = 1 << 29
"""Limits of ``batch_bytes``."""


@functools.lru_cache(maxsize=1)
def _decoding(process: int) -> ThreadPoolExecutor:
    """Threads of its own: those of an event loop may all be waiting for what is decoded here. A forked child has the
    object, but not the threads."""
    return ThreadPoolExecutor(thread_name_prefix=f"raypg-decoding-{process}")


class ArrowStream:
    """The result of a query as record batches: ``async for batch in stream``, or ``await stream.read_all()``.

    It begins at its first use. ``async with`` ends it when its block ends; so does dropping it, a moment later.

    Args:
        source: a leased connection, or a transaction for this stream alone.
        query, args: SQL and the values of its parameters.
        batch_bytes: bytes of a batch as the server sends it, at most, about; a row is never divided.
        timeout: seconds for each batch.
        decimals: column → precision and scale, of those of type numeric that are to be decimals in Arrow.

    Raises:
        ConfigError: *batch_bytes* is no size.
        StatementNotAllowedError: not a SELECT, VALUES or TABLE.
    """

    def __init__(
        self,
        source: LeasedConnection | PoolTransaction,
        query: str,
        args: tuple[Any, ...],
        batch_bytes: int,
        timeout: float | None,
        decimals: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        check_statement(query)
        check_timeout(timeout)
        if isinstance(batch_bytes, bool) or not isinstance(batch_bytes, int):
            raise ConfigError(f"batch_bytes={batch_bytes!r}: must be a whole number of bytes")
        if not LEAST_BATCH <= batch_bytes <= MOST_BATCH:
            raise ConfigError(f"batch_bytes={batch_bytes!r}: must be between {LEAST_BATCH} and {MOST_BATCH} bytes")
        check_query(query)
        self._source = source
        self._query = query
        self._args = args
        self._batch_bytes = batch_bytes
        self._timeout = timeout
        self._connection: LeasedConnection | None = None
        self._decoder: CopyDecoder | None = None
        self._ahead: asyncio.Future[OutOfBand | Place | None] | None = None
        self._borrowed: dict[int, memoryview] = {}
        self._begun = self._ended = False
        self._decimals = dict(decimals or {})

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open" if self._begun else "not begun"
        return f"<ArrowStream of {self._source!r}, {state}>"

    def __del__(self) -> None:
        # Dropped half way, by a `break` say. A lease of its own ends with it; on one of the user's the COPY must.
        connection: LeasedConnection | None = getattr(self, "_connection", None)
        if connection is None or connection is not self._source:
            return
        if not self._ended and connection._ended is None:
            connection._streaming = False
            handle, message = connection._channel.handle, pack((connection._token, 0))
            background.soon(lambda: send(handle.lease_copy_end, message))

    @property
    def schema(self) -> pyarrow.Schema:
        """Names and types of the columns.

        Raises:
            asyncpg.InterfaceError: it has not begun.
        """
        if self._decoder is None:
            raise asyncpg.InterfaceError("the stream has not begun: use `async with`, or read its first batch")
        return self._decoder.schema

    @property
    def columns(self) -> Sequence[Column]:
        """The columns, with what PostgreSQL says of their types. Errors as :attr:`schema`."""
        self.schema  # noqa: B018
        assert self._decoder is not None
        return self._decoder.columns

    def __aiter__(self) -> AsyncIterator[pyarrow.RecordBatch]:
        return self

    async def __anext__(self) -> pyarrow.RecordBatch:
        while True:
            data = await self.next_piece()
            if data is None:
                raise StopAsyncIteration
            assert self._decoder is not None
            try:  # not self.decode: the thread keeps what it is given for a moment, and would keep a stream open
                batch = await asyncio.get_running_loop().run_in_executor(
                    _decoding(os.getpid()), self._decoder.decode, data
                )
            except BaseException:
                await asyncio.shield(self.aclose())
                raise
            if batch is not None:
                return batch

    async def __aenter__(self) -> ArrowStream:
        await self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def read_all(self) -> pyarrow.Table:
        """All its rows as a table; it is at its end then."""
        import pyarrow

        async with self:
            batches = [batch async for batch in self]
            return pyarrow.Table.from_batches(batches, schema=self.schema)

    async def aclose(self) -> None:
        """End it, wherever it is. Twice does nothing."""
        if self._ended:
            return
        self._ended = True
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            await asyncio.wait((ahead,))
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection._streaming = False
        if connection is self._source:
            with contextlib.suppress(LeaseLostError):
                await connection._in_turn(None, "lease_copy_end")
        else:
            await connection.release()

    # --- also for callers without an event loop ---

    async def begin(self) -> None:
        """Send the query, if that was not done yet.

        Raises:
            asyncpg.PostgresError, UnavailableError, …: as for ``fetch``.
        """
        if self._begun:
            return
        self._begun = True
        from raypg.core.arrow_columns import NATIVE, column_of
        from raypg.core.copy_binary import CopyDecoder
        from raypg.core.copy_rows import KEY_ENDS_WITH
        from raypg.lease import LeasedConnection

        source = self._source
        key = secrets.randbits(23) << 8 | KEY_ENDS_WITH
        try:
            if isinstance(source, LeasedConnection):
                connection = source
            else:
                connection = self._connection = await source.__aenter__()
            how = (key, self._batch_bytes, NATIVE, here())
            described: list[tuple[str, int, str, bool]] = await connection._in_turn(
                self._query, "lease_copy", self._query, self._args, how, self._timeout
            )
        except BaseException as error:
            self._ended = True
            await self._leave(error)
            raise
        self._connection, connection._streaming = connection, True
        columns = [column_of(*column, self._decimals.get(column[0])) for column in described]
        self._decoder = CopyDecoder(columns, key)
        self._fetch_ahead()

    async def next_piece(self) -> Buffer | None:
        """What :meth:`decode` makes the next batch of, where the worker or Ray has put it; ``None`` at the end. It may
        be looked at until the next call."""
        await self.begin()
        ahead = self._ahead
        if ahead is None:
            return None
        try:
            piece = await ahead
            data = None if piece is None else await self._received(piece)
        except BaseException as error:
            self._ended = True
            await self._leave(error)
            raise
        if data is None:
            self._ended, self._ahead = True, None
            await self._leave(None)
            return None
        self._fetch_ahead()  # while this one is decoded
        return data

    async def _received(self, piece: OutOfBand | Place) -> Buffer:
        if isinstance(piece, OutOfBand):
            return piece.data
        memory = self._borrowed.get(piece.inode)
        if memory is None:
            try:
                memory = self._borrowed[piece.inode] = borrow(piece)
            except OSError:  # what the kernel allows may be less than we know of
                assert self._connection is not None
                again: OutOfBand = await self._connection._ask(self._query, "lease_piece", self._timeout, True)
                return again.data
        return memory[: piece.size]

    def decode(self, data: Buffer) -> pyarrow.RecordBatch | None:
        """The batch in *data*; ``None`` if it holds no rows.

        Raises:
            ArrowValueError: a value has no equal in Arrow.
        """
        assert self._decoder is not None
        return self._decoder.decode(data)

    def _fetch_ahead(self) -> None:
        connection = self._connection
        assert connection is not None
        self._ahead = asyncio.ensure_future(connection._ask(self._query, "lease_piece", self._timeout))
        self._ahead.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def _leave(self, error: BaseException | None) -> None:
        """The COPY is over: give back the lease, if it is ours."""
        self._ahead = None
        self._borrowed.clear()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection._streaming = False
        if connection is self._source:
            if error is not None and connection._ended is None:
                with contextlib.suppress(Exception):
                    await asyncio.shield(connection._in_turn(None, "lease_copy_end"))
        elif isinstance(error, Exception | None):
            kind = None if error is None else type(error)
            await self._source.__aexit__(kind, error, None)  # type: ignore[union-attr]
        else:
            await asyncio.shield(connection.release())
