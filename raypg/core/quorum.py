"""One breaker over all workers of a pool: what each has seen, and what follows for all.

Each worker has a breaker of its own and opens it on its own evidence. That isolates it: the others go on. The
breaker of the pool opens when every worker that can be reached is unwell, so that one with a bad network never opens
it for all. While it is half open one worker at a time probes for all of them.

Pure: no Ray, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from raypg.core.breaker import CLOSED, DISABLED, HALF_OPEN, OPEN, BreakerConfig, CircuitBreaker, State
from raypg.core.window import RateWindow

__all__ = ["PROBE_PATIENCE", "STALE_AFTER", "Order", "Quorum", "Report"]

STALE_AFTER = 4.0
"""Seconds without a report after which a worker has no vote: it is dead or cut off from us."""

JOIN_PATIENCE = 3.0
"""Seconds in which all workers must have joined."""

PROBE_PATIENCE = 3.0
"""Seconds in which a worker must have probed; then the next one may."""


class Report(NamedTuple):
    """What a worker has seen since its last report; travels as a plain tuple.

    Attributes:
        epoch: of the order that it acted under; older ones say nothing about now.
        state: of its own breaker.
        successes, failures, slow, rejected: calls since the last report.
        seconds: that those calls took together.
        consecutive_failures: failures since its last success.
        cause: of the last failure, or of its own breaker's opening.
        absent: whether that failure was that the server was not there; see :meth:`CircuitBreaker.failed`.
    """

    epoch: int
    state: State
    successes: int = 0
    failures: int = 0
    slow: int = 0
    rejected: int = 0
    seconds: float = 0.0
    consecutive_failures: int = 0
    cause: str = ""
    absent: bool = False


class Order(NamedTuple):
    """What a worker must do; travels as a plain tuple.

    Attributes:
        epoch: number of the pool's state; an order of an older one must be ignored.
        state: ``closed``, ``open`` or ``disabled``; ``half_open`` says: probe, for all.
        reason: why.
        retry_after: seconds until the next probe, or until a forced state ends; None = not known.
        forced: whether it is held open by hand.
        ramp: whether closed means to begin with little load, and grow.
    """

    epoch: int
    state: State
    reason: str
    retry_after: float | None
    forced: bool
    ramp: bool = False


@dataclass
class _Member:
    window: RateWindow
    seen: float
    state: State = CLOSED
    consecutive_failures: int = 0
    cause: str = ""
    absent: bool = False
    epoch: int = 0  # of its last report that counted
    tried: int = 0  # epoch in which it was asked to probe


class Quorum:
    """The breaker of one pool.

    Args:
        config: thresholds and times.
        now: the time, in seconds of any monotonic clock.
        random_unit: gives numbers in [0, 1), for the jitter.
        expected: workers that will join: before they have, or ``JOIN_PATIENCE`` is over, the few that are there do not
            decide for the others.

    Attributes:
        machine: the state of the pool.
    """

    def __init__(self, config: BreakerConfig, now: float, random_unit: Callable[[], float], expected: int = 1) -> None:
        self.machine = CircuitBreaker(config, now, random_unit)
        self._expected = expected
        self._complete_at = now + JOIN_PATIENCE
        self._members: dict[int, _Member] = {}
        self._prober: int | None = None
        self._probing_since = 0.0

    # --- who is there ---

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._members))

    def join(self, worker: int, now: float) -> None:
        """A worker, or its new life, is there."""
        self._members[worker] = _Member(RateWindow(self.machine.config.window, now), now)
        if self._prober == worker:
            self._prober = None

    def leave(self, worker: int, now: float) -> None:
        """A worker has gone; what it was probing, another one will."""
        self._members.pop(worker, None)
        if self._prober == worker:
            self._prober = None
        self._judge(now)

    def knows(self, worker: int) -> bool:
        """Whether *worker* has joined."""
        return worker in self._members

    def configure(self, config: BreakerConfig, now: float) -> None:
        """Go on with other thresholds."""
        self.machine.configure(config, now)
        for member in self._members.values():
            member.window = RateWindow(config.window, now)

    # --- what they have seen ---

    def report(self, worker: int, report: Report, now: float) -> None:
        """Take in what a worker has seen, and draw the conclusions."""
        machine, member = self.machine, self._members[worker]
        member.seen = now
        machine.rejected_calls += report.rejected
        machine.merge(report.successes, report.failures, report.slow, report.seconds, now, current=self._is_now(report))
        if not self._is_now(report):
            return
        if member.epoch != report.epoch:
            member.epoch = report.epoch
            member.window.clear(now)
        member.window.add(now, report.failures, report.slow, report.successes + report.failures)
        member.state = report.state
        member.consecutive_failures = report.consecutive_failures
        if report.cause:
            member.cause, member.absent = report.cause, report.absent
        if machine.state == HALF_OPEN:
            self._probed(worker, report, now)
        else:
            self._judge(now)

    def _is_now(self, report: Report) -> bool:
        return report.epoch == self.machine.epoch

    def _judge(self, now: float) -> None:
        machine = self.machine
        voters = [member for member in self._members.values() if now - member.seen <= STALE_AFTER]
        sick = [member for member in voters if self._is_sick(member, now)]
        machine.consecutive_failures = sum(m.consecutive_failures for m in sick) if len(sick) == len(voters) else 0
        if machine.state != CLOSED or not voters or len(sick) < len(voters):
            return
        if len(self._members) < self._expected and now < self._complete_at:
            return
        latest = max(sick, key=lambda member: member.seen)
        absent = latest.absent
        config = machine.config
        calls, failed = (sum(getattr(m.window, what) for m in sick) for what in ("calls", "failed"))
        if all(member.state != CLOSED for member in sick):
            all_of_them = "" if len(sick) == 1 else f"all {len(sick)} workers gave up, the last with "
            machine.trip(f"{all_of_them}{latest.cause}", now, absent=absent)
        elif machine.consecutive_failures >= config.failure_threshold:
            machine.trip(
                f"{machine.consecutive_failures} failures in a row over all workers: {latest.cause}", now, absent=absent
            )
        elif calls >= config.minimum_calls and failed > config.error_rate * calls:
            machine.trip(
                f"{failed} of {calls} calls within {config.window:g} s failed: {latest.cause}", now, absent=absent
            )

    def _is_sick(self, member: _Member, now: float) -> bool:
        if member.epoch != self.machine.epoch:
            return False  # what it said before the last transition says nothing about now
        window = member.window
        window.advance(now)
        return (
            member.state != CLOSED
            or member.consecutive_failures > 0
            or window.failed > self.machine.config.error_rate * window.calls
        )

    # --- probing ---

    def _probed(self, worker: int, report: Report, now: float) -> None:
        if report.state == CLOSED:
            self.machine.recover(f"worker {worker} reached the server", now)
            self._prober = None
        elif report.state == OPEN and report.failures and worker == self._prober:
            self._prober = None
            self._next_prober(now)

    def _next_prober(self, now: float) -> None:
        """Ask a worker that has not failed yet to probe; open again when there is none left."""
        machine = self.machine
        voters = {w: m for w, m in self._members.items() if now - m.seen <= STALE_AFTER}
        fresh = [worker for worker, member in voters.items() if member.tried != machine.epoch]
        if fresh:
            # The one that was well last: it is the most likely to reach the server.
            self._prober = min(fresh, key=lambda worker: (voters[worker].consecutive_failures, worker))
            self._probing_since = now
            self._members[self._prober].tried = machine.epoch
        elif voters:
            latest = max(voters.values(), key=lambda member: member.seen)
            machine.reopen(f"no worker reached the server: {latest.cause}", now, latest.absent)

    def tick(self, now: float) -> None:
        """Let time do its work. To be called often, and before :meth:`order`."""
        machine = self.machine
        machine.tick(now)
        if machine.state == HALF_OPEN:
            member = self._members.get(self._prober) if self._prober is not None else None
            if member is None or now - self._probing_since > PROBE_PATIENCE or now - member.seen > STALE_AFTER:
                self._next_prober(now)
        elif machine.state == CLOSED:
            self._judge(now)

    def silence(self, now: float) -> float:
        """Seconds since a worker was last heard of."""
        return now - max((member.seen for member in self._members.values()), default=now)

    # --- what follows ---

    def order(self, worker: int, now: float) -> Order:
        """What *worker* must do now."""
        machine = self.machine
        state = machine.state
        if state == HALF_OPEN and worker != self._prober:
            return Order(machine.epoch, OPEN, "another worker probes", PROBE_PATIENCE, False)
        retry_after = machine.time_until_recovery(now)
        ramp = machine.load(now) < 1.0
        return Order(machine.epoch, state, machine.reason, retry_after, machine.forced, ramp)

    def workers(self, now: float) -> dict[int, dict[str, Any]]:
        """What each worker said last: its own state, its failures in a row, and the age of that in seconds."""
        return {
            worker: {
                "state": member.state,
                "isolated": self.machine.state == CLOSED and member.state not in (CLOSED, DISABLED),
                "consecutive_failures": member.consecutive_failures,
                "age": now - member.seen,
            }
            for worker, member in self._members.items()
        }
