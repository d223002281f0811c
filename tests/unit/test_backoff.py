"""Backoff and jitter: growing, bounded, spread."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.backoff import Backoff, jittered

UNITS = st.floats(0, 1, exclude_max=True)


def test_without_jitter_it_doubles_up_to_the_bound_and_begins_again() -> None:
    backoff = Backoff(0.1, 1.0, jitter=0)
    assert [backoff.next(0.7) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert repr(backoff) == "<Backoff next 1 s, at most 1 s>"
    backoff.reset()
    assert backoff.next(0.0) == 0.1


def test_jitter_draws_from_the_upper_part() -> None:
    assert Backoff(8.0, 8.0).next(0.0) == 8.0
    assert Backoff(8.0, 8.0).next(0.5) == 6.0
    assert Backoff(8.0, 8.0, jitter=1.0).next(0.75) == 2.0


@given(st.lists(UNITS, min_size=1, max_size=80), st.floats(0, 1), st.floats(1, 10))
def test_every_delay_is_within_its_bounds(units: list[float], jitter: float, factor: float) -> None:
    backoff = Backoff(0.05, 30.0, factor, jitter)
    for n, unit in enumerate(units):
        full = min(30.0, 0.05 * factor**n)
        assert full * (1 - jitter) * (1 - 1e-9) <= backoff.next(unit) <= full * (1 + 1e-9)


def test_it_does_not_overflow() -> None:
    backoff = Backoff(1.0, 60.0, factor=1e300)
    assert [backoff.next(0.0) for _ in range(5)] == [1.0, 60.0, 60.0, 60.0, 60.0]


@given(st.floats(0, 1e9), st.floats(0, 1), UNITS)
def test_jitter_only_shortens(value: float, fraction: float, unit: float) -> None:
    assert value * (1 - fraction) * (1 - 1e-9) <= jittered(value, fraction, unit) <= value


@pytest.mark.parametrize(
    ("first", "most", "factor", "jitter"),
    [
        (0, 1, 2, 0.5),
        (-1, 1, 2, 0.5),
        (2, 1, 2, 0.5),
        (1, math.inf, 2, 0.5),
        (math.nan, 1, 2, 0.5),
        (1, 2, 0.5, 0.5),
        (1, 2, math.nan, 0.5),
        (1, 2, 2, -0.1),
        (1, 2, 2, 1.1),
    ],
)
def test_what_makes_no_sense(first: float, most: float, factor: float, jitter: float) -> None:
    with pytest.raises(ValueError, match=r"delays|factor|jitter"):
        Backoff(first, most, factor, jitter)
