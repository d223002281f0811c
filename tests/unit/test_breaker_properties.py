"""The breaker against a simple oracle under random use, and every sequence of a small scope."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from raypg.core.breaker import CLOSED, DISABLED, HALF_OPEN, OPEN, BreakerConfig, CircuitBreaker

# --- random use ------------------------------------------------------------------------------------------------------

CONFIG = BreakerConfig(
    failure_threshold=3,
    error_rate=0.4,
    minimum_calls=5,
    window=10.0,
    slow_call_duration=1.0,
    slow_call_rate=0.6,
    recovery_timeout=5.0,
    max_recovery_timeout=20.0,
    half_open_probes=2,
    ramp=4.0,
    jitter=0.0,
)


class Oracle:
    """The same, in the plainest way: a list of (time, failed, slow), looked through at every call.

    Like the real window it forgets a tenth at a time, counted from the last transition.
    """

    def __init__(self) -> None:
        self.state = CLOSED
        self.forced = False
        self.until = math.inf
        self.retry_at = math.inf
        self.recovery = CONFIG.recovery_timeout
        self.ramp_until = -math.inf
        self.calls: list[tuple[int, bool, bool]] = []
        self.since = 0.0
        self.in_a_row = 0
        self.probes = 0
        self.passed = 0
        self.generation = 0

    def bucket(self, now: float) -> int:
        return math.floor((now - self.since) / (CONFIG.window / 10))

    def move(self, state: str, now: float) -> None:
        self.state, self.calls, self.since = state, [], now  # type: ignore[assignment]
        self.probes = self.passed = 0
        self.generation += 1

    def tick(self, now: float) -> None:
        if self.forced:
            if now >= self.until:
                self.forced = False
                self.close(now, ramp=True)
        elif self.state == OPEN and now >= self.retry_at:
            self.move(HALF_OPEN, now)
        elif self.state == CLOSED and now >= self.ramp_until:
            self.recovery = CONFIG.recovery_timeout

    def close(self, now: float, *, ramp: bool) -> None:
        self.move(CLOSED, now)
        self.ramp_until = now + CONFIG.ramp if ramp else -math.inf
        self.in_a_row = 0

    def open(self, now: float, *, grow: bool = True) -> None:
        if self.state == HALF_OPEN or now < self.ramp_until:
            if grow:
                self.recovery = min(2 * self.recovery, CONFIG.max_recovery_timeout)
        else:
            self.recovery = CONFIG.recovery_timeout
        self.move(OPEN, now)
        self.retry_at = now + self.recovery

    def count(self, now: float, *, failed: bool, slow: bool, absent: bool = False) -> None:
        self.calls.append((self.bucket(now), failed, slow))
        oldest = self.bucket(now) - 9
        window = [call for call in self.calls if call[0] >= oldest]
        self.in_a_row = self.in_a_row + 1 if failed else 0
        failures, slow_ones = sum(call[1] for call in window), sum(call[2] for call in window)
        if self.state == DISABLED:
            return
        if (failed and self.in_a_row >= CONFIG.failure_threshold) or (
            len(window) >= CONFIG.minimum_calls
            and (failures > CONFIG.error_rate * len(window) or slow_ones > CONFIG.slow_call_rate * len(window))
        ):
            self.open(now, grow=not absent)


class Use(RuleBasedStateMachine):
    """Calls, probes, time and commands in any order."""

    tokens = Bundle("tokens")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.machine = CircuitBreaker(CONFIG, 0.0, lambda: 0.0)
        self.oracle = Oracle()
        self.seen = 1

    @rule(target=tokens)
    def permit(self) -> tuple[int, int]:
        self.oracle.tick(self.now)
        oracle = self.oracle
        allowed = oracle.state in (CLOSED, DISABLED) or (oracle.state == HALF_OPEN and oracle.probes < 2)
        token = self.machine.permit(self.now)
        assert bool(token) == allowed
        if token and oracle.state == HALF_OPEN:
            oracle.probes += 1
        return token, oracle.generation

    @rule(token=consumes(tokens), slow=st.booleans())
    def succeed(self, token: tuple[int, int], slow: bool) -> None:
        value, generation = token
        self.machine.succeeded(value, 2.0 if slow else 0.01, self.now)
        if not value or generation != self.oracle.generation:
            return
        if self.oracle.state == HALF_OPEN:
            self.oracle.passed += 1
            if self.oracle.passed >= CONFIG.half_open_probes:
                self.oracle.close(self.now, ramp=True)
        else:
            self.oracle.count(self.now, failed=False, slow=slow)

    @rule(token=consumes(tokens), absent=st.booleans())
    def fail(self, token: tuple[int, int], absent: bool) -> None:
        value, generation = token
        self.machine.failed(value, 0.01, self.now, "failed", absent)
        if not value or generation != self.oracle.generation:
            return
        if self.oracle.state == HALF_OPEN:
            self.oracle.in_a_row += 1
            self.oracle.open(self.now, grow=not absent)
        else:
            self.oracle.count(self.now, failed=True, slow=False, absent=absent)

    @rule(token=consumes(tokens))
    def release(self, token: tuple[int, int]) -> None:
        value, generation = token
        self.machine.release(value)
        if value and generation == self.oracle.generation and self.oracle.state == HALF_OPEN:
            self.oracle.probes -= 1

    @rule(seconds=st.sampled_from([0.125, 0.5, 1.0, 3.0, 5.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.machine.tick(self.now)
        self.oracle.tick(self.now)

    @rule(ttl=st.sampled_from([None, 1.0, 10.0]))
    def force_open(self, ttl: float | None) -> None:
        self.machine.force_open("forced", self.now, ttl)
        self.oracle.move(OPEN, self.now)
        self.oracle.forced, self.oracle.until = True, math.inf if ttl is None else self.now + ttl
        self.oracle.retry_at = math.inf

    @rule()
    def force_close(self) -> None:
        self.machine.force_close("closed", self.now)
        self.oracle.forced, self.oracle.recovery = False, CONFIG.recovery_timeout
        self.oracle.close(self.now, ramp=False)

    @rule()
    def disable(self) -> None:
        self.machine.disable("disabled", self.now)
        self.oracle.forced = False
        self.oracle.move(DISABLED, self.now)

    @rule()
    def enable(self) -> None:
        self.machine.enable("enabled", self.now)
        if self.oracle.state == DISABLED:
            self.oracle.close(self.now, ramp=False)

    @invariant()
    def both_agree(self) -> None:
        machine, oracle = self.machine, self.oracle
        assert (machine.state, machine.forced) == (oracle.state, oracle.forced)
        assert machine.epoch == oracle.generation + 1
        assert machine.consecutive_failures == oracle.in_a_row
        if machine.state == OPEN:
            at = oracle.until if oracle.forced else oracle.retry_at
            left = machine.time_until_recovery(self.now)
            assert left is None if at == math.inf else abs((left or 0.0) - max(0.0, at - self.now)) < 1e-9
        assert 0.0 <= machine.load(self.now) <= 1.0
        assert machine.epoch >= self.seen
        self.seen = machine.epoch


TestUse = Use.TestCase
TestUse.settings = settings(max_examples=400, stateful_step_count=50, derandomize=True, deadline=None)


# --- every sequence --------------------------------------------------------------------------------------------------

LEGAL = {
    (CLOSED, OPEN),
    (OPEN, HALF_OPEN),
    (HALF_OPEN, OPEN),
    (HALF_OPEN, CLOSED),
    # By hand, from anywhere.
    *((state, target) for state in (CLOSED, OPEN, HALF_OPEN, DISABLED) for target in (OPEN, CLOSED, DISABLED)),
}
BY_HAND = ("force_open", "force_open_for", "force_close", "disable", "enable")
STEPS = ("permit", "succeed", "fail", "release", "wait", *BY_HAND)


class Walk:
    """A breaker, the time, and the tokens that are out."""

    def __init__(self, config: BreakerConfig) -> None:
        self.now = 0.0
        self.machine = CircuitBreaker(config, 0.0, float)
        self.tokens: list[int] = []

    def fork(self) -> Walk:
        twin = copy.copy(self)
        twin.machine = copy.deepcopy(self.machine)
        twin.tokens = list(self.tokens)
        return twin

    def key(self) -> tuple[object, ...]:
        """All that decides what can happen next."""
        machine = self.machine
        left = machine.time_until_recovery(self.now)
        return (
            machine.state,
            machine.forced,
            machine.consecutive_failures,
            machine._probes,
            machine._probes_passed,
            machine._recovery,
            machine.metrics()["window_calls"],
            machine.metrics()["error_rate"],
            None if left is None else round(left, 3),
            round(machine.load(self.now), 3),
            tuple(sorted(0 if abs(token) != machine.epoch else token // machine.epoch for token in self.tokens)),
        )

    def do(self, step: str) -> bool:
        """Do one step; False if it makes no sense here."""
        machine, now = self.machine, self.now
        if step == "permit":
            if len(self.tokens) == 3:
                return False
            token = machine.permit(now)
            if token:
                self.tokens.append(token)
        elif step in ("succeed", "fail", "release"):
            if not self.tokens:
                return False
            token = self.tokens.pop(0)
            if step == "succeed":
                machine.succeeded(token, 0.1, now)
            elif step == "fail":
                machine.failed(token, 0.1, now, "x")
            else:
                machine.release(token)
        elif step == "wait":
            self.now += 1.0
            machine.tick(self.now)
        else:
            commands: dict[str, Callable[[], None]] = {
                "force_open": lambda: machine.force_open("x", now),
                "force_open_for": lambda: machine.force_open("x", now, 1.0),
                "force_close": lambda: machine.force_close("x", now),
                "disable": lambda: machine.disable("x", now),
                "enable": lambda: machine.enable("x", now),
            }
            commands[step]()
        return True


def check(before: Walk, step: str, after: Walk) -> None:
    machine = after.machine
    changes = machine.epoch - before.machine.epoch
    assert changes >= 0
    if machine.state != before.machine.state:
        assert changes > 0
    for change in list(machine.transitions)[-changes:] if changes else []:
        assert (change.source, change.target) in LEGAL
        if step not in BY_HAND and not before.machine.forced:
            assert (change.source, change.target) in {
                (CLOSED, OPEN),
                (OPEN, HALF_OPEN),
                (HALF_OPEN, OPEN),
                (HALF_OPEN, CLOSED),
            }
    outstanding = sum(token == -machine.epoch for token in after.tokens)
    assert outstanding + machine._probes + machine._probes_passed <= machine.config.half_open_probes
    if machine.state == OPEN:
        assert all(abs(token) != machine.epoch for token in after.tokens)
    assert not (machine.forced and machine.state != OPEN)


def check_it_can_close(walk: Walk) -> None:
    """Time and good calls lead back to closed, whatever was done before and however many calls never come back."""
    machine = walk.machine
    if machine.state == DISABLED or (machine.forced and machine.time_until_recovery(walk.now) is None):
        return
    twin = walk.fork()
    machine = twin.machine
    for token in twin.tokens:  # what is out comes back somehow: cancelled
        machine.release(token)
    for _ in range(20):
        if machine.state == CLOSED:
            break
        twin.now += 100.0
        machine.tick(twin.now)
        while machine.state == HALF_OPEN and (token := machine.permit(twin.now)):
            machine.succeeded(token, 0.1, twin.now)
    assert machine.state == CLOSED
    token = machine.permit(twin.now)
    assert token
    machine.succeeded(token, 0.1, twin.now)


def test_every_sequence_of_a_small_scope() -> None:
    """No illegal transition and no stuck state, in all states that nine steps can reach."""
    reached = 0
    for threshold, probes in itertools.product((1, 2), (1, 2)):
        config = BreakerConfig(
            failure_threshold=threshold,
            error_rate=0.5,
            minimum_calls=3,
            window=4.0,
            recovery_timeout=1.0,
            max_recovery_timeout=2.0,
            half_open_probes=probes,
            ramp=1.0,
            jitter=0.0,
        )
        known: set[tuple[object, ...]] = set()
        frontier = [Walk(config)]
        for _ in range(9):
            following = []
            for walk, step in itertools.product(frontier, STEPS):
                twin = walk.fork()
                if not twin.do(step):
                    continue
                check(walk, step, twin)
                if (key := twin.key()) not in known:
                    known.add(key)
                    check_it_can_close(twin)
                    following.append(twin)
            frontier = following
        states = {key[0] for key in known}
        assert states == {CLOSED, OPEN, HALF_OPEN, DISABLED}
        reached += len(known)
    print(f"{reached} states")
    assert reached > 1000
