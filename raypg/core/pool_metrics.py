"""All figures of one pool: what its workers have told, added up once each.

A worker sends *deltas*: what happened since the last one, numbered from 1 in each of its lives. They may come twice,
and late; what was known stays known when the worker dies. The clock is passed in: seconds since the epoch.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NotRequired, TypedDict

from raypg.core.cache_figures import CACHE_COUNTERS, CacheFigures
from raypg.core.history import History
from raypg.core.lazy import Lazy
from raypg.core.sketch import Sketch
from raypg.core.sqlstate import CATEGORIES
from raypg.core.top import Entry, Group, TopStatements

__all__ = ["BOUNDS", "COUNTERS", "GAUGES", "TIMES", "WINDOW", "Delta", "PoolMetrics", "utilization"]

COUNTERS: Final = (
    "queries",  # statements that ran, failed ones included
    "errors",  # of these, those that failed
    "refused",  # calls that never ran
    "exhausted",  # of these, those for which no connection became free
    "rejected",  # of these, those that the circuit breaker refused
    "retries",
    "together",  # reads that shared a write to the server with others
    "acquired",
    "reused",  # acquisitions of a connection that somebody had used before
    "released",
    "created",
    "recycled",
    "connect_failures",
    "health_checks",
    "health_check_failures",
    "rows",  # that statements returned
    "written",  # rows that statements inserted, updated, deleted or copied
    "replica_reads",  # statements that a replica answered
    *CACHE_COUNTERS,
)
TIMES: Final = ("execution", "wait", "connect", "use", "fetch", "health_check")
"""What is timed, in seconds; ``execution`` comes by statement, see :class:`Group`."""

GAUGES: Final = ("total", "idle", "active", "waiting", "opening", "health", "max_connections", "min_connections")
"""What a worker has now; ``health`` is the sum of the scores, the last two are the whole pool's."""

BOUNDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Of histograms, in seconds: those that OpenTelemetry asks for in ``db.client.operation.duration``."""

WINDOW: Final = 60
"""Seconds that recent figures are of."""

PART: Final = 10
"""Seconds of the window that are forgotten at a time: it covers up to so much more."""

RATE_OVER: Final = 10
"""Seconds that throughput is taken over."""

SILENT_AFTER: Final = 3.5
"""Seconds without a word after which a worker counts as away."""

MOST_STATEMENTS: Final = 200
"""Fingerprints that are watched."""

MOST_CODES: Final = 200
"""Different SQLSTATEs that are counted apart: a function may raise any it likes."""

MOST_COMMANDS: Final = 100

LIVES: Final = 16
"""Lives of one worker that are remembered, so that a message of an earlier one is not taken for new."""

OTHER: Final = "other"


class Delta(TypedDict):
    """What one worker has seen between two looks.

    ``groups``: the fields of :class:`Group`.
    ``age``: seconds since the second look; ``seconds``: between the two. ``times`` as :meth:`Sketch.take` gives them.
    ``floor``: seconds that any fingerprint may have taken beside ``groups``.
    ``replicas``: address → seconds that a replica is behind, NaN if that is not known.
    """

    seq: int
    age: float
    seconds: float
    counts: dict[str, int]
    times: dict[str, tuple[dict[int, int], float]]
    groups: list[tuple[Any, ...]]
    floor: float
    errors: dict[tuple[str, str], int]
    recent: list[dict[str, Any]]
    gauges: dict[str, float]
    replicas: NotRequired[dict[str, float]]


@dataclass
class _Worker:
    incarnation: str
    heard_at: float
    known: dict[str, int] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    replicas: dict[str, float] = field(default_factory=dict)
    gone: bool = False


@dataclass
class _Part:
    counts: Counter[str] = field(default_factory=Counter)
    times: dict[str, Sketch] = field(default_factory=dict)


class _Window:
    """What happened in the last minute, or up to ten seconds more."""

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}

    def part(self, when: float) -> _Part:
        slot = int(when // PART)
        if slot not in self._parts:
            self._parts[slot] = _Part()
            newest = max(self._parts)
            for old in [old for old in self._parts if old < newest - WINDOW // PART]:
                del self._parts[old]
        return self._parts.get(slot) or _Part()  # what is too old is not kept

    def _current(self, now: float) -> list[_Part]:
        return [part for slot, part in self._parts.items() if slot >= int(now // PART) - WINDOW // PART]

    def counts(self, now: float) -> Counter[str]:
        counts: Counter[str] = Counter()
        for part in self._current(now):
            counts.update(part.counts)
        return counts

    def times(self, name: str, now: float) -> Sketch:
        merged = Sketch()
        for part in self._current(now):
            if name in part.times:
                merged.merge(part.times[name].buckets, part.times[name].total)
        return merged

    def seconds(self, name: str, now: float) -> float:
        return sum(part.times[name].total for part in self._current(now) if name in part.times)


@dataclass
class _Command:
    times: Sketch = field(default_factory=Sketch)
    errors: int = 0


class PoolMetrics:
    """The figures of one pool.

    Args:
        minutes: how long the history is kept.
        now: the time.
    """

    def __init__(self, minutes: float, now: float) -> None:
        self.since = now
        self.history = History(minutes)
        self._workers: dict[int, _Worker] = {}
        self._counters: Counter[str] = Counter()
        self._times = {name: Sketch() for name in TIMES if name != "execution"}
        self._commands: dict[str, _Command] = {}
        self._statements = TopStatements(MOST_STATEMENTS)
        self._errors: Counter[tuple[str, str]] = Counter()
        self._recent: deque[dict[str, Any]] = deque(maxlen=10)
        self._window = _Window()
        self._caches = CacheFigures()
        self._cached: Counter[str] = Counter()  # what caches told since a worker told last
        self._adjusted: dict[str, Any] | None = None

    # --- from workers ---

    def join(self, worker: int, incarnation: str, now: float) -> int:
        """A worker is there; the number of its last delta that is known."""
        known = self._workers.get(worker)
        if known is None:
            known = self._workers[worker] = _Worker(incarnation, now)
        known.incarnation, known.heard_at, known.gone = incarnation, now, False
        number = known.known.pop(incarnation, 0)
        known.known[incarnation] = number  # the last of the dict
        while len(known.known) > LIVES:
            del known.known[next(iter(known.known))]
        return number

    def apply(self, worker: int, incarnation: str, deltas: Iterable[Delta], now: float) -> int | None:
        """Add up what is new in *deltas*; the number of the last that is known now, or ``None``: it must join first."""
        known = self._workers.get(worker)
        if known is None or known.incarnation != incarnation or known.gone:
            return None
        known.heard_at = now
        for delta in deltas:
            if delta["seq"] > known.known[incarnation]:
                known.known[incarnation] = delta["seq"]
                self._note_cap(known.gauges, delta["gauges"], now)
                known.gauges, known.replicas = delta["gauges"], delta.get("replicas", {})
                self._add(delta, now)
        return known.known[incarnation]

    def told_by_cache(self, who: str, totals: Mapping[str, int], now: float) -> None:
        """The cache of a router tells its totals; see :class:`CacheFigures`."""
        counts = self._caches.told(who, totals, now)
        for counted in (self._counters, self._window.part(now).counts, self._cached):
            counted.update(counts)

    def leave(self, worker: int) -> None:
        """This worker has ended, and is missed by nobody: what it has counted stays."""
        known = self._workers.get(worker)
        if known is not None:
            known.gone, known.gauges, known.replicas = True, {}, {}

    def leave_silent(self, now: float, seconds: float) -> None:
        """Nobody misses a worker any more that was not heard of for so long."""
        for index, worker in self._workers.items():
            if now - worker.heard_at > seconds:
                self.leave(index)

    def known(self) -> dict[tuple[int, str], int]:
        """(worker, its life) → the number of its last delta that is known."""
        return {
            (index, worker.incarnation): worker.known[worker.incarnation] for index, worker in self._workers.items()
        }

    def present(self, now: float) -> set[int]:
        """The workers that were heard of lately."""
        return {index for index, worker in self._workers.items() if now - worker.heard_at < WINDOW and not worker.gone}

    @property
    def heard_at(self) -> float:
        """When any worker was heard of last."""
        return max((worker.heard_at for worker in self._workers.values()), default=self.since)

    def _note_cap(self, before: Mapping[str, float], after: Mapping[str, float], now: float) -> None:
        old, new = before.get("max_connections"), after.get("max_connections")
        latest = self._adjusted
        if old is not None and new is not None and old != new and (latest is None or latest["to"] != new):
            self._adjusted = {"at": now, "from": old, "to": new}

    def _add(self, delta: Delta, now: float) -> None:
        when = now - delta["age"]
        counts, groups = delta["counts"], [Group(*group) for group in delta["groups"]]
        self._counters.update(counts)
        part = self._window.part(when)
        part.counts.update(counts)
        for name, (buckets, total) in delta["times"].items():
            self._times[name].merge(buckets, total)
            part.times.setdefault(name, Sketch()).merge(buckets, total)
        for group in groups:
            command = self._command(group.command)
            command.times.merge(group.buckets, group.seconds)
            command.errors += group.errors
            part.times.setdefault("execution", Sketch()).merge(group.buckets, group.seconds)
        self._statements.add((group for group in groups if group.fingerprint), delta["floor"])
        for (category, sqlstate), count in delta["errors"].items():
            room = len(self._errors) < MOST_CODES or (category, sqlstate) in self._errors
            self._errors[category, sqlstate if room else OTHER] += count
            part.counts[_of(category)] += count
        self._recent.extend({**error, "at": when - error["ago"]} for error in delta["recent"])
        refused = counts.get("refused", 0)
        by_time = {
            "queries": counts.get("queries", 0),
            "calls": counts.get("queries", 0) + refused,
            "errors": counts.get("errors", 0) + refused,
            "exhausted": counts.get("exhausted", 0),
            "execution_seconds": sum(group.seconds for group in groups),
            "wait_seconds": delta["times"].get("wait", ({}, 0.0))[1],
            "acquired": counts.get("acquired", 0),
            "rows": counts.get("written", 0),
            "rows_fetched": counts.get("rows", 0),
            **_by_category(delta["errors"]),
            **self._cached,
        }
        self._cached.clear()
        times = {"execution": [(group.buckets, group.seconds) for group in groups]}
        if "wait" in delta["times"]:
            times["wait"] = [delta["times"]["wait"]]
        self.history.add(when, delta["seconds"], by_time, self._gauges(now), times)

    def _command(self, name: str) -> _Command:
        if name not in self._commands and len(self._commands) >= MOST_COMMANDS:
            name = OTHER.upper()
        return self._commands.setdefault(name, _Command())

    # --- for readers ---

    def _is_up(self, worker: _Worker, now: float) -> bool:
        return now - worker.heard_at <= SILENT_AFTER

    def _gauges(self, now: float) -> dict[str, float]:
        here = [worker.gauges for worker in self._workers.values() if worker.gauges and self._is_up(worker, now)]
        sums = {name: sum(gauges[name] for gauges in here) for name in GAUGES[:6]}
        told = here or [worker.gauges for worker in self._workers.values() if worker.gauges]
        of_all = {name: max((gauges[name] for gauges in told), default=0) for name in GAUGES[6:]}
        return {**sums, **of_all}

    def _replicas(self, now: float) -> dict[str, float]:
        """The lag of each replica as the worker sees it to which it seems longest."""
        lags: dict[str, float] = {}
        for worker in self._workers.values():
            for address, lag in worker.replicas.items() if self._is_up(worker, now) else ():
                known = lags.get(address, math.nan)
                lags[address] = lag if math.isnan(known) else known if math.isnan(lag) else max(lag, known)
        return lags

    def snapshot(
        self, now: float, statements: int = 20, in_detail: bool = True, notable: bool = False
    ) -> dict[str, Any]:
        """All there is to know, as plain data: times in seconds, quantiles of nothing NaN, points of time in seconds
        since the epoch. ``recent`` and ``window`` are of the last minute, the rest since the pool began.

        Args:
            statements: how many fingerprints to show.
            in_detail: whether with the quantiles of each, which take longer than all the rest.
            notable: also as many of the slowest, and of the most frequent.
        """
        parts = self.parts(now)
        shown = self._statements.notable(statements) if notable else self._statements.top(statements)
        return {
            **{key: dict(part) if isinstance(part, Lazy) else part for key, part in parts.items()},
            "commands": {
                name: {**_histogram(command.times), "errors": command.errors}
                for name, command in sorted(self._commands.items())
            },
            "statements": [_statement(entry, in_detail) for entry in shown],
        }

    def parts(self, now: float) -> Lazy:
        """The same but for ``commands`` and ``statements``, each part made when it is asked for."""
        return Lazy(
            {
                "since": lambda: self.since,
                "as_of": lambda: now,
                "heard_at": lambda: self.heard_at,
                "window_seconds": lambda: WINDOW,
                "workers": lambda: self._workers_now(now),
                "gauges": lambda: self._gauges(now),
                "replicas": lambda: self._replicas(now),
                "caches": lambda: self._caches.levels(now),
                "counters": lambda: {name: self._counters[name] for name in COUNTERS},
                "window": lambda: self._last_minute(now),
                "recent": lambda: Lazy({name: partial(self._recently, name, now) for name in TIMES}),
                "lifetime": lambda: Lazy({name: partial(self._ever, name) for name in TIMES}),
                "errors": lambda: [(*key, count) for key, count in self._errors.most_common()],
                "recent_errors": lambda: list(self._recent),
                "statements_floor": lambda: self._statements.floor,
                "last_adjustment": lambda: self._adjusted,
            }
        )

    def _workers_now(self, now: float) -> dict[int, dict[str, Any]]:
        return {
            index: {
                "up": self._is_up(worker, now) and bool(worker.gauges),
                "incarnation": worker.incarnation,
                "as_of": worker.heard_at,
                **worker.gauges,
            }
            for index, worker in sorted(self._workers.items())
            if not worker.gone
        }

    def _last_minute(self, now: float) -> dict[str, Any]:
        counts = self._window.counts(now)
        calls = counts["queries"] + counts["refused"]
        covered = min(WINDOW + now % PART, max(now - self.since, 1.0))
        return {
            **{name: counts[name] for name in COUNTERS},
            "calls": calls,
            "errors_by_category": {name: counts[_of(name)] for name in CATEGORIES},
            "error_rate": (counts["errors"] + counts["refused"]) / calls if calls else 0.0,
            "queries_per_second": self.history.rate("queries", now, RATE_OVER),
            "busy": self._window.seconds("execution", now) / covered,
        }

    def _recently(self, name: str, now: float) -> dict[str, float]:
        return self._window.times(name, now).summary()

    def _ever(self, name: str) -> dict[str, Any]:
        if name != "execution":
            return _histogram(self._times[name])
        execution = Sketch()
        for command in self._commands.values():
            execution.merge(command.times.buckets, command.times.total)
        return _histogram(execution)


def _of(category: str) -> str:
    """Under which name errors of a category are counted beside :data:`COUNTERS`."""
    return f"errors of {category}"


def utilization(gauges: Mapping[str, float]) -> float:
    """Share of the connections that there may be which is in use."""
    cap = gauges["max_connections"]
    return gauges["active"] / cap if cap else 0.0


def _by_category(errors: Mapping[tuple[str, str], int]) -> Counter[str]:
    """Series of the history → errors of that category."""
    found: Counter[str] = Counter()
    for (category, _), count in errors.items():
        found[f"errors_{category}"] += count
    return found


def _histogram(sketch: Sketch) -> dict[str, Any]:
    return {
        "count": sketch.count,
        "sum": sketch.total,
        "at_most": sketch.at_most(BOUNDS),
        "p95": sketch.quantiles([0.95])[0],
    }


def _statement(entry: Entry, in_detail: bool) -> dict[str, Any]:
    count = entry.times.count
    quantiles = entry.times.quantiles([0.5, 0.95, 0.99]) if in_detail else [math.nan] * 3
    return {
        "fingerprint": entry.fingerprint,
        "command": entry.command,
        "text": entry.text,
        "count": count,
        "errors": entry.errors,
        "seconds": entry.times.total,
        "mean": entry.times.total / count if count else math.nan,
        **dict(zip(("p50", "p95", "p99"), quantiles, strict=True)),
        "missed_seconds": entry.missed,
    }
