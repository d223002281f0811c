"""How a replica stands, by what several workers say of it."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console

from raypg.cli_pools import _show_replicas
from raypg.replica_status import replicas_of


def worker(**of_a: Any) -> dict[str, Any]:
    """The figures of a worker that sees replicas ``a`` and ``b``, and nothing wrong but what is said of ``a``."""
    fine = {
        "role": "standby", "healthy": True, "problem": "", "lag_seconds": 0.0, "lag_bytes": 0, "budget": 2, "total": 1,
        "active": 1, "waiting": 0, "circuit_breaker": "closed",
    }  # fmt: skip
    return {"replicas": [{**fine, "replica": "a", **of_a}, {**fine, "replica": "b"}]}


def test_the_breaker_is_open_where_one_worker_has_opened_it() -> None:
    cut_off = worker(healthy=False, problem="its circuit breaker is open", circuit_breaker="open")
    trying = worker(healthy=False, problem="its circuit breaker is open", circuit_breaker="half_open")
    a, b = replicas_of([worker(), trying, cut_off])
    assert (a["circuit_breaker"], a["used_by"], a["workers"], a["healthy"]) == ("open", 1, 3, True)
    assert a["problem"] == "its circuit breaker is open"
    assert (b["circuit_breaker"], b["used_by"], b["workers"], b["problem"]) == ("closed", 3, 3, "")
    assert (b["budget"], b["total"], b["active"]) == (6, 3, 3)
    (a, _) = replicas_of([worker(), trying])
    assert a["circuit_breaker"] == "half_open"


def test_what_nobody_knows_of_it() -> None:
    unknown = worker(role="unknown", healthy=False, problem="refused", lag_seconds=math.nan, lag_bytes=None)
    (a, _) = replicas_of([unknown])
    assert (a["role"], a["healthy"], a["used_by"], a["lag_bytes"]) == ("unknown", False, 0, None)
    assert math.isnan(a["lag_seconds"])
    (a, _) = replicas_of([unknown, worker(lag_seconds=2.0, lag_bytes=5)])
    assert (a["role"], a["lag_seconds"], a["lag_bytes"]) == ("standby", 2.0, 5)
    assert replicas_of([]) == []


def test_it_is_shown_who_uses_it_and_why_the_others_do_not() -> None:
    shown = io.StringIO()
    problem = "its circuit breaker is open"
    half = worker(healthy=False, problem=problem, circuit_breaker="half_open", lag_seconds=math.nan, lag_bytes=None)
    _show_replicas(Console(file=shown, width=160), replicas_of([worker(lag_seconds=1.5, lag_bytes=2048), half]))
    _, a, b = (line.split("  ") for line in shown.getvalue().splitlines())
    assert [word.strip() for word in a if word.strip()] == [
        "a", "standby", "half open", "1 of 2", "1.5 s", "2,048", "2 of 4", "2", "0", problem,
    ]  # fmt: skip
    assert [word.strip() for word in b if word.strip()][2:4] == ["closed", "2 of 2"]
