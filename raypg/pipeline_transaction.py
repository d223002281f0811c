"""The strategy ``transactional``: all queries of a flush in one transaction on one connection."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from raypg.buffer import Buffer, Message
from raypg.channel import Channel, WorkerGone
from raypg.dispatch import Dispatcher
from raypg.errors import OutcomeUnknownError, RaypgError, StatementNotRunError, TransactionRolledBackError
from raypg.lease import LeasedConnection, acquire, raise_if_rolled_back
from raypg.portable import unpack_error
from raypg.sending import MOST_BYTES, MOST_ROWS, Sender, ask

ANSWER_WITHIN = 15.0
"""Seconds in which a worker must say what became of a transaction."""


class TransactionSender(Sender):
    """Streams what is buffered into a transaction, which is committed by :meth:`finish` alone.

    Args:
        name: for the ``application_name`` of its connection, if any.
        idle_timeout: seconds without a query after which it is rolled back.
        others: as :class:`Sender`.
    """

    def __init__(
        self,
        prefix: str,
        find: Callable[[], Awaitable[Dispatcher]],
        buffer: Buffer,
        how: tuple[str, int, bool, bool],
        wait: bool,
        name: str | None,
        idle_timeout: float,
    ) -> None:
        super().__init__(prefix, find, buffer, how, wait)
        self._name = name
        self._idle_timeout = idle_timeout
        self._lease: LeasedConnection | None = None
        self._doomed: Exception | None = None  # why the transaction was rolled back, if not by a culprit
        self._idle: asyncio.TimerHandle | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    # --- streaming ---

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while self.buffer.rows:
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            message = self.buffer.take(MOST_ROWS, MOST_BYTES, False)
            self._under_way[task] = message
            try:
                await self._stream(message)
            finally:
                del self._under_way[task]
            self.count(message)
        if self._lease is not None:
            self._idle = asyncio.get_running_loop().call_later(self._idle_timeout, self._was_idle)

    async def _stream(self, message: Message) -> None:
        if self._finishing is not None:
            await asyncio.wait((self._finishing,))  # this is for the next transaction
        if self.culprit is not None or self._doomed is not None:
            self._fail(message.numbers, self._doomed or self.rolled_back())
            return
        try:
            dispatcher = await self.find()
            if self._lease is None:
                self._lease = await self._begin(dispatcher)
            lease = self._lease
            outcomes, trips, lanes = await ask(
                lease._channel, dispatcher.job, message.packed(), self._how, lease._token
            )
        except WorkerGone:
            self._doomed = StatementNotRunError("the worker died: the server rolled all of it back")
            self._fail(message.numbers, self._doomed)
            return
        except Exception as problem:
            self.culprit = self.query_id(message.numbers[0])
            self._fail(message.numbers, problem)
            return
        self.counts.trips += trips
        self.counts.note_lanes(lanes)
        for position, count, result, error, milliseconds, retries in outcomes:
            self._note(message, position, count, result, error, milliseconds, retries)
        done = sum(outcome[1] for outcome in outcomes)
        if outcomes[-1][3] is not None:
            self.culprit = self.query_id(message.numbers[outcomes[-1][0]])
            self._fail(message.numbers[done:], self.rolled_back())

    async def _begin(self, dispatcher: Dispatcher) -> LeasedConnection:
        while True:
            try:
                lease = await acquire(dispatcher, None, None, "BEGIN", self._name)
            except RaypgError as error:
                if not await self.waits(error):
                    raise
            else:
                lease._base_depth = 1
                return lease

    def rolled_back(self) -> StatementNotRunError:
        """The error of what is rolled back, or not run, because of the culprit."""
        return StatementNotRunError(
            f"rolled back or not run, because {self.culprit} of the same transaction failed", self.culprit
        )

    def _was_idle(self) -> None:
        """Others may wait for what an idle transaction has locked."""
        self._idle = None
        lease, self._lease = self._lease, None
        if lease is None:
            return
        self._doomed = StatementNotRunError(
            f"rolled back: nothing was added for {self._idle_timeout:g} s (transaction_idle_timeout); flush sooner"
        )
        self._ending = asyncio.get_running_loop().create_task(_roll_back(lease))

    # --- the end ---

    async def finish(self, end: int) -> None:
        """COMMIT, or ROLLBACK after a failure; then the results of all queries below *end* say what became of each."""
        # Who leaves a flush does not stop a COMMIT under way: the next flush tells what came of it.
        if self._finishing is None:
            self._finishing = asyncio.get_running_loop().create_task(self._finish(end))
        await asyncio.shield(self._finishing)
        self._finishing = None

    async def _finish(self, end: int) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        lease, self._lease = self._lease, None
        culprit, self.culprit = self.culprit, None
        problem, self._doomed = self._doomed, None
        if culprit is not None:
            problem = StatementNotRunError(f"rolled back, because {culprit} of the same transaction failed", culprit)
        if lease is not None and problem is not None:
            await _roll_back(lease)
        elif lease is not None:
            try:
                await self._commit(lease)
            except Exception as error:
                problem = error
        if problem is not None:
            self.counts.failures += self.results.fail_all(end - self.results.first, problem)

    async def _commit(self, lease: LeasedConnection) -> None:
        """Raises what the queries are to be told if it is not certain that they took effect."""
        channel = lease._channel
        try:
            kind, known = await channel.ask("before_commit", lease._token, self._prefix, secrets.token_hex(8))
        except WorkerGone:
            raise StatementNotRunError("the worker died before COMMIT: the server rolled all of it back") from None
        if kind == "error":
            raise unpack_error(known)
        try:
            raise_if_rolled_back(await lease._end("COMMIT"))
        except OutcomeUnknownError as unknown:
            fate = await self._fate(lease._dispatcher, channel, known)
            if fate == "aborted":
                raise TransactionRolledBackError(
                    "the connection was lost at COMMIT, and the server says that it rolled all of it back"
                ) from unknown
            if fate != "committed":
                raise

    async def _fate(self, dispatcher: Dispatcher, first: Channel, known: dict[str, Any]) -> str:
        """What became of the transaction, as far as any worker can tell."""
        for channel in sorted(dispatcher.channels, key=lambda each: each is not first):
            try:
                kind, fate = await asyncio.wait_for(channel.ask("fate", dispatcher.job, known), ANSWER_WITHIN)
            except (WorkerGone, TimeoutError):
                continue
            if kind == "ok" and fate != "unknown":
                return str(fate)
        return "unknown"


async def _roll_back(lease: LeasedConnection) -> None:
    try:
        await lease._end("ROLLBACK")
    except RaypgError:
        pass  # rolled back already
