"""``pool.process({"operation": …})``: one method for each operation, with the keys and shapes of the guide."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from raypg import messages, monitoring
from raypg.answers import answer_to, arguments_of, check_fetch_mode
from raypg.core.nearest import did_you_mean
from raypg.errors import ConfigError
from raypg.lease import LeasedConnection, acquire
from raypg.metrics_access import ANSWER_WITHIN, snapshots
from raypg.metrics_status import comprehensive, counters, statistics
from raypg.replica_status import replicas_of

if TYPE_CHECKING:
    from raypg.pool import WorkflowConnectionPool


_KEYS: dict[str, frozenset[str]] = {
    "initialize": frozenset(),
    "acquire": frozenset({"timeout", "lease_timeout"}),
    "release": frozenset({"connection_id"}),
    "execute": frozenset({"query", "params", "connection_id", "fetch_mode", "timeout", "settings"}),
    "stats": frozenset(),
    "get_status": frozenset(),
    "get_pool_statistics": frozenset(),
    "get_comprehensive_status": frozenset(),
    "export_metrics": frozenset(),
    "start_monitoring": frozenset(),
    "stop_monitoring": frozenset(),
    "adjust_pool_size": frozenset({"new_size"}),
    "close": frozenset(),
}
"""The keys that each operation takes, beside ``operation``; each is a method of that name."""


class Operations:
    """The operations of one handle. Leases made by ``acquire`` belong to the handle that made them."""

    def __init__(self, pool: WorkflowConnectionPool) -> None:
        # Weakly: a handle that is dropped with leases must go at once, not when cycles are looked for. They come back
        # with it.
        self._pool: WorkflowConnectionPool = weakref.proxy(pool)
        self._leases: dict[str, LeasedConnection] = {}

    async def run(self, request: Mapping[str, Any]) -> Any:
        """Do what *request* asks.

        Raises:
            ConfigError: not a mapping, unknown operation, unknown or missing key.
        """
        if not isinstance(request, Mapping):
            raise ConfigError(f"process() takes a dict with the key 'operation', not {type(request).__name__}")
        name = request.get("operation")
        if not isinstance(name, str):
            raise ConfigError(f"operation={name!r}: must be a string, one of {', '.join(_KEYS)}")
        if name not in _KEYS:
            raise ConfigError(f"unknown operation {name!r}{did_you_mean(str(name), _KEYS)}")
        operation: Callable[..., Awaitable[Any]] = getattr(self, name)
        keys = _KEYS[name]
        arguments = {key: value for key, value in request.items() if key != "operation"}
        for key in arguments:
            if key not in keys:
                raise ConfigError(f"operation {name!r}: unknown key {key!r}{did_you_mean(str(key), keys)}")
        return await operation(**arguments)

    async def initialize(self) -> dict[str, Any]:
        """Start the pool, or join the one that runs."""
        dispatcher, first = await self._pool._initialize()
        config = dispatcher.config
        return {
            "status": "initialized" if first else "already_initialized",
            "pool_name": config.name,
            "min_connections": config.min_connections,
            "max_connections": config.max_connections,
            "adaptive_sizing": config.adaptive_sizing,
            "query_routing": config.enable_query_routing,
        }

    async def acquire(self, timeout: float | None = None, lease_timeout: float | None = None) -> dict[str, Any]:
        """Lease a connection: ``{connection_id, health_score, acquisition_time_ms}``."""
        started = time.perf_counter()
        lease = await acquire(await self._pool._dispatcher(), timeout, lease_timeout, None, self._pool._users_name)
        # The id alone opens nothing: the lease itself is found in this handle, and its token stays there.
        self._leases[lease.connection_id] = lease
        return {
            "connection_id": lease.connection_id,
            "health_score": lease.health_score,
            "acquisition_time_ms": (time.perf_counter() - started) * 1000,
        }

    async def release(self, connection_id: str | None = None) -> dict[str, Any]:
        """Give a leased connection back: ``{status: "released", connection_id}``."""
        lease = self._lease(connection_id)
        del self._leases[lease.connection_id]
        await lease.release()
        return {"status": "released", "connection_id": connection_id}

    async def execute(
        self,
        query: str | None = None,
        params: Any = None,
        connection_id: str | None = None,
        fetch_mode: str = "all",
        timeout: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run a statement, on a leased connection or on any.

        Returns:
            ``{success, data, execution_time_ms, …}``. Rows as a list of dicts; with ``fetch_mode="one"`` one dict or
            ``None``; a statement without rows gives ``[{"rows_affected": n}]``. What the server says against the
            statement comes back as ``{success: False, data: None, error, error_category, sqlstate, …}``.

        Raises:
            UnavailableError: the database cannot be used now.
        """
        if not isinstance(query, str):
            raise ConfigError("operation 'execute' needs the key 'query', a string")
        arguments = arguments_of(params)
        lease = None if connection_id is None else self._lease(connection_id)
        if lease is not None and settings:
            raise ConfigError("settings are for a statement on any connection: on a lease, use SET")

        check_fetch_mode(fetch_mode)
        if lease is not None:
            running = lease._run(messages.BOTH, query, arguments, timeout)
        else:
            running = self._pool._run(messages.BOTH, query, arguments, timeout, settings)
        answer = await answer_to(query, fetch_mode, running)
        answer["connection_id"] = connection_id
        return answer

    async def adjust_pool_size(self, new_size: Any = None) -> dict[str, Any]:
        """Change ``max_connections`` of the whole pool: ``{success, previous_size, new_size}``, or why not."""
        if isinstance(new_size, bool) or not isinstance(new_size, int) or new_size < 1:
            raise ConfigError(f"new_size={new_size!r}: must be a whole number of connections, at least 1")
        dispatcher = await self._pool._dispatcher()
        try:
            done = await dispatcher.reconfigure({"max_connections": new_size})
            return {"success": True, "previous_size": done["previous_size"], "new_size": done["new_size"]}
        except ConfigError as error:
            return {"success": False, "reason": str(error)}

    async def close(self) -> dict[str, Any]:
        """Close the handle; the pool ends with it if the handle was constructed."""
        await self._pool.close()
        return {"status": "closed"}

    async def release_all(self) -> None:
        """Give back what ``acquire`` has leased and ``release`` was not called for."""
        leases = tuple(self._leases.values())
        self._leases.clear()
        await asyncio.gather(*(lease.release() for lease in leases), return_exceptions=True)

    # --- figures ---

    async def get_status(self) -> dict[str, Any]:
        """Every connection with its health, use, and, if it is leased, its owner (see :func:`raypg.owner.describe`).

        Of a worker that does not answer within 2 s (``reachable`` is false) nothing is known, and nothing is counted.
        """
        status = await self._figures()
        return {
            "connections": {
                f"{worker['index']}/{name}": connection
                for worker in status["workers"]
                if worker["figures"]
                for name, connection in worker["figures"]["connections"].items()
            },
            "pool_size": _sum(status, "total"),
            "active_count": _sum(status, "active"),
            "available_count": _sum(status, "idle"),
            "waiting_count": _sum(status, "waiting"),
            "max_connections": status["max_connections"],
            "replicas": replicas_of(_figures_of(status)),
            "workers": [
                {
                    **{key: worker[key] for key in ("index", "node", "budget", "state", "reachable")},
                    "isolated": _isolated(worker),
                }
                for worker in status["workers"]
            ],
            "reclaimed_leases": {
                why: sum(figures["reclaimed_leases"][why] for figures in _figures_of(status))
                for why in ("process died", "forgotten", "deadline")
            },
        }

    async def get_pool_statistics(self) -> dict[str, Any]:
        """How the pool stands, and its rates and times of the last minute.

        A rate of nothing is 0.0, a time of nothing NaN. ``error_rate`` counts calls that never ran (no connection
        became free, the database cannot be reached, the breaker is open) as failed.
        """
        return statistics(self._pool.name, await self._snapshot())

    async def get_comprehensive_status(self) -> dict[str, Any]:
        """Everything; see :func:`raypg.metrics_status.comprehensive`."""
        known, breaker, url = await asyncio.gather(
            self._snapshot(),
            self._pool.circuit_breaker.status(within=ANSWER_WITHIN),
            asyncio.to_thread(monitoring.url_for, self._pool.name),
        )
        return comprehensive(self._pool.name, known, breaker, url)

    async def stats(self) -> dict[str, Any]:
        """What was counted since the pool began."""
        return counters(self._pool.name, await self._snapshot())

    async def export_metrics(self) -> dict[str, str]:
        """``{"prometheus_metrics": text}``: this pool's metrics as Prometheus reads them, from a file or by HTTP."""
        from raypg.exposition import render  # not for those who only use a pool

        return {"prometheus_metrics": render({self._pool.name: await self._snapshot()})}

    async def start_monitoring(self) -> dict[str, Any]:
        """Have a dashboard on ``monitoring_host``:``monitoring_port`` of this node, which shows all pools of the
        cluster: ``{status, dashboard_url}``, ``started`` or ``already_running``.

        The pool need not run yet, and is not started for it. The dashboard ends with the last pool that asked for it.

        Raises:
            UnavailableError: the port is in use; names it.
        """
        config = self._pool._config or (await self._pool._dispatcher()).config
        return await monitoring.start(self._pool.name, config.monitoring_host, config.monitoring_port)

    async def stop_monitoring(self) -> dict[str, Any]:
        """This pool wants no dashboard any more: ``{status, dashboard_url, running_for}``, ``stopped`` or
        ``not_running``. It goes on for the other pools that have asked for it (``running_for``)."""
        return await monitoring.stop(self._pool.name)

    # --- inside ---

    def _lease(self, connection_id: Any) -> LeasedConnection:
        lease = self._leases.get(connection_id) if isinstance(connection_id, str) else None
        if lease is None:
            raise ConfigError(
                f"connection_id={connection_id!r} is not a connection that this handle has acquired"
                f"{did_you_mean(str(connection_id), self._leases)}"
            )
        return lease

    async def _snapshot(self) -> dict[str, Any]:
        await self._pool._dispatcher()
        return (await snapshots([self._pool.name]))[self._pool.name]

    async def _figures(self) -> dict[str, Any]:
        dispatcher = await self._pool._dispatcher()
        return await dispatcher.ask_pool("status")  # type: ignore[no-any-return]


def _figures_of(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [worker["figures"] for worker in status["workers"] if worker["figures"]]


def _isolated(worker: dict[str, Any]) -> bool:
    """Whether it knows that it cannot reach the database."""
    return worker["figures"] is not None and worker["figures"]["circuit_breaker"]["state"] in ("open", "half_open")


def _sum(status: dict[str, Any], key: str) -> int:
    return sum(figures[key] for figures in _figures_of(status))
