"""The caller's side of a write: batches go to the workers, a few at a time, and what became of them is added up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from raypg.channel import Channel, WorkerGone
from raypg.core import write_plan, write_state
from raypg.core.write_state import BatchCounts
from raypg.dispatch import Dispatcher
from raypg.errors import CircuitBreakerError, ConfigError, ConnectError, OutcomeUnknownError
from raypg.ingest import inputs
from raypg.ingest.inputs import Piece
from raypg.portable import unpack_error

AT_ONCE = 2
"""Batches under way to each worker: one that is written, one that is on its way."""

TRIES = 10
"""Workers that are asked to write a batch that the ledger keeps from being written twice, until it fails."""

POLL = 0.25
"""Seconds between two tries while the database cannot be used, and the caller waits."""

Find = Callable[[], Awaitable[Dispatcher]]


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a write has done.

    Attributes:
        rows: rows written now: inserted, or updated.
        batches: batches written now.
        duplicates: rows left out because another row of their batch, or of the table, has their key.
        quarantined: bad rows, now in ``raypg.quarantine``.
        known_batches, known_rows: what the ledger had already, and was not written again.
        seconds: time from the call to the last COMMIT.
        workers: number of the worker → rows that it has written.
    """

    rows: int = 0
    batches: int = 0
    duplicates: int = 0
    quarantined: int = 0
    known_batches: int = 0
    known_rows: int = 0
    seconds: float = 0.0
    workers: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done with all batches of a write. Checked when it is made.

    Raises:
        ConfigError: a value is wrong; names the nearest valid one.
    """

    into: str
    mode: str = "append"
    key: Any = None
    pipeline: str = "write"
    batch_id: str | None = None
    on_bad_rows: str = "fail"
    overriding: bool = False

    def __post_init__(self) -> None:
        self.spec(None, 0)

    def spec(self, batch_id: str | None, first: int) -> tuple[Any, ...]:
        """The fields of :class:`raypg.server.writing.Spec` for one batch."""
        key = write_plan.check_options(self.mode, self.on_bad_rows, self.key, self.batch_id)
        name = write_plan.parse_name(self.into)
        overriding = bool(self.overriding)
        return name, self.mode, key, self.pipeline, batch_id, self.on_bad_rows, overriding, first


class Writer:
    """One write.

    Args:
        find: finds the dispatcher of the pool.
        order: what is to be done.
        wait: wait while the circuit breaker is open, instead of failing.
    """

    def __init__(self, find: Find, order: Order, wait: bool = False) -> None:
        self._find = find
        self._order = order
        self._wait = wait
        self._under_way: Counter[Channel] = Counter()
        self._started = time.monotonic()
        self._sums: Counter[str] = Counter()
        self._workers: Counter[int] = Counter()

    @property
    def result(self) -> WriteResult:
        """What was done so far."""
        return WriteResult(
            **self._sums, seconds=time.monotonic() - self._started, workers=dict(sorted(self._workers.items()))
        )

    async def run(self, pieces: AsyncGenerator[Piece, None]) -> WriteResult:
        """Write all *pieces*. After the first failure no more are begun, and those under way are waited for.

        Raises:
            Exception: of the first batch that failed; it has the result so far as ``written``.
        """
        tasks: set[asyncio.Task[None]] = set()
        failure: BaseException | None = None
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    tasks.add(asyncio.ensure_future(self._write(piece)))
                    del piece
                    most = AT_ONCE * max(1, (await self._find()).workers)
                    while len(tasks) >= most and failure is None:
                        done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                        failure = _first_failure(done)
                    if failure is not None:
                        break
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()  # what the workers have begun, they end
            raise
        except Exception as error:
            failure = error
        if tasks:
            done, _ = await asyncio.wait(tasks)
            later = _first_failure(done)  # asked for in any case, or asyncio complains that nobody did
            failure = failure or later
        if failure is not None:
            failure.written = self.result  # type: ignore[attr-defined]
            raise failure
        return self.result

    async def _write(self, piece: Piece) -> None:
        order = self._order
        batch_id = None if order.batch_id is None else write_state.part_id(order.batch_id, piece.number)
        counts, worker = await self.one(piece.data, batch_id, piece.first)
        if counts.known:
            self._sums.update(known_batches=1, known_rows=counts.rows)
            return
        self._sums.update(rows=counts.rows, batches=1, duplicates=counts.duplicates, quarantined=counts.quarantined)
        self._workers[worker] += counts.rows

    async def one(self, data: Any, batch_id: str | None, first: int = 0) -> tuple[BatchCounts, int]:
        """Write one batch, whatever becomes of workers; (what became of its rows, number of the worker).

        Raises:
            OutcomeUnknownError: its worker or connection died with it, and it has no batch id; or it has one, and
                ``acquire_timeout`` is over, or `TRIES` workers have died.
            RaypgError, asyncpg.PostgresError: nothing of it was written.
        """
        reference = data if isinstance(data, ray.ObjectRef) else await asyncio.to_thread(inputs.put, data)
        del data
        spec = self._order.spec(batch_id, first)
        started = time.monotonic()
        lost = refused = 0
        while lost < TRIES:
            dispatcher = await self._find()
            channel = await self._channel(dispatcher)
            self._under_way[channel] += 1
            channel.open += 1
            try:
                kind, value = await channel.ask("write", dispatcher.job, spec, references=([reference],))
            except WorkerGone:
                if batch_id is None:
                    raise OutcomeUnknownError(
                        f"the worker died with a batch into {self._order.into!r}; with batch_id=… the same write "
                        "can be repeated"
                    ) from None
                lost += 1
                continue  # the ledger knows whether it was written
            finally:
                channel.open -= 1
                self._under_way[channel] -= 1
            if kind == "ok":
                return BatchCounts(*value), channel.index
            error = unpack_error(value)
            if channel.refused_by(error) and not dispatcher.is_final(error) and refused < TRIES:
                refused += 1
                continue
            # Whoever has a batch id may ask again, whatever happened: the server may just be restarted.
            again = batch_id is not None and isinstance(error, ConnectError | OutcomeUnknownError)
            in_time = time.monotonic() - started < dispatcher.config.acquire_timeout
            if (again and in_time) or (self._wait and isinstance(error, CircuitBreakerError)):
                await asyncio.sleep(POLL)
                continue
            raise error
        raise OutcomeUnknownError(
            f"{TRIES} workers died, one after the other, with a batch into {self._order.into!r}; the same write can be "
            "repeated"
        )

    async def _channel(self, dispatcher: Dispatcher) -> Channel:
        """The worker that has the fewest batches of ours."""
        usable = [each for each in dispatcher.channels if each.usable and not each.isolated and each.budget > 0]
        best = min(usable, key=lambda each: self._under_way[each], default=None)
        return best if best is not None else await dispatcher.channel()


def _first_failure(done: set[asyncio.Task[None]]) -> BaseException | None:
    failures = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
    return failures[0] if failures else None


async def write(
    find: Find,
    data: Any,
    order: Order,
    batch_rows: int = write_state.BATCH_ROWS,
    wait: bool = False,
    progress: bool = False,
) -> WriteResult:
    """Write *data*; see :meth:`raypg.QueryPipelineNode.write`."""
    try:
        write_state.at_most_rows(batch_rows)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    writer = Writer(find, order, wait)
    pieces = inputs.pieces(data, batch_rows, ordered=order.batch_id is not None)
    if not progress:
        return await writer.run(pieces)
    from raypg.ingest.progress import with_bar

    return await with_bar(writer, pieces, inputs.total_rows(data), order.into)


async def write_batch(
    pool: Any,
    batch: Any,
    into: str,
    mode: str = "append",
    key: Any = None,
    batch_id: str | None = None,
    *,
    pipeline: str = "write",
    on_bad_rows: str = "fail",
    overriding: bool = False,
    first_row: int = 0,
) -> BatchCounts:
    """Write one batch, as it is, in one transaction. What :meth:`QueryPipelineNode.write` does with each of its.

    Args:
        pool: handle of the pool.
        batch: pyarrow Table or RecordBatch, or the ObjectRef of one.
        into, mode, key, on_bad_rows, overriding: as for ``write``.
        batch_id: its id in the ledger, under the name *pipeline*.
        first_row: number of its first row in messages and in the quarantine.

    Raises:
        as :meth:`QueryPipelineNode.write`.
    """
    writer = Writer(pool._dispatcher, Order(into, mode, key, pipeline, batch_id, on_bad_rows, overriding))
    return (await writer.one(batch, batch_id, first_row))[0]
