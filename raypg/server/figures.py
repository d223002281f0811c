"""What one worker counts and times. Adding is all that is done while statements run; once a second it is taken away."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg.core.pool_metrics import MOST_CODES, OTHER, Delta
from raypg.core.sketch import LEAST, LOWEST, SCALE, Sketch
from raypg.core.sqlstate import error_category, meaning
from raypg.core.statements import identify, shown
from raypg.errors import CircuitBreakerError, ConnectError, PoolClosedError, PoolExhaustedError, WorkerDrainingError
from raypg.server.outcomes import ConnectionLost, outcome_of
from raypg.server.worker_status import gauges

if TYPE_CHECKING:
    from raypg.server.connection import ServerConnection
    from raypg.server.engine import Engine
    from raypg.server.work import Statement

MOST_GROUPS = 200
"""Fingerprints that a worker watches at a time."""

MOST_TEXTS = 4096
"""Texts whose fingerprint is remembered (the hash of the text is: no text is kept)."""

MOST_RECENT = 10
"""Errors that are told one by one between two looks."""

TIMED_ROWS = 100
"""From so many rows on, the time is taken that it needs to turn an answer into rows: part of ``fetch``."""

_ceil, _log = math.ceil, math.log


class _Watched:
    """The statements of one fingerprint since the last look."""

    __slots__ = ("buckets", "command", "errors", "fingerprint", "seconds", "text")

    def __init__(self, fingerprint: str, command: str, text: str) -> None:
        self.fingerprint = fingerprint
        self.command = command
        self.text = text
        self.buckets: dict[int, int] = {}
        self.seconds = 0.0
        self.errors = 0


class Figures:
    """What happened in this worker: since it began (the plain counters), and since the last :meth:`take` (the rest)."""

    __slots__ = (
        "_codes",
        "_errors",
        "_floor",
        "_groups",
        "_groups_by_text",
        "_number",
        "_recent",
        "_rest",
        "_taken",
        "_taken_at",
        "_taken_seconds",
        "connect",
        "exhausted",
        "fetch",
        "first_uses",
        "health_check",
        "health_check_failures",
        "refused_calls",
        "rejected",
        "released",
        "replica_reads",
        "retries",
        "rows",
        "together",
        "use",
        "wait",
        "written",
    )

    def __init__(self) -> None:
        self.retries = 0
        self.together = 0  # reads that shared a write to the server with others
        self.exhausted = 0
        self.rejected = 0
        self.refused_calls = 0
        self.first_uses = 0  # acquisitions of a connection that nobody had used
        self.released = 0
        self.rows = 0
        self.written = 0
        self.replica_reads = 0
        self.health_check_failures = 0
        self.wait, self.connect, self.use = Sketch(), Sketch(), Sketch()
        self.fetch, self.health_check = Sketch(), Sketch()
        self._groups: dict[str, _Watched] = {}
        self._groups_by_text: dict[int, _Watched] = {}
        self._rest: dict[str, _Watched] = {}
        self._floor = 0.0
        self._errors: Counter[tuple[str, str]] = Counter()
        self._codes: set[str] = set()
        self._recent: deque[dict[str, Any]] = deque(maxlen=MOST_RECENT)
        self._number = 0
        self._taken: Counter[str] = Counter()
        self._taken_seconds = {"execution": 0.0, "wait": 0.0}
        self._taken_at = time.monotonic()

    # --- while statements run: what Sketch.add does is written out, as a call takes as long as all of it ---

    def waited(self, seconds: float, connection: ServerConnection) -> None:
        """A caller waited this long for *connection*."""
        wait = self.wait
        wait.total += seconds
        bucket = _ceil(_log(seconds) * SCALE) if seconds > LEAST else LOWEST
        try:
            wait.buckets[bucket] += 1
        except KeyError:
            wait.buckets[bucket] = 1
        connection.uses += 1
        if not connection.used:
            self.first_uses += 1

    def waited_together(self, now: float, statements: Sequence[Statement | None], connection: ServerConnection) -> None:
        """Several callers get *connection* now; a third less work than to say so for each."""
        buckets = self.wait.buckets
        total = 0.0
        for statement in statements:
            if statement is not None:
                seconds = now - statement.arrived
                total += seconds
                bucket = _ceil(_log(seconds) * SCALE) if seconds > LEAST else LOWEST
                buckets[bucket] = buckets.get(bucket, 0) + 1
        self.wait.total += total
        connection.uses += len(statements)
        if not connection.used:
            self.first_uses += len(statements)

    def given_back(self, connection: ServerConnection) -> None:
        """Its callers need *connection* no longer."""
        if connection.uses:
            self.use.add(time.monotonic() - connection.taken_at)
            self.released += connection.uses
            connection.uses = 0

    def ran(self, seconds: float, failed: bool, sql: str = "", error: BaseException | None = None) -> None:
        """A statement took this long. *error* says why it failed."""
        try:
            group = self._groups_by_text[hash(sql)]
        except KeyError:
            group = self._group(sql)
        group.seconds += seconds
        bucket = _ceil(_log(seconds) * SCALE) if seconds > LEAST else LOWEST
        try:
            group.buckets[bucket] += 1
        except KeyError:
            group.buckets[bucket] = 1
        if failed:
            group.errors += 1
            self._failed(error, group, 1)

    def ran_together(
        self, statements: int, failed: int, seconds: float, sql: str = "", error: BaseException | None = None
    ) -> None:
        """A group of statements took this long together. *error* is one of theirs."""
        each = seconds / statements
        group = self._groups_by_text.get(hash(sql)) or self._group(sql)
        group.seconds += seconds
        bucket = _ceil(_log(each) * SCALE) if each > LEAST else LOWEST
        group.buckets[bucket] = group.buckets.get(bucket, 0) + statements
        if failed:
            group.errors += failed
            self._failed(error, group, failed)

    def refused(self, error: BaseException, calls: int = 1) -> None:
        """So many calls never ran, because of *error*."""
        if isinstance(error, PoolClosedError | WorkerDrainingError) or not calls:  # the latter are run elsewhere
            return
        self.refused_calls += calls
        if isinstance(error, CircuitBreakerError):
            self.rejected += calls
            return
        if isinstance(error, PoolExhaustedError):
            self.exhausted += calls
        self._failed(error, None, calls)

    def connected(self, seconds: float) -> None:
        """A connection was opened."""
        self.connect.add(seconds)

    def pinged(self, seconds: float, answered: bool) -> None:
        """An idle connection was asked whether it is there."""
        self.health_check.add(seconds)
        self.health_check_failures += not answered

    def fetched(self, mode: int, records: Sequence[asyncpg.Record], status: str) -> tuple[Any, tuple[str, ...] | None]:
        """Turn an answer into plain rows, as :func:`outcome_of` does."""
        count = len(records)
        self.rows += count
        if count < TIMED_ROWS:
            return outcome_of(mode, records, status)
        started = time.monotonic()
        outcome = outcome_of(mode, records, status)
        self.fetch.add(time.monotonic() - started)
        return outcome

    def wrote(self, status: str) -> None:
        """A statement ended with this command tag; the count in it, if it writes rows, is at its end."""
        if status[:1] in "IUDMC":  # INSERT 0 7, UPDATE 7, DELETE 7, MERGE 7, COPY 7; but CREATE TABLE …
            count = status.rpartition(" ")[2]
            if count.isdigit():
                self.written += int(count)

    def wrote_each(self, sql: str, times: int) -> None:
        """*sql* ran so many times, and nobody has told how many rows it wrote: one each, if it writes."""
        self.wrote(f"{sql.lstrip()[:1].upper()} {times}")

    def portion(self, seconds: float, rows: int) -> None:
        """A portion of a cursor took so long."""
        self.rows += rows
        self.fetch.add(seconds)

    def _group(self, sql: str) -> _Watched:
        """Where *sql* belongs."""
        statement = identify(sql)
        group = self._groups.get(statement.fingerprint)
        if group is None:
            if len(self._groups) >= MOST_GROUPS:
                self._make_room()
            group = self._groups[statement.fingerprint] = _Watched(*statement, shown(sql, statement))
        if len(self._groups_by_text) >= MOST_TEXTS:
            self._groups_by_text.clear()
        self._groups_by_text[hash(sql)] = group
        return group

    def _make_room(self) -> None:
        """Watch no longer what has not run lately, or, if all have, the half that took less time."""
        self._groups_by_text.clear()
        kept = {name: group for name, group in self._groups.items() if group.buckets}
        if len(kept) > MOST_GROUPS // 2:
            order = sorted(kept.values(), key=lambda group: group.seconds)
            for group in order[: len(order) - MOST_GROUPS // 2]:
                del kept[group.fingerprint]
                rest = self._rest.setdefault(group.command, _Watched("", group.command, ""))
                for bucket, count in group.buckets.items():
                    rest.buckets[bucket] = rest.buckets.get(bucket, 0) + count
                rest.seconds += group.seconds
                rest.errors += group.errors
                self._floor = max(self._floor, group.seconds)
        self._groups = kept

    def _failed(self, error: BaseException | None, group: _Watched | None, count: int) -> None:
        kind = "" if error is None else type(error).__name__
        sqlstate, category = _code(error)
        if sqlstate and sqlstate not in self._codes:
            if len(self._codes) >= MOST_CODES or not sqlstate.isalnum():
                sqlstate = OTHER
            self._codes.add(sqlstate)
        self._errors[category, sqlstate] += count
        # Not the server's message: it quotes values.
        message = str(error) if isinstance(error, ConnectError | PoolExhaustedError) else meaning(sqlstate).name
        self._recent.append(
            {
                "at": time.monotonic(),
                "command": "" if group is None else group.command,
                "fingerprint": "" if group is None else group.fingerprint,
                "error_type": kind,
                "message": message if sqlstate or not isinstance(error, TimeoutError) else "it took too long",
                "category": category,
                "sqlstate": sqlstate,
            }
        )

    # --- taking it away ---

    def take(self, engine: Engine) -> Delta:
        """What happened since the last call, and what there is now."""
        now = time.monotonic()
        groups = [
            (group.fingerprint, group.command, group.text, group.buckets, group.seconds, group.errors)
            for watched in (self._groups, self._rest)
            for group in watched.values()
            if group.buckets
        ]
        for group in self._groups.values():
            if group.buckets:
                group.buckets, group.seconds, group.errors = {}, 0.0, 0
        self._rest = {}
        totals = self._totals(engine, groups)
        counts = {name: count - self._taken[name] for name, count in totals.items() if count != self._taken[name]}
        self._taken.update(counts)
        sketches = {
            "wait": self.wait,
            "connect": self.connect,
            "use": self.use,
            "fetch": self.fetch,
            "health_check": self.health_check,
        }
        self._taken_seconds["execution"] += sum(group[4] for group in groups)
        self._taken_seconds["wait"] += self.wait.total
        errors, self._errors = dict(self._errors), Counter()
        recent, self._recent = self._recent, deque(maxlen=MOST_RECENT)
        floor, self._floor = self._floor, 0.0
        since, self._taken_at = self._taken_at, now
        self._number += 1
        lags = {} if engine.replicas is None else engine.replicas.lags()
        return {
            "seq": self._number,
            "age": now,  # until it is sent
            "seconds": now - since,
            "counts": counts,
            "times": {name: sketch.take() for name, sketch in sketches.items() if sketch.buckets},
            "groups": groups,
            "floor": floor,
            "errors": errors,
            "recent": [{**error, "ago": now - error["at"]} for error in recent],
            "gauges": gauges(engine),
            "replicas": lags,
        }

    def _totals(self, engine: Engine, groups: list[tuple[Any, ...]]) -> dict[str, int]:
        """All counters since the worker began."""
        servers = [each.connections for each in engine.servers]
        acquired = self._taken["acquired"] + self.wait.count
        checks = self._taken["health_checks"] + self.health_check.count
        return {
            "queries": self._taken["queries"] + sum(sum(group[3].values()) for group in groups),
            "errors": self._taken["errors"] + sum(group[5] for group in groups),
            "refused": self.refused_calls,
            "exhausted": self.exhausted,
            "rejected": self.rejected,
            "retries": self.retries,
            "together": self.together,
            "acquired": acquired,
            "reused": acquired - self.first_uses,
            "released": self.released,
            "created": sum(connections.created for connections in servers),
            "recycled": sum(connections.recycled for connections in servers),
            "connect_failures": sum(connections.failed for connections in servers),
            "health_checks": checks,
            "health_check_failures": self.health_check_failures,
            "rows": self.rows,
            "written": self.written,
            "replica_reads": self.replica_reads,
        }

    def as_dict(self) -> dict[str, Any]:
        """The same worker's totals for its status; a mean of nothing is NaN."""
        groups = [*self._groups.values(), *self._rest.values()]
        executed = self._taken["queries"] + sum(sum(group.buckets.values()) for group in groups)
        acquired = self._taken["acquired"] + self.wait.count
        execution = self._taken_seconds["execution"] + sum(group.seconds for group in groups)
        return {
            "executed": executed,
            "errors": self._taken["errors"] + sum(group.errors for group in groups),
            "query_ms": {"count": executed, "mean": execution / executed * 1000 if executed else math.nan},
            "wait_ms": {
                "count": acquired,
                "mean": (self._taken_seconds["wait"] + self.wait.total) / acquired * 1000 if acquired else math.nan,
            },
        }


def _code(error: BaseException | None) -> tuple[str, str]:
    """(SQLSTATE or nothing, category)."""
    if isinstance(error, PoolExhaustedError):
        return "", "pool_exhausted"
    if isinstance(error, ConnectError):
        return error.sqlstate or "", error.category
    sqlstate = getattr(error, "sqlstate", None) if isinstance(error, asyncpg.PostgresError | ConnectionLost) else None
    category = error_category(
        sqlstate,
        connecting=False,
        timed_out=isinstance(error, TimeoutError),
        connection_lost=isinstance(error, ConnectionLost),
    )
    return sqlstate or "", category
