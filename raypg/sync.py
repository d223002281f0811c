"""The pool for callers without an event loop: plain Ray tasks and threads.

All threads of a process share one background loop and thus one line to each worker: what they ask for at the same time
travels together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raypg import background, owner
from raypg.lease import Isolation, LeasedConnection
from raypg.row import Row
from raypg.sync_statements import SyncCursor, SyncListener, SyncPreparedStatement
from raypg.sync_stream import SyncStream

if TYPE_CHECKING:
    import pyarrow

    from raypg.pool import WorkflowConnectionPool


class SyncConnection:
    """A leased connection for a caller without an event loop; see :class:`raypg.lease.LeasedConnection`."""

    def __init__(self, connection: LeasedConnection) -> None:
        self._connection = connection

    def __repr__(self) -> str:
        return f"<Sync{repr(self._connection)[1:]}"

    @property
    def connection_id(self) -> str:
        """Name of the connection."""
        return self._connection.connection_id

    def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Row]:
        """Run a query and return all its rows."""
        return background.run(lambda: self._connection.fetch(query, *args, timeout=timeout))

    def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Row | None:
        """Run a query and return its first row, or ``None``."""
        return background.run(lambda: self._connection.fetchrow(query, *args, timeout=timeout))

    def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Run a query and return one value of its first row, or ``None``."""
        return background.run(lambda: self._connection.fetchval(query, *args, column=column, timeout=timeout))

    def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement and return its command tag."""
        return background.run(lambda: self._connection.execute(query, *args, timeout=timeout))

    def executemany(self, command: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run a statement for each row of *args*; all or none of them take effect."""
        background.run(lambda: self._connection.executemany(command, args, timeout=timeout))

    def prepare(self, query: str, *, timeout: float | None = None) -> SyncPreparedStatement:
        """Let the server check a statement, to run it later; see :meth:`LeasedConnection.prepare`."""
        return SyncPreparedStatement(background.run(lambda: self._connection.prepare(query, timeout=timeout)))

    def cursor(self, query: str, *args: Any, prefetch: int = 50, timeout: float | None = None) -> SyncCursor:
        """Read a result in portions, inside a transaction: ``for row in connection.cursor(…)``; see
        :meth:`LeasedConnection.cursor`."""
        return SyncCursor(self._connection.cursor(query, *args, prefetch=prefetch, timeout=timeout))

    def stream(self, query: str, *args: Any, **how: Any) -> SyncStream:
        """Read a result as Arrow record batches; see :meth:`LeasedConnection.stream`."""
        return SyncStream(self._connection.stream(query, *args, **how))

    def fetch_arrow(self, query: str, *args: Any, timeout: float | None = None) -> pyarrow.Table:
        """Run a query and return all its rows as an Arrow table."""
        return self.stream(query, *args, timeout=timeout).read_all()

    def add_listener(self, channel: str, callback: Callable[..., Any]) -> None:
        """Listen to *channel*: ``callback(connection, pid, channel, payload)``; see
        :meth:`LeasedConnection.add_listener`.

        Callbacks are called on the background thread that all of ``pool.sync`` in this process shares. They must be
        quick, put what they get into a ``queue.Queue`` say, and cannot use the connection: its methods would wait for
        that same thread, and raise RuntimeError there.
        """
        listener = SyncListener(self, callback)
        background.run(lambda: self._connection.add_listener(channel, listener))

    def remove_listener(self, channel: str, callback: Callable[..., Any]) -> None:
        """Call *callback* no more."""
        listener = SyncListener(self, callback)
        background.run(lambda: self._connection.remove_listener(channel, listener))

    @contextmanager
    def transaction(
        self, *, isolation: Isolation | None = None, readonly: bool = False, deferrable: bool = False
    ) -> Iterator[None]:
        """``with connection.transaction():`` — inside another one, a savepoint."""
        transaction = self._connection.transaction(isolation=isolation, readonly=readonly, deferrable=deferrable)
        background.run(transaction.start)
        try:
            yield
        except BaseException as error:
            problem = error
            background.run(lambda: transaction.__aexit__(type(problem), problem, None))
            raise
        background.run(transaction.commit)

    def release(self) -> None:
        """Give the connection back. Twice does nothing."""
        background.run(self._connection.release)


