"""What a worker counts: by statement, by error, in fixed memory, and never what a literal says."""

from __future__ import annotations

import json
import timeit
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from raypg.core.pool_metrics import PoolMetrics
from raypg.errors import CircuitBreakerError, ConnectError, PoolClosedError, PoolExhaustedError, QueryTimeoutError
from raypg.server.figures import MOST_GROUPS, MOST_RECENT, Figures
from raypg.server.outcomes import ConnectionLost

SECRET = "hunter2"


class Levels:
    """As much of an engine as figures look at: a pool without connections."""

    def __init__(self) -> None:
        self.connections = SimpleNamespace(total=0, idle=0, opening=0, created=0, recycled=0, failed=0)
        self.connections = _Empty(self.connections)
        self.queue: list[Any] = []
        self.config = SimpleNamespace(max_connections=10, min_connections=2)
        self.servers = [self]
        self.replicas = None


class _Empty:
    def __init__(self, counts: SimpleNamespace) -> None:
        self.__dict__.update(counts.__dict__)

    def __iter__(self) -> Any:
        return iter(())


def taken(figures: Figures) -> dict[str, Any]:
    """What the cluster knows after this worker has told."""
    metrics = PoolMetrics(60, 0.0)
    metrics.join(0, "life", 0.0)
    metrics.apply(0, "life", [{**figures.take(Levels()), "age": 0.0}], 1.0)  # type: ignore[arg-type, typeddict-item]
    return metrics.snapshot(1.0, statements=1000)


def connection(used: int = 1) -> Any:
    return SimpleNamespace(used=used, uses=0, taken_at=0.0)


def name(number: int) -> str:
    """A name of letters: fingerprints overlook numbers at the end of names."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number)) + "x"


def refused(sqlstate: str, message: str) -> asyncpg.PostgresError:
    error = asyncpg.PostgresError.new({"C": sqlstate, "M": message, "S": "ERROR", "V": "ERROR"})
    assert isinstance(error, asyncpg.PostgresError)
    return error


def test_statements_are_counted_by_kind_and_fingerprint() -> None:
    figures = Figures()
    for number in range(10):
        figures.ran(0.010, False, f"select a from t where b = {number}")
    figures.ran(0.500, False, "insert into t values ($1)")
    figures.ran_together(100, 0, 0.100, "insert into t values ($1)")
    known = taken(figures)
    assert {name: command["count"] for name, command in known["commands"].items()} == {"SELECT": 10, "INSERT": 101}
    insert, select = known["statements"]
    assert (insert["count"], insert["command"]) == (101, "INSERT")
    assert insert["seconds"] == pytest.approx(0.6)
    assert (select["count"], select["text"]) == (10, "select a from t where b = $1")
    assert select["p95"] == pytest.approx(0.010, rel=0.01)
    assert known["counters"]["queries"] == 111


@pytest.mark.parametrize(
    ("error", "category", "sqlstate"),
    [
        (refused("23505", f"duplicate key (token)=({SECRET})"), "query_error", "23505"),
        (refused("57014", "canceling statement"), "query_timeout", "57014"),
        (QueryTimeoutError(f"[{SECRET}] took too long", 1.0), "query_timeout", ""),
        (ConnectionLost("57P01"), "connection_refused", "57P01"),
        (ConnectionLost(None), "connection_refused", ""),
        (asyncpg.InterfaceError(f"cannot encode {SECRET}"), "query_error", ""),
        (asyncpg.DataError(f"invalid input for $1: '{SECRET}'"), "query_error", "22000"),
        (ValueError(SECRET), "query_error", ""),
        (None, "query_error", ""),
    ],
)
def test_each_error_has_its_category_and_quotes_no_value(error: Exception | None, category: str, sqlstate: str) -> None:
    figures = Figures()
    figures.ran(0.001, True, f"select '{SECRET}'", error)
    known = taken(figures)
    assert known["errors"] == [(category, sqlstate, 1)]
    assert known["counters"]["errors"] == 1
    assert known["window"]["error_rate"] == 1.0
    (recent,) = known["recent_errors"]
    assert recent["error_type"] == ("" if error is None else type(error).__name__)
    assert SECRET not in json.dumps(known, default=str)


def test_calls_that_never_ran() -> None:
    figures = Figures()
    figures.refused(PoolExhaustedError("p", 1.0, 5, 5, 2))
    figures.refused(ConnectError("refused", "connection_refused"), 3)
    figures.refused(ConnectError("wrong password", "authentication_failed", "28P01"), 2)
    figures.refused(CircuitBreakerError("p", "open", "down", 1.0, False), 4)
    figures.refused(PoolClosedError("closed"), 7)
    known = taken(figures)
    counts = known["counters"]
    assert (counts["refused"], counts["exhausted"], counts["rejected"], counts["queries"]) == (10, 1, 4, 0)
    assert set(known["errors"]) == {
        ("connection_refused", "", 3),
        ("authentication_failed", "28P01", 2),
        ("pool_exhausted", "", 1),
    }
    assert known["window"]["error_rate"] == 1.0


def test_connections_are_acquired_reused_and_given_back() -> None:
    figures, new, old = Figures(), connection(used=0), connection()
    figures.waited(0.001, new)
    figures.waited(0.002, old)
    figures.waited(0.003, old)
    figures.given_back(old)
    known = taken(figures)
    counts = known["counters"]
    assert (counts["acquired"], counts["reused"], counts["released"]) == (3, 2, 2)
    assert known["lifetime"]["wait"]["sum"] == pytest.approx(0.006)


def test_counters_are_told_once() -> None:
    figures, levels = Figures(), Levels()
    figures.ran(0.001, True, "select 1", ValueError())
    first, second = figures.take(levels), figures.take(levels)  # type: ignore[arg-type]
    assert first["counts"] == {"queries": 1, "errors": 1}
    assert (second["seq"], second["counts"], second["groups"], second["errors"]) == (2, {}, [], {})
    assert figures.as_dict()["executed"] == 1
    assert figures.as_dict()["errors"] == 1


def test_thousands_of_different_statements_take_fixed_memory_and_nothing_is_lost() -> None:
    figures = Figures()
    for number in range(2000):
        figures.ran(0.001, False, f"select {name(number)} from t")
    for _ in range(50):
        figures.ran(1.0, False, "select slow from big")
    delta = figures.take(Levels())  # type: ignore[arg-type]
    assert len(delta["groups"]) <= MOST_GROUPS + 1
    assert sum(sum(group[3].values()) for group in delta["groups"]) == 2050
    assert delta["floor"] == pytest.approx(0.001)
    slowest = max(delta["groups"], key=lambda group: group[4])
    assert slowest[2] == "select slow from big"


def test_errors_told_one_by_one_are_bounded() -> None:
    figures = Figures()
    for number in range(1000):
        figures.ran(0.001, True, "select 1", refused(f"X{number:04}", "made up"))
    delta = figures.take(Levels())  # type: ignore[arg-type]
    assert len(delta["recent"]) == MOST_RECENT
    assert len(delta["errors"]) <= 202
    assert sum(delta["errors"].values()) == 1000


def test_recording_is_quick() -> None:
    """The benchmark has the figures; this is to notice when it has become another order of magnitude."""
    figures, used = Figures(), connection()
    figures.ran(0.001, False, "select 1")

    def record() -> None:
        figures.waited(0.000012, used)
        figures.ran(0.00123, False, "select 1")

    assert min(timeit.repeat(record, number=2000, repeat=10)) / 2000 < 20e-6
