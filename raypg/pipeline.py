"""The pipeline as its users hold it: queries are added one by one and travel together."""

from __future__ import annotations

import asyncio
import atexit
import logging
import secrets
import warnings
from collections.abc import Iterable, Sequence
from sys import getsizeof
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import asyncpg

from raypg import joining
from raypg.buffer import ROW_BYTES, TAKEN, Buffer, Run
from raypg.checks import check_statement
from raypg.core.nearest import did_you_mean
from raypg.core.sql import shorten
from raypg.dispatch import Dispatcher
from raypg.errors import ConfigError, PipelineClosedError, StatementNotAllowedError
from raypg.explaining import PlanStep, explained
from raypg.pipeline_transaction import TransactionSender
from raypg.pool import WorkflowConnectionPool, check_pool
from raypg.results import PipelineResult, PipelineResults
from raypg.sending import MOST_BYTES, Sender

if TYPE_CHECKING:
    from raypg.ingest.writing import WriteResult

__all__ = ["PipelineResult", "PipelineResults", "PlanStep", "QueryPipelineNode"]

logger = logging.getLogger(__name__)

STRATEGIES = ("best_effort", "transactional", "sequential", "parallel")

BUFFER_ROWS = 100_000
BUFFER_BYTES = 64_000_000
"""Limits of the buffer; beyond them ``add_query`` waits."""

BREATHE_EVERY = 1_000
"""Adds after which the event loop gets a turn even from a caller that never awaits anything else."""

TURNS = 3
"""So many, as it takes to get a message on its way."""

DRAW_EVERY = 0.1
"""Seconds between two pictures of the progress bar."""

_NONE = Run("")
_NONE.width = TAKEN

_alive: WeakSet[QueryPipelineNode] = WeakSet()


