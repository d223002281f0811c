"""The pool as its users hold it: a small, picklable handle. All work is done by the pool's actors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raypg import joining, messages
from raypg.arrow_stream import BATCH_BYTES, ArrowStream
from raypg.checks import check_statement, check_timeout, checked_settings, rows_of
from raypg.circuit_breaker import PoolCircuitBreaker
from raypg.cluster import find
from raypg.config import PoolConfig, from_kwargs
from raypg.dispatch import Dispatcher
from raypg.errors import ConfigError, PoolClosedError, PoolNotInitializedError
from raypg.lease import AcquireContext, Isolation, LeasedConnection, PoolTransaction, begin_text
from raypg.naming import check_pool_name
from raypg.operations import Operations
from raypg.pool_life import end
from raypg.reading import FROM_PRIMARY, After, Reading, read
from raypg.row import Row, row_type
from raypg.sync import SyncPool

if TYPE_CHECKING:
    import pyarrow

    from raypg.pipeline import QueryPipelineNode

__all__ = ["WorkflowConnectionPool", "get_pool"]


class WorkflowConnectionPool:
    """One pool of PostgreSQL connections for the whole Ray cluster.

    The constructor only checks its arguments. The pool starts at the first use, or with
    ``await pool.process({"operation": "initialize"})``; it lives on when this job ends, any other job finds it by name
    (:func:`get_pool`), and constructing it again with the same settings gives the same pool.

    Two ways in: ``await pool.process({"operation": …})``, and asyncpg's own words on the handle itself.

    Args:
        config: see :class:`raypg.config.PoolConfig` for every key, its unit and its default.

    Raises:
        ConfigError: a key is unknown, or a value is wrong; names the nearest valid one.
    """

    def __init__(self, **config: Any) -> None:
        self._config: PoolConfig | None = from_kwargs(**config)
        self._name: str = self._config.name
        self._started = False
        self._known: Dispatcher | None = None
        self._closed: PoolClosedError | None = None
        self._operations = Operations(self)
        self._breaker: PoolCircuitBreaker | None = None

    @classmethod
    def _attach(cls, name: str) -> WorkflowConnectionPool:
        handle = cls.__new__(cls)
        handle._config = None
        handle._name = name
        handle._started = True
        handle._known = None
        handle._closed = None
        handle._operations = Operations(handle)
        handle._breaker = None
        return handle

    def __reduce__(self) -> tuple[Any, ...]:
        # The name travels, and nothing else: no connection, no configuration, no password.
        if not self._started:
            raise PoolNotInitializedError(
                f"pool {self._name!r} does not run yet, so another process would not find it: "
                "await pool.process({'operation': 'initialize'}) first"
            )
        return _unpickle, (self._name,)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "started" if self._started else "not started"
        return f"<WorkflowConnectionPool {self._name!r}, {state}>"

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._name

    @property
    def sync(self) -> SyncPool:
        """The same pool for callers without an event loop: plain Ray tasks and threads."""
        return SyncPool(self)

    @property
    def circuit_breaker(self) -> PoolCircuitBreaker:
        """What protects the database, and callers from waiting for it: see, force, disable, listen."""
        if self._breaker is None:
            self._breaker = PoolCircuitBreaker(self)
        return self._breaker

    # --- the guide's way in ---

    async def process(self, request: dict[str, Any]) -> Any:
        """Do one operation; ``request["operation"]`` names it.

        Operations: initialize, acquire, release, execute, stats, get_status, get_pool_statistics,
        get_comprehensive_status, adjust_pool_size, close. See :class:`raypg.operations.Operations` for what each takes
        and returns.

        Raises:
            ConfigError: unknown operation or key; names the nearest valid one.
            UnavailableError: the database cannot be used now (CircuitBreakerError, PoolExhaustedError, ConnectError,
                PoolClosedError …).
        """
        return await self._operations.run(request)

    # --- asyncpg's words ---

    async def fetch(
        self,
        query: str,
        *args: Any,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
        read_from: str = "primary",
        max_staleness: float | None = None,
        after: After = None,
    ) -> list[Row]:
        """Run a query and return all its rows.

        Args:
            query: SQL with ``$1``, ``$2`` …
            args: their values.
            timeout: seconds for waiting and running together.
            settings: PostgreSQL settings for this statement alone, e.g. ``{"search_path": "app", "role": "reader"}``;
                it then runs in a transaction of its own.
            read_from: ``"replica"``: a replica may answer; the primary does if none will do. A replica refuses to
                write; what it has refused runs on the primary.
            max_staleness: seconds that a replica's data may be older than the primary's.
            after: what the answer must show: a token, see :meth:`token`, or a :class:`raypg.Session`, which learns
                what it has seen then.

        Raises:
            asyncpg.PostgresError: what the server says of the statement, as asyncpg's own class.
            QueryTimeoutError: cancelled by *timeout*, without effect.
            OutcomeUnknownError: it was sent, and whether it took effect cannot be known.
            ResultLostError: it took effect, but the rows it returned cannot be read (their type was altered, say).
            UnavailableError: it could not run now, and did not.
        """
        reading = read_from, max_staleness, after
        payload, names = await self._run(messages.FETCH, query, args, timeout, settings, reading)
        return list(map(row_type(names), payload)) if payload else []

    async def fetchrow(
        self,
        query: str,
        *args: Any,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
        read_from: str = "primary",
        max_staleness: float | None = None,
        after: After = None,
    ) -> Row | None:
        """Run a query and return its first row, or ``None``. Errors as :meth:`fetch`."""
        reading = read_from, max_staleness, after
        payload, names = await self._run(messages.ROW, query, args, timeout, settings, reading)
        return row_type(names)(payload[0]) if payload else None

    async def fetchval(
        self,
        query: str,
        *args: Any,
        column: int = 0,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
        read_from: str = "primary",
        max_staleness: float | None = None,
        after: After = None,
    ) -> Any:
        """Run a query and return one value of its first row, or ``None``. Errors as :meth:`fetch`."""
        reading = read_from, max_staleness, after
        payload, _ = await self._run(messages.ROW, query, args, timeout, settings, reading)
        return payload[0][column] if payload else None

    async def execute(
        self, query: str, *args: Any, timeout: float | None = None, settings: Mapping[str, str] | None = None
    ) -> str:
        """Run a statement and return its command tag, such as ``INSERT 0 1``. Errors as :meth:`fetch`."""
        payload, _ = await self._run(messages.STATUS, query, args, timeout, settings)
        return str(payload)

    async def executemany(
        self,
        command: str,
        args: Iterable[Sequence[Any]],
        *,
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Run a statement for each row of *args*; all or none of them take effect. Errors as :meth:`fetch`."""
        rows = rows_of(args)
        if rows:
            await self._run(messages.MANY, command, rows, timeout, settings)

    def stream(
        self,
        query: str,
        *args: Any,
        batch_bytes: int = BATCH_BYTES,
        timeout: float | None = None,
        lease_timeout: float | None = None,
        decimals: Mapping[str, tuple[int, int]] | None = None,
    ) -> ArrowStream:
        """Read a result as Arrow record batches, in bounded memory: ``async for batch in pool.stream(…)``.

        It goes by COPY on a lease of its own, in a transaction that ends with it. Types without an equal in Arrow
        (numeric, enums, ranges, inet …) arrive as text; its fields' metadata has PostgreSQL's names of them.

        Args:
            query: one SELECT, VALUES, TABLE or WITH; *args* as for :meth:`fetch`.
            batch_bytes: bytes of a batch as the server sends it, at most, about: the first ones are smaller, and all
                are while a worker has several streams. Up to four are in the worker's memory at a time.
            timeout: seconds for each batch.
            lease_timeout: seconds for the whole; ``lease_timeout`` of the pool by default.
            decimals: column → precision and scale: these, of type numeric, arrive as decimals.

        Raises:
            StatementNotAllowedError: another kind of statement.
            ArrowValueError: a value has no equal in Arrow, such as ``infinity`` in a timestamp.
            LeaseLostError: the worker, the backend or the lease ended before the stream did.
            PoolExhaustedError, ConnectError, asyncpg.PostgresError, …: as for :meth:`fetch`.
        """
        transaction = self.transaction(lease_timeout=lease_timeout)
        return ArrowStream(transaction, query, args, batch_bytes, timeout, decimals)

    async def fetch_arrow(self, query: str, *args: Any, timeout: float | None = None) -> pyarrow.Table:
        """Run a query and return all its rows as an Arrow table. Arguments and errors as :meth:`stream`."""
        return await self.stream(query, *args, timeout=timeout).read_all()

    def acquire(self, *, timeout: float | None = None, lease_timeout: float | None = None) -> AcquireContext:
        """Lease a connection: ``async with pool.acquire() as connection``, or await it and ``release`` it.

        Args:
            timeout: seconds to wait for one, ``acquire_timeout`` by default.
            lease_timeout: seconds it may be held, ``lease_timeout`` of the pool by default.

        Raises:
            PoolExhaustedError, ConnectError, PoolClosedError: none is to be had.
        """
        return AcquireContext(self._dispatcher, timeout, lease_timeout, self._users_name)

    async def release(self, connection: LeasedConnection) -> None:
        """Give a leased connection back."""
        await connection.release()

    def transaction(
        self,
        *,
        isolation: Isolation | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        timeout: float | None = None,
        lease_timeout: float | None = None,
    ) -> PoolTransaction:
        """``async with pool.transaction() as tx``: a leased connection in a transaction of its own.

        It commits at the end of the block, and rolls back if the block raises.

        Raises:
            ConfigError: unknown isolation level.
            TransactionRolledBackError: a statement had failed, and the block swallowed its error.
            OutcomeUnknownError: the connection was lost while COMMIT was under way.
        """
        begin = begin_text(isolation, readonly, deferrable)
        return PoolTransaction(self._dispatcher, begin, timeout, lease_timeout, self._users_name)

    def pipeline(self, name: str = "pipeline", **settings: Any) -> QueryPipelineNode:
        """A pipeline over this pool, whose ``batch_size`` is the pool's ``pipeline_batch_size`` unless it is given.

        Args:
            name, settings: as :class:`raypg.QueryPipelineNode`.

        Raises:
            ConfigError: the pool was constructed without ``enable_pipelining=True``, or a setting is wrong.
        """
        from raypg.pipeline import QueryPipelineNode

        config = self._config or (None if self._known is None else self._known.config)
        if config is not None:
            if not config.enable_pipelining:
                raise ConfigError(
                    f"pool {self._name!r} has no pipelines: construct it with enable_pipelining=True, or use "
                    f"QueryPipelineNode(connection_pool={self._name!r}, …)"
                )
            settings.setdefault("batch_size", config.pipeline_batch_size)
        return QueryPipelineNode(name, self, **settings)

    async def reconfigure(self, **changes: Any) -> None:
        """Change settings of the running pool for everybody, e.g. ``max_connections`` or ``lease_timeout``.

        Raises:
            ConfigError: an unknown key, a wrong value, or a setting that a running pool cannot change.
        """
        await (await self._dispatcher()).reconfigure(changes)

    async def scale(self, *, workers: int | str | None = None, max_connections: int | None = None) -> dict[str, Any]:
        """Give the running pool another size, for everybody: more workers start, others end when nobody uses them any
        more, a smaller cap is reached as connections come back. No call fails for it.

        Args:
            workers: how many in all, or ``"per_node"``.
            max_connections: the hard cap for the cluster.

        Returns:
            ``{previous_size, new_size, workers, draining}``: the caps, how many workers there are, and the numbers of
            those that are to end; they have ``drain_timeout`` seconds to finish what they have begun.

        Raises:
            ConfigError: a wrong value, or more workers than connections.
        """
        changes = {"workers": workers, "max_connections": max_connections}
        changes = {key: value for key, value in changes.items() if value is not None}
        if not changes:
            raise ConfigError("scale: give workers, max_connections or both")
        return await (await self._dispatcher()).reconfigure(changes)

    async def close(self) -> None:
        """End the pool, if this handle was constructed; a handle from :func:`get_pool` is only detached.

        Whoever waits on an ended pool gets :class:`PoolClosedError` at once.
        """
        if self._closed is not None:
            return
        self._closed = PoolClosedError(f"this handle of pool {self._name!r} was closed")
        self._known = None
        if self._breaker is not None:
            self._breaker.stop_listening()
        await self._operations.release_all()
        if self._config is not None and self._started:
            await end(self._name, f"pool {self._name!r} was closed")

    async def __aenter__(self) -> WorkflowConnectionPool:
        await self._dispatcher()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- inside ---

    @property
    def _users_name(self) -> str | None:
        """The ``application_name`` that this handle was constructed with."""
        return None if self._config is None else self._config.users_name()

    async def _run(
        self,
        mode: int,
        query: str,
        args: Any,
        timeout: float | None,
        settings: Mapping[str, str] | None = None,
        reading: Reading = FROM_PRIMARY,
    ) -> tuple[Any, Any]:
        check_statement(query)
        check_timeout(timeout)
        known = self._known  # the shortest way, for every call but the first
        if known is None or not known.is_here():
            known = await self._dispatcher()
        checked = checked_settings(settings) if settings else None
        if reading[0] == "primary":
            return await known.run(mode, query, args, timeout, checked)
        return await read(known, mode, query, args, timeout, checked, reading)

    async def token(self) -> str:
        """What has been written up to now, for ``after`` of reads on replicas, in this process or another.

        Raises:
            UnavailableError: the primary cannot be asked.
        """
        return str(await (await self._dispatcher()).token())

    async def _dispatcher(self) -> Dispatcher:
        if self._closed is not None:
            raise self._closed
        return (await self._initialize())[0]

    async def _initialize(self) -> tuple[Dispatcher, bool]:
        if self._closed is not None:
            raise self._closed
        found = await joining.connect(self._name, None if self._started else self._config)
        self._started = True
        self._known = found[0]
        return found


def _unpickle(name: str) -> WorkflowConnectionPool:
    return WorkflowConnectionPool._attach(name)


def check_pool(given: object) -> None:
    """Refuse what is neither the name of a pool nor a handle.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, str):
        if not given:
            raise ConfigError("connection_pool: give the name of a pool, or a handle")
        check_pool_name(given)
    elif not isinstance(given, WorkflowConnectionPool):
        raise ConfigError(f"connection_pool: a pool's name or handle, not {type(given).__name__}")


def get_pool(name: str) -> WorkflowConnectionPool:
    """A handle of the running pool *name*, whichever job started it.

    Raises:
        PoolNotFoundError: it does not run; names those that do.
        ConfigError: it cannot be the name of a pool.
    """
    find(check_pool_name(name))
    return WorkflowConnectionPool._attach(name)
