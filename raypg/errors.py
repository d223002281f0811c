"""The errors of raypg.

Each says what happened, to what, and what to do. They cross process boundaries, so every class hands *all* its
arguments to ``super().__init__`` positionally: Ray and pickle rebuild an exception from ``args`` and nothing else.

An error of the SQL itself is not here: it is raised as asyncpg's own class (``asyncpg.UniqueViolationError`` …),
with the same attributes, so that code written for asyncpg goes on working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raypg.base_error import RaypgError
from raypg.data_errors import (
    ArrowValueError,
    BatchConflictError,
    DataLostError,
    IncompatibleDataError,
    LedgerError,
    SnapshotLostError,
)

__all__ = [
    "AlertRuleNotFoundError",
    "ArrowValueError",
    "BatchConflictError",
    "CircuitBreakerError",
    "ConfigError",
    "ConnectError",
    "ConnectionLostError",
    "DataLostError",
    "IncompatibleDataError",
    "LeaseLostError",
    "LedgerError",
    "OutcomeUnknownError",
    "PipelineClosedError",
    "PoolClosedError",
    "PoolConflictError",
    "PoolExhaustedError",
    "PoolNotFoundError",
    "PoolNotInitializedError",
    "PoolVersionError",
    "QueryTimeoutError",
    "RaypgError",
    "ResultLostError",
    "SnapshotLostError",
    "StatementNotAllowedError",
    "StatementNotRunError",
    "TransactionRolledBackError",
    "UnavailableError",
    "UnknownFigureError",
    "WorkerDrainingError",
]


class ConfigError(RaypgError, ValueError):
    """A setting, argument or operation is wrong. Nothing was started. ``args``: (message,)."""


class UnknownFigureError(ConfigError):
    """The condition of an alert names a figure that there is not. No rule was added.

    Args:
        condition: the whole text.
        name: what is no figure.
        known: the figures that there are.
        nearest: the one that is most like *name*, if any is near.
    """

    def __init__(self, condition: str, name: str, known: Sequence[str] = (), nearest: str | None = None) -> None:
        super().__init__(condition, name, tuple(known), nearest)
        self.condition = condition
        self.name = name
        self.known = tuple(known)
        self.nearest = nearest

    def __str__(self) -> str:
        guess = f"did you mean {self.nearest!r}?" if self.nearest else f"there are {', '.join(self.known)}"
        return f"condition {self.condition!r}: there is no figure {self.name!r} ({guess})"


class AlertRuleNotFoundError(RaypgError, LookupError):
    """No alert rule has this id.

    Args:
        id: what was asked for.
        known: the ids that there are.
        nearest: the one that is most like *id*, if any is near.
    """

    def __init__(self, id: str, known: Sequence[str] = (), nearest: str | None = None) -> None:
        super().__init__(id, tuple(known), nearest)
        self.id = id
        self.known = tuple(known)
        self.nearest = nearest

    def __str__(self) -> str:
        guess = f"did you mean {self.nearest!r}?" if self.nearest else f"there are: {', '.join(self.known) or 'none'}"
        return f"no alert rule has the id {self.id!r} ({guess})"


class StatementNotAllowedError(RaypgError, ValueError):
    """A statement that cannot run as it was given, e.g. ``BEGIN`` without a lease. Nothing was sent."""


class PoolNotFoundError(RaypgError, LookupError):
    """No pool of that name runs in this Ray cluster.

    Args:
        name: the name that was asked for.
        known: names of the pools that do run.
    """

    def __init__(self, name: str, known: Sequence[str] = ()) -> None:
        super().__init__(name, tuple(known))
        self.name = name
        self.known = tuple(known)

    def __str__(self) -> str:
        running = ", ".join(self.known) if self.known else "none"
        return (
            f"no pool named {self.name!r} runs in this Ray cluster (running: {running}); start it with "
            f"WorkflowConnectionPool(name={self.name!r}, …).process({{'operation': 'initialize'}}) or `raypg up`"
        )


class PoolNotInitializedError(RaypgError):
    """A handle was sent to another process before its pool existed. ``args``: (message,)."""


class PoolConflictError(RaypgError):
    """A pool of this name runs already, with other settings.

    Args:
        name: the pool.
        differences: setting → (what runs, what was asked for).
        identity: whether the difference is in *which database* (host, port, database, user, TLS).
    """

    def __init__(self, name: str, differences: Mapping[str, tuple[Any, Any]], identity: bool = False) -> None:
        super().__init__(name, dict(differences), identity)
        self.name = name
        self.differences = dict(differences)
        self.identity = identity

    def __str__(self) -> str:
        what = "; ".join(f"{key}: runs with {old!r}, asked for {new!r}" for key, (old, new) in self.differences.items())
        remedy = (
            f"it is another database: choose another name, or end the old pool with `raypg down {self.name}`"
            if self.identity
            else f"leave these settings out to share the running pool, change it with pool.reconfigure(…), "
            f"or end it with `raypg down {self.name}`"
        )
        return f"a pool named {self.name!r} runs already with other settings ({what}); {remedy}"


class PoolVersionError(RaypgError):
    """The running pool was started by another version of raypg, Ray or Python.

    Args:
        name: the pool.
        differences: component → (version that runs, version here).
    """

    def __init__(self, name: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__(name, dict(differences))
        self.name = name
        self.differences = dict(differences)

    def __str__(self) -> str:
        what = "; ".join(f"{key} {old} there, {new} here" for key, (old, new) in self.differences.items())
        return (
            f"pool {self.name!r} was started by other versions ({what}); use the same here, or end it with "
            f"`raypg down {self.name}` and start it anew"
        )


class UnavailableError(RaypgError):
    """The database cannot be used now. What was asked for did not run. ``args``: (message, …)."""


class WorkerDrainingError(UnavailableError):
    """A worker takes no more work, as it is to end. Nothing was run, and another worker is asked: callers see this only
    if there is none. ``args``: (message,)."""


class PoolClosedError(UnavailableError):
    """The pool was closed. ``args``: (message,)."""


class CircuitBreakerError(UnavailableError):
    """The circuit breaker is open: the database is unwell, or somebody has closed it for maintenance. Nothing was sent.

    Args:
        pool: the pool.
        state: ``open`` or ``half_open``.
        reason: what opened it.
        retry_after: seconds until calls may be permitted again; ``None`` = when somebody lifts it.
        isolated: whether only the worker that was asked is cut off from the database, not the whole pool.
    """

    def __init__(
        self,
        pool: str,
        state: str = "open",
        reason: str = "",
        retry_after: float | None = None,
        isolated: bool = False,
    ) -> None:
        super().__init__(pool, state, reason, retry_after, isolated)
        self.pool = pool
        self.state = state
        self.reason = reason
        self.retry_after = retry_after
        self.isolated = isolated

    def __str__(self) -> str:
        where = "a worker of pool" if self.isolated else "pool"
        when = (
            "until it is lifted by pool.circuit_breaker.force_close(…)"
            if self.retry_after is None
            else f"try again in {self.retry_after:.1f} s"
        )
        return f"the circuit breaker of {where} {self.pool!r} is {self.state} ({self.reason}); {when}"


class PoolExhaustedError(UnavailableError, TimeoutError):
    """No connection became free in time, or too many callers wait already. The statement did not run.

    Args:
        name: the pool.
        waited: seconds this caller waited.
        depth: callers in the queue of the worker that was asked.
        limit: most callers that may wait there.
        connections: connections that worker may have.
        reason: ``"timeout"`` (waited too long) or ``"full"`` (refused at once).
        use: what those connections are doing, in words; empty if all are in use.
    """

    def __init__(
        self,
        name: str,
        waited: float,
        depth: int,
        limit: int,
        connections: int,
        reason: str = "timeout",
        use: str = "",
    ) -> None:
        super().__init__(name, waited, depth, limit, connections, reason, use)
        self.name = name
        self.waited = waited
        self.depth = depth
        self.limit = limit
        self.connections = connections
        self.reason = reason
        self.use = use

    def __str__(self) -> str:
        what = (
            f"the queue is full ({self.depth} of {self.limit} callers wait)"
            if self.reason == "full"
            else f"no connection became free within {self.waited:.3g} s "
            f"({self.depth} callers wait, the limit is {self.limit})"
        )
        return (
            f"pool {self.name!r} is exhausted: {what}, {self.use or f'all {self.connections} connections are in use'}; "
            "shorten the statements, hold leases for less time, or raise max_connections"
        )


class ConnectError(UnavailableError, ConnectionError):
    """PostgreSQL could not be reached, or would not let us in. The statement did not run.

    Args:
        message: what happened, to which server, and what to do; never contains a password.
        category: ``connection_timeout``, ``connection_refused``, ``authentication_failed``, ``query_error`` or
            ``pool_exhausted`` (the server has no free slot).
        sqlstate: the server's code, if it answered.
    """

    def __init__(self, message: str, category: str = "connection_refused", sqlstate: str | None = None) -> None:
        super().__init__(message, category, sqlstate)
        self.args = (message, category, sqlstate)  # OSError takes the third of three for a file's name, and drops it
        self.message = message
        self.category = category
        self.sqlstate = sqlstate

    def __str__(self) -> str:
        return self.message


class ConnectionLostError(UnavailableError, ConnectionError):
    """The connection died under a statement that only reads; it had no effect, and may be asked again.

    ``args``: (message,).
    """


class QueryTimeoutError(RaypgError, TimeoutError):
    """A statement took longer than its timeout; it was cancelled on the server and had no effect.

    Args:
        message: what took too long.
        timeout: the limit in seconds.
    """

    def __init__(self, message: str, timeout: float | None = None) -> None:
        super().__init__(message, timeout)
        self.message = message
        self.timeout = timeout

    def __str__(self) -> str:
        return self.message


class OutcomeUnknownError(RaypgError):
    """A statement was sent, and whether it took effect cannot be known. It was not, and will not be, sent again.

    Args:
        message: what was lost, and when.
        statement: the SQL text, without parameters, shortened.
    """

    def __init__(self, message: str, statement: str = "") -> None:
        super().__init__(message, statement)
        self.message = message
        self.statement = statement

    def __str__(self) -> str:
        tail = f" [{self.statement}]" if self.statement else ""
        return f"{self.message}; look at the data before you repeat it{tail}"


class ResultLostError(RaypgError):
    """A statement took effect, but the rows that it returned could not be read, and are lost.

    For instance of ``INSERT … RETURNING`` with a composite type that was altered since it was last read. Do not repeat
    the statement: read what it wrote. The connection is good.

    Args:
        message: what took effect (inside a transaction: as far as that is committed), why the rows could not be read.
        statement: the SQL text, without parameters, shortened.
    """

    def __init__(self, message: str, statement: str = "") -> None:
        super().__init__(message, statement)
        self.message = message
        self.statement = statement

    def __str__(self) -> str:
        tail = f" [{self.statement}]" if self.statement else ""
        return f"{self.message}{tail}"


class LeaseLostError(RaypgError):
    """The connection of a lease is gone: its deadline passed, it was released, or its worker or backend died.

    An open transaction was rolled back by the server. ``args``: (message,).
    """


class TransactionRolledBackError(RaypgError):
    """COMMIT was asked for, but a statement inside had failed: PostgreSQL rolled the transaction back.

    PostgreSQL answers such a COMMIT with the command tag ``ROLLBACK`` and no error (PostgreSQL manual, COMMIT).
    ``args``: (message,).
    """


class StatementNotRunError(RaypgError):
    """A statement of a pipeline that did not run, or was rolled back, because another one failed.

    Args:
        message: why.
        culprit: query id of the statement that failed, if it is known.
    """

    def __init__(self, message: str, culprit: str | None = None) -> None:
        super().__init__(message, culprit)
        self.message = message
        self.culprit = culprit

    def __str__(self) -> str:
        return self.message


class PipelineClosedError(RaypgError):
    """The pipeline was closed. ``args``: (message,)."""
