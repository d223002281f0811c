"""What one read task of Ray Data reads: some ranges of a table, or a query, as blocks in their order.

Two connections read two ranges at the same time where the pool has them: the server then works with two processes for
a task, and Ray Data begins a read with one task alone. The order of the rows does not depend on it, since Ray makes a
block that it has lost by running the task again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import pyarrow as pa

from raypg import background, owner
from raypg.errors import SnapshotLostError
from raypg.pool import get_pool
from raypg.snapshot import Snapshot

if TYPE_CHECKING:
    from ray.data.expressions import Expr

    from raypg.arrow_stream import ArrowStream
    from raypg.lease import LeasedConnection, PoolTransaction

__all__ = ["OrderedReader", "Shard"]

T = TypeVar("T")

CONNECTIONS = 2
"""Most that one read task reads over."""

HELD_BYTES = 64 * 1024 * 1024
"""As many as the ranges of a shard have at most, in pages."""

_NO_SNAPSHOT = (
    asyncpg.InvalidParameterValueError,
    asyncpg.UndefinedObjectError,
    asyncpg.ObjectNotInPrerequisiteStateError,
)
"""What SET TRANSACTION SNAPSHOT fails with when the transaction that exported it has ended."""


@dataclass(frozen=True)
class Shard:
    """What one read task does, wherever it runs.

    Attributes:
        queries: of its ranges, in the order of their rows.
        rest: conditions that rows must meet besides.
        row_limit: rows after which no more are wanted.
        seconds: for which it may wait for a connection, and then hold it.
    """

    pool: str
    queries: tuple[str, ...]
    snapshot: Snapshot | None
    decimals: dict[str, tuple[int, int]]
    schema: pa.Schema
    rest: tuple[Expr, ...]
    batch_bytes: int
    seconds: float
    row_limit: int | None

    def __call__(self) -> Iterator[pa.Table]:
        """Its blocks; an empty one if it has no rows."""
        pool = get_pool(self.pool)
        reader = OrderedReader(
            lambda: Snapshot.read(pool, self.snapshot, self.seconds),
            lambda connection, query: connection.stream(query, batch_bytes=self.batch_bytes, decimals=self.decimals),
            self.queries,
            CONNECTIONS if self.row_limit is None else 1,
        )
        empty = True
        with contextlib.closing(reader.batches()) as batches:
            try:
                for batch in batches:
                    table = pa.Table.from_batches([batch])
                    for predicate in self.rest:
                        table = table.filter(predicate.to_pyarrow())
                    table = table.select(self.schema.names)
                    if table.num_rows:
                        empty = False
                        yield table
            except _NO_SNAPSHOT as error:
                if reader.has_begun:
                    raise
                raise SnapshotLostError(str(error)) from None
        if empty:
            yield self.schema.empty_table()


class OrderedReader:
    """Reads queries over some connections at the same time, and gives their rows in the order of the queries.

    It goes on with the connections that it gets: each takes the next query when it has one, and none waits for another.

    Args:
        begin: makes a transaction that is not begun.
        stream: makes the stream of a query on its connection.
        queries: what to read.
        connections: most of them.
        held_bytes: of Arrow that may be read before it is wanted, about.
    """

    def __init__(
        self,
        begin: Callable[[], PoolTransaction],
        stream: Callable[[LeasedConnection, str], ArrowStream],
        queries: Sequence[str],
        connections: int,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self._begin = begin
        self._stream = stream
        self._queries = queries
        self._connections = min(connections, len(queries))
        self._most = held_bytes
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun: set[asyncio.Task[None] | None] = set()
        self._batches: list[list[pa.RecordBatch]] = [[] for _ in queries]
        self._read: set[int] = set()
        self._taken = self._turn = self._bytes = 0
        self._news, self._room = asyncio.Event(), asyncio.Event()

    @property
    def has_begun(self) -> bool:
        """Whether it has had a connection, and begun a transaction on it."""
        return bool(self._begun)

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """All of them, once, for a thread without an event loop.

        Raises:
            What a transaction and a stream do; that no connection is to be had only if there was none at all.
        """
        try:
            while batches := self._run(self._next):
                yield from batches
        finally:
            self._run(self._stop)

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with owner.named():
            return background.run(work)

    async def _next(self) -> list[pa.RecordBatch]:
        """What is there of the query whose turn it is; nothing at the end of all."""
        if not self._tasks:
            self._tasks = {asyncio.ensure_future(self._lane()) for _ in range(self._connections)}
        while self._turn < len(self._queries):
            batches, self._batches[self._turn] = self._batches[self._turn], []
            self._bytes -= sum(batch.nbytes for batch in batches)
            self._room.set()
            if batches:
                return batches
            if self._turn in self._read:
                self._turn += 1
            else:
                await self._wait()
        for task in self._tasks - self._begun:
            task.cancel()  # it waits for a connection that nobody needs any more
        await asyncio.gather(*self._tasks & self._begun)
        return []

    async def _wait(self) -> None:
        """Until there is something new, or a lane has failed."""
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait((news, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        self._news.clear()
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.remove(task)
            if task in self._begun or not self._tasks:
                task.result()

    async def _lane(self) -> None:
        """Read with one connection, until nothing is left to be read."""
        async with self._begin() as connection:
            self._begun.add(asyncio.current_task())
            while self._taken < len(self._queries):
                number, self._taken = self._taken, self._taken + 1
                async with self._stream(connection, self._queries[number]) as stream:
                    async for batch in stream:
                        while self._bytes >= self._most and (number != self._turn or self._batches[number]):
                            self._room.clear()
                            await self._room.wait()
                        self._batches[number].append(batch)
                        self._bytes += batch.nbytes
                        self._news.set()
                self._read.add(number)
                self._news.set()

    async def _stop(self) -> None:
        """End what is under way, and give all connections back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
