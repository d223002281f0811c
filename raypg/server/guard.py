"""The circuit breaker of one worker: it decides here, and follows the one of the pool as long as that is to be heard.

What happens to connections and statements is told to it; whether work may run is a field to read (``refusing``). It
opens on what this worker has seen. What all workers have seen together comes as orders from the Breaker actor; without
one, it recovers by itself.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from typing import Any

import asyncpg

from raypg.core.breaker import CLOSED, DISABLED, HALF_OPEN, OPEN, BreakerConfig, CircuitBreaker
from raypg.core.quorum import Order, Report
from raypg.core.sqlstate import breaker_verdict
from raypg.errors import CircuitBreakerError, ConnectError
from raypg.server.figures import Figures
from raypg.server.outcomes import ConnectionLost

SILENCE = 2.0
"""Seconds that a worker waits for the Breaker to say that it is time to probe, before it probes by itself."""

_NOT_THERE = frozenset({None, "57P03"})
"""Codes of failed connects that say that there is no server yet: none at all, and *cannot connect now*."""


class Guard:
    """One worker's breaker.

    Args:
        pool: name of the pool.
        config: thresholds and times.
        moved: called after each change of state.
        figures: what is counted and timed.

    Attributes:
        machine: the state.
        refusing: whether work is refused now.
        token: what a call that begins now hands back with its outcome; 0 while ``refusing``.
        news: set when there is something that the Breaker should hear at once.
        alone: whether the pool has no other worker.
    """

    def __init__(self, pool: str, config: BreakerConfig, moved: Callable[[], None], figures: Figures) -> None:
        self.machine = CircuitBreaker(config, time.monotonic(), random.random)
        self.pool = pool
        self.figures = figures
        self.refusing = False
        self.token = self._epoch = self.machine.epoch
        self.news = asyncio.Event()
        self.alone = True
        self._moved = moved
        self._order: Order | None = None
        self._pool_well = False  # whether the breaker of the pool is closed, as far as was ever heard
        self._retry_at = math.inf  # what the last order said of it
        self._probed_for = 0  # the epoch in which the Breaker asked for probes last
        self._lost_at = -math.inf
        self._connects_fail = False
        self._absent = False
        self._told: tuple[float, ...] = (0, 0, 0, 0, 0.0)
        self._telling = self._told

    # --- what happens ---

    def succeeded(self, token: int, seconds: float, now: float) -> None:
        """A statement or ping was answered."""
        machine = self.machine
        machine.succeeded(token, seconds, now)
        if machine.epoch != self._epoch:
            self._note()

    def answered(self, token: int, seconds: float, now: float, error: Exception) -> bool:
        """A statement failed, and its connection lives.

        Returns:
            Whether that is the server's fault.
        """
        if not isinstance(error, asyncpg.PostgresError):
            if isinstance(error, TimeoutError):  # the server has answered to being asked to cancel it
                self.succeeded(token, seconds, now)
            return False
        severity = error.severity_en or error.severity
        if severity is None:
            return False  # asyncpg's own: nothing was sent
        if breaker_verdict(error.sqlstate, severity=severity, connection_alive=True) == "ignore":
            self.succeeded(token, seconds, now)
            return False
        self._failed(token, seconds, now, f"{error.sqlstate}: {_words(error)}")
        return True

    def lost(self, token: int, started: float, lost: ConnectionLost) -> None:
        """A connection died under a statement that was sent at *started*.

        A crash takes all connections at once, and is one failure: statements that ran already when the last one was
        counted do not count.
        """
        severity = "FATAL" if lost.sqlstate else None
        if breaker_verdict(lost.sqlstate, severity=severity, connection_alive=False) == "ignore":
            return
        if started <= self._lost_at:
            return
        now = self._lost_at = time.monotonic()
        how = f"with {lost.sqlstate}" if lost.sqlstate else "without a word"
        self._failed(token, now - started, now, f"the server ended a connection {how}")

    def ping_passed(self, token: int, seconds: float, now: float) -> None:
        """An idle connection has answered."""
        self.figures.pinged(seconds, True)
        self.succeeded(token, seconds, now)

    def ping_failed(self, token: int, seconds: float) -> None:
        """An idle connection did not answer in time, though it looked alive."""
        self.figures.pinged(seconds, False)
        self._failed(token, seconds, time.monotonic(), f"no answer to a ping within {seconds:.3g} s")

    def connected(self, token: int, seconds: float) -> None:
        """A connection was opened. That ends a row of failures to connect, but not one of failing statements."""
        self.figures.connected(seconds)
        if self._connects_fail:
            self._connects_fail = False
            self.succeeded(token, seconds, time.monotonic())

    def connect_failed(self, token: int, seconds: float, error: ConnectError) -> None:
        """A connection could not be opened."""
        self._failed(token, seconds, time.monotonic(), str(error), error)

    def _failed(self, token: int, seconds: float, now: float, cause: str, error: ConnectError | None = None) -> None:
        if not token:
            return
        self._connects_fail = error is not None
        self._absent = error is not None and error.sqlstate in _NOT_THERE
        self.machine.failed(token, seconds, now, cause, self._absent)
        self.news.set()
        self._note()

    # --- probing ---

    def permit_probe(self) -> int:
        """A token for a probe; 0 if none is wanted."""
        return self.machine.permit(time.monotonic()) if self.machine.state == HALF_OPEN else 0

    def probe_passed(self, token: int, seconds: float) -> None:
        """The server answered a probe."""
        self.succeeded(token, seconds, time.monotonic())

    def probe_failed(self, token: int, seconds: float, error: Exception) -> None:
        """It did not."""
        cause = str(error) or type(error).__name__
        self._failed(token, seconds, time.monotonic(), cause, error if isinstance(error, ConnectError) else None)

    def probe_given_up(self, token: int) -> None:
        """It was not made; another one may be."""
        self.machine.release(token)

    # --- time, and the Breaker ---

    def tick(self, now: float) -> None:
        """Let time do its work."""
        self.machine.tick(now)
        self._note()

    def room(self, budget: int, now: float) -> int:
        """How many of *budget* connections may be at work: fewer for some time after a recovery."""
        load = self.machine.load(now)
        return budget if load >= 1.0 else min(budget, max(1, math.ceil(load * budget)))

    def follow(self, order: Order, now: float) -> None:
        """Do what the Breaker says, unless it has said something newer."""
        known, machine = self._order, self.machine
        if known is not None and order.epoch < known.epoch:
            return
        new = known is None or order.epoch > known.epoch
        self._order = order
        self._pool_well = order.state == CLOSED
        self._retry_at = math.inf if order.retry_after is None else now + order.retry_after
        held = machine.forced or machine.state == DISABLED
        if order.state == DISABLED:
            if machine.state != DISABLED:
                machine.disable(order.reason, now)
        elif order.forced:
            if new or not machine.forced:
                machine.force_open(order.reason, now, order.retry_after)
        elif order.state == CLOSED:
            if held or (known is not None and new and not order.ramp):
                machine.force_close(order.reason, now)
            elif known is not None and new:
                machine.recover(order.reason, now)
        else:
            if held:
                machine.force_close(order.reason, now)
            if order.state == HALF_OPEN:
                if self._probed_for != order.epoch:  # it says so until it has heard what came of it
                    self._probed_for = order.epoch
                    machine.trip(order.reason, now)
                    machine.probe(order.reason, now)
            else:
                machine.trip(order.reason, now, (order.retry_after or 0.0) + SILENCE)
        self._note()

    def forget_order(self) -> None:
        """The Breaker is a new one: its epochs begin anew. What the last one said of the pool holds until it speaks:
        who asks a worker that is cut off is sent to another one meanwhile, too."""
        self._order = None
        self._probed_for = 0

    def report(self) -> Report:
        """What there is to tell the Breaker since the last report."""
        machine = self.machine
        self.news.clear()
        counts = (
            machine.successful_calls,
            machine.failed_calls,
            machine.slow_calls,
            machine.rejected_calls,
            machine.total_seconds,
        )
        successes, failures, slow, rejected, seconds = (a - b for a, b in zip(counts, self._told, strict=True))
        self._telling = counts
        return Report(
            self._order.epoch if self._order is not None else 0,
            machine.state,
            int(successes),
            int(failures),
            int(slow),
            int(rejected),
            seconds,
            machine.consecutive_failures,
            "" if not failures else machine.reason if machine.state == OPEN else machine.last_cause,
            self._absent,
        )

    def told(self) -> None:
        """The last report has arrived."""
        self._told = self._telling

    def _note(self) -> None:
        """Make the machine's state a matter of reading a field, and tell of its change."""
        machine = self.machine
        if machine.epoch == self._epoch:
            return
        self._epoch = machine.epoch
        self.refusing = machine.state in (OPEN, HALF_OPEN)
        self.token = 0 if self.refusing else machine.epoch
        self.news.set()
        self._moved()

    # --- refusing ---

    def refusal(self) -> CircuitBreakerError:
        """What to tell a caller who is refused; counts it."""
        machine, now = self.machine, time.monotonic()
        machine.rejected_calls += 1
        order = self._order
        retry_after = machine.time_until_recovery(now)
        if order is not None and order.state == OPEN and retry_after is not None:
            retry_after = max(0.0, min(retry_after, self._retry_at - now))
        isolated = not self.alone and self._pool_well
        reason = machine.reason
        return CircuitBreakerError(self.pool, machine.state, reason, retry_after, isolated)

    def as_dict(self) -> dict[str, Any]:
        """State and counts of this worker alone."""
        return {"state": self.machine.state, "reason": self.machine.reason, **self.machine.metrics()}


def _words(error: asyncpg.PostgresError) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
