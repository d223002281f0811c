"""Results of a pipeline: complete, in order, lazy."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.errors import StatementNotRunError
from raypg.pipeline import PipelineResult, PipelineResults
from raypg.portable import pack_error


def name_of(number: int) -> str:
    return f"q-{number}"


def results_of(spans: list[tuple[int, int, object, object]]) -> PipelineResults:
    results = PipelineResults(name_of, min((span[0] for span in spans), default=0))
    for first, count, result, error in spans:
        results.add(first, count, result, error, 1.5, 2)  # type: ignore[arg-type]
    return results


@given(st.integers(0, 10**9), st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=30), st.randoms())
def test_in_order_whatever_the_order_of_arrival(
    base: int, sizes: list[tuple[int, bool]], shuffled: random.Random
) -> None:
    spans: list[tuple[int, int, object, object]] = []
    expected = []
    number = base
    for size, bad in sizes:
        error = ValueError(f"at {number}") if bad else None
        spans.append((number, size, None if bad else f"TAG {number}", error))
        expected += [(name_of(i), error, None if bad else f"TAG {number}") for i in range(number, number + size)]
        number += size
    shuffled.shuffle(spans)
    results = results_of(spans)
    assert [(r.query_id, r.error, r.result) for r in results] == expected
    assert [(results[i].query_id, results[i].error, results[i].result) for i in range(len(expected))] == expected
    assert len(results) == len(expected)
    assert results.failures == sum(error is not None for _, error, _ in expected)
    if expected:
        assert results[-1].query_id == expected[-1][0]
    for outside in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            results[outside]


def test_a_result_says_all() -> None:
    results = results_of([(5, 1, "INSERT 0 1", None), (6, 1, None, pack_error(StatementNotRunError("not", "q-1")))])
    assert results[0] == PipelineResult("q-5", True, "INSERT 0 1", None, 1.5, 2)
    assert results[1].success is False
    assert isinstance(results[1].error, StatementNotRunError)
    assert results[1].error.culprit == "q-1"
    assert repr(results) == "<PipelineResults 2 results, 1 failed>"


def test_rows_are_made_of_columns_and_values() -> None:
    results = results_of([(0, 1, ("rows", ("a", "b"), [(1, 2), (3, 4)]), None), (1, 1, ("rows", None, []), None)])
    assert [dict(row) for row in results[0].result] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert results[1].result == []


def test_slices() -> None:
    results = results_of([(100, 10, "x", None)])
    assert [r.query_id for r in results[2:5]] == ["q-102", "q-103", "q-104"]
    assert [r.query_id for r in results[::-4]] == ["q-109", "q-105", "q-101"]
    assert results[20:] == []


@pytest.mark.parametrize(("size", "count"), [(1, 100_000), (100, 1_000_000), (10_000, 1_000_000)])
def test_a_million_successes_take_little_memory(size: int, count: int) -> None:
    """However they arrive, and with command tags that alternate. Each allocation is traced, which takes its time."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        spans = ((first, size, f"UPDATE {first // size % 3}", None, 1.5, 0) for first in range(0, count, size))
        results = PipelineResults(name_of)
        for span in spans:
            results.add(*span)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(results) == count
    assert results[count - 1].query_id == f"q-{count - 1}"
    assert taken < 32 * count


def test_a_part_is_split_off() -> None:
    results = results_of([(10, 4, "x", None), (14, 2, None, ValueError("bad")), (16, 4, "y", None)])
    results.callbacks = {11: "early", 17: "late"}
    done, rest = results.split(5)
    assert [r.query_id for r in done] == ["q-10", "q-11", "q-12", "q-13", "q-14"]
    assert [r.query_id for r in rest] == ["q-15", "q-16", "q-17", "q-18", "q-19"]
    assert [r.callback_id for r in (*done, *rest)] == [None, "early", *[None] * 5, "late", None, None]
    assert (done.failures, rest.failures) == (1, 1)
    rest.add(20, 1, "x", None, 0.0, 0)
    assert rest[-1].result == "x"
    everything, nothing = rest.split(6)
    assert everything is rest
    assert (nothing.first, len(nothing)) == (21, 0)


def test_successes_may_turn_into_failures() -> None:
    results = results_of([(0, 3, "x", None), (3, 1, None, ValueError("bad"))])
    assert results.fail_all(4, StatementNotRunError("rolled back")) == 3
    assert [type(r.error) for r in results] == [StatementNotRunError] * 3 + [ValueError]
    assert (results.failures, [r.result for r in results]) == (4, [None] * 4)


def test_empty() -> None:
    results = results_of([])
    assert list(results) == []
    assert not results
    with pytest.raises(IndexError):
        results[0]
