"""A leased connection: what ``pool.acquire()`` and ``pool.transaction()`` give, with asyncpg's words."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg import background, messages
from raypg.arrow_stream import BATCH_BYTES, ArrowStream
from raypg.calling import send, tell
from raypg.channel import Channel, WorkerGone
from raypg.checks import check_statement, check_timeout, rows_of
from raypg.core.sql import classify, shorten
from raypg.cursor import CursorFactory
from raypg.errors import ConfigError, LeaseLostError, OutcomeUnknownError
from raypg.listening import RELEASED, Callback, Listeners
from raypg.packing import pack
from raypg.portable import unpack_error
from raypg.prepared import PreparedStatement
from raypg.row import Row, row_type
from raypg.transaction import Isolation, Transaction, begin_text, raise_if_rolled_back

if TYPE_CHECKING:
    import pyarrow

    from raypg.dispatch import Dispatcher

__all__ = [
    "AcquireContext",
    "Isolation",
    "LeasedConnection",
    "PoolTransaction",
    "Transaction",
    "acquire",
    "begin_text",
    "raise_if_rolled_back",
]

_requests = itertools.count(1)


class LeasedConnection:
    """One connection of the pool, for this caller alone, until it is released, its deadline passes, or it dies.

    Session state is real here: transactions, temporary tables, ``SET``, ``LISTEN``, advisory locks. Statements run one
    after the other. When the lease has ended every call raises :class:`LeaseLostError`; nobody else's connection is
    ever touched.
    """

    def __init__(self, dispatcher: Dispatcher, channel: Channel, granted: dict[str, Any]) -> None:
        self._dispatcher = dispatcher
        self._channel = channel
        self._token: str = granted["token"]
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._base_depth = 0
        self._begun = ""
        self._transactions: list[Transaction] = []
        self._listeners = Listeners()
        self._streaming = False
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
            background.soon(lambda: send(handle.release, pack((token, None, True))))
            self._dispatcher.soon(self._channel.lease_forgotten)

    @property
    def _depth(self) -> int:
        """How many transactions are open, each but the first a savepoint."""
        return self._base_depth + len(self._transactions)

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

    async def prepare(self, query: str, *, timeout: float | None = None) -> PreparedStatement:
        """Let the server check a statement, to run it later, once or often.

        Raises:
            asyncpg.PostgresError: what the server has against it, now and not at its first run.
        """
        check_statement(query)
        check_timeout(timeout)
        parameters, attributes = (await self._in_turn(None, "lease_prepare", query, timeout))[0]
        return PreparedStatement(self, query, parameters, attributes)

    def cursor(self, query: str, *args: Any, prefetch: int = 50, timeout: float | None = None) -> CursorFactory:
        """Read a result in portions, inside a transaction: ``async for row in connection.cursor(…)``, or
        ``cursor = await connection.cursor(…)`` for ``fetch(n)``, ``fetchrow()`` and ``forward(n)``.

        Args:
            prefetch: rows in a portion when iterated over. Each takes a message to the worker, so thousands of short
                rows are better read in large portions.
            timeout: seconds for each portion.

        Raises:
            asyncpg.NoActiveSQLTransactionError: at the first use: there is no transaction.
        """
        return CursorFactory(self, query, args, prefetch, timeout)

    def stream(
        self,
        query: str,
        *args: Any,
        batch_bytes: int = BATCH_BYTES,
        timeout: float | None = None,
        decimals: Mapping[str, tuple[int, int]] | None = None,
    ) -> ArrowStream:
        """Read a result as Arrow record batches, by COPY; see :meth:`WorkflowConnectionPool.stream`. Until it is at
        its end or closed, nothing else can be done on this connection; closed before, it fails its transaction."""
        return ArrowStream(self, query, args, batch_bytes, timeout, decimals)

    async def fetch_arrow(self, query: str, *args: Any, timeout: float | None = None) -> pyarrow.Table:
        """Run a query and return all its rows as an Arrow table; see :meth:`WorkflowConnectionPool.fetch_arrow`."""
        return await self.stream(query, *args, timeout=timeout).read_all()

    async def add_listener(self, channel: str, callback: Callback) -> None:
        """Listen to *channel*: ``callback(connection, pid, channel, payload)`` is called for each notification.

        As with asyncpg: callbacks are plain or async functions, called in order in this event loop; their exceptions
        are logged. Inside a transaction the server begins to listen at its commit. It ends with the lease, so give the
        lease a ``lease_timeout`` that is long enough; when the lease is lost, an error is logged. If this process does
        not take notifications while megabytes of them pile up in the worker, the lease is ended for it.

        Raises:
            asyncpg.InterfaceError: no name of a channel, or nothing that can be called.
            StatementNotAllowedError: a transaction pooler is in front.
        """
        await self._listeners.add(self, channel, callback)

    async def remove_listener(self, channel: str, callback: Callback) -> None:
        """Call *callback* no more; without another one for *channel* the server is told ``UNLISTEN``. Does nothing if
        it is not called anyway."""
        await self._listeners.remove(self, channel, callback)

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
        self._mark_ended(RELEASED)
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
            self._listeners.end(why)

    async def _run(self, mode: int, sql: str, arguments: Any, timeout: float | None) -> tuple[Any, Any]:
        """Run a statement, as :meth:`raypg.dispatch.Dispatcher.run` does on any connection."""
        check_statement(sql)
        check_timeout(timeout)
        return await self._in_turn(sql, "lease_run", mode, sql, arguments, timeout)  # type: ignore[no-any-return]

    async def _in_turn(self, sql: str | None, method: str, *arguments: Any) -> Any:
        """Have the worker do something on this connection, when what was asked for before is done.

        Args:
            sql: what it does; ``None`` if it changes nothing but the session.
        """
        if self._ended is not None:
            raise LeaseLostError(f"the lease is gone: {self._ended}")
        async with self._turn:  # messages to an actor may overtake each other: one statement at a time keeps the order
            if self._ended is not None:
                raise LeaseLostError(f"the lease is gone: {self._ended}")
            if self._streaming:
                raise asyncpg.InterfaceError(
                    "a stream is open on this connection: read it to its end, or close it, before anything else"
                )
            return await self._ask(sql, method, *arguments)

    async def _ask(self, sql: str | None, method: str, *arguments: Any) -> Any:
        number = next(self._numbers)
        try:
            kind, value = await self._channel.ask(method, self._token, number, *arguments)
        except asyncio.CancelledError:
            tell(self._channel.handle.lease_cancel, self._token, number)
            raise
        except WorkerGone:
            self._mark_ended("its worker died")
            verdict = None if sql is None else classify(sql)
            if self._depth and (verdict is None or verdict.kind != "transaction"):
                raise LeaseLostError(
                    "the worker died inside the transaction: the server rolls all of it back"
                ) from None
            if sql is None or verdict is None or verdict.retryable:
                raise LeaseLostError("the worker died; nothing was changed") from None
            raise OutcomeUnknownError("the worker died after the statement was sent", shorten(sql)) from None
        if kind == "error":
            error = unpack_error(value)
            if isinstance(error, LeaseLostError):
                self._mark_ended(error.args[0].removeprefix("the lease is gone: "))
            raise error
        return value


class AcquireContext:
    """What ``pool.acquire()`` returns: awaited it gives a connection, with ``async with`` it also takes it back."""

    def __init__(self, dispatch: Any, timeout: float | None, lease_timeout: float | None, name: str | None) -> None:
        self._dispatch = dispatch
        self._name = name
        self._timeout = timeout
        self._lease_timeout = lease_timeout
        self._connection: LeasedConnection | None = None

    def __await__(self) -> Generator[Any, None, LeasedConnection]:
        return self._acquire().__await__()

    async def _acquire(self) -> LeasedConnection:
        return await acquire(await self._dispatch(), self._timeout, self._lease_timeout, None, self._name)

    async def __aenter__(self) -> LeasedConnection:
        if self._connection is not None:
            raise asyncpg.InterfaceError("a connection is acquired already: call pool.acquire() for another")
        self._connection = await self._acquire()
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.shield(connection.release())


class PoolTransaction:
    """What ``pool.transaction()`` returns: a lease and a transaction on it, begun and ended with one message each."""

    def __init__(
        self, dispatch: Any, begin: str, timeout: float | None, lease_timeout: float | None, name: str | None
    ) -> None:
        self._dispatch = dispatch
        self._name = name
        self._begin = begin
        self._timeout = timeout
        self._lease_timeout = lease_timeout
        self._connection: LeasedConnection | None = None

    async def __aenter__(self) -> LeasedConnection:
        if self._connection is not None:
            raise asyncpg.InterfaceError("the transaction was started already: call pool.transaction() for another")
        dispatcher = await self._dispatch()
        connection = await acquire(dispatcher, self._timeout, self._lease_timeout, self._begin, self._name)
        connection._base_depth = 1
        connection._begun = self._begin
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
    dispatcher: Dispatcher, timeout: float | None, lease_timeout: float | None, begin: str | None, name: str | None
) -> LeasedConnection:
    """Lease a connection.

    Args:
        timeout: seconds to wait for one; ``acquire_timeout`` of the pool by default.
        lease_timeout: seconds it may be held; ``lease_timeout`` of the pool by default.
        begin: statement to run on it first.
        name: the holder's, for ``application_name``; its Ray job id by default.

    Raises:
        PoolExhaustedError, ConnectError, PoolClosedError, CircuitBreakerError: none is to be had.
    """
    wait = dispatcher.config.acquire_timeout if timeout is None else _positive("timeout", timeout)
    hold = dispatcher.config.lease_timeout if lease_timeout is None else _positive("lease_timeout", lease_timeout)
    for attempt in itertools.count():
        channel = await dispatcher.channel()
        channel.be_watched()
        channel.open += 1
        key = (dispatcher.client, next(_requests))
        owner = {**dispatcher.owner(), "application_name": name or dispatcher.job}
        try:
            kind, value = await channel.ask("acquire", key, dispatcher.job, owner, wait, hold, begin)
        except WorkerGone:
            dispatcher.worker_gone(channel, [], [])
            if attempt >= 3:
                raise LeaseLostError("the workers that were asked for a connection died") from None
            await asyncio.sleep(0.1)
            continue
        except asyncio.CancelledError:
            tell(channel.handle.cancel_acquire, key)  # it leaves the queue, or what it was granted goes back at once
            raise
        finally:
            channel.open -= 1
        if kind == "error":
            error = unpack_error(value)
            if channel.refused_by(error) and not dispatcher.is_final(error):
                continue  # another worker may have one
            raise error
        return LeasedConnection(dispatcher, channel, value)
    raise AssertionError


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name}={value!r}: must be a positive number of seconds")
    return float(value)
