"""A leased connection: what ``pool.acquire()`` and ``pool.transaction()`` give, with asyncpg's words."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from raypg import background, messages
from raypg.channel import Channel, WorkerGone
from raypg.checks import check_statement, check_timeout, rows_of
from raypg.core.sql import classify, shorten
from raypg.errors import ConfigError, LeaseLostError, OutcomeUnknownError, TransactionRolledBackError
from raypg.packing import pack
from raypg.portable import unpack_error
from raypg.row import Row, row_type

if TYPE_CHECKING:
    from raypg.dispatch import Dispatcher

Isolation = Literal["read_uncommitted", "read_committed", "repeatable_read", "serializable"]


class LeasedConnection:
    """One connection of the pool, for this caller alone, until it is released, its deadline passes, or it dies.

    Session state is real here: transactions, temporary tables, ``SET``, advisory locks. Statements run one after the
    other. When the lease has ended every call raises :class:`LeaseLostError`; nobody else's connection is ever touched.
    """

    def __init__(self, dispatcher: Dispatcher, channel: Channel, granted: dict[str, Any]) -> None:
        self._dispatcher = dispatcher
        self._channel = channel
        self._token: str = granted["token"]
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._depth = 0
        self._ended: str | None = None
        background.start()
        self._channel.open += 1  # it takes a connection of that worker's share for as long as it is held
        self.connection_id: str = granted["connection_id"]
        self.health_score: float = granted["health_score"]
        self.backend_pid: int = granted["backend_pid"]

    def __del__(self) -> None:
        # Forgotten, not released. Only the background loop may talk to Ray from here: this may run anywhere.
        if getattr(self, "_ended", "") is None:
            handle, token = self._channel.handle, self._token
            background.soon(lambda: handle.release.remote(pack((token, None))))
            self._dispatcher.soon(self._channel.lease_forgotten)

    def __repr__(self) -> str:
        state = f"ended: {self._ended}" if self._ended else "held"
        return f"<LeasedConnection {self.connection_id} of pool {self._dispatcher.name!r}, {state}>"

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Row]:
        """Run a query and return all its rows. Arguments and errors as asyncpg's ``fetch``."""
        payload, names = await self._run(messages.FETCH, query, args, timeout)
        return list(map(row_type(names), payload)) if payload else []

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Row | None:
        """Run a query and return its first row, or ``None``."""
        payload, names = await self._run(messages.ROW, query, args, timeout)
        return row_type(names)(payload[0]) if payload else None

    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Run a query and return one value of its first row, or ``None``."""
        payload, _ = await self._run(messages.ROW, query, args, timeout)
        return payload[0][column] if payload else None

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement, or without arguments several in one text, and return the (last) command tag."""
        payload, _ = await self._run(messages.STATUS, query, args, timeout)
        return str(payload)

    async def executemany(self, command: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run a statement for each row of *args*; all or none of them take effect."""
        await self._run(messages.MANY, command, rows_of(args), timeout)

    async def execute_with_rows(self, query: str, args: Sequence[Any], timeout: float | None) -> tuple[list[Row], str]:
        """Run a statement and return its rows and its command tag."""
        (rows, status), names = await self._run(messages.BOTH, query, tuple(args), timeout)
        return (list(map(row_type(names), rows)) if rows else []), status

    def transaction(
        self, *, isolation: Isolation | None = None, readonly: bool = False, deferrable: bool = False
    ) -> Transaction:
        """A transaction on this connection; inside another one, a savepoint. Use it with ``async with``."""
        return Transaction(self, isolation, readonly, deferrable)

    async def release(self) -> None:
        """Give the connection back; an open transaction is rolled back. Releasing twice does nothing."""
        await self._end(None)

    async def _end(self, last: str | None) -> str | None:
        """Run *last* and end the lease, in one message."""
        if self._ended is not None:
            if last is None:
                return None
            raise LeaseLostError(f"the lease is gone: {self._ended}")
        self._mark_ended("it was released")
        try:
            kind, value = await self._channel.ask("release", self._token, last)
        except WorkerGone:
            if last is None or last == "ROLLBACK":
                return None  # the server rolls back what lost its client
            raise OutcomeUnknownError("the worker died while the transaction was being committed", last) from None
        if kind == "error":
            error = unpack_error(value)
            if last is None and isinstance(error, LeaseLostError):
                return None
            raise error
        return None if value is None else str(value)

    def _mark_ended(self, why: str) -> None:
        if self._ended is None:
            self._ended = why
            self._channel.open -= 1

    async def _run(self, mode: int, sql: str, arguments: Any, timeout: float | None) -> tuple[Any, Any]:
        if self._ended is not None:
            raise LeaseLostError(f"the lease is gone: {self._ended}")
        check_statement(sql)
        check_timeout(timeout)
        async with self._turn:  # messages to an actor may overtake each other: one statement at a time keeps the order
            if self._ended is not None:
                raise LeaseLostError(f"the lease is gone: {self._ended}")
            return await self._run_now(mode, sql, arguments, timeout)

    async def _run_now(self, mode: int, sql: str, arguments: Any, timeout: float | None) -> tuple[Any, Any]:
        number = next(self._numbers)
        try:
            kind, value = await self._channel.ask("lease_run", self._token, number, mode, sql, arguments, timeout)
        except asyncio.CancelledError:
            self._channel.handle.lease_cancel.remote(self._token, number)
            raise
        except WorkerGone:
            self._mark_ended("its worker died")
            verdict = classify(sql)
            if self._depth and verdict.kind != "transaction":
                raise LeaseLostError(
                    "the worker died inside the transaction: the server rolls all of it back"
                ) from None
            if verdict.retryable:
                raise LeaseLostError("the worker died; nothing was changed") from None
            raise OutcomeUnknownError("the worker died after the statement was sent", shorten(sql)) from None
        if kind == "error":
            error = unpack_error(value)
            if isinstance(error, LeaseLostError):
                self._mark_ended(error.args[0].removeprefix("the lease is gone: "))
            raise error
        return value  # type: ignore[no-any-return]


class Transaction:
    """``async with connection.transaction():`` — commits at the end, rolls back on an error. Nested: a savepoint."""

    def __init__(
        self, connection: LeasedConnection, isolation: Isolation | None, readonly: bool, deferrable: bool
    ) -> None:
        self._connection = connection
        self._begin = begin_text(isolation, readonly, deferrable)
        self._savepoint: str | None = None

    async def start(self) -> None:
        """Begin the transaction, or set the savepoint."""
        connection = self._connection
        if connection._depth:
            self._savepoint = f"raypg_{connection._depth}"
            await connection.execute(f"SAVEPOINT {self._savepoint}")
        else:
            await connection.execute(self._begin)
        connection._depth += 1

    async def commit(self) -> None:
        """Commit, or release the savepoint."""
        self._connection._depth -= 1
        if self._savepoint is not None:
            await self._connection.execute(f"RELEASE SAVEPOINT {self._savepoint}")
        else:
            raise_if_rolled_back(await self._connection.execute("COMMIT"))

    async def rollback(self) -> None:
        """Roll back, to the savepoint if it is one."""
        self._connection._depth -= 1
        if self._savepoint is not None:
            await self._connection.execute(
                f"ROLLBACK TO SAVEPOINT {self._savepoint}; RELEASE SAVEPOINT {self._savepoint}"
            )
        else:
            await self._connection.execute("ROLLBACK")

    async def __aenter__(self) -> Transaction:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.commit()
        else:
            try:
                await self.rollback()
            except LeaseLostError:
                pass  # the server has rolled back already; what matters is the error on its way


class AcquireContext:
    """What ``pool.acquire()`` returns: awaited it gives a connection, with ``async with`` it also takes it back."""

    def __init__(self, dispatch: Any, timeout: float | None, lease_timeout: float | None) -> None:
        self._dispatch = dispatch
        self._timeout = timeout
        self._lease_timeout = lease_timeout
        self._connection: LeasedConnection | None = None

    def __await__(self) -> Generator[Any, None, LeasedConnection]:
        return self._acquire().__await__()

    async def _acquire(self) -> LeasedConnection:
        return await acquire(await self._dispatch(), self._timeout, self._lease_timeout, None)

    async def __aenter__(self) -> LeasedConnection:
        self._connection = await self._acquire()
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.shield(connection.release())


class PoolTransaction:
    """What ``pool.transaction()`` returns: a lease and a transaction on it, begun and ended with one message each."""

    def __init__(self, dispatch: Any, begin: str, timeout: float | None, lease_timeout: float | None) -> None:
        self._dispatch = dispatch
        self._begin = begin
        self._timeout = timeout
        self._lease_timeout = lease_timeout
        self._connection: LeasedConnection | None = None

    async def __aenter__(self) -> LeasedConnection:
        connection = await acquire(await self._dispatch(), self._timeout, self._lease_timeout, self._begin)
        connection._depth = 1
        self._connection = connection
        return connection

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if kind is None:
            raise_if_rolled_back(await asyncio.shield(connection._end("COMMIT")))
        else:
            try:
                await asyncio.shield(connection._end("ROLLBACK"))
            except LeaseLostError:
                pass  # rolled back already


async def acquire(
    dispatcher: Dispatcher, timeout: float | None, lease_timeout: float | None, begin: str | None
) -> LeasedConnection:
    """Lease a connection.

    Args:
        timeout: seconds to wait for one; ``acquire_timeout`` of the pool by default.
        lease_timeout: seconds it may be held; ``lease_timeout`` of the pool by default.
        begin: statement to run on it first.

    Raises:
        PoolExhaustedError, ConnectError, PoolClosedError, CircuitBreakerError: none is to be had.
    """
    wait = dispatcher.config.acquire_timeout if timeout is None else _positive("timeout", timeout)
    hold = dispatcher.config.lease_timeout if lease_timeout is None else _positive("lease_timeout", lease_timeout)
    for attempt in itertools.count():
        channel = await dispatcher.channel()
        channel.be_watched()
        channel.open += 1
        request = asyncio.ensure_future(channel.ask("acquire", dispatcher.job, dispatcher.owner(), wait, hold, begin))
        try:
            kind, value = await asyncio.shield(request)
        except WorkerGone:
            dispatcher.worker_gone(channel, [], [])
            if attempt >= 3:
                raise LeaseLostError("the workers that were asked for a connection died") from None
            await asyncio.sleep(0.1)
            continue
        except asyncio.CancelledError:
            # The connection may be granted all the same: then it must go back at once.
            request.add_done_callback(functools.partial(_return, channel))
            raise
        finally:
            channel.open -= 1
        if kind == "error":
            raise unpack_error(value)
        return LeasedConnection(dispatcher, channel, value)
    raise AssertionError


def _return(channel: Channel, request: asyncio.Future[Any]) -> None:
    if not request.cancelled() and request.exception() is None:
        kind, value = request.result()
        if kind == "ok":
            channel.handle.release.remote(pack((value["token"], None)))


def begin_text(isolation: Isolation | None, readonly: bool, deferrable: bool) -> str:
    """The BEGIN statement for these properties.

    Raises:
        ConfigError: an unknown isolation level.
    """
    levels = {
        None: "",
        "read_uncommitted": " ISOLATION LEVEL READ UNCOMMITTED",
        "read_committed": " ISOLATION LEVEL READ COMMITTED",
        "repeatable_read": " ISOLATION LEVEL REPEATABLE READ",
        "serializable": " ISOLATION LEVEL SERIALIZABLE",
    }
    if isolation not in levels:
        known = ", ".join(repr(level) for level in levels if level)
        raise ConfigError(f"isolation={isolation!r}: must be one of {known}")
    return f"BEGIN{levels[isolation]}{' READ ONLY' if readonly else ''}{' DEFERRABLE' if deferrable else ''}"


def raise_if_rolled_back(status: str | None) -> None:
    """PostgreSQL answers COMMIT of a failed transaction with ROLLBACK: that must not pass for success."""
    if status == "ROLLBACK":
        raise TransactionRolledBackError("a statement in the transaction had failed: the server rolled all of it back")


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name}={value!r}: must be a positive number of seconds")
    return float(value)
