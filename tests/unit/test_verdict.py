"""What is wrong, in words that name it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from raypg.core.pool_metrics import PoolMetrics
from raypg.core.verdict import lights, verdict

NOW = 1_000_000.0
CLOSED: dict[str, Any] = {
    "state": "closed",
    "forced": False,
    "forced_reason": None,
    "reason": "",
    "time_until_recovery": None,
    "workers": {0: {"isolated": False}, 1: {"isolated": False}},
}
CALM: dict[str, Any] = {"error": None, "sessions": [], "backends": 12, "server_max_connections": 100}


def worker(index: int = 0, active: int = 1, waiting: int = 0, budget: int = 5, **more: Any) -> dict[str, Any]:
    figures = {"active": active, "waiting": waiting, "connections": {}}
    known = {"index": index, "node": "f00dcafe1234", "budget": budget, "state": "serving", "silent": 0.1}
    return {**known, "reachable": True, "figures": figures, **more}


def status(*workers: dict[str, Any], cap: int = 10, wanted: int = 10) -> dict[str, Any]:
    return {
        "workers": list(workers or (worker(0), worker(1))),
        "max_connections": cap,
        "configured_max_connections": wanted,
    }


def session(pid: int, *blocked_by: int, waits: float | None = None, **more: Any) -> dict[str, Any]:
    known = {"pid": pid, "application": "", "user": "ann", "state": "active", "seconds": 7.0}
    return {**known, "blocked_by": list(blocked_by), "waiting_seconds": waits, **more}


def alert(name: str, severity: str, state: str = "firing") -> dict[str, Any]:
    return {"name": name, "severity": severity, "state": state, "message": f"{name} is 7"}


def told(**changed: Any) -> dict[str, Any]:
    known = {
        "snapshot": PoolMetrics(60, NOW).snapshot(NOW),
        "status": status(),
        "breaker": CLOSED,
        "activity": CALM,
        "alerts": [],
    }
    return lights(**{**known, **changed})  # type: ignore[return-value]


def test_all_is_well() -> None:
    found = told()
    assert {light["level"] for light in found.values()} == {"ok"}
    assert verdict(found) == {"level": "ok", "text": "All is well: 2 of 10 connections in use, nobody waiting"}


SATURATED = status(
    worker(
        0,
        active=5,
        waiting=7,
        figures={
            "active": 5,
            "waiting": 7,
            "connections": {
                "1": {"lease": {"age": 3.0, "held_by": "driver", "job": "02"}},
                "2": {"lease": {"age": 41.4, "held_by": "task load", "job": "01"}},
                "3": {"lease": None},
            },
        },
    ),
    worker(1, active=5),
)
LOST = worker(1, figures=None, reachable=False, state="lost", silent=8.2)
BLOCKED = [
    session(1, 2, waits=5.25, application="etl"),
    session(2, 3, waits=4.0),
    session(3, state="idle in transaction", seconds=20.0, user="bob", application="psql"),
]


@pytest.mark.parametrize(
    ("light", "level", "words", "changed"),
    [
        ("pool", "critical", ["all 10 connections", "7 callers wait", "41 s", "task load", "job 01"],
         {"status": SATURATED}),
        ("pool", "warning", ["9 of 10 connections"], {"status": status(worker(0, active=5), worker(1, active=4))}),
        ("pool", "warning", ["worker 1 (node f00dcafe)", "silent for 8 s"], {"status": status(worker(0), LOST)}),
        ("pool", "critical", ["workers 0", "1 (node"], {"status": status({**LOST, "index": 0}, LOST)}),
        ("pool", "critical", ["no workers"], {"status": {**status(), "workers": []}}),
        ("pool", "warning", ["no room for 50 connections", "with 10"], {"status": status(wanted=50)}),
        ("pool", "unknown", ["Pool actor does not answer"], {"status": None}),
        ("pool", "unknown", ["metrics are not known"], {"snapshot": None}),
        ("database", "critical", ["does not answer", "refused"], {"activity": {"error": "connection refused"}}),
        ("database", "warning", ["no answer for 0.6 s"],
         {"activity": {"error": "no answer for 0.6 s", "unanswered_seconds": 0.6}}),
        ("database", "critical", ["no answer for 9.0 s"],
         {"activity": {"error": "no answer for 9.0 s", "unanswered_seconds": 9.0}}),
        ("database", "unknown", ["nobody could ask"], {"activity": None}),
        ("database", "warning",
         ["session 1 (ann etl) waits 5.2 s", "session 3 (bob psql)", "idle in transaction for 20.0 s", "1 more"],
         {"activity": {**CALM, "sessions": BLOCKED}}),
        ("database", "critical", ["waits 60.0 s", "session 9 holds"],
         {"activity": {**CALM, "sessions": [session(1, 9, waits=60.0)]}}),
        ("database", "warning", ["98 of the server's 100 connections"], {"activity": {**CALM, "backends": 98}}),
        ("database", "ok", ["too small to look"], {"activity": {"error": None, "unseen": "too small to look"}}),
        ("breaker", "critical", ["open", "tries again in 12 s", "5 failures in a row"],
         {"breaker": {**CLOSED, "state": "open", "reason": "5 failures in a row", "time_until_recovery": 12.2}}),
        ("breaker", "critical", ["forced open", "until it is lifted", "upgrade (by ann)"],
         {"breaker": {**CLOSED, "state": "open", "forced": True, "forced_reason": "upgrade (by ann)"}}),
        ("breaker", "critical", ["for 30 s more"],
         {"breaker": {**CLOSED, "state": "open", "forced": True, "forced_reason": "x", "time_until_recovery": 30.0}}),
        ("breaker", "warning", ["half open"], {"breaker": {**CLOSED, "state": "half_open"}}),
        ("breaker", "warning", ["disabled", "for the load test"],
         {"breaker": {**CLOSED, "state": "disabled", "reason": "for the load test"}}),
        ("breaker", "warning", ["worker 1 cannot reach the database"],
         {"breaker": {**CLOSED, "workers": {0: {"isolated": False}, 1: {"isolated": True}}}}),
        ("breaker", "unknown", ["Breaker actor does not answer"], {"breaker": None}),
        ("alerts", "critical", ["slow: slow is 7", "few: few is 7"],
         {"alerts": [alert("few", "warning"), alert("slow", "error")]}),
        ("alerts", "warning", ["few is 7"], {"alerts": [alert("few", "warning")]}),
        ("alerts", "ok", ["fyi is 7"], {"alerts": [alert("fyi", "info")]}),
        ("alerts", "ok", ["none fires, 1 may soon"], {"alerts": [alert("few", "critical", "pending")]}),
    ],
)  # fmt: skip
def test_each_trouble_is_named(light: str, level: str, words: list[str], changed: dict[str, Any]) -> None:
    found = told(**changed)
    assert found[light]["level"] == level
    for word in words:
        assert word in found[light]["text"]
    if level != "ok":
        assert verdict(found) == {"level": level, "text": f"{light.capitalize()}: {found[light]['text']}"}


def test_a_lock_that_is_waited_for_for_a_moment_is_none() -> None:
    assert told(activity={**CALM, "sessions": [session(1, 2, waits=0.2), session(2)]})["database"]["level"] == "ok"


def test_sessions_that_wait_for_each_other_are_named_without_end() -> None:
    found = told(activity={**CALM, "sessions": [session(1, 2, waits=1.0), session(2, 1, waits=0.9)]})
    assert "session 1 (ann) waits 1.0 s for a lock that session 2" in found["database"]["text"]


def test_the_worst_comes_first_and_the_rest_is_counted() -> None:
    found = told(alerts=[alert("few", "warning")], activity={"error": "refused"}, status=status(wanted=50))
    assert verdict(found) == {
        "level": "critical",
        "text": "Database: the database does not answer: refused (and 2 more)",
    }


def test_where_nobody_can_look_failed_attempts_to_connect_tell() -> None:
    metrics = PoolMetrics(60, NOW).snapshot(NOW)
    metrics["recent_errors"] = [{"category": "connection_refused", "at": NOW - 1, "message": "nobody listens at h:1"}]
    unseen = {"error": None, "unseen": "too small"}
    assert "nobody listens at h:1" in told(snapshot=metrics, activity=unseen)["database"]["text"]
    refused = worker(0, figures={"active": 0, "waiting": 0, "connections": {}, "last_error": "nobody listens at h:2"})
    found = told(status=status(refused), activity=unseen)["database"]
    assert (found["level"], "nobody listens at h:2" in found["text"]) == ("critical", True)
    metrics["recent_errors"][0]["at"] = NOW - 60
    assert told(snapshot=metrics, activity=unseen)["database"]["level"] == "ok"


def replica(address: str = "b:5432", healthy: bool = True, lag: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"replica": address, "role": "standby", "healthy": healthy, "problem": "", "lag_seconds": lag, **more}


@pytest.mark.parametrize(
    ("replicas", "level", "text"),
    [
        ([replica(), replica("c:5432", lag=2.0)], "ok", "2 answer reads, at most 2.0 s behind"),
        ([replica(lag=math.nan)], "ok", "1 answers reads"),
        ([replica(lag=31.4), replica("c:5432")], "warning", "b:5432 is 31 s behind"),
        (
            [replica(healthy=False, problem="connection refused"), replica("c:5432")],
            "warning",
            "b:5432 answers no reads: connection refused",
        ),
        (
            [replica(healthy=False, role="foreign")],
            "warning",
            "b:5432 answers no reads: it is foreign; all reads go to the primary",
        ),
    ],
)
def test_replicas(replicas: list[dict[str, Any]], level: str, text: str) -> None:
    assert "replicas" not in told()
    found = told(replicas=replicas)
    assert found["replicas"] == {"level": level, "text": text}
    assert verdict(found)["level"] == level
