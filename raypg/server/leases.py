"""Leases: a connection that one caller has for itself, until it gives it back or its time is up."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import asyncpg

from raypg import messages
from raypg.core.sql import classify
from raypg.errors import LeaseLostError, QueryTimeoutError
from raypg.server.connection import STEP, ServerConnection
from raypg.server.copying import CopyOut
from raypg.server.cursors import OpenCursor
from raypg.server.notifications import Notification, Notifications
from raypg.server.outcomes import ConnectionLost, timed_out
from raypg.server.work import lost_error

if TYPE_CHECKING:
    from raypg.server.writes import Writes

Reclaimed: TypeAlias = Literal["process died", "forgotten", "deadline"]
"""Why a lease ended that nobody gave back: its process is dead; its handle was garbage-collected, as when a task ends
without releasing it; it was held for too long."""


class Lease:
    """One lease. Its token is a secret between holder and worker: a connection cannot be had by guessing."""

    __slots__ = (
        "_timer",
        "busy",
        "cancelled",
        "connection",
        "copy",
        "cursors",
        "lock",
        "notifications",
        "over",
        "owner",
        "request",
        "since",
        "token",
    )

    def __init__(self, token: str, connection: ServerConnection, owner: dict[str, Any], since: float) -> None:
        self.token = token
        self.connection = connection
        self.owner = owner
        self.since = since
        self.lock = asyncio.Lock()
        self.over = asyncio.Event()
        self.busy: int | None = None
        self.cancelled: set[int] = set()
        self.cursors: dict[int, OpenCursor] = {}
        self.copy: CopyOut | None = None
        self.notifications: Notifications | None = None
        self.request: tuple[str, int] | None = None
        self._timer: asyncio.TimerHandle | None = None


class LeaseTable:
    """The leases of one worker.

    Args:
        take_back: called with a connection whose lease has ended, which is dirty, and the event to set when its session
            has been put in order.
        writes: announces what is written.
    """

    def __init__(self, take_back: Callable[[ServerConnection, asyncio.Event], None], writes: Writes) -> None:
        self._take_back = take_back
        self._writes = writes
        self._leases: dict[str, Lease] = {}
        self._ended: dict[str, str] = {}
        self.reclaimed: dict[Reclaimed, int] = {"process died": 0, "forgotten": 0, "deadline": 0}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(tuple(self._leases.values()))

    def grant(self, connection: ServerConnection, owner: dict[str, Any], seconds: float) -> Lease:
        """Give *connection* to *owner* for at most *seconds*."""
        loop = asyncio.get_running_loop()
        lease = Lease(secrets.token_hex(16), connection, owner, time.monotonic())
        connection.lease = lease.token
        self._leases[lease.token] = lease
        why = f"it was held for longer than its deadline of {seconds:g} s"
        lease._timer = loop.call_later(seconds, functools.partial(self.end, lease.token, why, reclaimed="deadline"))
        return lease

    def find(self, token: str) -> Lease:
        """The lease of *token*.

        Raises:
            LeaseLostError: it has ended; says why.
        """
        lease = self._leases.get(token)
        if lease is None:
            raise LeaseLostError(f"the lease is gone: {self._ended.get(token, 'this worker does not know it')}")
        return lease

    async def run(
        self, token: str, number: int, mode: int, sql: str, arguments: Any, timeout: float | None
    ) -> tuple[Any, tuple[str, ...] | None]:
        """Run a statement on a leased connection; those of one lease run one after the other, in order of arrival.

        Raises:
            LeaseLostError: the lease has ended, or its connection died *before* the statement was sent.
            OutcomeUnknownError, ConnectionLostError: the connection died under it.
            asyncpg.InterfaceError: *mode* is ``BEGIN``, and a transaction was begun by hand.
            asyncpg.PostgresError, QueryTimeoutError, …: as :meth:`ServerConnection.run`.
        """
        lease = self.find(token)
        async with lease.lock:
            lease = self.find(token)
            if number in lease.cancelled:
                raise TimeoutError("cancelled before it ran")
            connection = lease.connection
            if not await connection.is_alive():
                self.end(token, "its backend was terminated", dead=True)
                raise LeaseLostError(f"the lease is gone: {self._ended[token]}; nothing was sent")
            if mode == messages.BEGIN:
                if connection.raw.is_in_transaction():
                    raise asyncpg.InterfaceError(
                        "connection.transaction() cannot be used in a transaction that was begun by hand (BEGIN): its "
                        "end would be yours too. Use SAVEPOINT there, or connection.transaction() outside too"
                    )
                mode = messages.STATUS
            connection.dirty = True
            verdict, left = classify(sql), timeout
            try:
                if self._writes.watched and self._writes.concerns(sql, verdict):
                    began = time.monotonic()
                    await self._writes.begin(connection, (sql,), timeout)
                    left = None if timeout is None else timeout - (time.monotonic() - began)
                    self.find(token)
                    if number in lease.cancelled:
                        raise TimeoutError("cancelled before it ran")
                lease.busy = number
                return await connection.run(
                    mode,
                    sql,
                    arguments,
                    left,
                    simple=verdict.statements > 1 and not arguments,
                    reads=verdict.retryable and mode != STEP,
                )
            except ConnectionLost as lost:
                in_transaction = connection.raw.is_in_transaction()
                self.end(token, "its connection died", dead=True)
                if in_transaction and verdict.kind != "transaction":
                    # Whatever it did, it did inside a transaction that never saw a COMMIT.
                    raise LeaseLostError(
                        "the connection died inside the transaction: the server has rolled all of it back"
                    ) from lost
                raise lost_error(lost, sql, verdict.retryable) from lost
            except QueryTimeoutError as error:
                if left == timeout:
                    raise
                raise timed_out(timeout) from error.__cause__  # the caller's limit, waiting for leave to write included
            except asyncpg.QueryCanceledError:
                self.find(token)  # if it was cancelled because the lease ended, that is what to say
                raise
            finally:
                lease.busy = None
                if connection.held is not None:
                    connection.held.settle(connection)

    async def listen(self, token: str, number: int, channel: str, on: bool) -> None:
        """LISTEN to *channel* for the holder, who fetches by :meth:`heard`; or UNLISTEN.

        Raises:
            Those of :meth:`run`, and nothing is heard of the channel.
        """
        lease = self.find(token)
        if lease.notifications is None:
            lease.notifications = Notifications(
                lease.connection.raw, lambda why: self.end(token, f"it was ended as {why}")
            )
        known = lease.notifications
        # Before the server begins, for what it sends may come with its answer.
        new = on and known.hear(channel)
        if not on:
            known.ignore(channel)
        quoted = channel.replace('"', '""')
        try:
            await self.run(token, number, messages.STATUS, f'{"" if on else "UN"}LISTEN "{quoted}"', (), None)
        except BaseException:
            if new:
                known.ignore(channel)
            raise

    async def heard(self, token: str) -> list[Notification]:
        """What the holder's channels brought since the last answer; waits a second for something.

        Raises:
            LeaseLostError: the lease has ended.
        """
        lease = self.find(token)
        told = [] if lease.notifications is None else await lease.notifications.next()
        self.find(token)
        if not told and not lease.lock.locked() and not await lease.connection.is_alive():
            self.end(token, "its backend was terminated", dead=True)
            self.find(token)
        return told

    def cancel(self, token: str, number: int) -> None:
        """The caller of statement *number* has left: cancel it on the server if it runs now."""
        lease = self._leases.get(token)
        if lease is not None and lease.busy == number:
            lease.connection.cancel("caller")
        elif lease is not None:
            lease.cancelled.add(number)  # its message may still be on its way, or it is over

    def end(self, token: str, why: str, dead: bool = False, reclaimed: Reclaimed | None = None) -> bool:
        """End a lease; its connection goes back, or is dropped if *dead*. False if it had ended before.

        Args:
            why: in words, for its holder.
            reclaimed: why it was taken back, if its holder did not give it back.
        """
        lease = self._leases.pop(token, None)
        if lease is None:
            return False
        if reclaimed is not None:
            self.reclaimed[reclaimed] += 1
        if lease._timer is not None:
            lease._timer.cancel()
        self._ended[token] = why
        while len(self._ended) > 1000:
            self._ended.pop(next(iter(self._ended)))
        if lease.notifications is not None:
            lease.notifications.close()
        lease.cursors.clear()
        if lease.copy is not None:
            lease.copy.stop()
        lease.connection.lease = None
        lease.connection.dirty = True
        if lease.busy is not None and not dead:
            # The holder's statement still runs. It must end before anybody else may have the connection.
            lease.connection.cancel("lease")
        self._hand_back(lease)
        return True

    def _hand_back(self, lease: Lease) -> None:
        if not lease.lock.locked() or lease.connection.raw.is_closed():
            self._take_back(lease.connection, lease.over)
            return
        task = asyncio.get_running_loop().create_task(self._hand_back_later(lease))
        _keep(task)

    async def _hand_back_later(self, lease: Lease) -> None:
        async with lease.lock:
            self._take_back(lease.connection, lease.over)

    def close(self) -> None:
        """End all leases: the pool closes."""
        for token in tuple(self._leases):
            self.end(token, "the pool was closed")


_tasks: set[asyncio.Task[None]] = set()


def _keep(task: asyncio.Task[None]) -> None:
    """Hold *task* until it is done: the event loop itself only holds it weakly."""
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
