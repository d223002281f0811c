"""How a cap is divided: never more than it, never less than one each."""

from __future__ import annotations

import itertools

import pytest

from raypg.core.sizing import divide


@pytest.mark.parametrize(
    ("cap", "workers", "shares"),
    [
        (10, 1, [9]),
        (10, 3, [3, 3, 3]),
        (12, 3, [4, 4, 3]),
        (4, 3, [1, 1, 1]),
        (3, 3, [1, 1, 1]),  # too small for a reserve
        (3, 1, [3]),
        (1, 1, [1]),
        (100, 7, [15, 14, 14, 14, 14, 14, 14]),
    ],
)
def test_shares(cap: int, workers: int, shares: list[int]) -> None:
    assert divide(cap, workers) == shares


def test_all_small_caps() -> None:
    for cap, workers, needs in itertools.product(range(1, 40), range(1, 40), (2, 4, 10)):
        usable = cap - 1 if cap >= needs else cap
        if workers > usable:
            with pytest.raises(ValueError, match="cannot share"):
                divide(cap, workers, needs)
            continue
        shares = divide(cap, workers, needs)
        assert len(shares) == workers
        assert sum(shares) == usable
        assert min(shares) >= 1
        assert max(shares) - min(shares) <= 1
        assert shares == sorted(shares, reverse=True)


def test_a_cap_of_one_is_never_kept_for_control() -> None:
    assert divide(1, 1, 0) == [1]


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="4 workers cannot share 4 connections, one of them for control"):
        divide(4, 4)
    with pytest.raises(ValueError, match="4 workers cannot share 3 connections: each needs"):
        divide(3, 4)
    with pytest.raises(ValueError, match="at least 1 connection"):
        divide(0, 1)
    with pytest.raises(ValueError, match="at least 1 worker"):
        divide(5, 0)
