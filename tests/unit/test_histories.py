"""The checker of histories: it lets pass what may be, and finds what must not be."""

from __future__ import annotations

import random

import pytest
from histories import Operation, check


def wrote(session: str, begun: float, ended: float, **rows: int) -> Operation:
    return Operation(session, True, begun, ended, rows)


def read(session: str, begun: float, ended: float, **rows: int) -> Operation:
    return Operation(session, False, begun, ended, rows)


def test_a_history_without_fault_has_none() -> None:
    history = [
        wrote("a", 0, 1, x=1),
        read("b", 2, 3, x=1, y=0),
        wrote("a", 4, 6, x=2),
        read("b", 5, 5.5, x=1),  # beside the write: either will do
        read("c", 5, 5.5, x=1),
        read("d", 5.4, 7, x=2),
        read("b", 7, 8, x=2),
    ]
    assert check(history) == []
    assert check(reversed(history)) == []
    assert check([]) == []


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([wrote("a", 0, 1, x=1), read("b", 2, 3, x=0)], "1 was acknowledged before it began"),
        ([wrote("a", 0, 1, x=1), read("a", 2, 3, x=0)], "1 was acknowledged before it began"),
        # While the write is under way.
        ([wrote("a", 0, 9, x=1), read("b", 1, 2, x=1), read("b", 3, 4, x=0)], "it had seen 1 before"),
        ([wrote("a", 0, 9, x=1), read("b", 1, 2, x=1), read("c", 3, 4, x=0)], "somebody had seen 1 before it began"),
        ([wrote("a", 5, 6, x=1), read("b", 1, 2, x=1)], "nobody had begun to write"),
        ([read("b", 1, 2, x=1)], "nobody had begun to write"),
        ([wrote("a", 0, 1, x=1), wrote("b", 2, 3, x=1)], "both wrote x at version 1"),
        # One of several rows.
        ([wrote("a", 0, 1, x=1, y=4), read("b", 2, 3, x=1, y=3)], "read y at version 3"),
    ],
)
def test_each_fault_is_found(history: list[Operation], words: str) -> None:
    problems = check(history)
    assert len(problems) == 1
    assert words in problems[0]
    assert len(check(reversed(history))) == 1


def simulated(rng: random.Random, stale: float, calls: int = 2_000) -> list[Operation]:
    """Calls on one true database, of which each takes effect at a moment between its begin and its end; a share of the
    reads answers what was there a while ago."""
    versions = dict.fromkeys("wxyz", 0)
    past: list[tuple[float, dict[str, int]]] = [(0.0, dict(versions))]
    free = dict.fromkeys(range(8), 0.0)
    history = []
    now = 0.0
    for _ in range(calls):
        now += rng.random()
        session = rng.choice([session for session, since in free.items() if since < now] or [0])
        if free[session] >= now:
            continue
        begun, ended = now - rng.random() / 100, now + rng.random() / 100
        row = rng.choice("wxyz")
        if rng.random() < 0.3:
            versions[row] += 1
            past.append((now, dict(versions)))
            seen = {row: versions[row]}
            history.append(Operation(f"s{session}", True, begun, ended, seen))
        else:
            shown = (
                next(then for at, then in reversed(past) if at <= now - 5.0)
                if rng.random() < stale and now > 6
                else versions
            )
            history.append(Operation(f"s{session}", False, begun, ended, {row: shown[row]}))
        free[session] = ended
    return history


def test_what_a_true_database_answers_passes_and_old_answers_do_not(rng: random.Random) -> None:
    for _ in range(5):
        assert check(simulated(rng, stale=0.0)) == []
        assert check(simulated(rng, stale=0.05)) != []
