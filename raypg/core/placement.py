"""Which node gets a worker, and which worker is to go. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

__all__ = ["PER_NODE", "Plan", "plan"]

PER_NODE: Literal["per_node"] = "per_node"


class Plan(NamedTuple):
    """What to change.

    Attributes:
        start: (number, node) of the workers to start; numbers are reused, so that names stay bounded.
        drain: numbers of the workers that are to end when nobody uses them any more.
    """

    start: tuple[tuple[int, str], ...]
    drain: tuple[int, ...]


def plan(
    nodes: Sequence[str],
    workers: Mapping[int, str],
    wanted: int | Literal["per_node"],
    most: int,
    taken: Sequence[int] = (),
) -> Plan:
    """Compare the workers that there are with those that there should be.

    Args:
        nodes: ids of the nodes that may have workers; with fewer workers than nodes, the first ones get them.
        workers: number → node of the workers that serve, or will. None is on a node that is gone.
        wanted: how many in all, or one for each node.
        most: more than this cannot be: each needs a connection.
        taken: other numbers that must not be used: of workers that end.

    Returns:
        The changes. There is always one worker, if there is a node: a worker elsewhere is better than none.
    """
    if not nodes:
        return Plan((), ())
    count = max(1, min(len(nodes) if wanted == PER_NODE else wanted, most))
    known = set(nodes)
    # Those on nodes that may have none any more are the first to go, then the second on a node, then the latest.
    seen: Counter[str] = Counter()
    ranked = []
    for number, node in sorted(workers.items()):
        ranked.append((node not in known, seen[node] if wanted == PER_NODE or count < len(workers) else 0, number))
        seen[node] += 1
    keep = [number for strange, again, number in sorted(ranked) if not strange and not (again and wanted == PER_NODE)]
    keep = keep[:count]
    on = Counter(workers[number] for number in keep)
    numbers = (number for number in itertools.count() if number not in workers and number not in taken)
    start = []
    for _ in range(count - len(keep)):
        node = min(nodes, key=lambda node: (on[node], nodes.index(node)))
        on[node] += 1
        start.append((next(numbers), node))
    return Plan(tuple(start), tuple(sorted(workers.keys() - set(keep))))
