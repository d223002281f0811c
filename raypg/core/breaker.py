"""The circuit breaker's state machine: when to refuse calls, when to try again, what to remember of it.

No Ray, no I/O, no clock: every method that needs the time takes ``now`` in seconds of any monotonic clock, and the
jitter's randomness is passed in. A call asks :meth:`CircuitBreaker.permit` and gets a token, and tells with it how it
ended (:meth:`~CircuitBreaker.succeeded`, :meth:`~CircuitBreaker.failed`, :meth:`~CircuitBreaker.release`). A token is
worth something only in the *epoch* it was given in: every transition begins a new one, so a call begun before a
transition never counts after it.

The states and their names are those of M. Nygard, *Release It!* (2007); windows by rate and by slow calls as in
resilience4j's documentation; epochs, tokens for probes and the ramp are ours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from raypg.core.backoff import jittered
from raypg.core.window import RateWindow

__all__ = ["CLOSED", "DISABLED", "HALF_OPEN", "OPEN", "BreakerConfig", "CircuitBreaker", "State", "Transition"]

State = Literal["closed", "open", "half_open", "disabled"]

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half_open"
DISABLED: Final = "disabled"

REFUSED: Final = 0
"""The token of a call that must not be made."""

GROWTH: Final = 2.0
"""By how much the recovery timeout grows each time the breaker opens again without having recovered."""

REMEMBERED: Final = 50
"""Transitions kept."""


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """What opens the breaker, and how it comes back. Checked where users give it, see ``CircuitBreakerConfig``.

    Attributes:
        failure_threshold: failures in a row that open it.
        error_rate: share of failed calls in the window above which it opens, 0–1; 1 = never by rate.
        minimum_calls: calls in the window below which no rate opens it.
        window: length of the window, in seconds.
        slow_call_duration: seconds from which a call counts as slow; None = none does.
        slow_call_rate: share of slow calls in the window above which it opens, 0–1.
        recovery_timeout: seconds from open to the first probe; grows while it keeps opening.
        max_recovery_timeout: seconds to which it may grow.
        half_open_probes: calls that are let through while half open, and that must succeed to close it.
        ramp: seconds from closed to full load.
        jitter: part of the recovery timeout that is random, so that several clusters do not come back at once.
    """

    failure_threshold: int = 5
    error_rate: float = 0.5
    minimum_calls: int = 10
    window: float = 30.0
    slow_call_duration: float | None = None
    slow_call_rate: float = 0.8
    recovery_timeout: float = 60.0
    max_recovery_timeout: float = 600.0
    half_open_probes: int = 3
    ramp: float = 5.0
    jitter: float = 0.1


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of state.

    Attributes:
        source, target: states; equal if only ``forced`` changed.
        at: when, on the clock that ``now`` came from.
        reason: what caused it.
        snapshot: the metrics as they were when it happened, before they were cleared.
    """

    source: State
    target: State
    at: float
    reason: str
    snapshot: dict[str, Any]


