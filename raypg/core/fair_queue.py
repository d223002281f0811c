"""The queue in front of a worker's connections: fair between jobs, bounded, with deadlines.

Deficit round robin (Shreedhar and Varghese, 1996) over flows, FIFO within a flow. A flow is whatever shall
get an equal share: here, a Ray job. Two refinements, both known from fq_codel (RFC 8290):

- A flow may overdraw its credit by one item and pays afterwards: so an item may cost more than the quantum.
- A flow that was idle goes ahead of the backlogged ones until its first quantum is used up. A job that asks
  seldom waits for the item in service, not for its heavy neighbours' turns.

Unlike there, a flow that ran empty with credit left keeps its place at the front for that rest, and an
endless stream of new flows cannot starve the backlogged ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from typing import Final, Generic, TypeVar

__all__ = ["FairQueue", "QueueFull", "Ticket"]

T = TypeVar("T")

_WAITING: Final = 0
_TAKEN: Final = 1
_CANCELLED: Final = 2
_EXPIRED: Final = 3

# Choudhury and Hahne's dynamic threshold (1998): a flow may hold this many times what is still free. Alone it
# gets 9/10 of the queue, each of two 9/19, each of n 9/(9n + 1): the rest stays free for whoever comes next.
_SHARE_OF_FREE: Final = 9

# After so many items of fresh flows in a row, a backlogged flow gets one in, or all pay a quantum of debt.
_FRESH_IN_A_ROW: Final = 128

# Dead entries are swept when they outnumber the waiting ones by this many: amortised O(1), bounded memory.
_SLACK: Final = 64


class QueueFull(Exception):
    """An item was refused; nothing was queued.

    Args:
        depth: items waiting, of all flows.
        limit: most items that may wait.
        flow_depth: items of this flow that wait.
        flow_limit: how many it may have now; below ``limit`` because room is kept for other flows.
    """

    def __init__(self, depth: int, limit: int, flow_depth: int, flow_limit: int) -> None:
        super().__init__(depth, limit, flow_depth, flow_limit)
        self.depth = depth
        self.limit = limit
        self.flow_depth = flow_depth
        self.flow_limit = flow_limit

    def __str__(self) -> str:
        return (
            f"the queue is full: {self.depth} of {self.limit} wait, {self.flow_depth} of them from this job, "
            f"which may have {self.flow_limit} now"
        )


class Ticket(Generic[T]):
    """One queued item; what ``cancel`` takes."""

    __slots__ = ("_cost", "_deadline", "_flow", "_item", "_state")

    def __init__(self, flow: _Flow[T], item: T, cost: float, deadline: float | None) -> None:
        self._flow = flow
        self._item = item
        self._cost = cost
        self._deadline = deadline
        self._state = _WAITING

    @property
    def waiting(self) -> bool:
        """Whether the item is still in the queue."""
        return self._state == _WAITING

    def __repr__(self) -> str:
        state = ("waiting", "taken", "cancelled", "expired")[self._state]
        return f"<Ticket {state} flow={self._flow.key!r} cost={self._cost:g} deadline={self._deadline}>"


class _Flow(Generic[T]):
    __slots__ = ("credit", "fresh", "key", "tickets", "waiting")

    def __init__(self, key: Hashable, credit: float) -> None:
        self.key = key
        self.credit = credit  # cost it may still take in this turn; below zero is debt
        self.fresh = True  # in the list of fresh flows, not in that of backlogged ones
        self.tickets: deque[Ticket[T]] = deque()
        self.waiting = 0


class FairQueue(Generic[T]):
    """Deficit round robin over flows, FIFO within a flow, bounded, with deadlines. Not thread-safe.

    Args:
        limit: most items that may wait, counted in items; items of ``push_front`` do not count.
        quantum: cost that a flow may take per turn. Lower is finer interleaving; items may cost more.

    Which flow gets in: a push is refused when ``limit`` items wait, or when its flow holds nine times the
    free room already. So a single flow can fill 90 % of the queue, and a newcomer still finds room, whoever
    floods it. Nothing is ever evicted: an accepted item comes out of exactly one of pop, expire, cancel and
    drain.

    Cost: push, pop and cancel take amortised O(1) steps plus O(log n) for an item with a deadline. When items
    are dearer than the quantum a pop may visit each flow once.
    """

    def __init__(self, limit: int, quantum: float = 8.0) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1 item, not {limit}")
        if not 0 < quantum < math.inf:
            raise ValueError(f"quantum must be a positive finite cost, not {quantum}")
        self.limit = limit
        self.quantum = float(quantum)
        self._flows: dict[Hashable, _Flow[T]] = {}
        self._fresh: OrderedDict[_Flow[T], None] = OrderedDict()
        self._backlogged: OrderedDict[_Flow[T], None] = OrderedDict()
        self._control: _Flow[T] = _Flow("control", 0.0)
        self._waiting = 0  # of all flows, without control
        self._fresh_in_a_row = 0  # items of fresh flows since a backlogged one was served
        self._swept_later = 0  # entries of flows that are cancelled or expired, but still in a deque
        self._by_deadline: list[tuple[float, int, Ticket[T]]] = []
        self._stale_deadlines = 0  # entries of that heap whose ticket no longer waits
        self._sequence = 0
        self._expired: list[tuple[float, T]] = []  # noticed by pop, to be handed out by expire

    def __len__(self) -> int:
        """Items that can still be popped, control work included."""
        return self._waiting + self._control.waiting

    def __repr__(self) -> str:
        return f"<FairQueue {len(self)} waiting, limit {self.limit}, {len(self._flows)} flows>"

    def depth(self, flow: Hashable) -> int:
        """Items of this flow that wait."""
        found = self._flows.get(flow)
        return found.waiting if found is not None else 0

    def push(self, flow: Hashable, item: T, *, cost: float = 1.0, deadline: float | None = None) -> Ticket[T]:
        """Queue an item behind the others of its flow.

        Args:
            flow: who shall be charged, e.g. the Ray job id.
            item: anything.
            cost: expected share of the resource, in the unit of ``quantum``.
            deadline: when it is no longer wanted, on the clock that ``pop`` and ``expire`` are given.

        Raises:
            QueueFull: see the class for when.
            ValueError: the cost is not a positive finite number, or the deadline is NaN.
        """
        if not 0 < cost < math.inf:
            raise ValueError(f"cost must be a positive finite number, not {cost}")
        if deadline is not None and deadline != deadline:
            raise ValueError("deadline must not be NaN")
        found = self._flows.get(flow)
        held = found.waiting if found is not None else 0
        if held >= (self.limit - self._waiting) * _SHARE_OF_FREE:
            # The least that is refused, from: held >= share * (beside - held).
            beside = self.limit - (self._waiting - held)
            raise QueueFull(self._waiting, self.limit, held, -(-beside * _SHARE_OF_FREE // (_SHARE_OF_FREE + 1)))
        if found is None:
            found = self._flows[flow] = _Flow(flow, self.quantum)
            self._fresh[found] = None
        elif not held and not found.fresh and found.credit > 0:
            del self._backlogged[found]
            self._fresh[found] = None
            found.fresh = True
        ticket = Ticket(found, item, cost, deadline)
        found.tickets.append(ticket)
        found.waiting = held + 1
        self._waiting += 1
        self._note_deadline(ticket)
        return ticket

    def push_front(self, item: T, *, deadline: float | None = None) -> Ticket[T]:
        """Queue control work: ahead of every flow, FIFO among itself, outside the bound.

        Args:
            deadline: see :meth:`push`.
        """
        ticket = Ticket(self._control, item, 0.0, deadline)
        self._control.tickets.append(ticket)
        self._control.waiting += 1
        self._note_deadline(ticket)
        return ticket

    def _note_deadline(self, ticket: Ticket[T]) -> None:
        if ticket._deadline is not None:
            self._sequence += 1  # so that equal deadlines never compare tickets
            heappush(self._by_deadline, (ticket._deadline, self._sequence, ticket))

    def pop(self, now: float, only: Callable[[T], bool] | None = None) -> T | None:
        """The next item, or None; never one whose deadline has passed (``deadline <= now``).

        Args:
            only: take it only if this says yes to it; nobody behind it is asked, and nothing is out of turn.
        """
        if self._by_deadline and self._by_deadline[0][0] <= now:
            self._notice_expired(now)
        if self._control.waiting:
            return self._take(self._control) if only is None or only(self._first(self._control)) else None
        if not self._waiting:
            self._forget_flows()
            return None
        in_debt = 0
        while True:
            flows = self._fresh or self._backlogged
            if self._fresh_in_a_row >= _FRESH_IN_A_ROW and self._backlogged:
                flows = self._backlogged
            flow = next(iter(flows))
            if flow.credit <= 0:
                flow.credit += self.quantum
                self._to_back(flow)
                in_debt += 1
                if in_debt > len(self._flows):
                    in_debt = 0
                    if self._fresh:
                        self._fresh_in_a_row = 0  # all the others paid a quantum of debt; that was their turn
                    else:
                        self._skip_idle_rounds()
            elif flow.waiting:
                if only is not None and not only(self._first(flow)):
                    return None
                self._waiting -= 1
                self._fresh_in_a_row = self._fresh_in_a_row + 1 if flow.fresh else 0
                return self._take(flow)
            elif flow.fresh and self._backlogged:
                # It must pass through a round of the others before it is new again.
                self._to_back(flow)
            else:
                self._forget(flow)

    def expire(self, now: float) -> list[T]:
        """Take out every item whose deadline has passed, those that ``pop`` stepped over included."""
        self._notice_expired(now)
        expired, self._expired = self._expired, []
        return [item for _, item in expired]

    def next_deadline(self) -> float | None:
        """When ``expire`` has something to hand out next; in the past if it has already."""
        if self._expired:
            return self._expired[0][0]
        heap = self._by_deadline
        while heap and heap[0][2]._state != _WAITING:
            heappop(heap)
            self._stale_deadlines -= 1
        return heap[0][0] if heap else None

    def cancel(self, ticket: Ticket[T]) -> bool:
        """Take one item out. False if it is not waiting any more (popped, expired, cancelled, drained)."""
        if ticket._state != _WAITING:
            return False
        flow = ticket._flow
        if flow is not self._control and self._flows.get(flow.key) is not flow:
            raise ValueError("the ticket is of another queue")
        ticket._state = _CANCELLED
        del ticket._item
        flow.waiting -= 1
        if flow is not self._control:
            self._waiting -= 1
        if ticket._deadline is not None:
            self._stale_deadlines += 1
        self._swept_later += 1
        self._sweep_if_due()
        return True

    def drain(self) -> list[T]:
        """Take out everything, for closing: control work first, then what has expired, then flow by flow."""
        everything = [*self._control.tickets]
        for flow in (*self._fresh, *self._backlogged):
            everything.extend(flow.tickets)
        expired = [item for _, item in self._expired]
        control = self._control.waiting
        items: list[T] = []
        for ticket in everything:
            if ticket._state == _WAITING:
                ticket._state = _TAKEN
                items.append(ticket._item)
                del ticket._item
        items[control:control] = expired
        self._expired = []
        self._control.tickets.clear()
        self._control.waiting = self._waiting = 0
        self._forget_flows()
        return items

    def _first(self, flow: _Flow[T]) -> T:
        """The item that ``_take`` would take."""
        tickets = flow.tickets
        while tickets[0]._state != _WAITING:
            tickets.popleft()
            self._swept_later -= 1
        return tickets[0]._item

    def _take(self, flow: _Flow[T]) -> T:
        item = self._first(flow)
        ticket = flow.tickets.popleft()
        ticket._state = _TAKEN
        flow.waiting -= 1
        flow.credit -= ticket._cost
        if ticket._deadline is not None:
            self._stale_deadlines += 1
            if self._stale_deadlines > self._waiting + _SLACK:
                self._sweep_deadlines()
        del ticket._item  # a ticket may be kept for long; the item must be free to go
        return item

    def _to_back(self, flow: _Flow[T]) -> None:
        if flow.fresh:
            del self._fresh[flow]
            flow.fresh = False
            self._backlogged[flow] = None
        else:
            self._backlogged.move_to_end(flow)

    def _skip_idle_rounds(self) -> None:
        """Everyone is in debt: give at once the rounds in which nobody could be served."""
        rounds = -max(flow.credit for flow in self._backlogged) // self.quantum
        if rounds > 0:
            for flow in self._backlogged:
                flow.credit += rounds * self.quantum

    def _notice_expired(self, now: float) -> None:
        heap = self._by_deadline
        while heap and heap[0][0] <= now:
            deadline, _, ticket = heappop(heap)
            if ticket._state != _WAITING:
                self._stale_deadlines -= 1
                continue
            ticket._state = _EXPIRED
            self._expired.append((deadline, ticket._item))
            del ticket._item
            ticket._flow.waiting -= 1
            if ticket._flow is not self._control:
                self._waiting -= 1
            self._swept_later += 1
        self._sweep_if_due()

    def _sweep_if_due(self) -> None:
        if self._swept_later > len(self) + _SLACK:
            for flow in (self._control, *self._flows.values()):
                flow.tickets = deque(t for t in flow.tickets if t._state == _WAITING)
            self._swept_later = 0
            for flow in [f for f in self._flows.values() if not f.waiting and f.credit > 0]:
                self._forget(flow)
        if self._stale_deadlines > self._waiting + _SLACK:
            self._sweep_deadlines()

    def _sweep_deadlines(self) -> None:
        self._by_deadline = [entry for entry in self._by_deadline if entry[2]._state == _WAITING]
        heapify(self._by_deadline)
        self._stale_deadlines = 0

    def _forget(self, flow: _Flow[T]) -> None:
        self._swept_later -= len(flow.tickets)
        del self._flows[flow.key]
        if flow.fresh:
            del self._fresh[flow]
        else:
            del self._backlogged[flow]

    def _forget_flows(self) -> None:
        """Nobody waits, so nobody is owed anything."""
        if self._flows or self._by_deadline:
            self._flows.clear()
            self._fresh.clear()
            self._backlogged.clear()
            self._by_deadline.clear()
            self._stale_deadlines = 0
            self._swept_later = sum(t._state != _WAITING for t in self._control.tickets)