class QueryPipelineNode:
    """Collects queries and sends them in batches over one pool.

    Args:
        name: of this pipeline; shows in query ids and logs.
        connection_pool: name of a running pool, or a handle.
        batch_size: queries that fail or succeed together on the wire at most; and how many collect before they are
            sent in the background.
        flush_interval: seconds after which what was added is sent though it is less than a batch; 0 for never.
        strategy: ``best_effort`` (each query stands alone; good ones commit), ``transactional`` (all or none; nothing
            is visible before :meth:`flush` returns), ``sequential`` (in order, each for itself; after the first failure
            the rest is not run, until the next :meth:`flush`) or ``parallel`` (independent reads, over all
            connections).
        enable_optimization: under ``best_effort``, let reads run before writes to other tables.
        on_open: what becomes of queries while the circuit breaker is open: ``fail`` or ``wait``.
        shared_now: ``now()`` may be the same for queries that travel together, so that more of them can.
        transaction_idle_timeout: seconds without a query after which a transaction that has begun is rolled back.

    Queries run in the order in which they were added, but for those that ``enable_optimization`` moves; for
    ``parallel``; and for long runs of one plain INSERT under ``best_effort``, which several workers may share: of rows
    that exclude each other any may then be the first.

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
        *,
        on_open: str = "fail",
        shared_now: bool = False,
        transaction_idle_timeout: float = 60.0,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"name={name!r}: must be a string that is not empty")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}: must be a whole number of queries, at least 1")
        if isinstance(flush_interval, bool) or not isinstance(flush_interval, int | float) or not flush_interval >= 0:
            raise ConfigError(f"flush_interval={flush_interval!r}: must be seconds, 0 for never")
        idle = transaction_idle_timeout
        if isinstance(idle, bool) or not isinstance(idle, int | float) or not idle > 0:
            raise ConfigError(f"transaction_idle_timeout={idle!r}: must be a positive number of seconds")
        if strategy not in STRATEGIES:
            raise ConfigError(f"strategy={strategy!r} is unknown{did_you_mean(str(strategy), STRATEGIES)}")
        if on_open not in ("fail", "wait"):
            raise ConfigError(f"on_open={on_open!r} is unknown{did_you_mean(str(on_open), ('fail', 'wait'))}")
        check_pool(connection_pool)
        self.name = name
        self.batch_size = batch_size
        self.flush_interval = flush_interval
        self.strategy = strategy
        self.enable_optimization = enable_optimization
        self.on_open = on_open
        self.shared_now = shared_now
        self.transaction_idle_timeout = transaction_idle_timeout
        self._pool = connection_pool
        self._prefix = f"{name}-{secrets.token_hex(6)}-"
        self._added = 0
        self._flushed = 0
        self._buffer = Buffer()
        self._run = _NONE  # what the next query joins if it has the same text
        how = (strategy, batch_size, bool(enable_optimization) and strategy == "best_effort", bool(shared_now))
        self._how = how
        common = (self._prefix, self._dispatcher_of(connection_pool), self._buffer, how, on_open == "wait")
        if strategy == "transactional":
            users_name = connection_pool._users_name if isinstance(connection_pool, WorkflowConnectionPool) else None
            self._sender: Sender = TransactionSender(*common, users_name, idle)
        else:
            self._sender = Sender(*common)
        # A transaction is sent when the buffer is full, others when a batch is.
        self._push_at = BUFFER_ROWS if strategy == "transactional" else min(batch_size, BUFFER_ROWS)
        self._timer: asyncio.TimerHandle | None = None
        self._ticks = flush_interval > 0 and strategy != "transactional"
        self._breathe_at = 0
        self._flushing = asyncio.Lock()
        self._last: PipelineResults | None = None
        self._closed = False
        _alive.add(self)

    def __repr__(self) -> str:
        return f"<QueryPipelineNode {self.name!r}, {self.strategy}, {self._buffer.rows} queued>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process gets a pipeline like this one, with ids of its own; what is queued stays here.
        return _make, (
            (self.name, self._pool, self.batch_size, self.flush_interval, self.strategy, self.enable_optimization),
            {
                "on_open": self.on_open,
                "shared_now": self.shared_now,
                "transaction_idle_timeout": self.transaction_idle_timeout,
            },
        )

    # --- adding ---

    async def add_query(self, query: str, params: Iterable[Any] | None = None, callback_id: Any = None) -> str:
        """Add a query; it is sent later, with others. Waits only when the buffer is full.

        Args:
            query: SQL with ``$1``, ``$2`` …; one statement.
            params: their values.
            callback_id: comes back as ``callback_id`` of its result.

        Returns:
            Its id: unique over all processes, the ``query_id`` of its result.

        Raises:
            TypeError: *query* is no string, or *params* is no sequence.
            asyncpg.InterfaceError: *params* has more or fewer values than *query* has parameters.
            StatementNotAllowedError: *query* holds what the protocol cannot carry; or it writes, and the strategy is
                ``parallel``.
            PipelineClosedError: the pipeline was closed.
        """
        run = self._run
        if query is not run.sql and query != run.sql:
            run = self._begin_run(query)
        if type(params) is list:
            row: tuple[Any, ...] = tuple(params)
        elif type(params) is tuple:
            row = params
        elif params is None:
            row = ()
        elif isinstance(params, str | bytes | dict):
            raise TypeError(f"params must be a sequence of values, not a {type(params).__name__}")
        else:
            row = tuple(params)
        if len(row) != run.width:
            if run.width == TAKEN:
                run = self._begin_run(query)
            self._check_width(run, row)
        size = sum(map(getsizeof, row), ROW_BYTES)
        number = self._added
        self._added = number + 1
        if callback_id is not None:
            self._sender.results.callbacks[number] = callback_id
        run.rows.append(row)
        buffer = self._buffer
        buffer.rows = rows = buffer.rows + 1
        buffer.bytes = size = buffer.bytes + size
        if rows >= self._push_at or size >= MOST_BYTES:
            await self._push(number)
        elif self._ticks and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.flush_interval, self._start)
        return f"{self._prefix}{number}"

    def _begin_run(self, query: str) -> Run:
        if self._closed:
            raise PipelineClosedError(f"pipeline {self.name!r} was closed: no more queries can be added")
        check_statement(query)
        run = self._buffer.last
        if run is None or run.sql != query:
            run = self._buffer.begin_run(query)
        if self.strategy == "parallel" and not run.verdict.retryable and run.verdict.kind != "invalid":
            self._run = _NONE
            raise StatementNotAllowedError(
                f"strategy 'parallel' is for independent reads, and this is not known to be one: {run.verdict.reason} "
                f"[{shorten(query)}]; use 'best_effort' or 'sequential'"
            )
        self._run = run
        return run

    def _check_width(self, run: Run, row: tuple[Any, ...]) -> None:
        if run.width is not None and len(row) != run.width:
            raise asyncpg.InterfaceError(
                f"the query has {run.width} parameter{'s' * (run.width != 1)}, and {len(row)} "
                f"{'value was' if len(row) == 1 else 'values were'} given [{shorten(run.sql)}]"
            )

    async def _push(self, number: int) -> None:
        buffer = self._buffer
        full = buffer.rows >= BUFFER_ROWS or buffer.bytes >= BUFFER_BYTES
        if full or self.strategy != "transactional":
            self._start()
        if full:
            while (buffer.rows >= BUFFER_ROWS or buffer.bytes >= BUFFER_BYTES) and not self._sender.is_idle:
                await self._sender.moved()
        elif number >= self._breathe_at:
            self._breathe_at = number + BREATHE_EVERY
            for _ in range(TURNS):
                await asyncio.sleep(0)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sender.start()

    # --- Arrow data ---

    async def write(
        self,
        data: Any,
        into: str,
        mode: str = "append",
        key: str | Sequence[str] | None = None,
        batch_id: str | None = None,
        on_bad_rows: str = "fail",
        progress: bool = False,
        *,
        batch_rows: int = 65_536,
        overriding: bool = False,
    ) -> WriteResult:
        """Write Arrow data into a table, by COPY over all workers; each batch in a transaction of its own.

        Args:
            data: Table, RecordBatch, RecordBatchReader or iterator of batches; ObjectRef of a Table, a RecordBatch or a
                list of these, or iterator of such references (a streaming task's too); Ray Data Dataset; or what has
                ``__arrow_c_stream__``.
            into: name of the table as in SQL. Columns go by their names; those that are missing get their default.
            mode: ``append``; ``ignore`` (a row whose key is there is left out) or ``upsert`` (it replaces that row's
                values). Of rows of one batch with one key the last wins.
            key: columns of a unique index; the primary key if not given.
            batch_id: makes it exactly once: the ledger ``raypg.batches`` notes each batch in its own transaction, and
                the same call again (the same rows, order and *batch_rows*) writes only what is not there yet.
            on_bad_rows: ``fail``, or ``quarantine``: what is refused goes to ``raypg.quarantine``, the rest commits.
            progress: show a bar on the terminal.
            batch_rows: rows in a batch. An ObjectRef is a batch as it is.
            overriding: values may be given for identity columns that are GENERATED ALWAYS.

        Raises:
            OutcomeUnknownError: a worker or connection died under a batch, and it cannot be known whether that was
                written. With a *batch_id* only if the server stays away for ``acquire_timeout``, or worker after worker
                dies: the same call again finds out.
            Exception: nothing of the batch was written (asyncpg's own errors have the number of the ``row``, if known).
                All have the result so far as ``written``.
        """
        from raypg.ingest.writing import Order, write  # pyarrow is big

        if self._closed:
            raise PipelineClosedError(f"pipeline {self.name!r} was closed: nothing can be written")
        order = Order(into, mode, key, self.name, batch_id, on_bad_rows, overriding)
        return await write(self._sender.find, data, order, batch_rows, self.on_open == "wait", progress)

    # --- flushing and closing ---

    async def flush(self) -> PipelineResults:
        """Send what is left, wait until all that was added before is done, and return every result since the last
        flush.

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
            end = self._added
            self._start()
            await self._sender.settle(end)
            if isinstance(self._sender, TransactionSender):
                end = self._buffer.first  # what came meanwhile is in the same transaction
                await self._sender.settle(end)
                await self._sender.finish(end)
            else:
                self._sender.culprit = None
            self._flushed = end
            self._last = self._sender.split(end)
            return self._last

    async def drain(self, progress: bool = False) -> PipelineResults:
        """As :meth:`flush`; with a bar on the terminal that shows how far it has come, if *progress*."""
        if not progress:
            return await self.flush()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as screen:
            before = self._flushed
            bar = screen.add_task(self.name, total=self._added - before)
            work = asyncio.ensure_future(self.flush())
            try:
                while not work.done():
                    screen.update(bar, completed=min(self._sender.counts.finished - before, self._added - before))
                    await asyncio.wait((work,), timeout=DRAW_EVERY)
            finally:
                if not work.done():
                    work.cancel()
            results = await work
            screen.update(bar, completed=len(results))
        return results

    async def close(self) -> None:
        """Flush and close. Failures of that last flush are logged, as nobody gets its results. Twice does nothing."""
        if not self._closed:
            results = await self._flush()
            self._closed = True
            self._run = _NONE
            _alive.discard(self)
            if results.failures:
                logger.warning("pipeline %s: %d queries failed in the flush on close", self.name, results.failures)

    async def __aenter__(self) -> QueryPipelineNode:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.close()

    def _unsent(self) -> int:
        """Queries that are lost if nobody sends them."""
        if isinstance(self._sender, TransactionSender):
            return self._added - self._flushed
        return self._buffer.rows if self._sender.is_idle else 0

    def __del__(self) -> None:
        if hasattr(self, "_closed") and (unsent := self._unsent()):
            text = f"pipeline {self.name!r} was dropped with {unsent} unsent queries; flush() or close() it"
            logger.warning("%s", text)  # Python itself shows no ResourceWarning unless asked to
            warnings.warn(text, ResourceWarning, stacklevel=2)

    # --- looking ---

    def get_result(self, query_id: str) -> PipelineResult | None:
        """The result of one query, of those since the last flush, or given out by it; ``None`` if it is not done.

        Raises:
            KeyError: it is no query of this pipeline, or its result was given out by an earlier flush.
        """
        tail = query_id[len(self._prefix) :] if query_id.startswith(self._prefix) else ""
        number = int(tail) if tail.isdecimal() else -1
        if not 0 <= number < self._added:
            raise KeyError(f"{query_id!r} is no query of pipeline {self.name!r}")
        for results in (self._sender.results, self._last):
            if results is not None and results.is_known(number):
                return results[number - results.first]
        if number < self._flushed:
            raise KeyError(f"the result of {query_id!r} was given out by an earlier flush")
        return None

    async def explain(self) -> list[PlanStep]:
        """How what is queued would travel, and why, in the order in which it would be executed. Nothing is run.

        Raises:
            UnavailableError: the catalogue cannot be asked now.
        """
        dispatcher = await self._sender.find()
        return await explained(dispatcher, self._buffer.texts(), self._how, self._prefix, self._buffer.first)

    def get_status(self) -> dict[str, Any]:
        """What this handle has queued, sent and seen. ``total_trips``: how often the server was asked; ``lanes``: how
        many queries took which way, see :meth:`explain`."""
        counts = self._sender.counts
        done = counts.finished
        return {
            "name": self.name,
            "queued_queries": self._buffer.rows,
            "queries_under_way": self._added - self._buffer.rows - done,
            "total_queries": self._added,
            "total_batches": counts.batches,
            "total_failures": counts.failures,
            "total_trips": counts.trips,
            "total_retries": counts.retries,
            "lanes": {"single": counts.single, "many": counts.many, "unnest": counts.unnest},
            "batch_size": self.batch_size,
            "flush_interval": self.flush_interval,
            "strategy": self.strategy,
            "success_rate": (done - counts.failures) / done if done else 1.0,
        }

    @staticmethod
    def _dispatcher_of(pool: str | WorkflowConnectionPool) -> Any:
        """What finds the dispatcher. Not a method: the sender must not keep a forgotten pipeline alive."""
        if isinstance(pool, WorkflowConnectionPool):
            return pool._dispatcher

        async def find() -> Dispatcher:
            return (await joining.connect(pool, None))[0]

        return find


def _make(arguments: tuple[Any, ...], more: dict[str, Any]) -> QueryPipelineNode:
    return QueryPipelineNode(*arguments, **more)


@atexit.register
def _warn_at_exit() -> None:
    for pipeline in tuple(_alive):
        if unsent := pipeline._unsent():
            logger.warning("pipeline %s: the process ends with %d unsent queries", pipeline.name, unsent)
