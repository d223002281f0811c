"""What the page shows: plain JSON, whatever is known and whatever is not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from raypg.breaker_status import describe as status
from raypg.core.breaker import BreakerConfig
from raypg.core.history import History
from raypg.core.pool_metrics import GAUGES, PoolMetrics
from raypg.core.quorum import Quorum
from raypg.core.sqlstate import CATEGORIES
from raypg.deployments.frame import Answers, describe, summary

NOW = 1_000_000.0
NOTHING = Answers(None, None, None, None, None, None, [])
LEASE = {"held_by": "task load", "job": "01", "node": "f00d", "process": 7, "age": 4.0, "client": "x"}
WORKER = {
    "index": 0,
    "node": "f00d",
    "budget": 5,
    "state": "serving",
    "silent": 0.1,
    "reachable": True,
    "figures": {
        "total": 3,
        "idle": 1,
        "opening": 0,
        "active": 2,
        "waiting": 1,
        "last_error": None,
        "replicas": [],
        "connections": {"1": {"lease": LEASE, "backend_pid": 42}, "2": {"lease": None, "backend_pid": 43}},
    },
}


def measured() -> dict[str, Any]:
    """A snapshot of a pool with one worker that has run one statement, which failed."""
    metrics = PoolMetrics(60, NOW)
    metrics.join(0, "life", NOW)
    gauges = {**dict.fromkeys(GAUGES, 0.0), "total": 4.0, "active": 3.0, "idle": 1.0, "health": 400.0}
    error = {
        "category": "query_error",
        "sqlstate": "22012",
        "message": "division by zero",
        "command": "SELECT",
        "fingerprint": "f",
        "error_type": "X",
        "ago": 0.0,
    }
    delta: Any = {
        "seq": 1,
        "age": 0.0,
        "seconds": 1.0,
        "counts": {"queries": 1, "errors": 1},
        "times": {},
        "groups": [("f", "SELECT", "select <script>", {100: 1}, 0.5, 1)],
        "floor": 0.0,
        "errors": {("query_error", "22012"): 1},
        "recent": [error],
        "gauges": {**gauges, "max_connections": 10.0},
    }
    assert metrics.apply(0, "life", [delta], NOW) == 1
    return metrics.snapshot(NOW)


def test_of_a_pool_of_which_nothing_is_known() -> None:
    frame = json.loads(json.dumps(describe(NOTHING, NOW), allow_nan=False))
    assert {light["level"] for name, light in frame["lights"].items() if name != "alerts"} == {"unknown"}
    assert frame["verdict"]["level"] == "unknown"
    assert (frame["active"], frame["utilization"], frame["breaker"]["state"]) == (None, None, None)
    assert summary(frame)["max_connections"] is None


def test_what_workers_say_now_is_preferred_to_what_they_told() -> None:
    told = dataclasses.replace(NOTHING, snapshot=measured(), newest=History(60).newest(NOW))
    before = describe(told, NOW)
    assert (before["active"], before["total"], before["max_connections"], before["health_score"]) == (3, 4, 10, 100)
    status = {"workers": [WORKER], "max_connections": 6, "configured_max_connections": 6}
    frame = describe(dataclasses.replace(told, status=status), NOW)
    json.dumps(frame, allow_nan=False)
    assert (frame["active"], frame["total"], frame["waiting"], frame["max_connections"]) == (2, 3, 1, 6)
    assert frame["utilization"] == 2 / 6
    assert frame["leases"] == [
        {"connection": "0/1", "backend_pid": 42, "held_by": "task load", "job": "01", "node": "f00d", "process": 7}
        | {"age": 4.0}
    ]
    assert frame["errors"]["by_category"] == {**dict.fromkeys(CATEGORIES, 0), "query_error": 1}
    assert frame["errors"]["recent"][0]["at"] == NOW
    (statement,) = frame["statements"]
    assert (statement["text"], statement["count"], statement["total_ms"]) == ("select <script>", 1, 500.0)
    assert frame["wait_ms"] == {"mean": None, "p50": None, "p95": None, "p99": None}


def test_caches_are_shown_where_there_are_any() -> None:
    metrics = PoolMetrics(60, NOW)
    assert describe(dataclasses.replace(NOTHING, snapshot=metrics.snapshot(NOW)), NOW)["cache"] is None
    totals = {"cache_hits": 3, "cache_misses": 1, "cache_invalidations": 2, "cache_entries": 5, "cache_bytes": 700}
    metrics.told_by_cache("one", totals, NOW)
    assert describe(dataclasses.replace(NOTHING, snapshot=metrics.snapshot(NOW)), NOW)["cache"] == {
        "hit_rate": 0.75, "invalidations": 2, "entries": 5, "bytes": 700, "caches": 1,
    }  # fmt: skip
    assert describe(NOTHING, NOW)["cache"] is None


def test_the_changes_of_a_breaker_are_all_there_and_stay_the_same_from_frame_to_frame() -> None:
    """While a server is away there are many, and what opened it is the first; two clocks never agree to the
    microsecond, and what differs would be sent anew each second."""
    quorum = Quorum(BreakerConfig(), 0.0, lambda: 0.0, 1)
    for number in range(10):
        quorum.machine.force_open(f"reason {number}", 100.0 + number)
        quorum.machine.force_close("back", 100.5 + number)
    frames = [
        describe(dataclasses.replace(NOTHING, breaker=status(quorum, 200.0, NOW + off, 50)), NOW)
        for off in (0.01, 0.01001)
    ]
    assert frames[0] == frames[1]
    changes = frames[0]["breaker"]["transitions"]
    assert len(changes) == 20
    assert (changes[0]["reason"], changes[0]["timestamp"]) == ("reason 0", NOW - 100.0)
