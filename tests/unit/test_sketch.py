"""Quantiles within 1 %, merged without loss; the library ddsketch as an independent witness."""

from __future__ import annotations

import math
import pickle
import random

import pytest
from ddsketch import DDSketch
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.sketch import ACCURACY, LEAST, LOWEST, MOST, SCALE, Sketch

WANTED = [0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]
TIMES = st.floats(min_value=1e-7, max_value=1e5)


def exact(values: list[float], quantile: float) -> float:
    """The lower quantile, as DDSketch defines it."""
    return sorted(values)[math.floor(quantile * (len(values) - 1))]


@given(st.lists(TIMES, min_size=1, max_size=300))
def test_quantiles_are_within_the_accuracy(values: list[float]) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    assert sketch.count == len(values)
    assert sketch.total == pytest.approx(sum(values))
    for quantile, found in zip(WANTED, sketch.quantiles(WANTED), strict=True):
        assert found == pytest.approx(exact(values, quantile), rel=ACCURACY * 1.0001)


@given(st.lists(TIMES, min_size=1, max_size=200))
def test_the_library_says_the_same(values: list[float]) -> None:
    sketch, library = Sketch(), DDSketch(ACCURACY)
    for value in values:
        sketch.add(value)
        library.add(value)
    assert sketch.quantiles(WANTED) == pytest.approx([library.get_quantile_value(q) for q in WANTED])


@given(st.lists(st.lists(TIMES, max_size=60), min_size=1, max_size=4))
def test_merged_sketches_are_that_of_all_values(parts: list[list[float]]) -> None:
    merged, whole = Sketch(), Sketch()
    for part in parts:
        sketch = Sketch()
        for value in part:
            sketch.add(value)
            whole.add(value)
        merged.merge(*sketch.take())
        assert sketch.count == 0
    assert merged.buckets == whole.buckets
    assert merged.total == pytest.approx(whole.total)


def test_three_workers_of_a_million_values_in_all() -> None:
    rng = random.Random(7)
    parts = [[rng.lognormvariate(-6 + worker, 1.0) for _ in range(100_000)] for worker in range(3)]
    merged = Sketch()
    for part in parts:
        sketch = Sketch()
        for value in part:
            sketch.add(value)
        merged.merge(*sketch.take())
    values = sorted(value for part in parts for value in part)
    for quantile, found in zip(WANTED, merged.quantiles(WANTED), strict=True):
        assert found == pytest.approx(values[math.floor(quantile * (len(values) - 1))], rel=0.01)


@given(st.lists(TIMES, max_size=100), st.lists(TIMES, min_size=1, max_size=5))
def test_counts_below_a_limit(values: list[float], limits: list[float]) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    limits.sort()
    found = sketch.at_most(limits)
    assert found == sorted(found)
    for limit, count in zip(limits, found, strict=True):
        assert sum(value <= limit * 0.97 for value in values) <= count <= sum(value <= limit * 1.03 for value in values)


def test_strange_values_take_no_more_memory() -> None:
    sketch = Sketch()
    for value in (0.0, -1.0, 1e-300, LEAST, 1e300, MOST, math.inf):
        sketch.add(value)
    assert sketch.count == 7
    assert min(sketch.buckets) == LOWEST
    assert max(sketch.buckets) == math.ceil(math.log(MOST) * SCALE)


def test_nothing_is_nan() -> None:
    summary = Sketch().summary(1000)
    assert summary["count"] == 0
    assert summary["sum"] == 0.0
    assert all(math.isnan(summary[name]) for name in ("mean", "min", "p50", "p95", "p99", "max"))
    assert f"{summary['p95']:.1f}" == "nan"
    assert not summary["p95"] > 1000


def test_it_can_be_kept() -> None:
    sketch = Sketch()
    sketch.add(0.25, 4)
    again = pickle.loads(pickle.dumps(sketch))
    assert (again.buckets, again.total) == (sketch.buckets, 1.0)
