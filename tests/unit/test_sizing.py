"""How connections are divided: never more than there are, never nothing for somebody while another one has two."""

from __future__ import annotations

import itertools
import random

import pytest

from raypg.core.sizing import check, reserve, share, targets


@pytest.mark.parametrize(
    ("total", "current", "wanted", "result"),
    [
        (9, [9], [0], [9]),
        (9, [3, 3, 3], [0, 0, 0], [3, 3, 3]),
        (11, [0, 0, 0], [0, 0, 0], [4, 4, 3]),
        (9, [3, 3, 3], [20, 0, 0], [7, 1, 1]),
        (9, [7, 1, 1], [20, 20, 0], [4, 4, 1]),
        (9, [3, 3, 3], [4, 2, 0], [4, 3, 2]),  # what nobody needs is divided evenly
        (9, [3, 3, 3], [3.6, 0, 0], [3, 3, 3]),  # not for less than one
        (20, [10, 10], [11, 10], [10, 10]),
        (20, [10, 10], [300, 301], [10, 10]),
        (20, [10, 10], [300, 100], [15, 5]),
        (9, [4, 5, 0], [0, 0, 0], [3, 3, 3]),  # another one has come
        (6, [3, 3, 3], [0, 0, 0], [2, 2, 2]),
        (2, [3, 3, 3], [0, 0, 5], [1, 0, 1]),  # who has work first
        (0, [3], [5], [0]),
        (5, [], [], []),
    ],
)
def test_targets(total: int, current: list[int], wanted: list[float], result: list[int]) -> None:
    found = targets(total, dict(enumerate(current)), dict(enumerate(wanted)))
    assert [found[key] for key in range(len(current))] == result


def test_any_division_uses_all_and_leaves_nobody_out(rng: random.Random) -> None:
    for _ in range(2000):
        workers = rng.randint(1, 6)
        total = rng.randint(0, 30)
        current = {key: rng.randint(0, 10) for key in range(workers)}
        wanted = {key: rng.choice([0.0, 1.0, rng.uniform(0, 12), 500.0]) for key in range(workers)}
        result = targets(total, current, wanted)
        assert sum(result.values()) == total
        assert min(result.values()) >= (1 if total >= workers else 0)
        assert max(result.values()) <= max(1, total - workers + 1)
        assert targets(total, result, wanted) == result, "it is final"
        # Nobody lacks much while another one has what it does not need.
        if any(wanted[key] >= result[key] + 3 for key in result):
            spare = [result[key] - max(1.0, wanted[key]) for key in result]
            assert sum(s for s in spare if s >= 1) < 1 or result == current


def test_all_small_caps() -> None:
    for cap, workers in itertools.product(range(1, 40), range(1, 40)):
        assert reserve(cap) == (1 if cap >= 4 else 0)
        if workers > cap - reserve(cap):
            with pytest.raises(ValueError, match="cannot share"):
                check(cap, workers)
        else:
            check(cap, workers)


def test_what_is_kept_together_is_no_less(rng: random.Random) -> None:
    for _ in range(500):
        budgets = [rng.randint(0, 9) for _ in range(rng.randint(1, 5))]
        least = rng.randint(0, 12)
        kept = [share(least, budget, sum(budgets)) for budget in budgets]
        assert sum(kept) >= least or not sum(budgets)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="4 workers cannot share 4 connections, one of them for control"):
        check(4, 4)
    with pytest.raises(ValueError, match="4 workers cannot share 3 connections: each needs"):
        check(3, 4)
    with pytest.raises(ValueError, match="at least 1 connection"):
        check(0, 1)
    with pytest.raises(ValueError, match="at least 1 worker"):
        check(5, 0)


def test_each_worker_needs_a_connection_to_each_server() -> None:
    check(7, 2, 3)
    with pytest.raises(
        ValueError, match=r"2 workers cannot share 6 connections, one of them for control: .* 3 servers"
    ):
        check(6, 2, 3)
    with pytest.raises(ValueError, match=r"one worker cannot share 2 connections: .* each of 3 servers"):
        check(2, 1, 3)
