"""The router as its users hold it: one door for all statements, which finds the server that each may run on."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import asyncpg

from raypg import messages
from raypg.answers import answer_to, arguments_of, rows_with
from raypg.catalogue_copy import CatalogueCopy
from raypg.checks import check_statement, check_timeout, checked_settings
from raypg.core.classifier import Classification
from raypg.core.nearest import did_you_mean
from raypg.core.seen import Token
from raypg.errors import ConfigError, RaypgError
from raypg.pool import WorkflowConnectionPool, check_pool, get_pool
from raypg.reading import Served, where_of
from raypg.router_sessions import Sessions
from raypg.row import Row

__all__ = ["QueryRouterNode"]

_KEYS = frozenset(
    ("query", "params", "parameters", "operation", "session_id", "max_staleness", "after", "timeout", "settings")
) | {"fetch_mode"}
_HISTORY = 100
_MISSING = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidSchemaNameError,
)
"""What a replica says that is behind a change of the schema. (The primary's word is final.)"""


class QueryRouterNode:
    """Sends each statement where it belongs: proven reads to replicas, all else to the primary.

    It is a library in the caller's process: a statement takes the same one hop to a worker as by the pool itself.

    Args:
        name: of this router; shows in its ``repr``.
        connection_pool: name of a running pool, or a handle.
        enable_read_write_split: let replicas answer reads. Without it, or without ``replicas`` in the pool, all runs on
            the primary.
        cache_size: results to remember. Checked and kept; there is no cache yet.
        pattern_learning: likewise.
        max_staleness: seconds that a replica's data may be older than the primary's, for queries that do not say;
            ``None`` = any.
        session_timeout: seconds after which a transaction of which nothing is asked is rolled back.
        max_sessions: ids that are remembered.

    Raises:
        ConfigError: a value is wrong; names the nearest valid one.
    """

    def __init__(
        self,
        name: str = "router",
        connection_pool: str | WorkflowConnectionPool = "",
        enable_read_write_split: bool = True,
        cache_size: int = 0,
        pattern_learning: bool = False,
        *,
        max_staleness: float | None = None,
        session_timeout: float = 60.0,
        max_sessions: int = 10_000,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"name={name!r}: must be a string that is not empty")
        check_pool(connection_pool)
        for key, switch in (
            ("enable_read_write_split", enable_read_write_split),
            ("pattern_learning", pattern_learning),
        ):
            if not isinstance(switch, bool):
                raise ConfigError(f"{key}={switch!r}: must be True or False")
        for key, count, least in (("cache_size", cache_size, 0), ("max_sessions", max_sessions, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ConfigError(f"{key}={count!r}: must be a whole number, at least {least}")
        idle = session_timeout
        if isinstance(idle, bool) or not isinstance(idle, int | float) or not idle > 0:
            raise ConfigError(f"session_timeout={idle!r}: must be a positive number of seconds")
        where_of("replica", max_staleness, None)
        self.name = name
        self.enable_read_write_split = enable_read_write_split
        self.cache_size = cache_size
        self.pattern_learning = pattern_learning
        self.max_staleness = max_staleness
        self.session_timeout = float(idle)
        self.max_sessions = max_sessions
        self._given = connection_pool
        self._pool: WorkflowConnectionPool | None = None
        self._catalogue = CatalogueCopy()
        self._sessions = Sessions(max_sessions)
        self._counts: Counter[str] = Counter()
        self._by_type: Counter[str] = Counter()
        self._by_target: Counter[str] = Counter()
        self._routing_seconds = 0.0
        self._recent: deque[tuple[str, str, str | None, str]] = deque(maxlen=_HISTORY)

    def __repr__(self) -> str:
        pool = self._given if isinstance(self._given, str) else self._given.name
        return f"<QueryRouterNode {self.name!r} of pool {pool!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process gets a router like this one, with sessions of its own; token() takes along what was seen.
        settings = ("enable_read_write_split", "cache_size", "pattern_learning", "max_staleness", "session_timeout")
        kept = {key: getattr(self, key) for key in (*settings, "max_sessions")}
        return _make, (self.name, self._given, kept)

    async def process(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one statement where it belongs.

        Args:
            request: ``query`` and, as far as wanted, ``params`` (or ``parameters``): values for ``$1``, ``$2`` …;
                ``session_id``: reads of a session show what it has written and read before, and ``BEGIN`` … ``COMMIT``
                with one id are a transaction; ``max_staleness`` in seconds; ``after``: a token of another process whose
                writes must be seen; ``timeout`` in seconds; ``settings``, ``fetch_mode``: as of
                ``pool.process({"operation": "execute"})``; ``operation``: ``"execute"``.

        Returns:
            As ``execute`` of the pool, see :func:`raypg.answers.answer_to`, with ``routing_metadata``: ``target``
            (``primary`` or ``replica``), ``replica`` (its address, or None), ``query_type``, ``complexity_score`` (0 to
            1), ``routing_confidence`` (1.0: proven; 0.5: not known, so sent to the primary), ``reason`` (why it is no
            read for a replica; empty if it is), ``cache_hit``, ``routing_time_ms``, ``session_id``.

        Raises:
            ConfigError: a key is unknown or its value is wrong.
            LeaseLostError: the transaction of this session is gone. It is said once.
            UnavailableError: the database cannot be used now; what was asked for did not run.
        """
        try:
            return await self._process(request)
        except (RaypgError, TypeError, ValueError):
            self._counts["errors"] += 1
            raise

    async def get_metrics(self) -> dict[str, Any]:
        """What this router has done: ``router_metrics`` (among them ``by_query_type``, ``by_target``, and
        ``replica_refusals``: reads that a replica would not run), ``cache_stats``, ``sessions``,
        ``active_transactions``, ``routing_history``."""
        counts = self._counts
        routed = self._by_target.total()
        recent = [
            {"query_type": kind, "target": target, "replica": replica, "reason": reason}
            for kind, target, replica, reason in self._recent
        ]
        return {
            "router_metrics": {
                "queries_routed": routed,
                "cache_hits": 0,
                "cache_misses": 0,
                "routing_errors": counts["errors"],
                "avg_routing_time_ms": self._routing_seconds * 1000 / routed if routed else float("nan"),
                "by_query_type": dict(self._by_type),
                "by_target": dict(self._by_target),
                "replica_refusals": counts["refusals"],
            },
            "cache_stats": {
                "total_entries": 0,
                "total_usage": 0,
                "hit_rate": 0.0,
                "avg_usage_per_entry": 0.0,
                "cache_size_bytes": 0,
            },
            "sessions": len(self._sessions),
            "active_transactions": self._sessions.in_transaction,
            "routing_history": {"total_decisions": routed, "recent_decisions": recent},
        }

    async def classify(self, query: str) -> Classification:
        """What *query* is, and why.

        Raises:
            UnavailableError: the catalogue is not known yet, and the database cannot be asked.
        """
        check_statement(query)
        return await self._catalogue.classify(self._handle(), query)

    def token(self, session_id: str | None = None) -> str:
        """What a session has seen, as text: with ``{"after": token}`` another process sees no less.

        Raises:
            ConfigError: *session_id* is none.
        """
        return str(self._sessions.find(session_id).seen.token)

    async def close(self) -> None:
        """Roll back the open transactions, and forget all sessions. The pool goes on."""
        await self._sessions.close()

    async def __aenter__(self) -> QueryRouterNode:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- inside ---

    def _handle(self) -> WorkflowConnectionPool:
        if self._pool is None:
            self._pool = get_pool(self._given) if isinstance(self._given, str) else self._given
        return self._pool

    async def _process(self, request: Mapping[str, Any]) -> dict[str, Any]:
        given = _checked(request)
        query: str = given["query"]
        timeout: float | None = given.get("timeout")
        session = self._sessions.find(given.get("session_id"))
        if given.get("after") is not None:
            session.seen.saw(session.seen.reads(), session.seen.token.joined(Token.parse(given["after"])))
        arguments = arguments_of(given.get("params", given.get("parameters")))
        settings = given.get("settings")
        pool = self._handle()
        dispatcher = pool._known
        if dispatcher is None or not dispatcher.is_here():
            dispatcher = await pool._dispatcher()

        started = time.perf_counter()
        verdict = self._catalogue.known(query) or await self._catalogue.classify(pool, query)
        lease = await session.holds() if session.id else None
        is_change = verdict.kind == "TRANSACTION" and verdict.statements == 1 and verdict.command not in _PREPARED
        if settings and (lease is not None or is_change):
            raise ConfigError("settings are for a statement outside of a transaction: inside, use SET LOCAL")
        has_replicas = bool(dispatcher.config.replicas)
        elsewhere = has_replicas and self.enable_read_write_split and lease is None and verdict.kind == "READ"
        routing = time.perf_counter() - started

        who = _PRIMARY
        checked = checked_settings(settings) if settings else None

        async def on_a_replica() -> tuple[list[Row], str]:
            nonlocal who
            begun = session.seen.reads()
            where = where_of("replica", given.get("max_staleness", self.max_staleness), begun[0])
            assert where is not None
            try:
                (plain, status), names, who = await dispatcher.read(
                    messages.BOTH, query, arguments, timeout, checked, where
                )
            except _MISSING:
                (plain, status), names = await dispatcher.run(messages.BOTH, query, arguments, timeout, checked)
                self._sessions.wrote(session)
            else:
                session.seen.saw(begun, who.token)
            return rows_with(names, plain), status

        async def on_the_primary() -> tuple[list[Row], str]:
            if verdict.kind == "READ" and lease is None and not has_replicas:  # what it sees, all see
                (plain, status), names = await dispatcher.run(messages.BOTH, query, arguments, timeout, checked)
                return rows_with(names, plain), status
            try:
                if is_change:
                    return await session.change(dispatcher, verdict, query, pool._users_name, self.session_timeout)
                if lease is not None:
                    return await session.run(lease, query, arguments, timeout, self.session_timeout)
                (plain, status), names = await dispatcher.run(messages.BOTH, query, arguments, timeout, checked)
                return rows_with(names, plain), status
            finally:
                self._sessions.wrote(session)
                if verdict.kind == "DDL":
                    session.has_ddl = True
                if session.has_ddl and session.lease is None:
                    session.has_ddl = False
                    self._catalogue.changed()

        run = on_a_replica if elsewhere else on_the_primary
        answer = await answer_to(query, given.get("fetch_mode", "all"), run)
        if who.refused:
            self._counts["refusals"] += 1
            self._catalogue.classifier.learn(query, "a replica has refused it: it writes")
        self._note(verdict, who, routing)
        answer["routing_metadata"] = {
            "target": who.target,
            "replica": who.replica,
            "query_type": verdict.query_type,
            "complexity_score": verdict.complexity,
            "routing_confidence": 0.5 if verdict.kind == "UNKNOWN" else 1.0,
            "reason": verdict.reason,
            "cache_hit": False,
            "routing_time_ms": routing * 1000,
            "session_id": session.id or None,
            "connection_id": None if session.lease is None else session.lease.connection_id,
        }
        return answer

    def _note(self, verdict: Classification, who: Served, seconds: float) -> None:
        self._by_type[verdict.query_type] += 1
        self._by_target[who.target] += 1
        self._routing_seconds += seconds
        self._recent.append((verdict.query_type, who.target, who.replica, verdict.reason))


_PREPARED = ("COMMIT PREPARED", "ROLLBACK PREPARED")
_PRIMARY = Served("primary", None, False, Token())


def _make(name: str, pool: Any, settings: dict[str, Any]) -> QueryRouterNode:
    return QueryRouterNode(name, pool, **settings)


def _checked(request: object) -> Mapping[str, Any]:
    """*request*, if its keys are right.

    Raises:
        ConfigError: they are not.
        TypeError, StatementNotAllowedError: the query cannot travel.
    """
    if not isinstance(request, Mapping):
        raise ConfigError(f"process() takes a dict with the key 'query', not {type(request).__name__}")
    if not request.keys() <= _KEYS:
        key = next(key for key in request if key not in _KEYS)
        raise ConfigError(f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
    operation = request.get("operation", "execute")
    if operation != "execute":
        raise ConfigError(f"operation={operation!r}: a router knows only 'execute'")
    if not isinstance(request.get("query"), str):
        raise ConfigError("a request needs the key 'query', a string")
    if "params" in request and "parameters" in request:
        raise ConfigError("give params or parameters, not both: they mean the same")
    check_statement(request["query"])
    check_timeout(request.get("timeout"))
    if "max_staleness" in request:
        where_of("replica", request["max_staleness"], None)
    return request
