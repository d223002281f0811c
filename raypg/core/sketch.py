"""Distributions of times in fixed memory: quantiles within 1 % of the exact value, merged without loss.

The buckets are those of DDSketch (Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch with
relative-error guarantees", 2019) with its logarithmic mapping: the same values give the same quantiles as the library
``ddsketch``. A dict of counts is what is kept, sent and merged: to record takes a third of the library's time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

__all__ = ["ACCURACY", "LEAST", "LOWEST", "MOST", "SCALE", "Sketch"]

ACCURACY: Final = 0.01
"""Relative error of a quantile."""

GAMMA: Final = (1 + ACCURACY) / (1 - ACCURACY)
SCALE: Final = 1 / math.log(GAMMA)
"""The bucket of a value is ``ceil(log(value) * SCALE)``."""

LEAST: Final = 1e-9
"""What is less counts as this much, so that there are at most some 2,100 buckets."""

MOST: Final = 1e9
"""What is more counts as this much."""

LOWEST: Final = math.ceil(math.log(LEAST) * SCALE)
"""The bucket of :data:`LEAST`."""


class Sketch:
    """How often which values were seen.

    Attributes:
        buckets: number of the bucket → how many values fell into it.
        total: sum of the values.
    """

    __slots__ = ("buckets", "total")

    def __init__(self, buckets: Mapping[int, int] | None = None, total: float = 0.0) -> None:
        self.buckets: dict[int, int] = dict(buckets) if buckets else {}
        self.total = total

    def add(self, value: float, count: int = 1) -> None:
        """*value* was seen *count* times."""
        self.total += value * count
        bucket = math.ceil(math.log(min(value, MOST)) * SCALE) if value > LEAST else LOWEST
        self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    def merge(self, buckets: Mapping[int, int], total: float) -> None:
        """Take in what another sketch has seen."""
        own = self.buckets
        if own:
            for bucket, count in buckets.items():
                own[bucket] = own.get(bucket, 0) + count
        else:
            self.buckets = dict(buckets)
        self.total += total

    def take(self) -> tuple[dict[int, int], float]:
        """What was seen since the last call, as :meth:`merge` takes it; begins anew."""
        taken = self.buckets, self.total
        self.buckets, self.total = {}, 0.0
        return taken

    @property
    def count(self) -> int:
        """How many values were seen."""
        return sum(self.buckets.values())

    def quantiles(self, wanted: Sequence[float]) -> list[float]:
        """The values below which these fractions (0–1) of all lie; NaN if nothing was seen."""
        order = sorted(self.buckets)
        seen = list(accumulate(map(self.buckets.__getitem__, order)))
        if not seen:
            return [math.nan] * len(wanted)
        return [_value(order[bisect_right(seen, fraction * (seen[-1] - 1))]) for fraction in wanted]

    def at_most(self, limits: Iterable[float]) -> list[int]:
        """How many values are at most each of *limits*, within the accuracy of a bucket."""
        order = sorted(self.buckets)
        seen = [0, *accumulate(map(self.buckets.__getitem__, order))]
        return [seen[bisect_right(order, math.floor(math.log(limit) * SCALE + 1e-9))] for limit in limits]

    def summary(self, unit: float = 1.0) -> dict[str, float]:
        """Count, sum, mean, least, most and quantiles, the values multiplied by *unit*; NaN where nothing was seen."""
        names = {"min": 0.0, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
        count = self.count
        values = self.quantiles(list(names.values()))
        return {
            "count": count,
            "sum": self.total * unit,
            "mean": self.total / count * unit if count else math.nan,
            **{name: value * unit for name, value in zip(names, values, strict=True)},
        }

    def __getstate__(self) -> Any:
        return self.buckets, self.total

    def __setstate__(self, state: Any) -> None:
        self.buckets, self.total = state


def _value(bucket: int) -> float:
    """What stands for all values of a bucket: none is further away than the accuracy."""
    return 2.0 * GAMMA**bucket / (1 + GAMMA)
