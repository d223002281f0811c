"""The router as its users hold it: one door for all statements, which finds the server that each may run on."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Awaitable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg import messages
from raypg.answers import answer_to, arguments_of, is_told
from raypg.catalogue_copy import CatalogueCopy
from raypg.checks import check_statement, check_timeout, checked_settings
from raypg.core.classifier import Classification
from raypg.core.patterns import Patterns
from raypg.core.seen import Token
from raypg.errors import ConfigError
from raypg.pool import WorkflowConnectionPool, check_pool, get_pool
from raypg.reading import Served, where_of
from raypg.router_cache import CACHED, Asked, RouterCache, asked_for
from raypg.router_metrics import RouterMetrics
from raypg.router_place import ON_PRIMARY, Place, is_change
from raypg.router_request import check_request
from raypg.router_sessions import Sessions
from raypg.router_statements import RouterStatements

if TYPE_CHECKING:
    pass

__all__ = ["QueryRouterNode"]

_MISSING = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidSchemaNameError,
)
"""What a replica says that is behind a change of the schema. (The primary's word is final.)"""


class QueryRouterNode(RouterStatements):
    """Sends each statement where it belongs: proven reads to replicas, all else to the primary.

    It is a library in the caller's process: a statement takes the same one hop to a worker as by the pool itself.

    Two ways in, as of the pool: :meth:`process`, whose answer says where it came from, and asyncpg's own words.

    Args:
        name: of this router; shows in its ``repr``.
        connection_pool: name of a running pool, or a handle.
        enable_read_write_split: let replicas answer reads. Without it, or without ``replicas`` in the pool, all runs on
            the primary.
        cache_size: results to keep in this process, see :mod:`raypg.router_cache` for what that promises; 0 = none.
        pattern_learning: learn how long statements take where, and whether keeping their results gains anything, and
            decide by that which replica is asked and what is kept; see :mod:`raypg.core.patterns`.
        max_staleness: seconds that a replica's data may be older than the primary's, for queries that do not say;
            ``None`` = any.
        session_timeout: seconds after which a transaction of which nothing is asked is rolled back.
        max_sessions: ids that are remembered.
        cache_ttl: seconds after which a kept result is asked for again. Writes through raypg end it at once; this
            bounds how long those are not seen who write past it.
        cache_bytes: that all kept results may take; one of them an eighth of it at most.

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
        cache_ttl: float = 5.0,
        cache_bytes: int = 64 * 1024 * 1024,
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
        counts = (("cache_size", cache_size, 0), ("cache_bytes", cache_bytes, 1), ("max_sessions", max_sessions, 1))
        for key, count, least in counts:
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ConfigError(f"{key}={count!r}: must be a whole number, at least {least}")
        for key, seconds in (("session_timeout", session_timeout), ("cache_ttl", cache_ttl)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
                raise ConfigError(f"{key}={seconds!r}: must be a positive number of seconds")
        where_of("replica", max_staleness, None)
        self.name = name
        self.enable_read_write_split = enable_read_write_split
        self.cache_size = cache_size
        self.pattern_learning = pattern_learning
        self.max_staleness = max_staleness
        self.session_timeout = float(session_timeout)
        self.max_sessions = max_sessions
        self.cache_ttl = float(cache_ttl)
        self.cache_bytes = cache_bytes
        self._given = connection_pool
        self._pool: WorkflowConnectionPool | None = None
        self._catalogue = CatalogueCopy()
        self._sessions = Sessions(max_sessions)
        self._metrics = RouterMetrics()
        self._patterns = Patterns() if pattern_learning else None
        self._cache: RouterCache | None = None
        if cache_size:
            reread = functools.partial(_reread, weakref.ref(self))
            self._cache = RouterCache(cache_size, cache_bytes, self.cache_ttl, reread, self._patterns)

    def __repr__(self) -> str:
        pool = self._given if isinstance(self._given, str) else self._given.name
        return f"<QueryRouterNode {self.name!r} of pool {pool!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process gets a router like this one, with sessions of its own; token() takes along what was seen.
        settings = ("enable_read_write_split", "cache_size", "pattern_learning", "max_staleness", "session_timeout")
        kept = {key: getattr(self, key) for key in (*settings, "max_sessions", "cache_ttl", "cache_bytes")}
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
            (``primary``, ``replica`` or ``cache``), ``replica`` (its address, or None), ``query_type``,
            ``complexity_score`` (0 to 1), ``routing_confidence`` (1.0: proven; 0.5: not known, so sent to the primary),
            ``reason`` (why it is no read for a replica; empty if it is), ``cache_hit``, ``routing_time_ms``,
            ``session_id``.

        Raises:
            ConfigError: a key is unknown or its value is wrong.
            LeaseLostError: the transaction of this session is gone. It is said once.
            UnavailableError: the database cannot be used now; what was asked for did not run.
        """
        try:
            check_request(request)
            query: str = request["query"]
            arguments = arguments_of(request.get("params", request.get("parameters")))
            place = await self._place(query, request.get("session_id"), request.get("after"), request.get("settings"))
            staleness = request.get("max_staleness", self.max_staleness)
            running = self._send(messages.BOTH, query, arguments, request.get("timeout"), staleness, place)
            answer = await answer_to(query, request.get("fetch_mode", "all"), running)
        except Exception as error:
            self._metrics.raised(error)
            raise
        verdict, session, who = place.verdict, place.session, place.who
        answer["routing_metadata"] = {
            "target": who.target,
            "replica": who.replica,
            "query_type": verdict.query_type,
            "complexity_score": verdict.complexity,
            "routing_confidence": 0.5 if verdict.kind == "UNKNOWN" else 1.0,
            "reason": verdict.reason,
            "cache_hit": who is CACHED,
            "routing_time_ms": place.seconds * 1000,
            "session_id": session.id or None,
            "connection_id": None if session.lease is None else session.lease.connection_id,
        }
        return answer

    async def get_metrics(self) -> dict[str, Any]:
        """What this router has done: ``router_metrics`` (among them ``by_query_type``, ``by_target``, and
        ``replica_refusals``: reads that a replica would not run), ``cache_stats`` (see :meth:`RouterCache.describe`),
        ``sessions``, ``active_transactions``, ``routing_history``; with ``pattern_learning`` also
        ``pattern_insights``, see :meth:`raypg.core.patterns.Patterns.insights`."""
        learnt = {} if self._patterns is None else {"pattern_insights": self._patterns.insights(time.monotonic())}
        return {
            **self._metrics.describe({} if self._cache is None else self._cache.describe()),
            **learnt,
            "sessions": len(self._sessions),
            "active_transactions": self._sessions.in_transaction,
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

    async def invalidate_cache(self, tables: str | Iterable[str] | None = None) -> int:
        """Forget what this router keeps: for who knows that something has been written past raypg.

        Args:
            tables: names of tables or views, with or without schema, as in SQL; ``None`` = everything.

        Returns:
            How many results those were.

        Raises:
            ConfigError: there is no such table.
            UnavailableError: the catalogue is not known yet, and the database cannot be asked.
        """
        bases: set[str] | None = None
        if tables is not None:
            bases = set()
            for name in [tables] if isinstance(tables, str) else tables:
                verdict = await self.classify(f"TABLE {name}")
                if not verdict.reads:
                    raise ConfigError(f"invalidate_cache: {name!r} is no table: {verdict.reason}")
                bases.update(verdict.reads)
        return 0 if self._cache is None else self._cache.invalidate(None if bases is None else frozenset(bases))

    async def close(self) -> None:
        """Roll back the open transactions, and forget all sessions and results. The pool goes on."""
        if self._cache is not None:
            await self._cache.close()
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

    async def _ask(
        self,
        mode: int,
        query: str,
        args: Any,
        session_id: str | None,
        max_staleness: float | None,
        after: str | None,
        timeout: float | None,
        settings: Mapping[str, str] | None,
    ) -> tuple[Any, Any]:
        try:
            check_statement(query)
            check_timeout(timeout)
            if max_staleness is None:
                max_staleness = self.max_staleness
            else:
                where_of("replica", max_staleness, None)
            place = await self._place(query, session_id, after, settings)
            running = self._send(mode, query, args, timeout, max_staleness, place)
            del place  # a thousand calls that wait keep as little as they can: what they keep, Python's GC visits
        except Exception as error:
            self._metrics.raised(error)
            raise
        try:
            return await running
        except Exception as error:
            if not is_told(error):
                self._metrics.raised(error)
            raise

    async def _place(self, query: str, session_id: object, after: Any, settings: Any) -> Place:
        """Decide where a statement is to run.

        Raises:
            ConfigError: *session_id*, *after* or *settings* is wrong.
            LeaseLostError: the transaction of the session is gone.
            UnavailableError: the catalogue is not known yet, and the database cannot be asked.
        """
        sessions = self._sessions
        session = sessions.shared if session_id is None else sessions.find(session_id)
        if after is not None:
            session.has_been_told(Token.parse(after), time.monotonic())
        pool = self._pool or self._handle()
        dispatcher = pool._known
        if dispatcher is None or not dispatcher.is_here():
            dispatcher = await pool._dispatcher()

        started = time.monotonic()
        verdict = self._catalogue.known(query, started) or await self._catalogue.classify(pool, query)
        lease = None if session_id is None else await session.holds()
        checked = None
        if settings:
            if lease is not None or is_change(verdict):
                raise ConfigError("settings are for a statement outside of a transaction: inside, use SET LOCAL")
            checked = checked_settings(settings)
        return Place(dispatcher, session, verdict, lease, checked, time.monotonic() - started)

    def _send(
        self, mode: int, query: str, arguments: Any, timeout: float | None, max_staleness: float | None, place: Place
    ) -> Awaitable[tuple[Any, Any]]:
        """Run a statement there, or give what is kept, and note who has answered, whatever came of it."""
        verdict = place.verdict
        if self._cache is not None and verdict.deterministic and verdict.reads and place.lease is None:
            asked = asked_for(mode, query, arguments, timeout, max_staleness, place)
            return self._by_the_cache(self._cache, asked, place)
        return self._past_the_cache(mode, query, arguments, timeout, max_staleness, place)

    def _past_the_cache(
        self, mode: int, query: str, arguments: Any, timeout: float | None, max_staleness: float | None, place: Place
    ) -> Awaitable[tuple[Any, Any]]:
        if self._patterns is not None:
            return self._watched(self._patterns, mode, query, arguments, timeout, max_staleness, place)
        return self._on_a_server(mode, query, arguments, timeout, max_staleness, place)

    def _on_a_server(
        self, mode: int, query: str, arguments: Any, timeout: float | None, max_staleness: float | None, place: Place
    ) -> Awaitable[tuple[Any, Any]]:
        dispatcher = place.dispatcher
        if place.verdict.kind != "READ" or place.lease is not None:
            return self._on_the_primary(mode, query, arguments, timeout, place)
        if not dispatcher.config.replicas:  # what it sees, all see
            self._metrics.note(place.verdict, ON_PRIMARY, place.seconds)
            return dispatcher.run(mode, query, arguments, timeout, place.settings)
        if not self.enable_read_write_split:
            return self._on_the_primary(mode, query, arguments, timeout, place)
        return self._on_a_replica(mode, query, arguments, timeout, max_staleness, place)

    async def _by_the_cache(self, cache: RouterCache, asked: Asked, place: Place) -> tuple[Any, Any]:
        found = cache.find(place.dispatcher, asked)
        who = CACHED
        if found is None:

            async def ask(mode: int, must_see: Token) -> tuple[tuple[Any, Any], Served]:
                place.must_see = must_see
                what = asked.query, asked.arguments, asked.timeout, asked.max_staleness
                return await self._past_the_cache(mode, *what, place), place.who

            found, who = await cache.read(place.dispatcher, asked, ask)
        if who is CACHED:
            place.who = CACHED
            self._metrics.note(place.verdict, CACHED, place.seconds)
        return found

    async def _watched(
        self,
        patterns: Patterns,
        mode: int,
        query: str,
        arguments: Any,
        timeout: float | None,
        max_staleness: float | None,
        place: Place,
    ) -> tuple[Any, Any]:
        started = time.monotonic()
        place.avoid = patterns.slow_ones(query, started)
        outcome = await self._on_a_server(mode, query, arguments, timeout, max_staleness, place)
        now = time.monotonic()
        rows = outcome[0][0] if mode == messages.BOTH else outcome[0]
        count = len(rows) if isinstance(rows, list) else 0
        patterns.of(query, now).asked(place.who.replica or "primary", now - started, count, now)
        return outcome

    async def _on_a_replica(
        self, mode: int, query: str, arguments: Any, timeout: float | None, max_staleness: float | None, place: Place
    ) -> tuple[Any, Any]:
        session, dispatcher = place.session, place.dispatcher
        begun = session.seen.reads()
        sent = begun[0].joined(place.must_see)
        where: messages.Where = (max_staleness, sent.plain, place.avoid) if place.avoid else (max_staleness, sent.plain)
        try:
            payload, names, who = await dispatcher.read(
                mode, query, arguments, timeout, place.settings, where, place.answered_by
            )
            place.who = who
            session.seen.saw(begun, who.token)
            return payload, names
        except _MISSING:
            if place.who.target == "primary":
                raise
            place.who = ON_PRIMARY
            try:
                return await dispatcher.run(mode, query, arguments, timeout, place.settings)
            finally:
                self._sessions.wrote(session)
        finally:
            self._metrics.note(place.verdict, place.who, place.seconds)
            if place.who.refused:
                self._metrics.refusals += 1
                self._catalogue.classifier.learn(query, "a replica has refused it: it writes")

    async def _on_the_primary(
        self, mode: int, query: str, arguments: Any, timeout: float | None, place: Place
    ) -> tuple[Any, Any]:
        session, verdict, idle = place.session, place.verdict, self.session_timeout
        try:
            if is_change(verdict):
                users_name = self._handle()._users_name
                return await session.change(mode, place.dispatcher, verdict, query, users_name, idle)
            if place.lease is not None:
                return await session.run(mode, place.lease, query, arguments, timeout, idle)
            return await place.dispatcher.run(mode, query, arguments, timeout, place.settings)
        finally:
            self._metrics.note(verdict, ON_PRIMARY, place.seconds)
            self._sessions.wrote(session)
            if verdict.kind == "DDL":
                session.has_ddl = True
            if session.has_ddl and session.lease is None:
                session.has_ddl = False
                self._catalogue.changed()


async def _reread(router: weakref.ref[QueryRouterNode]) -> bool:
    """Read the catalogue anew, while its router is there."""
    known = router()
    return known is not None and await known._catalogue.reread(known._handle())


def _make(name: str, pool: Any, settings: dict[str, Any]) -> QueryRouterNode:
    return QueryRouterNode(name, pool, **settings)
