"""The fair queue: against a model of every promise, for fairness, and for bounded memory."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from raypg.core.fair_queue import FairQueue, QueueFull, Ticket


def drained(queue: FairQueue[str], now: float = 0.0) -> Iterator[str]:
    while (item := queue.pop(now)) is not None:
        yield item


def test_one_flow_is_first_in_first_out() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for n in range(20):
        queue.push("job", str(n))
    assert list(drained(queue)) == [str(n) for n in range(20)]
    assert len(queue) == 0


def test_two_backlogged_flows_take_turns_of_a_quantum() -> None:
    queue: FairQueue[str] = FairQueue(100, quantum=2)
    for n in range(5):
        queue.push("a", f"a{n}")
    for n in range(3):
        queue.push("b", f"b{n}")
    assert list(drained(queue)) == ["a0", "a1", "b0", "b1", "a2", "a3", "b2", "a4"]


def test_shares_are_of_cost_and_not_of_items() -> None:
    queue: FairQueue[str] = FairQueue(10_000)
    for _ in range(3000):
        queue.push("dear", "dear", cost=5)
        queue.push("cheap", "cheap", cost=0.5)
    served = [queue.pop(0.0) for _ in range(2000)]
    dear, cheap = 5 * served.count("dear"), 0.5 * served.count("cheap")
    assert abs(dear - cheap) <= 2 * (queue.quantum + 5)


def test_an_item_far_above_the_quantum_is_served_at_once_and_paid_for_afterwards() -> None:
    queue: FairQueue[str] = FairQueue(100_000, quantum=1)
    queue.push("whale", "whale", cost=1_000)
    queue.push("whale", "whale again", cost=1_000)
    for n in range(3_000):
        queue.push("fish", f"fish{n}")
    served = list(drained(queue))
    assert served[0] == "whale"
    assert 990 <= served.index("whale again") <= 1_010


def test_debt_is_kept_while_others_wait_even_by_a_flow_that_runs_empty() -> None:
    queue: FairQueue[str] = FairQueue(1_000)
    for n in range(200):
        queue.push("fish", f"fish{n}")
    queue.push("whale", "whale", cost=100)
    before_second: list[str | None] = []
    while queue.pop(0.0) != "whale":
        pass
    queue.push("whale", "whale again", cost=100)
    while (item := queue.pop(0.0)) != "whale again":
        before_second.append(item)
    assert len(before_second) >= 90


@pytest.mark.parametrize("huge", [1e6, 1e30, 1e308])
def test_debt_without_bound_does_not_spin(huge: float) -> None:
    queue: FairQueue[str] = FairQueue(100, quantum=0.001)
    for flow in range(5):
        for n in range(2):
            queue.push(flow, f"{flow}/{n}", cost=huge)
    assert len(list(drained(queue))) == 10


def test_when_nobody_waits_debts_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue(100)
    queue.push("whale", "whale", cost=1e9)
    assert queue.pop(0.0) == "whale"
    assert queue.pop(0.0) is None
    queue.push("whale", "again", cost=1e9)
    queue.push("fish", "fish")
    assert queue.pop(0.0) == "again"


def light_waits(heavy_per_light: int, seed: int) -> list[float]:
    """Cost served between push and pop of each item of a light flow, while a heavy one floods the queue."""
    rng = random.Random(seed)
    queue: FairQueue[tuple[str, float]] = FairQueue(1_000)
    served = 0.0
    waits: list[float] = []
    for _ in range(400):
        gap = rng.expovariate(1 / 100)  # one light arrival in 100 units of service
        until = served + gap
        while served < until:
            for _ in range(heavy_per_light and 2):  # twice what can be served: it is refused most of the time
                try:
                    queue.push("heavy", ("heavy", served))
                except QueueFull:
                    break
            got = queue.pop(0.0)
            served += 1.0
            if got is not None and got[0] == "light":
                waits.append(served - got[1])
        for _ in range(rng.choice([1, 1, 1, 5, 20])):
            queue.push("light", ("light", served))
    return waits


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_light_flow_waits_at_most_three_times_its_wait_alone(seed: int) -> None:
    alone, beside = sorted(light_waits(0, seed)), sorted(light_waits(100, seed))
    assert len(beside) > 1_000
    assert sum(beside) / len(beside) <= 3 * sum(alone) / len(alone)
    for quantile in (0.5, 0.9, 0.99, 1.0):
        at = math.ceil(quantile * min(len(alone), len(beside))) - 1
        assert beside[at] <= 3 * alone[at], f"quantile {quantile}: {beside[at]} against {alone[at]} alone"


def test_a_flow_that_flashes_up_again_and_again_gets_no_more_than_its_share() -> None:
    """One item whenever the last was served: always 'new', if running empty gave that privilege back."""
    queue: FairQueue[str] = FairQueue(100_000)
    for _ in range(10_000):
        queue.push("heavy", "heavy")
    queue.push("flash", "flash", cost=4)
    cost = {"flash": 0.0, "heavy": 0.0}
    for _ in range(4_000):
        item = queue.pop(0.0)
        assert item is not None
        cost[item] += 4 if item == "flash" else 1
        if item == "flash":
            queue.push("flash", "flash", cost=4)
    assert cost["flash"] <= cost["heavy"] + 2 * (queue.quantum + 4)


@pytest.mark.parametrize("limit", [2, 3, 10, 100, 10_000])
def test_a_flood_leaves_room_for_a_light_flow(limit: int) -> None:
    queue: FairQueue[int] = FairQueue(limit)
    accepted = math.ceil(0.9 * limit)
    for n in range(accepted):
        queue.push("heavy", n)
    with pytest.raises(QueueFull) as refused:
        queue.push("heavy", accepted)
    assert refused.value.depth == accepted
    assert refused.value.flow_limit == accepted
    if limit >= 10:
        queue.push("light", 0)
        with pytest.raises(QueueFull):  # what the light flow took, the heavy one does not get back
            queue.push("heavy", 0)


@pytest.mark.parametrize("flows", [2, 5, 20])
def test_room_stays_for_one_more_flow_however_many_flood(flows: int) -> None:
    queue: FairQueue[int] = FairQueue(10_000)
    for n in range(20_000):
        try:
            queue.push(n % flows, 0)
        except QueueFull:
            continue
    depths = [queue.depth(flow) for flow in range(flows)]
    assert max(depths) - min(depths) <= 1
    assert sum(depths) == pytest.approx(10_000 * 9 * flows / (9 * flows + 1), abs=flows)
    queue.push("newcomer", 1)


def test_a_full_queue_refuses_everybody_and_says_so() -> None:
    queue: FairQueue[int] = FairQueue(1)
    queue.push("a", 1)
    with pytest.raises(QueueFull) as refused:
        queue.push("b", 2)
    assert (refused.value.depth, refused.value.limit) == (1, 1)
    assert (refused.value.flow_depth, refused.value.flow_limit) == (0, 0)
    assert "1 of 1" in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    assert len(queue) == 1


def test_control_work_goes_ahead_and_is_not_bounded() -> None:
    queue: FairQueue[str] = FairQueue(1)
    queue.push("a", "statement")
    ping = queue.push_front("ping")
    for n in range(10):
        queue.push_front(f"control {n}")
    assert len(queue) == 12
    assert queue.cancel(ping)
    assert list(drained(queue)) == [*(f"control {n}" for n in range(10)), "statement"]


def test_an_expired_item_is_never_popped_and_comes_out_of_expire() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.push("a", "late", deadline=5.0)
    queue.push("a", "patient")
    queue.push("a", "later", deadline=7.0)
    assert queue.next_deadline() == 5.0
    assert queue.pop(5.0) == "patient"  # a deadline that is reached has passed
    assert queue.next_deadline() == 5.0
    assert queue.depth("a") == 1
    assert queue.expire(5.0) == ["late"]
    assert queue.expire(6.9) == []
    assert queue.expire(100.0) == ["later"]
    assert queue.next_deadline() is None
    assert len(queue) == 0


def test_control_work_expires_too() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.push("a", "statement")
    queue.push_front("put back", deadline=5.0)
    queue.push_front("ping")
    cancelled = queue.push_front("cancelled", deadline=4.0)
    assert queue.cancel(cancelled)
    assert queue.next_deadline() == 5.0
    assert queue.pop(5.0) == "ping"
    assert queue.expire(5.0) == ["put back"]
    assert len(queue) == 1
    queue.push_front("again", deadline=9.0)
    assert queue.pop(8.9) == "again"
    assert queue.drain() == ["statement"]
    queue.push_front("last", deadline=12.0)
    assert queue.drain() == ["last"]
    assert queue.next_deadline() is None
    assert queue.expire(99.0) == []


def test_who_takes_only_some_takes_nothing_out_of_turn() -> None:
    """Asked again and again for what it may not have, the queue goes on as if nobody had asked."""
    for flows in (1, 3):
        asked, plain = FairQueue[int](200, quantum=2), FairQueue[int](200, quantum=2)
        for n in range(60):
            for queue in (asked, plain):
                queue.push(f"flow {n % flows}", n, cost=1 + n % 3)
        taken = []
        while asked:
            assert asked.pop(0.0, only=lambda _: False) is None
            seen: list[int] = []
            first = asked.pop(0.0, only=lambda item, seen=seen: not seen.append(item))  # type: ignore[func-returns-value,misc]
            assert seen == [first]
            taken.append(first)
        assert taken == [plain.pop(0.0) for _ in range(60)]


def test_who_takes_only_some_does_not_see_the_cancelled() -> None:
    queue: FairQueue[str] = FairQueue(10)
    tickets = [queue.push("a", name) for name in ("x", "y", "z")]
    queue.cancel(tickets[0])
    assert queue.pop(0.0, only=lambda item: item == "x") is None
    assert queue.pop(0.0, only=lambda item: item == "y") == "y"
    queue.push_front("first")
    assert queue.pop(0.0, only=lambda item: item == "z") is None
    assert [queue.pop(0.0), queue.pop(0.0), queue.pop(0.0)] == ["first", "z", None]


def test_next_deadline_passes_over_what_is_gone() -> None:
    queue: FairQueue[str] = FairQueue(10)
    first = queue.push("a", "first", deadline=1.0)
    queue.push("a", "second", deadline=2.0)
    assert queue.cancel(first)
    assert not queue.cancel(first)
    assert not first.waiting
    assert queue.next_deadline() == 2.0


def test_drain_returns_everything_once_also_what_pop_stepped_over() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.push("a", "expired", deadline=1.0)
    queue.push("a", "taken")
    assert queue.pop(2.0) == "taken"
    gone = queue.push("a", "cancelled")
    kept = queue.push("b", "b")
    queue.push("a", "a", deadline=9.0)
    queue.push_front("ping")
    queue.cancel(gone)
    drained_items = queue.drain()
    assert drained_items[:2] == ["ping", "expired"]
    assert sorted(drained_items[2:]) == ["a", "b"]
    assert len(queue) == 0
    assert queue.pop(0.0) is None
    assert queue.next_deadline() is None
    assert queue.expire(100.0) == []
    assert not queue.cancel(kept)
    queue.push("b", "usable again")
    assert queue.pop(0.0) == "usable again"


def test_a_ticket_does_not_keep_its_item_and_belongs_to_one_queue() -> None:
    one: FairQueue[str] = FairQueue(10)
    two: FairQueue[str] = FairQueue(10)
    ticket = one.push("a", "x" * 10, deadline=3.0)
    two.push("a", "y")
    with pytest.raises(ValueError, match="another queue"):
        two.cancel(ticket)
    assert "waiting" in repr(ticket)
    one.pop(0.0)
    assert not hasattr(ticket, "_item")
    assert "taken" in repr(ticket)
    assert repr(one) == "<FairQueue 0 waiting, limit 10, 1 flows>"


def test_memory_stays_bounded_when_nothing_is_ever_popped() -> None:
    queue: FairQueue[int] = FairQueue(1_000)
    keep = queue.push("kept", 0, deadline=1e9)
    for n in range(50_000):
        queue.cancel(queue.push(f"flow {n}", n, deadline=1e6 + n))
        queue.cancel(queue.push_front(n))
    entries = sum(len(flow.tickets) for flow in queue._flows.values()) + len(queue._control.tickets)
    assert entries < 300
    assert len(queue._flows) < 300
    assert len(queue._by_deadline) < 300
    assert keep.waiting
    assert queue.pop(0.0) == 0


@pytest.mark.parametrize("cost", [1, 50])
def test_an_endless_stream_of_new_flows_neither_starves_the_others_nor_leaks(cost: float) -> None:
    queue: FairQueue[int] = FairQueue(1_000)
    for _ in range(100):
        queue.push("base", -1, deadline=1e9)
    served = 0
    for n in range(20_000):
        queue.push(n, n, cost=cost, deadline=1e6 - n)
        served += queue.pop(0.0) == -1
    assert served == 100
    assert len(queue._by_deadline) < 400
    assert len(queue._flows) < 2_000


@pytest.mark.parametrize("cost", [0, -1, math.inf, math.nan])
def test_costs_that_make_no_sense(cost: float) -> None:
    with pytest.raises(ValueError, match="cost"):
        FairQueue[int](10).push("a", 1, cost=cost)


def test_other_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="limit"):
        FairQueue[int](0)
    with pytest.raises(ValueError, match="quantum"):
        FairQueue[int](1, quantum=0)
    with pytest.raises(ValueError, match="deadline"):
        FairQueue[int](1).push("a", 1, deadline=math.nan)


class QueueAgainstModel(RuleBasedStateMachine):
    """The promises, kept by lists: nothing lost, nothing twice, FIFO in a flow, no flow far ahead in cost."""

    tickets = Bundle("tickets")
    LIMIT = 30
    QUANTUM = 3.0
    MOST = 7.0

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue(self.LIMIT, quantum=self.QUANTUM)
        self.now = 0.0
        self.items = 0
        self.control: list[int] = []
        self.flows: dict[int, list[int]] = {flow: [] for flow in range(4)}
        self.deadlines: dict[int, float] = {}
        self.costs: dict[int, float] = {}
        self.owed_to_expire: list[int] = []
        self.shares: dict[tuple[int, int], list[float]] = {}

    def waiting(self) -> int:
        return sum(map(len, self.flows.values()))

    def forget(self, item: int) -> None:
        for waiting in (self.control, *self.flows.values()):
            if item in waiting:
                waiting.remove(item)

    def settle_shares(self) -> None:
        """Two flows can be compared only over a time in which both had something waiting throughout."""
        for pair in list(self.shares):
            if not all(self.flows[flow] for flow in pair):
                del self.shares[pair]

    def let_expire(self) -> None:
        passed = [item for item, deadline in self.deadlines.items() if deadline <= self.now]
        for item in sorted(passed, key=lambda i: (self.deadlines[i], i)):
            self.forget(item)
            del self.deadlines[item]
            self.owed_to_expire.append(item)
        self.settle_shares()

    @rule(
        target=tickets,
        flow=st.integers(0, 3),
        cost=st.sampled_from([0.5, 1.0, 3.0, MOST]),
        patience=st.none() | st.sampled_from([1.0, 3.0, 10.0]),
    )
    def push(self, flow: int, cost: float, patience: float | None) -> object:
        held, total = len(self.flows[flow]), self.waiting()
        deadline = None if patience is None else self.now + patience
        try:
            ticket = self.queue.push(flow, self.items, cost=cost, deadline=deadline)
        except QueueFull:
            assert held >= 9 * (self.LIMIT - total)
            return multiple()
        assert held < 9 * (self.LIMIT - total)
        item = self.items
        self.items += 1
        self.flows[flow].append(item)
        self.costs[item] = cost
        if deadline is not None:
            self.deadlines[item] = deadline
        if not held:
            for other in self.flows:
                if other != flow and self.flows[other]:
                    self.shares[min(flow, other), max(flow, other)] = [0.0, 0.0]
        return ticket, item

    @rule(target=tickets, patience=st.none() | st.sampled_from([1.0, 3.0, 10.0]))
    def push_front(self, patience: float | None) -> object:
        item = self.items
        self.items += 1
        self.control.append(item)
        deadline = None if patience is None else self.now + patience
        if deadline is not None:
            self.deadlines[item] = deadline
        return self.queue.push_front(item, deadline=deadline), item

    @rule(entry=consumes(tickets))
    def cancel(self, entry: tuple[Ticket[int], int]) -> None:
        ticket, item = entry
        waits = item in self.control or any(item in waiting for waiting in self.flows.values())
        assert ticket.waiting == waits
        assert self.queue.cancel(ticket) == waits
        self.forget(item)
        self.deadlines.pop(item, None)
        self.settle_shares()

    @rule(times=st.integers(1, 12))
    def pop(self, times: int) -> None:
        for _ in range(times):
            self.pop_one()

    def pop_one(self) -> None:
        item = self.queue.pop(self.now)
        self.let_expire()
        if item is None:
            assert not self.control
            assert not self.waiting()
            return
        self.deadlines.pop(item, None)
        if self.control:
            assert item == self.control.pop(0)
            return
        (flow,) = [flow for flow, waiting in self.flows.items() if item in waiting]
        assert self.flows[flow].pop(0) == item
        for pair, served in self.shares.items():
            if flow in pair:
                served[pair.index(flow)] += self.costs[item]
                # Each may be ahead by a quantum and one item overdrawn, and by what it did the round before.
                assert abs(served[0] - served[1]) <= 2 * (self.QUANTUM + self.MOST)
        self.settle_shares()

    @rule(step=st.sampled_from([0.5, 2.0, 20.0]))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule()
    def expire(self) -> None:
        expired = self.queue.expire(self.now)
        self.let_expire()
        assert expired == self.owed_to_expire
        self.owed_to_expire = []

    @rule()
    def drain(self) -> None:
        expected = [
            *self.control,
            *self.owed_to_expire,
            *(i for waiting in self.flows.values() for i in waiting),
        ]
        drained_items = self.queue.drain()
        assert drained_items[: len(self.control) + len(self.owed_to_expire)] == self.control + self.owed_to_expire
        assert sorted(drained_items) == sorted(expected)
        self.control, self.owed_to_expire = [], []
        self.flows = {flow: [] for flow in self.flows}
        self.deadlines = {}
        self.shares = {}

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.queue) == self.waiting() + len(self.control)
        for flow, waiting in self.flows.items():
            assert self.queue.depth(flow) == len(waiting)
        if self.owed_to_expire:
            assert self.queue.next_deadline() is not None
        else:
            assert self.queue.next_deadline() == min(self.deadlines.values(), default=None)


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=200, stateful_step_count=60, deadline=None, print_blob=True)
