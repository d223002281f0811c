"""What one read task of Ray Data reads: some ranges of a table, or a query, as blocks in their order.

A second connection reads the next range ahead where the pool has one: the server then works with two processes for a
task, and Ray Data begins a read with one task alone. Neither the order of the rows nor where they are divided depends
on it, see :mod:`raypg.core.block_cuts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from raypg import background, owner
from raypg.core.block_cuts import compact, cut
from raypg.pool import get_pool
from raypg.snapshot import Snapshot

if TYPE_CHECKING:
    from ray.data.expressions import Expr

    from raypg.arrow_stream import ArrowStream
    from raypg.lease import LeasedConnection

__all__ = ["OrderedReader", "Shard"]

T = TypeVar("T")

AHEAD_BYTES = 64 * 1024 * 1024
"""Bytes of Arrow that a range may have to be read ahead: as many as its pages have at most, see
:mod:`raypg.core.shards`."""

TABLE_BYTES = 72 * 1024 * 1024
"""Bytes of values that a table holds at most: Ray Data makes a block of two, since it wants more than 128 MB."""

PATIENCE = 0.25
"""Seconds that the second connection, and its transaction, are waited for. It must not stand in the way of those who
need one."""


@dataclass(frozen=True)
class Shard:
    """What one read task does, wherever it runs.

    Attributes:
        select: the query, but for its conditions.
        ranges: conditions that divide it, in the order of their rows.
        conditions: those of all ranges.
        rest: conditions that rows must meet besides.
        by_pages: whether *ranges* are of pages.
        row_limit: rows after which no more are wanted.
        seconds: for which it may wait for a connection, and then hold it.
    """

    pool: str
    select: str
    ranges: tuple[str, ...]
    conditions: tuple[str, ...]
    snapshot: Snapshot | None
    decimals: dict[str, tuple[int, int]]
    schema: pa.Schema
    rest: tuple[Expr, ...]
    by_pages: bool
    batch_bytes: int
    row_limit: int | None
    seconds: float

    @property
    def _most(self) -> int | None:
        """Rows of all that are read; what is left to be filtered may be any number."""
        return None if self.rest else self.row_limit

    @property
    def queries(self) -> list[str]:
        """Those of its ranges."""
        most = "" if self._most is None else f"\nLIMIT {self._most}"
        queries = []
        for bounds in self.ranges:
            met = " AND ".join(f"({condition}\n)" for condition in (bounds, *self.conditions) if condition != "true")
            queries.append(f"{self.select}{f' WHERE {met}' if met else ''}{most}")
        return queries

    def __call__(self) -> Iterator[pa.Table]:
        """Its blocks; an empty one if it has no rows."""
        empty = True
        for batches in self._read():
            table = pa.Table.from_batches(batches)
            del batches  # or they would be kept while the next ones are read
            for predicate in self.rest:
                table = table.filter(predicate.to_pyarrow())
            table = table.select(self.schema.names)
            if table.num_rows:
                empty = False
                table = compact(table)
                yield table
            del table
        if empty:
            yield self.schema.empty_table()

    def _read(self) -> Iterator[list[pa.RecordBatch]]:
        """The batches of one table after the other."""
        pool = get_pool(self.pool)
        reader = OrderedReader(
            lambda: Snapshot.read(pool, self.snapshot, self.seconds, self.by_pages),
            lambda connection, query: connection.stream(query, batch_bytes=self.batch_bytes, decimals=self.decimals),
            self.queries,
            # Without a snapshot, two connections would see two states of the table.
            reads_ahead=self.row_limit is None and self.snapshot is not None,
        )
        with contextlib.closing(reader.batches()) as batches:
            yield from cut(self._wanted(batches), TABLE_BYTES)

    def _wanted(
        self, batches: Generator[tuple[int, pa.RecordBatch], None, None]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Those up to the row limit; then the connections are given back."""
        rows = 0
        for number, batch in batches:
            yield number, batch
            rows += batch.num_rows
            if self._most is not None and rows >= self._most:
                batches.close()
                return


