"""The pipeline as its users hold it: queries are added one by one and travel together."""

from __future__ import annotations

import asyncio
import logging
import secrets
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any

from raypg import joining
from raypg.channel import Channel, WorkerGone
from raypg.checks import check_statement
from raypg.core.nearest import did_you_mean
from raypg.core.sql import classify
from raypg.dispatch import Dispatcher
from raypg.errors import ConfigError, OutcomeUnknownError, PipelineClosedError, StatementNotRunError
from raypg.lease import LeasedConnection, acquire, raise_if_rolled_back
from raypg.messages import size_of
from raypg.naming import check_pool_name
from raypg.pool import WorkflowConnectionPool
from raypg.portable import unpack_error
from raypg.results import PipelineResult, PipelineResults

__all__ = ["PipelineResult", "PipelineResults", "QueryPipelineNode"]

logger = logging.getLogger(__name__)

STRATEGIES = ("best_effort", "transactional", "sequential", "parallel")
_LATER = ("sequential", "parallel")

MOST_ROWS = 5_000
MOST_BYTES = 4_000_000
"""Limits of one message of a pipeline: several batches travel together."""

MOST_MESSAGES = 2
"""Messages under way: one that the worker works on, one that it finds when it is done."""

BUFFER_ROWS = 100_000
BUFFER_BYTES = 64_000_000
"""Limits of the buffer; beyond them ``add_query`` waits."""

BREATHE_EVERY = 1_000
"""Adds after which the event loop gets a turn even from a caller that never awaits anything else."""


