"""What waits for a connection: single statements, and requests for a lease. Pipeline chunks are in ``chunk.py``.

Each kind knows how to use the connection it is given and how to fail without one. ``serve`` returns the connection if
the next caller may have it, or ``None`` if it is gone or kept.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from raypg import messages
from raypg.core.sql import Verdict, shorten
from raypg.errors import ConnectionLostError, OutcomeUnknownError, QueryTimeoutError, StatementNotAllowedError
from raypg.messages import Settings
from raypg.portable import PortableError, pack_error
from raypg.server.connection import ServerConnection
from raypg.server.outcomes import ConnectionLost, timed_out
from raypg.server.replies import BatchState

if TYPE_CHECKING:
    from raypg.core.fair_queue import Ticket
    from raypg.server.engine import Engine


T = TypeVar("T")


class Servable(Protocol):
    """Something to do on a connection."""

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        """Use *connection*. Never raises for what a caller did or for what happens to the server."""
        ...

    def fail(self, error: PortableError) -> None:
        """It cannot be done: tell the caller."""
        ...


class Work(Servable, Protocol):
    """Something that waits for a connection."""

    arrived: float
    deadline: float

    @property
    def begun(self) -> bool:
        """Whether part of it was sent to the server already, so that it cannot go to another worker."""
        ...


class Runs(Protocol):
    """What runs a statement now: a connection, or a run of several reads on one."""

    def cancel(self, reason: str) -> None:
        """Cancel it on the server, unless that would hit others."""
        ...


class Statement:
    """One statement of one caller, on its own (autocommit)."""

    __slots__ = (
        "alone",
        "arguments",
        "arrived",
        "batch",
        "cancelled",
        "connection",
        "deadline",
        "expires_at",
        "mode",
        "position",
        "retried",
        "settings",
        "sql",
        "ticket",
        "verdict",
    )

    def __init__(
        self,
        batch: BatchState,
        position: int,
        mode: int,
        sql: str,
        arguments: Any,
        verdict: Verdict,
        arrived: float,
        deadline: float,
        expires_at: float | None,
        settings: Settings,
    ) -> None:
        self.batch = batch
        self.settings = settings
        self.position = position
        self.mode = mode
        self.sql = sql
        self.arguments = arguments
        self.verdict = verdict
        self.arrived = arrived
        self.deadline = deadline
        self.expires_at = expires_at
        self.alone = False  # it must not travel with others any more
        self.retried = False
        self.cancelled = False
        self.connection: Runs | None = None
        self.ticket: Ticket[Work] | None = None

    @property
    def begun(self) -> bool:
        return False  # what waits for its second try only reads

    def fail(self, error: PortableError) -> None:
        self.batch.finish(self.position, None, None, error)

    def _is_left(self) -> bool:
        """Whether its caller has left; asked for each time, as that may happen during any wait."""
        return self.cancelled

    def withdraw(self, engine: Engine) -> bool:
        """Take it out of the queue of *engine*; whether it was still there."""
        return self.ticket is not None and engine.queue.cancel(self.ticket)

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        now = engine.now()
        if self._is_left():
            # Its caller left after it was taken out of the queue, or while it waited for its second try.
            self.fail(pack_error(TimeoutError("cancelled before it ran")))
            return connection
        engine.figures.waited(now - self.arrived, connection)
        self.batch.begun = True
        timeout = None if self.expires_at is None else self.expires_at - now
        try:
            plain = self.verdict.clean
            if plain and self.verdict.relations:
                # Settings may change which tables the names mean.
                plain = self.settings is None and await engine.catalogue.are_plain(
                    connection, self.verdict.relations, now
                )
            plain = plain and not (engine.writes.watched and engine.writes.reach.may_write(self.sql))
            if not plain:
                connection.dirty = True
                if engine.writes.watched:
                    await engine.writes.begin(connection, (self.sql,), timeout)
                    if self._is_left():
                        self.fail(pack_error(TimeoutError("cancelled before it ran")))
                        return connection
                    timeout = None if self.expires_at is None else self.expires_at - engine.now()
            self.connection = connection
            payload, names = await connection.run(
                self.mode, self.sql, self.arguments, timeout, self.settings, reads=self.verdict.retryable
            )
        except ConnectionLost as lost:
            engine.connections.drop(connection)
            self.lost(engine, lost, now, retryable=self.verdict.retryable and not connection.dirty)
            return None
        except Exception as error:
            if isinstance(error, QueryTimeoutError) and self.expires_at is not None:
                error = timed_out(self.expires_at - self.arrived)  # the caller's limit, waiting included
            engine.figures.ran(engine.now() - now, True, self.sql, error)
            self.fail(pack_error(error))
        else:
            seconds = engine.now() - now
            engine.figures.ran(seconds, False, self.sql)
            if self.settings is None:
                engine.pace.frequent.note(self.sql)
            if self.verdict.retryable:
                engine.pace.note(self.sql, seconds)
            self.batch.finish(self.position, payload, names)
        finally:
            self.connection = None
            if connection.held is not None:
                connection.held.settle(connection)
        return connection

    def lost(self, engine: Engine, lost: ConnectionLost, began: float, retryable: bool) -> None:
        """The connection died under it: queue it once more if that does no harm, or tell its caller."""
        if not lost.sent and not self.cancelled:
            engine.put_first(self)
        elif retryable and not lost.by_crash and not self.retried and not self.cancelled:
            # It only read, and the backend was ended on purpose: asking once more is safe.
            self.alone = self.retried = True
            self.deadline = engine.deadline_anew(self.expires_at)
            engine.figures.retries += 1
            engine.put_first(self)
        else:
            engine.figures.ran(engine.now() - began, True, self.sql, lost)
            self.fail(pack_error(lost_error(lost, self.sql, retryable)))


class Request(Generic[T]):
    """What waits for a connection, and whose one outcome somebody awaits.

    Attributes:
        arrived, deadline: when it began to wait, and until when it may, in seconds of the engine's clock.
        future: its outcome, or a :class:`Refused`.
    """

    __slots__ = ("arrived", "deadline", "future", "ticket")

    def __init__(self, arrived: float, deadline: float) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.ticket: Ticket[Any] | None = None
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    @property
    def begun(self) -> bool:
        """See :class:`Work`: nothing that could not be done once more."""
        return False

    def fail(self, error: PortableError) -> None:
        """It cannot be done: tell whoever waits, if anybody still does."""
        if not self.future.done():
            self.future.set_exception(Refused(error))


class LeaseRequest(Request[ServerConnection]):
    """A caller that wants a connection for itself, under its name, optionally with a transaction begun on it."""

    __slots__ = ("begin", "cancelled", "connection", "name")

    def __init__(self, begin: str | None, name: str, arrived: float, deadline: float) -> None:
        super().__init__(arrived, deadline)
        self.begin = begin
        self.name = name
        self.cancelled = False
        self.connection: ServerConnection | None = None

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        if self.future.done():
            return connection  # its caller has left
        engine.figures.waited(engine.now() - self.arrived, connection)
        opening = connection.opening(self.begin, self.name)
        if opening is not None:
            try:
                await connection.run(messages.STATUS, opening, ())
            except ConnectionLost:
                engine.connections.drop(connection)
                engine.put_first(self)  # nothing was done yet; another connection will do
                return None
            except Exception as error:
                self.fail(pack_error(error))
                connection.dirty = True
                return connection
        if self.future.done():
            connection.dirty = True
            return connection
        self.future.set_result(connection)
        return None


class Refused(Exception):
    """Carries a packed error from the queue to the message that asked."""

    def __init__(self, packed: PortableError) -> None:
        super().__init__(packed)
        self.packed = packed


def lost_error(lost: ConnectionLost, sql: str, reads_only: bool) -> Exception:
    """What to tell the caller of a statement whose connection died under it."""
    how = f"with {lost.sqlstate}" if lost.sqlstate else "without a word"
    if reads_only:
        return ConnectionLostError(f"the server ended the connection ({how}) while it read [{shorten(sql)}]")
    return OutcomeUnknownError(
        f"the server ended the connection ({how}) after the statement was sent; whether it took effect is unknown",
        shorten(sql),
    )


def refuse(verdict: Verdict, sql: str) -> StatementNotAllowedError | None:
    """Why a statement cannot run without a lease, if it cannot."""
    if verdict.kind == "transaction":
        return StatementNotAllowedError(
            f"{verdict.command} without a lease would end up on some connection or other: use "
            "`async with pool.transaction() as tx:` or `async with pool.acquire() as connection:`"
        )
    if verdict.statements > 1:
        return StatementNotAllowedError(
            f"{verdict.statements} statements in one text: send them one by one, or, if they belong together, "
            f"with `async with pool.transaction() as tx: await tx.execute(…)` [{shorten(sql)}]"
        )
    return None