class OrderedReader:
    """Reads queries one after the other, the next one ahead over a second connection, and gives their rows in order.

    The second connection helps, and nothing depends on it: it is given up if it is not to be had at once, if it meets
    an error, or if its query has more than can be held; the first one reads that query then. It never waits for whoever
    takes the rows.

    Args:
        begin: makes a transaction that is not begun; its connection is what the ``async with`` gives.
        stream: makes the stream of a query on its connection.
        queries: what to read.
        reads_ahead: whether to use a second connection.
        ahead_bytes: of Arrow that a query may have to be read ahead.
        patience: seconds that the second connection is waited for.

    Attributes:
        alone: whether it goes on with one connection.
    """

    def __init__(
        self,
        begin: Callable[[], AbstractAsyncContextManager[LeasedConnection]],
        stream: Callable[[LeasedConnection, str], ArrowStream],
        queries: Sequence[str],
        *,
        reads_ahead: bool = True,
        ahead_bytes: int = AHEAD_BYTES,
        patience: float = PATIENCE,
    ) -> None:
        self._begin = begin
        self._stream = stream
        self._queries = queries
        self._most = ahead_bytes
        self._patience = patience
        self._left = list(range(len(queries)))
        self._batches: list[list[pa.RecordBatch]] = [[] for _ in queries]
        self._read: set[int] = set()
        self._turn = self._bytes = self._given = 0
        self._reading: asyncio.Task[None] | None = None
        self._helping: asyncio.Task[None] | None = None
        self._is_ahead = False
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self.alone = not reads_ahead

    def batches(self) -> Generator[tuple[int, pa.RecordBatch], None, None]:
        """All of them, once, with the number of their query; for a thread without an event loop.

        Raises:
            What a transaction and a stream do.
        """
        try:
            while batches := self._run(self._next):
                number = self._turn
                while batches:
                    yield number, batches.pop(0)
        finally:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                if not sys.is_finalizing():
                    self._run(self._stop)
            else:  # it was dropped where nothing may wait
                background.soon(lambda: asyncio.ensure_future(self._stop()))

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with owner.named():
            return background.run(work)

    async def _next(self) -> list[pa.RecordBatch]:
        """What is there of the query whose turn it is; nothing at the end of all."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read_all())
        self._bytes, self._given = self._bytes - self._given, 0
        self._room.set()
        while self._turn < len(self._queries):
            batches, self._batches[self._turn] = self._batches[self._turn], []
            if batches:
                self._given = _size_of(batches)
                return batches
            if self._turn in self._read:
                self._turn += 1
                self._room.set()
                continue
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait((news, self._reading), return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
            self._news.clear()
            if self._reading.done():
                self._reading.result()
        # All is read. If its transaction cannot be committed, there was nothing in it to be lost.
        await asyncio.gather(self._reading, return_exceptions=True)
        return []

    async def _read_all(self) -> None:
        """Read with the first connection whatever is not read ahead."""
        async with self._begin() as connection:
            while self._left:
                number = self._left.pop(0)
                self._get_help()
                async with self._stream(connection, self._queries[number]) as stream:
                    async for batch in stream:
                        self._get_help()
                        while self._bytes >= self._most and (number != self._turn or self._batches[number]):
                            self._room.clear()
                            await self._room.wait()
                        self._keep(number, [batch])
                self._is_read(number)
                if self._helping is not None and self._is_ahead:
                    await asyncio.wait((self._helping,))  # if it gives up, what it had comes next

    def _get_help(self) -> None:
        if not self.alone and self._left and self._helping is None and 2 * self._bytes < self._most:
            self._helping = asyncio.ensure_future(self._read_ahead())

    async def _read_ahead(self) -> None:
        """Read one query with a second connection: all of it, or nothing."""
        number = None
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._patience):
                    connection = await stack.enter_async_context(self._begin())
                if self._left:
                    number, self._is_ahead = self._left.pop(0), True
                    await self._read_whole(connection, number)
        except Exception:
            self.alone = True
            if number is not None and number not in self._read:
                self._left.insert(0, number)
        finally:
            self._helping, self._is_ahead = None, False

    async def _read_whole(self, connection: LeasedConnection, number: int) -> None:
        held: list[pa.RecordBatch] = []
        size = 0
        async with self._stream(connection, self._queries[number]) as stream:
            async for batch in stream:
                held.append(batch)
                size += batch.nbytes
                if size > self._most:
                    raise _TooMuchError
        self._keep(number, held)
        self._is_read(number)

    def _keep(self, number: int, batches: list[pa.RecordBatch]) -> None:
        self._batches[number] += batches
        self._bytes += _size_of(batches)
        self._news.set()

    def _is_read(self, number: int) -> None:
        self._read.add(number)
        self._news.set()

    async def _stop(self) -> None:
        """End what is under way, and give all connections back."""
        tasks = {task for task in (self._reading, self._helping) if task is not None}
        left = tasks
        while left:  # asyncio.wait_for of Python 3.11 may lose a cancellation
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1.0)
        await asyncio.gather(*tasks, return_exceptions=True)


class _TooMuchError(Exception):
    """A query has more than can be held."""


def _size_of(batches: list[pa.RecordBatch]) -> int:
    return sum(batch.nbytes for batch in batches)