class QueryPipelineNode:
    """Collects queries and sends them in batches over one pool.

    Args:
        name: of this pipeline; shows in query ids and logs.
        connection_pool: name of a running pool, or a handle.
        batch_size: queries that fail or succeed together on the wire at most; and how many collect before they are
            sent in the background.
        flush_interval: seconds after which what was added is sent though it is less than a batch; 0 for never.
        strategy: ``best_effort`` (each query stands alone; good ones commit) or ``transactional`` (all or none;
            nothing is visible before :meth:`flush` returns).
        enable_optimization: reserved for the optimizer; accepted and kept.

    Raises:
        ConfigError: a value is wrong; names the nearest valid one.
    """

    def __init__(
        self,
        name: str = "pipeline",
        connection_pool: str | WorkflowConnectionPool = "",
        batch_size: int = 100,
        flush_interval: float = 0.1,
        strategy: str = "best_effort",
        enable_optimization: bool = True,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"name={name!r}: must be a string that is not empty")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}: must be a whole number of queries, at least 1")
        if isinstance(flush_interval, bool) or not isinstance(flush_interval, int | float) or not flush_interval >= 0:
            raise ConfigError(f"flush_interval={flush_interval!r}: must be seconds, 0 for never")
        if strategy not in STRATEGIES:
            raise ConfigError(f"strategy={strategy!r} is unknown{did_you_mean(str(strategy), STRATEGIES)}")
        if strategy in _LATER:
            raise NotImplementedError(f"strategy {strategy!r} is not there yet; see the CHANGELOG")
        if isinstance(connection_pool, str):
            if not connection_pool:
                raise ConfigError("connection_pool: give the name of a pool, or a handle")
            check_pool_name(connection_pool)
        elif not isinstance(connection_pool, WorkflowConnectionPool):
            raise ConfigError(f"connection_pool: a pool's name or handle, not {type(connection_pool).__name__}")
        self.name = name
        self.batch_size = batch_size
        self.flush_interval = flush_interval
        self.strategy = strategy
        self.enable_optimization = enable_optimization
        self._pool = connection_pool
        self._prefix = f"{name}-{secrets.token_hex(6)}-"
        self._added = 0
        self._runs: list[tuple[str, list[tuple[Any, ...]]]] = []
        self._last_sql: str | None = None
        self._last_rows: list[tuple[Any, ...]] = []
        self._rows = 0
        self._bytes = 0
        self._first_buffered = 0
        self._results = PipelineResults(self._query_id)
        self._sender: asyncio.Task[None] | None = None
        self._more: asyncio.Future[None] | None = None  # resolved when there is more to send
        self._timer: asyncio.TimerHandle | None = None
        self._transaction: LeasedConnection | None = None
        self._culprit: str | None = None
        self._flushing = asyncio.Lock()
        self._finishing: asyncio.Task[None] | None = None
        self._messages = 0
        self._batches = 0
        self._failures = 0
        self._finished = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<QueryPipelineNode {self.name!r}, {self.strategy}, {self._rows} queued>"

    def _query_id(self, number: int) -> str:
        return f"{self._prefix}{number}"

    # --- adding ---

    async def add_query(self, query: str, params: Iterable[Any] | None = None) -> str:
        """Add a query; it is sent later, with others. Waits only when the buffer is full.

        Args:
            query: SQL with ``$1``, ``$2`` …; one statement.
            params: their values.

        Returns:
            Its id: unique over all processes, the ``query_id`` of its result.

        Raises:
            TypeError: *query* is no string, or *params* is no sequence.
            StatementNotAllowedError: *query* holds what the protocol cannot carry.
            PipelineClosedError: the pipeline was closed.
        """
        if self._closed:
            raise PipelineClosedError(f"pipeline {self.name!r} was closed: no more queries can be added")
        check_statement(query)
        if isinstance(params, str | bytes | dict):
            raise TypeError(f"params must be a sequence of values, not a {type(params).__name__}")
        row = () if params is None else tuple(params)
        number = self._added
        self._added += 1
        if query != self._last_sql:
            self._last_sql, self._last_rows = query, []
            self._runs.append((query, self._last_rows))
            self._bytes += len(query)
        self._last_rows.append(row)
        self._rows += 1
        self._bytes += size_of(row)
        if self._rows >= self.batch_size or self._bytes >= MOST_BYTES:
            await self._push(number)
        elif self._timer is None and self.flush_interval > 0 and self.strategy != "transactional":
            self._timer = asyncio.get_running_loop().call_later(self.flush_interval, self._send_in_background)
        return f"{self._prefix}{number}"

    async def _push(self, number: int) -> None:
        full = self._rows >= BUFFER_ROWS or self._bytes >= BUFFER_BYTES
        if self.strategy != "transactional" or full:
            self._send_in_background()
        if full:
            while self._sender is not None and (self._rows >= BUFFER_ROWS or self._bytes >= BUFFER_BYTES):
                await asyncio.wait((self._sender,), timeout=0.05)
        elif number % BREATHE_EVERY == 0:
            await asyncio.sleep(0)

    # --- sending ---

    def _send_in_background(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sender is not None:
            if self._more is not None and not self._more.done():
                self._more.set_result(None)
        elif self._rows:
            self._sender = asyncio.get_running_loop().create_task(self._send())
            self._sender.add_done_callback(self._sent)

    def _sent(self, sender: asyncio.Task[None]) -> None:
        self._sender = None
        if sender.cancelled():
            return
        error = sender.exception()
        if error is not None:
            logger.error("pipeline %s: internal error while sending", self.name, exc_info=error)

    async def _send(self) -> None:
        """Send all that is buffered, message by message, in order."""
        if self.strategy == "transactional":
            while self._rows:
                first, count, runs = self._take()
                await self._send_in_transaction(first, count, runs)
                self._count(count)
            return
        under_way: deque[asyncio.Task[None]] = deque()
        channel: Channel | None = None
        while self._rows or under_way:
            while self._rows and len(under_way) < MOST_MESSAGES:
                first, count, runs = self._take()
                if not under_way:
                    channel = None  # while one is under way the next goes to the same worker, which keeps the order
                try:
                    dispatcher = await self._dispatcher()
                    channel = channel or await dispatcher.channel()
                except Exception as error:
                    self._note_all(first, count, error)
                    self._count(count)
                    continue
                self._messages += 1
                place = (self._prefix, self._messages, bool(under_way))
                under_way.append(asyncio.create_task(self._send_alone(channel, dispatcher.job, first, runs, place)))
            if under_way:
                self._more = asyncio.get_running_loop().create_future()
                await asyncio.wait((*under_way, self._more), return_when=asyncio.FIRST_COMPLETED)
                while under_way and under_way[0].done():
                    under_way.popleft()

    def _count(self, queries: int) -> None:
        self._batches += -(-queries // self.batch_size)
        self._finished += queries

    def _take(self) -> tuple[int, int, list[tuple[str, list[tuple[Any, ...]]]]]:
        """Take the next message out of the buffer: (number of its first query, how many, runs)."""
        first = self._first_buffered
        if self._rows <= MOST_ROWS and self._bytes <= MOST_BYTES:
            everything, self._runs = self._runs, []
            count, self._rows, self._bytes = self._rows, 0, 0
            self._last_sql, self._last_rows = None, []
            self._first_buffered += count
            return first, count, everything
        taken: list[tuple[str, list[tuple[Any, ...]]]] = []
        count = size = 0
        while self._runs and count < MOST_ROWS and size < MOST_BYTES:
            sql, rows = self._runs[0]
            most = MOST_ROWS - count
            part = rows[:most]
            part_size = len(sql) + sum(map(size_of, part))
            if size and size + part_size > MOST_BYTES:
                break
            if part_size > MOST_BYTES and len(part) > 1:
                part = part[: max(1, len(part) * MOST_BYTES // part_size)]
                part_size = len(sql) + sum(map(size_of, part))
            taken.append((sql, part))
            if len(part) == len(rows):
                self._runs.pop(0)
            else:
                self._runs[0] = (sql, rows[len(part) :])
            if rows is self._last_rows:
                # What is added from now on must not change a message under way.
                self._last_rows = self._runs[0][1] if self._runs else []
                self._last_sql = self._last_sql if self._runs else None
            count += len(part)
            size += part_size
        self._rows -= count
        self._bytes = max(0, self._bytes - size) if self._rows else 0
        self._first_buffered += count
        return first, count, taken

    async def _send_alone(
        self, channel: Channel, job: str, first: int, runs: list[Any], place: tuple[str, int, bool]
    ) -> None:
        count = sum(len(rows) for _, rows in runs)
        try:
            outcomes = await _ask(channel, job, runs, self.batch_size, None, place)
        except WorkerGone:
            self._note_lost(first, runs)
        except Exception as error:
            self._note_all(first, count, error)
        else:
            self._note(first, outcomes)
        self._count(count)

    def _note(self, first: int, outcomes: list[Any]) -> None:
        for position, count, result, error, milliseconds, retries in outcomes:
            self._results.add(first + position, count, result, error, milliseconds, retries)
            if error is not None:
                self._failures += count

    def _note_all(self, first: int, count: int, error: BaseException) -> None:
        self._results.add(first, count, None, error, 0.0, 0)
        self._failures += count

    def _note_lost(self, first: int, runs: list[Any]) -> None:
        """The worker died with a message: of what may write, nobody knows."""
        for sql, rows in runs:
            what = "reads only; ask again" if classify(sql).retryable else "it may or may not have taken effect"
            error = OutcomeUnknownError(f"the worker died after the query was sent to it ({what})")
            self._note_all(first, len(rows), error)
            first += len(rows)

    # --- in one transaction ---

    async def _send_in_transaction(self, first: int, count: int, runs: list[Any]) -> None:
        if self._culprit is not None:
            self._note_all(first, count, self._rolled_back())
            return
        try:
            dispatcher = await self._dispatcher()
            if self._transaction is None:
                name = self._pool._users_name if isinstance(self._pool, WorkflowConnectionPool) else None
                self._transaction = await acquire(dispatcher, None, None, "BEGIN", name)
                self._transaction._base_depth = 1
            lease = self._transaction
            outcomes = await _ask(lease._channel, dispatcher.job, runs, self.batch_size, lease._token)
        except WorkerGone:
            outcomes = [
                (0, count, None, StatementNotRunError("the worker died: the server rolled all of it back"), 0.0, 0)
            ]
        except Exception as error:
            outcomes = [(0, count, None, error, 0.0, 0)]
        self._note(first, outcomes)
        done = sum(outcome[1] for outcome in outcomes)
        if outcomes[-1][3] is not None:
            last = outcomes[-1]
            self._culprit = self._query_id(first + last[0])
            if count > done:
                self._note_all(first + done, count - done, self._rolled_back())

    def _rolled_back(self) -> StatementNotRunError:
        return StatementNotRunError(
            f"rolled back or not run, because {self._culprit} of the same transaction failed", self._culprit
        )

    async def _finish_transaction(self) -> None:
        """COMMIT, or ROLLBACK after a failure; then the results say what became of each query."""
        lease, self._transaction = self._transaction, None
        culprit, self._culprit = self._culprit, None
        problem: BaseException | None = None
        try:
            if lease is not None and culprit is None:
                raise_if_rolled_back(await lease._end("COMMIT"))
            elif lease is not None:
                await lease._end("ROLLBACK")
        except Exception as error:
            if culprit is None:
                problem = error
        if culprit is not None:
            problem = StatementNotRunError(f"rolled back, because {culprit} of the same transaction failed", culprit)
        if problem is not None:
            before = self._results
            self._results = PipelineResults(self._query_id)
            for first, count, _, failed, milliseconds, retries in before._spans:
                if failed is None:
                    self._failures += count
                self._results.add(first, count, None, failed or problem, milliseconds, retries)

    # --- flushing and closing ---

    async def flush(self) -> PipelineResults:
        """Send what is left, wait until all is done, and return every result since the last flush.

        Returns:
            A sequence of :class:`PipelineResult` in order of submission, those of background batches included.

        Raises:
            PipelineClosedError: the pipeline was closed.
        """
        if self._closed:
            raise PipelineClosedError(f"pipeline {self.name!r} was closed: there is nothing to flush")
        return await self._flush()

    async def _flush(self) -> PipelineResults:
        async with self._flushing:
            while self._rows or self._sender is not None:
                self._send_in_background()
                if self._sender is not None:
                    await asyncio.wait((self._sender,))
            if self.strategy == "transactional":
                # Who leaves a flush does not stop a COMMIT under way: the next flush tells what came of it.
                if self._finishing is None:
                    self._finishing = asyncio.get_running_loop().create_task(self._finish_transaction())
                await asyncio.shield(self._finishing)
                self._finishing = None
            results, self._results = self._results, PipelineResults(self._query_id)
            results.complete()
            return results

    async def close(self) -> None:
        """Flush and close. Failures of that last flush are logged, as nobody gets its results. Twice does nothing."""
        if not self._closed:
            results = await self._flush()
            self._closed = True
            if results.failures:
                logger.warning("pipeline %s: %d queries failed in the flush on close", self.name, results.failures)

    async def __aenter__(self) -> QueryPipelineNode:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if getattr(self, "_rows", 0):
            warnings.warn(
                f"pipeline {self.name!r} was dropped with {self._rows} unsent queries; flush() or close() it",
                ResourceWarning,
                stacklevel=2,
            )

    def get_status(self) -> dict[str, Any]:
        """What this handle has queued, sent and seen."""
        done = self._finished
        return {
            "name": self.name,
            "queued_queries": self._rows,
            "total_queries": self._added,
            "total_batches": self._batches,
            "total_failures": self._failures,
            "batch_size": self.batch_size,
            "flush_interval": self.flush_interval,
            "strategy": self.strategy,
            "success_rate": (done - self._failures) / done if done else 1.0,
        }

    async def _dispatcher(self) -> Dispatcher:
        if isinstance(self._pool, WorkflowConnectionPool):
            return await self._pool._dispatcher()
        return (await joining.connect(self._pool, None))[0]


async def _ask(
    channel: Channel,
    job: str,
    runs: list[Any],
    most: int,
    token: str | None,
    place: tuple[str, int, bool] | None = None,
) -> list[Any]:
    """Send a chunk and wait for its outcomes."""
    channel.open += 1
    try:
        kind, value = await channel.ask("chunk", job, runs, most, token, place)
    finally:
        channel.open -= 1
    if kind == "error":
        error = unpack_error(value)
        channel.refused_by(error)  # then the next message goes to another worker
        raise error
    return value  # type: ignore[no-any-return]
