"""How a pipeline's queries reach the workers: in messages, in order where that is promised, several at a time.

Messages in order go to one worker while any of them is under way, which runs them one after the other. Where order
makes no difference (independent reads; a long run of one plain INSERT) they fan out: to the worker of our node while it
has room, then to the least loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from raypg.buffer import Buffer, Message
from raypg.channel import Channel, WorkerGone
from raypg.core.sql import classify
from raypg.credits import credits_of
from raypg.dispatch import Dispatcher
from raypg.errors import CircuitBreakerError, ConnectionLostError, OutcomeUnknownError, StatementNotRunError
from raypg.portable import unpack_error
from raypg.results import PipelineResults

logger = logging.getLogger(__name__)

MOST_ROWS = 5_000
MOST_BYTES = 4_000_000
"""Limits of one message of a pipeline: several batches travel together."""

MOST_READS = 250
"""Most queries in a message of independent reads."""

IN_ORDER = 2
"""Messages in order under way: one that the worker works on, one that it finds when it is done."""

AT_ONCE = 4
"""Messages in any order under way to each worker."""

FAN_OUT_FROM = 1_000
"""Statements of one plain INSERT from which they fan out: fewer are done sooner than others could help."""

POLL = 0.25
"""Seconds, at most, between two tries while the circuit breaker is open and the caller wants to wait."""


@dataclass(slots=True)
class Counts:
    """What a pipeline has done so far."""

    batches: int = 0
    finished: int = 0
    failures: int = 0
    trips: int = 0
    retries: int = 0
    single: int = 0
    many: int = 0
    unnest: int = 0

    def note_lanes(self, lanes: dict[str, int]) -> None:
        """So many statements took these lanes."""
        self.single += lanes.get("single", 0)
        self.many += lanes.get("many", 0)
        self.unnest += lanes.get("unnest", 0)


class Sender:
    """Sends what is in *buffer* and notes what comes back.

    Args:
        prefix: of the pipeline's query ids; names its stream of messages.
        find: the dispatcher of the pool.
        how: strategy, batch_size, whether reads may move ahead, whether now() may be shared; see
            :class:`raypg.server.chunk.How`.
        wait: wait while the circuit breaker is open, instead of failing.
    """

    def __init__(
        self,
        prefix: str,
        find: Callable[[], Awaitable[Dispatcher]],
        buffer: Buffer,
        how: tuple[str, int, bool, bool],
        wait: bool,
    ) -> None:
        self._prefix = prefix
        self.find = find
        self.buffer = buffer
        self._how = how
        self._wait = wait
        self.results = PipelineResults(self.query_id)
        self.counts = Counts()
        self.culprit: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._more: asyncio.Future[None] | None = None  # resolved when there is more to send
        self._moved = asyncio.Event()
        self._under_way: dict[asyncio.Task[None], Message] = {}
        self._line: Channel | None = None  # of the messages in order that are under way
        self._numbers = 0
        self._numbers_under_way: set[int] = set()
        self._free_sql: str | None = None
        self._awaited = 0  # somebody waits for all queries below this number

    def query_id(self, number: int) -> str:
        """The id of query *number*."""
        return f"{self._prefix}{number}"

    # --- from the pipeline ---

    def start(self) -> None:
        """Send what is buffered, in the background."""
        if self._task is not None:
            if self._more is not None and not self._more.done():
                self._more.set_result(None)
        elif self.buffer.rows:
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._ended)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being sent."""
        return self._task is None

    async def moved(self) -> None:
        """Wait until something was taken out of the buffer, or answered."""
        await self._moved.wait()

    async def settle(self, end: int) -> None:
        """Wait until all queries with a number below *end* have their outcome."""
        self._awaited = max(self._awaited, end)
        while self.buffer.first < end or any(message.numbers[0] < end for message in self._under_way.values()):
            self.start()
            if self._task is None:
                return
            await self.moved()

    def split(self, end: int) -> PipelineResults:
        """Take the results of all queries below *end*."""
        done, self.results = self.results.split(end - self.results.first)
        return done

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._pulse()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("pipeline %s: internal error while sending", self._prefix, exc_info=error)

    def _pulse(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    # --- sending ---

    async def _run(self) -> None:
        buffer, under_way = self.buffer, self._under_way
        loop = asyncio.get_running_loop()
        while buffer.rows or under_way:
            dispatcher: Dispatcher | None = None
            if buffer.rows:
                try:
                    dispatcher = await self.find()
                except Exception as error:
                    refused = buffer.take(MOST_ROWS, MOST_BYTES, False)
                    self._refuse(refused, error)
                    self.count(refused)
                    continue
            while dispatcher is not None and buffer.rows and (message := self._next(dispatcher)) is not None:
                task = loop.create_task(self._deliver(dispatcher, message, self._place(message)))
                under_way[task] = message
                task.add_done_callback(self._delivered)
                self._pulse()
            if under_way:
                self._more = loop.create_future()
                await asyncio.wait((*under_way, self._more), return_when=asyncio.FIRST_COMPLETED)

    def _next(self, dispatcher: Dispatcher) -> Message | None:
        """The next message, if it may be sent now."""
        buffer, strategy, most = self.buffer, self._how[0], self._how[1]
        running = len(self._under_way)
        if strategy == "sequential":
            return None if running else buffer.take(most, MOST_BYTES, False)
        if strategy == "parallel":
            connections = max(1, dispatcher.connections)
            if running >= connections:
                return None
            # Spread over all connections: a slow report must not wait for another.
            share = -(-buffer.rows // (connections - running))
            return buffer.take(max(1, min(MOST_READS, share)), MOST_BYTES, True)
        free = buffer.next_is_free(self._free_sql if running else None, FAN_OUT_FROM)
        if running and free != (self._free_sql is not None):
            return None  # what comes before must be done
        if running >= (AT_ONCE * max(1, dispatcher.workers) if free else IN_ORDER):
            return None
        if free and running and buffer.rows < FAN_OUT_FROM and buffer.first >= self._awaited:
            return None  # more are on their way: few alone are not worth a message
        self._free_sql = buffer.runs[0].sql if free else None
        return buffer.take(MOST_ROWS, MOST_BYTES, free)

    def _place(self, message: Message) -> tuple[str, int] | None:
        """The place of a message in the order of this pipeline; ``None`` if it has none."""
        if message.free:
            return None
        self._numbers += 1
        self._numbers_under_way.add(self._numbers)
        return self._prefix, self._numbers

    def _delivered(self, task: asyncio.Task[None]) -> None:
        message = self._under_way.pop(task)
        if not any(not other.free for other in self._under_way.values()):
            self._line = None
        if not self._under_way:
            self._free_sql = None
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a fault of ours must not lose a query
            logger.error("pipeline %s: internal error while sending", self._prefix, exc_info=error)
            self._fail([n for n in message.numbers if not self.results.is_known(n)], error)
        self.count(message)

    def count(self, message: Message) -> None:
        """*message* is done with."""
        self.counts.batches += -(-len(message.numbers) // self._how[1])
        self.counts.finished += len(message.numbers)
        self._pulse()

    async def _deliver(self, dispatcher: Dispatcher, message: Message, place: tuple[str, int] | None) -> None:
        """Send *message* until each of its queries has an outcome."""
        credit = credits_of(dispatcher)
        await credit.take(message.size)
        try:
            left: Message | None = message
            while left is not None:
                if self.culprit is not None:
                    self._fail(left.numbers, self.not_run())
                    return
                left = await self._send(dispatcher, left, place)
                if left is not None and place is not None:
                    # It may go to another worker now, which does not know how far the ones before it have come.
                    while any(number < place[1] for number in self._numbers_under_way):
                        await self.moved()
        finally:
            credit.give_back(message.size)
            if place is not None:
                self._numbers_under_way.discard(place[1])

    async def _send(self, dispatcher: Dispatcher, message: Message, place: tuple[str, int] | None) -> Message | None:
        """Send a message once; returns what of it is to be sent again."""
        channel: Channel | None = None
        try:
            channel = await self._channel(dispatcher, message)
            follows = place is not None and place[1] - 1 in self._numbers_under_way
            where = None if place is None else (*place, follows)
            outcomes, trips, lanes = await ask(channel, dispatcher.job, message.packed(), self._how, None, where)
        except WorkerGone:
            if message.is_reading and not message.retries and self._how[0] != "sequential":
                message.retries = 1
                return message
            self._lose(message)
            return None
        except Exception as error:
            return await self._refused(dispatcher, channel, message, error)
        self.counts.trips += trips
        self.counts.note_lanes(lanes)
        return await self._told(dispatcher, channel, message, outcomes)

    async def _channel(self, dispatcher: Dispatcher, message: Message) -> Channel:
        if message.free:
            return await dispatcher.channel()
        if self._line is None or not self._line.usable or self._line.isolated:
            self._line = await dispatcher.channel()
        return self._line

    async def _told(
        self, dispatcher: Dispatcher, channel: Channel, message: Message, outcomes: list[Any]
    ) -> Message | None:
        """Note the outcomes; returns what of the message did not run because the breaker opened meanwhile."""
        refusals = [o for o in outcomes if o[3] is not None and o[3][:2] == ("raypg", "CircuitBreakerError")]
        for position, count, result, error, milliseconds, retries in outcomes:
            if error is None or error[:2] != ("raypg", "CircuitBreakerError"):
                self._note(message, position, count, result, error, milliseconds, retries + message.retries)
        if refusals:
            problem = unpack_error(refusals[0][3])
            refused = {p for o in refusals for p in range(o[0], o[0] + o[1])}
            rest = message.without(set(range(len(message.numbers))) - refused)
            return await self._refused(dispatcher, channel, rest, problem)
        if self._how[0] == "sequential":
            self._stop_after(message, outcomes)
        return None

    def _stop_after(self, message: Message, outcomes: list[Any]) -> None:
        position, count, _, error, *_ = outcomes[-1]
        if error is not None:
            self.culprit = self.query_id(message.numbers[position])
            self._fail(message.numbers[position + count :], self.not_run())

    async def _refused(
        self, dispatcher: Dispatcher, channel: Channel | None, message: Message, error: BaseException
    ) -> Message | None:
        """A worker has refused *message*, of which nothing was run: another one may take it, or it waits."""
        if channel is not None and channel.refused_by(error) and not dispatcher.is_final(error):
            return message
        if not await self.waits(error):
            self._refuse(message, error)
            return None
        return message

    async def waits(self, error: BaseException) -> bool:
        """Whether *error* only says that the breaker is open, and the user wants to wait; then a moment has passed."""
        if not self._wait or not isinstance(error, CircuitBreakerError):
            return False
        await asyncio.sleep(POLL if error.retry_after is None else min(max(error.retry_after, 0.01), POLL))
        return True

    # --- noting ---

    def _note(
        self, message: Message, position: int, count: int, result: Any, error: Any, milliseconds: Any, retries: int
    ) -> None:
        numbers = message.numbers
        self.counts.retries += retries * count
        if error is not None:
            self.counts.failures += count
        if type(numbers) is range:
            self.results.add(numbers[position], count, result, error, milliseconds, retries)
            return
        for index in range(count):
            each = milliseconds[index] if isinstance(milliseconds, list) else milliseconds
            self.results.add(numbers[position + index], 1, result, error, each, retries)

    def _fail(self, numbers: Any, error: BaseException) -> None:
        if type(numbers) is range and numbers:
            self.results.add(numbers[0], len(numbers), None, error, 0.0, 0)
        else:
            for number in numbers:
                self.results.add(number, 1, None, error, 0.0, 0)
        self.counts.failures += len(numbers)

    def _refuse(self, message: Message, error: BaseException) -> None:
        """Nothing of *message* was run."""
        if self._how[0] == "sequential" and self.culprit is None:
            self.culprit = self.query_id(message.numbers[0])
        self._fail(message.numbers, error)

    def _lose(self, message: Message) -> None:
        """The worker died with a message: of what may write, nobody knows."""
        position = 0
        for sql, rows in message.runs:
            error: Exception = OutcomeUnknownError("the worker died after the query was sent to it")
            if classify(sql).retryable:
                error = ConnectionLostError("the worker died while it read")
            self._fail(message.numbers[position : position + len(rows)], error)
            position += len(rows)
        if self._how[0] == "sequential":
            self.culprit = self.query_id(message.numbers[0])

    def not_run(self) -> StatementNotRunError:
        """The error of what did not run because a query before it failed."""
        return StatementNotRunError(f"not run, because {self.culprit} before it failed", self.culprit)


async def ask(
    channel: Channel,
    job: str,
    runs: list[Any],
    how: tuple[str, int, bool, bool],
    token: str | None,
    place: tuple[str, int, bool] | None = None,
) -> tuple[list[Any], int, dict[str, int]]:
    """Send a chunk and wait for its outcomes, the number of trips, and the lanes.

    Raises:
        WorkerGone: the worker died with it.
        RaypgError: nothing was run.
    """
    channel.open += 1
    try:
        kind, value = await channel.ask("chunk", job, runs, how, token, place)
    finally:
        channel.open -= 1
    if kind == "error":
        raise unpack_error(value)
    return value  # type: ignore[no-any-return]