class CircuitBreaker:
    """One breaker. Every method is O(1); :meth:`permit`, :meth:`succeeded` and :meth:`failed` allocate nothing.

    Args:
        config: thresholds and times.
        now: the time.
        random_unit: gives numbers in [0, 1), for the jitter.

    Attributes:
        state: ``closed``, ``open``, ``half_open`` or ``disabled``.
        epoch: number of the current state, from 1; the token of every call permitted while closed.
        forced: whether it is held open by hand.
        forced_reason: why.
        consecutive_failures: failures since the last success.
    """

    __slots__ = (
        "_opened",
        "_probes",
        "_probes_passed",
        "_ramp_from",
        "_random",
        "_recovery",
        "_retry_at",
        "_slow",
        "_successes_before",
        "_until",
        "_window",
        "config",
        "consecutive_failures",
        "epoch",
        "failed_calls",
        "forced",
        "forced_reason",
        "last_cause",
        "late_calls",
        "rejected_calls",
        "slow_calls",
        "state",
        "successful_calls",
        "total_seconds",
        "transitions",
    )

    def __init__(self, config: BreakerConfig, now: float, random_unit: Callable[[], float]) -> None:
        self.config = config
        self._random = random_unit
        self.state: State = CLOSED
        self.epoch = 1
        self.forced = False
        self.forced_reason: str | None = None
        self.transitions: deque[Transition] = deque(maxlen=REMEMBERED)
        self.successful_calls = self.failed_calls = self.rejected_calls = self.slow_calls = self.late_calls = 0
        self.total_seconds = 0.0
        self.last_cause = ""
        self._until = math.inf  # when what was forced ends by itself
        self._retry_at = math.inf  # when open turns half open
        self._recovery = config.recovery_timeout  # without jitter
        self._ramp_from = -math.inf
        self._probes = self._probes_passed = 0
        self._slow = math.inf
        self.consecutive_failures = 0
        self._successes_before = 0  # successful calls until the last failure or transition
        self.configure(config, now)

    def configure(self, config: BreakerConfig, now: float) -> None:
        """Go on with other thresholds. Counts of the window begin anew; the state stays."""
        self.config = config
        self._slow = math.inf if config.slow_call_duration is None else config.slow_call_duration
        self._recovery = min(max(self._recovery, config.recovery_timeout), config.max_recovery_timeout)
        if self.state == CLOSED:
            self._recovery = config.recovery_timeout
        self._window = RateWindow(config.window, now)

    # --- calls ---

    def permit(self, now: float) -> int:
        """Ask for a call: its token, or ``REFUSED`` (0, false). Whoever gets one gives it back with the outcome."""
        state = self.state
        if state in (CLOSED, DISABLED):
            return self.epoch
        if state == OPEN:
            self.tick(now)
            state = self.state
            if state == CLOSED:
                return self.epoch
        if state == HALF_OPEN and self._probes > 0:
            self._probes -= 1
            return -self.epoch
        self.rejected_calls += 1
        return REFUSED

    def succeeded(self, token: int, seconds: float, now: float) -> None:
        """A call ended well, or with an error that is its caller's own: the server is alive.

        Args:
            token: what :meth:`permit` gave.
            seconds: how long it took.
        """
        if token == self.epoch:
            self.successful_calls += 1
            self.total_seconds += seconds
            self.consecutive_failures = 0
            window = self._window
            if seconds < self._slow:
                if now < window.end:
                    window.good += 1
                else:
                    window.add(now, 0, 0)
            else:
                self.slow_calls += 1
                window.add(now, 0, 1)
            if (window.failed or window.slow) and self.state != DISABLED:
                self._judge(now)
        elif token == -self.epoch:
            self.successful_calls += 1
            self.total_seconds += seconds
            self._probes_passed += 1
            if self._probes_passed >= self.config.half_open_probes:
                self._close(now, f"{self._probes_passed} probes succeeded", ramp=True)
        elif token:
            self.late_calls += 1

    def failed(self, token: int, seconds: float, now: float, cause: str, absent: bool = False) -> None:
        """A call ended in a way that says the server is unwell.

        Args:
            token: what :meth:`permit` gave.
            seconds: how long it took.
            cause: how it ended, for the transition it may cause.
            absent: there was no server to be unwell: it was not reached, or said that it is only starting. A probe
                costs such a server nothing, so the recovery timeout does not grow.
        """
        if token == self.epoch:
            self.failed_calls += 1
            self.total_seconds += seconds
            self.consecutive_failures += 1
            self._successes_before = self.successful_calls
            self.last_cause = cause
            if self.state == DISABLED:
                return
            slow = seconds >= self._slow
            self.slow_calls += slow
            self._window.add(now, 1, slow)
            if self.consecutive_failures >= self.config.failure_threshold:
                self._open(now, f"{self.consecutive_failures} failures in a row, the last: {cause}", grow=not absent)
            else:
                self._judge(now, absent)
        elif token == -self.epoch:
            self.failed_calls += 1
            self.total_seconds += seconds
            self.consecutive_failures += 1
            self._successes_before = self.successful_calls
            self.last_cause = cause
            self._open(now, f"a probe failed: {cause}", grow=not absent)
        elif token:
            self.late_calls += 1

    def release(self, token: int) -> None:
        """A call ended without saying anything about the server: cancelled, or never made. A probe's token is free
        again."""
        if token == -self.epoch and self.state == HALF_OPEN:
            self._probes += 1

    def _judge(self, now: float, absent: bool = False) -> None:
        """Open if a rate of the window says so."""
        window, config = self._window, self.config
        calls = window.calls
        if calls < config.minimum_calls:
            return
        if window.failed > config.error_rate * calls:
            reason = f"{window.failed} of {calls} calls within {config.window:g} s failed: {self.last_cause}"
            self._open(now, reason, grow=not absent)
        elif window.slow > config.slow_call_rate * calls:
            duration = config.slow_call_duration or 0.0
            self._open(now, f"{window.slow} of {calls} calls within {config.window:g} s took {duration:g} s or longer")

    # --- time ---

    def tick(self, now: float) -> None:
        """Let time do its work: what was forced runs out, open turns half open, a recovery is complete."""
        if self.forced:
            if now >= self._until:
                self._unforce()
                self._close(now, "the time of force_open is over", ramp=True)
            return
        self._window.advance(now)
        if self.state == OPEN and now >= self._retry_at:
            self._half_open(now, "the recovery timeout has passed: probing")
        elif self.state == CLOSED and self._recovery > self.config.recovery_timeout and self.load(now) >= 1.0:
            self._recovery = self.config.recovery_timeout

    def time_until_recovery(self, now: float) -> float | None:
        """Seconds until calls may be tried again; 0.0 while half open, None if they are permitted, or if nobody knows
        (forced open without a ttl)."""
        if self.state == HALF_OPEN:
            return 0.0
        if self.state != OPEN:
            return None
        at = self._until if self.forced else self._retry_at
        return None if at == math.inf else max(0.0, at - now)

    def load(self, now: float) -> float:
        """The share of full load that may run now, 0.0–1.0: below 1 only within ``ramp`` seconds of a recovery.

        It grows geometrically, so that it doubles in equal times: what comes back must not stampede.
        """
        if self.state in (OPEN, HALF_OPEN):
            return 0.0
        since = now - self._ramp_from
        ramp = self.config.ramp
        if since >= ramp:
            return 1.0
        return math.exp2(-_DOUBLINGS * (1 - since / ramp))

    # --- by hand, or by whom it follows ---

    def force_open(self, reason: str, now: float, ttl: float | None = None) -> None:
        """Refuse all calls until :meth:`force_close`, :meth:`reset` or :meth:`enable`, or for *ttl* seconds."""
        self._enter(OPEN, now, reason)
        self.forced = True
        self.forced_reason = reason
        self._until = math.inf if ttl is None else now + ttl
        self._retry_at = math.inf

    def force_close(self, reason: str, now: float) -> None:
        """Permit calls, with cleared counters, and go on protecting."""
        self._unforce()
        self._recovery = self.config.recovery_timeout
        self._close(now, reason, ramp=False)

    def disable(self, reason: str, now: float) -> None:
        """Permit all calls, whatever comes of them, until :meth:`enable`."""
        self._unforce()
        self._enter(DISABLED, now, reason)

    def enable(self, reason: str, now: float) -> None:
        """Protect again, from closed; does nothing unless disabled."""
        if self.state == DISABLED:
            self._close(now, reason, ramp=False)

    def reset(self, now: float) -> None:
        """As new: closed, and the totals at 0. The transitions stay."""
        self.force_close("reset", now)
        self.successful_calls = self.failed_calls = self.rejected_calls = self.slow_calls = self.late_calls = 0
        self._successes_before = 0
        self.total_seconds = 0.0

    def trip(self, reason: str, now: float, retry_after: float | None = None, absent: bool = False) -> None:
        """Open because of what somebody else has seen; as if it had been seen here.

        Args:
            retry_after: replaces the recovery timeout.
            absent: as in :meth:`failed`.
        """
        if self.forced or self.state == DISABLED:
            return
        if self.state != OPEN:
            self._open(now, reason, grow=not absent)
        if retry_after is not None:
            self._retry_at = now + retry_after

    def reopen(self, reason: str, now: float, absent: bool = False) -> None:
        """Open again because somebody else's probes failed; *absent* as in :meth:`failed`."""
        if self.state == HALF_OPEN:
            self._open(now, reason, grow=not absent)

    def probe(self, reason: str, now: float) -> None:
        """Turn half open now, because somebody else says that it is time."""
        if self.state == OPEN and not self.forced:
            self._half_open(now, reason)

    def merge(self, successes: int, failures: int, slow: int, seconds: float, now: float, *, current: bool) -> None:
        """Add calls that were judged elsewhere. They move no state; those of an older epoch (not *current*) do not
        count in the window."""
        self.successful_calls += successes
        self.failed_calls += failures
        self.slow_calls += slow
        self.total_seconds += seconds
        if not current:
            self.late_calls += successes + failures
        elif self.state == CLOSED:
            self._window.add(now, failures, slow, successes + failures)

    def recover(self, reason: str, now: float) -> None:
        """Close because somebody else's probes succeeded; ramps up as after probes of its own."""
        if not self.forced and self.state in (OPEN, HALF_OPEN):
            self._close(now, reason, ramp=True)

    # --- transitions ---

    def _unforce(self) -> None:
        self.forced = False
        self.forced_reason = None
        self._until = math.inf

    def _open(self, now: float, reason: str, grow: bool = True) -> None:
        # From half open, or before the last recovery was complete: it had not recovered. Wait longer.
        again = self.state == HALF_OPEN or (self.state == CLOSED and self.load(now) < 1.0)
        if again and grow:
            self._recovery = min(self._recovery * GROWTH, max(self.config.max_recovery_timeout, self._recovery))
        elif self.state == CLOSED:
            self._recovery = self.config.recovery_timeout
        self._enter(OPEN, now, reason)
        self._retry_at = now + jittered(self._recovery, self.config.jitter, self._random())

    def _half_open(self, now: float, reason: str) -> None:
        self._enter(HALF_OPEN, now, reason)
        self._probes = self.config.half_open_probes

    def _close(self, now: float, reason: str, ramp: bool) -> None:
        self._enter(CLOSED, now, reason)
        self._ramp_from = now if ramp else -math.inf
        self.consecutive_failures = 0

    def _enter(self, state: State, now: float, reason: str) -> None:
        self.transitions.append(Transition(self.state, state, now, reason, self.metrics()))
        self.state = state
        self.epoch += 1
        self._probes = self._probes_passed = 0
        self._window.clear(now)
        self._successes_before = self.successful_calls

    # --- what is known ---

    @property
    def reason(self) -> str:
        """Why it is in its state; empty if it never was in another."""
        return self.transitions[-1].reason if self.transitions else ""

    def metrics(self) -> dict[str, Any]:
        """Counts since the start or :meth:`reset`, and rates of the window (0.0 if it is empty)."""
        window, done = self._window, self.successful_calls + self.failed_calls
        calls = window.calls
        return {
            "total_calls": done + self.rejected_calls,
            "successful_calls": self.successful_calls,
            "failed_calls": self.failed_calls,
            "rejected_calls": self.rejected_calls,
            "slow_calls": self.slow_calls,
            "late_calls": self.late_calls,
            "error_rate": window.failed / calls if calls else 0.0,
            "slow_call_rate": window.slow / calls if calls else 0.0,
            "avg_call_duration": self.total_seconds / done if done else math.nan,
            "consecutive_failures": self.consecutive_failures,
            "consecutive_successes": self.successful_calls - self._successes_before,
            "window_calls": calls,
        }


_DOUBLINGS: Final = 6
"""A ramp begins at 2⁻⁶ of the load."""