class SyncPool:
    """``pool.sync``: the same words as on the pool, for callers without an event loop.

    Raises:
        RuntimeError: from any method, if the calling thread runs an event loop: await the pool's own methods there.
    """

    def __init__(self, pool: WorkflowConnectionPool) -> None:
        self._pool = pool

    def __repr__(self) -> str:
        return f"<SyncPool of {self._pool!r}>"

    def process(self, request: dict[str, Any]) -> Any:
        """Do one operation; see :meth:`WorkflowConnectionPool.process`."""
        with owner.named():
            return background.run(lambda: self._pool.process(request))

    def fetch(
        self,
        query: str,
        *args: Any,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
        **reading: Any,
    ) -> list[Row]:
        """Run a query and return all its rows. *reading*: ``read_from``, ``max_staleness``, ``after``; see
        :meth:`WorkflowConnectionPool.fetch`."""
        return background.run(lambda: self._pool.fetch(query, *args, timeout=timeout, settings=settings, **reading))

    def fetchrow(
        self,
        query: str,
        *args: Any,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
        **reading: Any,
    ) -> Row | None:
        """Run a query and return its first row, or ``None``. *reading* as for :meth:`fetch`."""
        return background.run(lambda: self._pool.fetchrow(query, *args, timeout=timeout, settings=settings, **reading))

    def fetchval(
        self,
        query: str,
        *args: Any,
        column: int = 0,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
        **reading: Any,
    ) -> Any:
        """Run a query and return one value of its first row, or ``None``. *reading* as for :meth:`fetch`."""
        return background.run(
            lambda: self._pool.fetchval(query, *args, column=column, timeout=timeout, settings=settings, **reading)
        )

    def token(self) -> str:
        """What has been written up to now; see :meth:`WorkflowConnectionPool.token`."""
        return background.run(self._pool.token)

    def execute(
        self, query: str, *args: Any, timeout: float | None = None, settings: Mapping[str, str] | None = None
    ) -> str:
        """Run a statement and return its command tag."""
        return background.run(lambda: self._pool.execute(query, *args, timeout=timeout, settings=settings))

    def executemany(
        self,
        command: str,
        args: Iterable[Sequence[Any]],
        *,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Run a statement for each row of *args*; all or none of them take effect."""
        background.run(lambda: self._pool.executemany(command, args, timeout=timeout, settings=settings))

    def stream(self, query: str, *args: Any, **how: Any) -> SyncStream:
        """Read a result as Arrow record batches: ``for batch in pool.sync.stream(…)``; arguments as of
        :meth:`WorkflowConnectionPool.stream`."""
        return SyncStream(self._pool.stream(query, *args, **how))

    def fetch_arrow(self, query: str, *args: Any, timeout: float | None = None) -> pyarrow.Table:
        """Run a query and return all its rows as an Arrow table."""
        return self.stream(query, *args, timeout=timeout).read_all()

    @contextmanager
    def acquire(self, *, timeout: float | None = None, lease_timeout: float | None = None) -> Iterator[SyncConnection]:
        """``with pool.sync.acquire() as connection:`` — a leased connection."""

        async def lease() -> LeasedConnection:
            return await self._pool.acquire(timeout=timeout, lease_timeout=lease_timeout)

        with owner.named():
            connection = background.run(lease)
        try:
            yield SyncConnection(connection)
        finally:
            background.run(connection.release)

    @contextmanager
    def transaction(
        self,
        *,
        isolation: Isolation | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        timeout: float | None = None,
        lease_timeout: float | None = None,
    ) -> Iterator[SyncConnection]:
        """``with pool.sync.transaction() as tx:`` — commits at the end of the block, rolls back if it raises."""
        transaction = self._pool.transaction(
            isolation=isolation,
            readonly=readonly,
            deferrable=deferrable,
            timeout=timeout,
            lease_timeout=lease_timeout,
        )
        with owner.named():
            connection = background.run(transaction.__aenter__)
        try:
            yield SyncConnection(connection)
        except BaseException as error:
            problem = error
            background.run(lambda: transaction.__aexit__(type(problem), problem, None))
            raise
        background.run(lambda: transaction.__aexit__(None))

    def reconfigure(self, **changes: Any) -> None:
        """Change settings of the running pool for everybody; see :meth:`WorkflowConnectionPool.reconfigure`."""
        background.run(lambda: self._pool.reconfigure(**changes))

    def scale(self, *, workers: int | str | None = None, max_connections: int | None = None) -> dict[str, Any]:
        """Give the running pool another size, for everybody; see :meth:`WorkflowConnectionPool.scale`."""
        return background.run(lambda: self._pool.scale(workers=workers, max_connections=max_connections))

    def close(self) -> None:
        """Close the handle; see :meth:`WorkflowConnectionPool.close`."""
        background.run(self._pool.close)
