"""Which node gets a worker."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from raypg.core.placement import PER_NODE, Plan, plan

A, B, C = "a", "b", "c"


@pytest.mark.parametrize(
    ("nodes", "workers", "wanted", "most", "start", "drain"),
    [
        ([A], {}, PER_NODE, 9, [(0, A)], []),
        ([A, B, C], {}, PER_NODE, 9, [(0, A), (1, B), (2, C)], []),
        ([A, B, C], {}, PER_NODE, 2, [(0, A), (1, B)], []),  # no connection for a third
        ([A, B, C], {0: A, 1: B}, PER_NODE, 9, [(2, C)], []),  # a node has joined
        ([A, C], {0: A, 2: C}, PER_NODE, 9, [], []),  # another one has left
        ([A, C], {0: A, 1: B, 2: C}, PER_NODE, 9, [], [1]),  # it may have no workers any more
        ([A, B], {0: A, 1: A}, PER_NODE, 9, [(2, B)], [1]),  # it was two workers on one node before
        ([A, B], {1: A}, PER_NODE, 9, [(0, B)], []),  # numbers are used again
        ([A], {}, 3, 9, [(0, A), (1, A), (2, A)], []),
        ([A, B], {}, 3, 9, [(0, A), (1, B), (2, A)], []),
        ([A, B, C], {0: A}, 3, 9, [(1, B), (2, C)], []),
        ([A, B, C], {}, 1, 9, [(0, A)], []),
        ([A, B], {0: A, 1: B, 2: A}, 2, 9, [], [2]),  # the second one on a node goes first
        ([A, B], {0: A, 1: A, 2: B}, 2, 9, [], [1]),
        ([A, B], {0: A, 1: B, 2: A}, 3, 9, [], []),
        ([A, B], {0: A, 1: C}, 2, 9, [(2, B)], [1]),
        ([A, B], {0: A, 1: B}, 2, 0, [], [1]),  # one is always there
        ([], {0: A}, 2, 9, [], []),  # nothing is known of the nodes
    ],
)
def test_plans(
    nodes: list[str], workers: dict[int, str], wanted: int, most: int, start: list[tuple[int, str]], drain: list[int]
) -> None:
    assert plan(nodes, workers, wanted, most) == Plan(tuple(start), tuple(drain))


def test_numbers_of_workers_that_end_are_not_used() -> None:
    assert plan([A, B], {0: A}, PER_NODE, 9, taken=(1, 2)).start == ((3, B),)


def test_any_plan_is_enough_and_final(rng: random.Random) -> None:
    for _ in range(2000):
        nodes = [f"n{i}" for i in range(rng.randint(1, 5))]
        workers = {i: rng.choice([*nodes, "gone"]) for i in rng.sample(range(8), rng.randint(0, 6))}
        wanted = rng.choice([PER_NODE, 1, 2, 3, 5, 8])
        most = rng.randint(1, 9)
        first = plan(nodes, workers, wanted, most)
        after = {number: node for number, node in workers.items() if number not in first.drain} | dict(first.start)
        assert plan(nodes, after, wanted, most) == Plan((), ()), (nodes, workers, wanted, most)
        assert len(after) == min(most, len(nodes) if wanted == PER_NODE else wanted)
        assert not first.drain or not set(first.drain) & {number for number, _ in first.start}
        if wanted == PER_NODE:
            assert max(Counter(after.values()).values()) == 1
        elif not workers:
            spread = Counter(after.values())
            assert max(spread.values()) - min(spread[node] for node in nodes) <= 1
