"""The budget: every interleaving of a small scope, and how shares follow demand."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from raypg.core.budget import Account, Budget
from raypg.core.sizing import reserve

MOST_STATES = 1_500
"""States looked at for each scope, breadth first: all of the first some steps."""


@dataclass(frozen=True)
class Worker:
    """A worker as it really is, and the messages on their way to it.

    ``orders`` are (number, grant, whether it may open connections by it); any of them may arrive next, or never.
    """

    budget: int = 0
    newest: int = 0
    may_open: bool = False
    held: int = 0
    orders: tuple[tuple[int, int, bool], ...] = ()
    answer: tuple[int, int] | None = None
    known: str = "live"  # to the controller: live, draining, lost, reaped


@dataclass(frozen=True)
class World:
    """Controller and workers."""

    cap: int
    ceiling: int  # the largest cap that connections may be left from
    number: int
    accounts: tuple[tuple[int, Account], ...]
    workers: tuple[tuple[int, Worker], ...]

    @property
    def held(self) -> int:
        return sum(worker.held for _, worker in self.workers)


def budget_of(world: World) -> Budget[int]:
    budget: Budget[int] = Budget(world.cap, reserve(world.cap))
    for key, account in world.accounts:
        budget.accounts[key] = replace(account, unanswered=dict(account.unanswered), demand=list(account.demand))
    return budget


def changed(world: World, budget: Budget[int], workers: dict[int, Worker], **more: int) -> World:
    return replace(world, accounts=tuple(budget.accounts.items()), workers=tuple(workers.items()), **more)


def steps(world: World, most_workers: int) -> Iterator[tuple[str, World]]:
    """Everything that may happen next."""
    workers = dict(world.workers)
    if len(workers) < most_workers:
        key = next(key for key in itertools.count() if key not in workers)
        budget = budget_of(world)
        budget.join(key)
        yield f"join {key}", changed(world, budget, {**workers, key: Worker()})
    if workers:
        budget = budget_of(world)
        budget.divide()
        after, number = dict(workers), world.number
        for key, worker in workers.items():
            number += 1
            grant = budget.send(key, number)
            # Of three on their way the eldest is lost: that keeps the scope small.
            orders = (*worker.orders[-1:], (number, grant, worker.known != "reaped"))
            after[key] = replace(worker, orders=orders)
        yield "ping", changed(world, budget, after, number=number)
    if world.cap > 1:
        for cap in (world.cap - 1, world.cap + 1):
            if cap <= world.ceiling:
                budget = budget_of(world)
                budget.cap, budget.reserved = cap, reserve(cap)
                yield f"cap {cap}", changed(world, budget, workers, cap=cap)
    for key, worker in workers.items():
        yield from steps_of(world, workers, key, worker)


def steps_of(world: World, workers: dict[int, Worker], key: int, worker: Worker) -> Iterator[tuple[str, World]]:
    def now(changes: Worker) -> World:
        return replace(world, workers=tuple({**workers, key: changes}.items()))

    for order in worker.orders:
        number, grant, may_open = order
        left = tuple(other for other in worker.orders if other is not order)
        if number < worker.newest:
            yield f"{key} ignores {number}", now(replace(worker, orders=left))
            continue
        # It answers, and then does its worst: it opens all that it may.
        held = max(worker.held, grant) if may_open else worker.held
        taken = replace(
            worker, orders=left, newest=number, budget=grant, may_open=may_open, answer=(number, worker.held), held=held
        )
        yield f"{key} takes {grant}", now(taken)
    if worker.held > worker.budget:
        yield f"{key} gives back", now(replace(worker, held=worker.held - 1))
    if worker.held < worker.budget and worker.may_open:
        yield f"{key} opens", now(replace(worker, held=worker.held + 1))
    if worker.answer is not None:
        for demand in (0, 9):
            budget = budget_of(world)
            known = worker.known
            if known in ("lost", "reaped"):
                budget.resume(key)
                known = "live"
            budget.answered(key, *worker.answer, demand)
            after = {**workers, key: replace(worker, answer=None, known=known)}
            yield f"{key} answered, demand {demand}", changed(world, budget, after)
    if worker.known == "live":
        for known in ("draining", "lost"):
            budget = budget_of(world)
            budget.stop(key)
            yield f"{key} {known}", changed(world, budget, {**workers, key: replace(worker, known=known)})
    if worker.known == "lost":
        # What it was sent is too old by now to open connections by; those that it had are ended.
        old = tuple((number, grant, False) for number, grant, _ in worker.orders)
        gone = replace(worker, orders=old, may_open=False, held=0, answer=None, known="reaped")
        budget = budget_of(world)
        budget.ended(key, worker.held)
        yield f"{key} reaped", changed(world, budget, {**workers, key: gone})
        budget = budget_of(world)
        budget.leave(key)
        yield f"{key} dead", changed(world, budget, {other: w for other, w in workers.items() if other != key})
    if worker.known == "draining" and worker.held == 0 and budget_of(world).accounts[key].charge == 0:
        budget = budget_of(world)
        budget.leave(key)
        yield f"{key} left", changed(world, budget, {other: w for other, w in workers.items() if other != key})


def normal(world: World) -> object:
    """The same with numbers of messages counted anew: what matters is their order."""
    numbers = {0}
    for _, account in world.accounts:
        numbers.update(account.unanswered)
    for _, worker in world.workers:
        numbers.update((worker.newest, *(number for number, *_ in worker.orders)))
        numbers.update(() if worker.answer is None else worker.answer[:1])
    rank = {number: index for index, number in enumerate(sorted(numbers))}
    return (
        world.cap,
        tuple(
            (key, a.share, a.told, tuple((rank[n], g) for n, g in a.unanswered.items()), a.used, a.live, a.wanted > 0)
            for key, a in world.accounts
        ),
        tuple(
            (
                key,
                w.budget,
                rank[w.newest],
                w.may_open,
                w.held,
                tuple((rank[n], g, o) for n, g, o in w.orders),
                None if w.answer is None else (rank[w.answer[0]], w.answer[1]),
                w.known,
            )
            for key, w in world.workers
        ),
    )


def check(world: World, budget: Budget[int], charged: int, story: object) -> None:
    """Whatever exists is charged for; and what is charged for is within the cap, or was so before the cap was lowered,
    and comes down from there."""
    assert world.held <= budget.charged, story
    assert budget.charged <= max(world.cap, charged), story


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("cap", range(1, 9))
def test_the_sum_never_exceeds_the_cap(cap: int, workers: int) -> None:
    """Whatever is lost, late or overtaken, and whoever dies, wakes up, comes and leaves."""
    begin = World(cap, cap, 0, (), ())
    seen = {normal(begin)}
    waiting: deque[tuple[World, tuple[str, ...]]] = deque([(begin, ())])
    while waiting and len(seen) < MOST_STATES:
        world, path = waiting.popleft()
        charged = budget_of(world).charged
        for name, after in steps(world, workers):
            key = normal(after)
            if key in seen:
                continue
            seen.add(key)
            story = (*path, name)
            budget = budget_of(after)
            check(after, budget, charged, story)
            waiting.append((after, story))
    print(f"{len(seen)} states, {len(path)} steps deep" + ("" if waiting else ", all there are"))


def test_nor_on_long_ways_through_a_larger_scope(rng: random.Random) -> None:
    for _ in range(20):
        world = World(12, 16, 0, (), ())
        story: list[str] = []
        for _ in range(150):
            charged = budget_of(world).charged
            name, world = rng.choice(list(steps(world, 6)))
            story.append(name)
            check(world, budget_of(world), charged, story)


def settled(budget: Budget[str], demand: dict[str, int], rounds: int = 6) -> dict[str, int]:
    """The shares after some rounds in which everybody but the lost answers, and uses what it has work for."""
    numbers = itertools.count(max((n for a in budget.accounts.values() for n in a.unanswered), default=0) + 1)
    for _ in range(rounds):
        budget.divide()
        for key, account in budget.accounts.items():
            if not account.live:
                continue
            number = next(numbers)
            grant = budget.send(key, number)
            budget.answered(key, number, min(grant, demand.get(key, 0)), demand.get(key, 0))
            assert account.told == grant
        assert budget.charged <= budget.cap
    return {key: account.share for key, account in budget.accounts.items() if account.live}


def of(cap: int, *keys: str) -> Budget[str]:
    budget: Budget[str] = Budget(cap, reserve(cap))
    for key in keys:
        budget.join(key)
    return budget


def test_without_demand_it_is_divided_evenly() -> None:
    assert settled(of(10, "a", "b", "c"), {}) == {"a": 3, "b": 3, "c": 3}
    assert settled(of(12, "a", "b", "c"), {}) == {"a": 4, "b": 4, "c": 3}
    assert settled(of(3, "a", "b", "c"), {}) == {"a": 1, "b": 1, "c": 1}
    assert settled(of(1, "a"), {}) == {"a": 1}


def test_shares_follow_load_within_five_pings_and_everybody_keeps_one() -> None:
    budget = of(21, "a", "b")
    assert settled(budget, {}) == {"a": 10, "b": 10}
    assert settled(budget, {"a": 100, "b": 0}, rounds=5) == {"a": 19, "b": 1}
    assert settled(budget, {"a": 0, "b": 100}, rounds=5) == {"a": 1, "b": 19}
    assert settled(budget, {"a": 50, "b": 50}, rounds=5) == {"a": 10, "b": 10}


def test_nothing_moves_for_little() -> None:
    budget = of(21, "a", "b")
    assert settled(budget, {"a": 100, "b": 101}) == {"a": 10, "b": 10}
    assert settled(budget, {"a": 11, "b": 10}) == {"a": 10, "b": 10}
    assert settled(budget, {"a": 10, "b": 3}) == {"a": 10, "b": 10}


def test_a_share_that_is_in_use_moves_only_when_it_comes_back() -> None:
    budget = of(5, "a", "b")
    assert settled(budget, {}) == {"a": 2, "b": 2}
    assert settled(budget, {"a": 9}) == {"a": 3, "b": 1}
    budget.divide()
    budget.send("a", 1001)
    budget.answered("a", 1001, used=3, demand=0)
    for number in range(1002, 1010):
        budget.divide()
        budget.send("b", 2 * number)
        budget.answered("b", 2 * number, used=1, demand=9)
        budget.send("a", 2 * number + 1)
        budget.answered("a", 2 * number + 1, used=3, demand=3)
    # a must give two up, but still holds three: b cannot have it yet.
    assert budget.accounts["a"].share == 1
    assert budget.accounts["b"].share == 1
    budget.send("a", 3000)
    budget.answered("a", 3000, used=2, demand=3)
    budget.divide()
    assert budget.accounts["b"].share == 2


def test_the_share_of_a_lost_worker_is_free_when_its_connections_are_gone() -> None:
    budget = of(10, "a", "b", "c")
    settled(budget, {"a": 5, "b": 5, "c": 5})
    budget.stop("c")
    assert settled(budget, {"a": 9, "b": 9}, rounds=1) == {"a": 3, "b": 3}
    budget.ended("c", 2)  # two were seen and ended; a third may be on its way
    budget.divide()
    assert sum(a.share for a in budget.accounts.values()) == 8
    budget.leave("c")
    budget.divide()
    assert sum(a.share for a in budget.accounts.values()) == 9


def test_primary_and_replicas_share_one_cap() -> None:
    budget: Budget[tuple[str, str]] = Budget(10, 1)
    for worker, server in itertools.product(("0", "1"), ("primary", "replica")):
        budget.join((worker, server))
    budget.divide()
    assert sorted(account.share for account in budget.accounts.values()) == [2, 2, 2, 3]
    assert budget.charged == 9


def test_a_smaller_cap_is_reached_as_connections_come_back() -> None:
    budget = of(9, "a", "b")
    settled(budget, {"a": 9, "b": 9})
    budget.cap = 5
    budget.divide()
    assert budget.charged == 8
    assert {key: budget.send(key, number) for number, key in enumerate("ab", 900)} == {"a": 2, "b": 2}
    budget.answered("a", 900, used=4, demand=4)
    budget.answered("b", 901, used=2, demand=4)
    assert budget.charged == 6
