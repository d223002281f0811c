"""What one worker counts and times."""

from __future__ import annotations

import math
from typing import Any

from ddsketch import DDSketch

ACCURACY = 0.01
"""Relative error of quantiles (Masson, Rim and Lee, "DDSketch", 2019)."""


class Figures:
    """Counters since the worker started, and sketches of times in milliseconds."""

    __slots__ = ("acquired", "errors", "executed", "exhausted", "query_ms", "retries", "together", "wait_ms")

    def __init__(self) -> None:
        self.executed = 0
        self.errors = 0
        self.retries = 0
        self.together = 0  # reads that shared a write to the server with others
        self.acquired = 0
        self.exhausted = 0
        self.wait_ms = DDSketch(ACCURACY)
        self.query_ms = DDSketch(ACCURACY)

    def waited(self, seconds: float) -> None:
        """A caller waited this long for its connection."""
        self.acquired += 1
        self.wait_ms.add(seconds * 1000)

    def ran(self, seconds: float, failed: bool) -> None:
        """A statement took this long."""
        self.executed += 1
        self.errors += failed
        self.query_ms.add(seconds * 1000)

    def ran_together(self, statements: int, failed: int, seconds: float) -> None:
        """A group of statements took this long together."""
        self.executed += statements
        self.errors += failed
        self.query_ms.add(seconds / statements * 1000, statements)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; a quantile or mean of nothing is NaN."""
        return {
            "acquired": self.acquired,
            "executed": self.executed,
            "errors": self.errors,
            "retries": self.retries,
            "together": self.together,
            "exhausted": self.exhausted,
            "wait_ms": _summary(self.wait_ms),
            "query_ms": _summary(self.query_ms),
        }


def _summary(sketch: DDSketch) -> dict[str, float]:
    count = int(sketch.count)
    if not count:
        return {"count": 0, "mean": math.nan, "p50": math.nan, "p95": math.nan, "p99": math.nan}
    quantiles = {f"p{round(q * 100)}": sketch.get_quantile_value(q) or math.nan for q in (0.5, 0.95, 0.99)}
    return {"count": count, "mean": sketch.avg, **quantiles}
