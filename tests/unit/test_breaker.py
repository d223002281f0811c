"""The breaker's state machine, one behaviour after the other."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from raypg import CircuitBreakerConfig, ConfigError
from raypg.core.breaker import CLOSED, DISABLED, HALF_OPEN, OPEN, REMEMBERED, BreakerConfig, CircuitBreaker
from raypg.core.window import BUCKETS, RateWindow

CONFIG = BreakerConfig(
    failure_threshold=3,
    error_rate=0.5,
    minimum_calls=10,
    window=10.0,
    recovery_timeout=4.0,
    max_recovery_timeout=16.0,
    half_open_probes=2,
    ramp=2.0,
    jitter=0.0,
)


def breaker(**changes: object) -> CircuitBreaker:
    return CircuitBreaker(replace(CONFIG, **changes), 0.0, lambda: 0.5)


def succeed(machine: CircuitBreaker, now: float, times: int = 1, seconds: float = 0.01) -> None:
    for _ in range(times):
        token = machine.permit(now)
        assert token
        machine.succeeded(token, seconds, now)


def fail(machine: CircuitBreaker, now: float, times: int = 1, *, absent: bool = False) -> None:
    for _ in range(times):
        token = machine.permit(now)
        assert token
        machine.failed(token, 0.01, now, "it broke", absent)


def opened(**changes: object) -> CircuitBreaker:
    """One that opened at time 0."""
    machine = breaker(**changes)
    fail(machine, 0.0, machine.config.failure_threshold)
    assert machine.state == OPEN
    return machine


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1, 2, 3, 5, 50])
def test_a_threshold_of_n_means_n(threshold: int) -> None:
    machine = breaker(failure_threshold=threshold, minimum_calls=1000)
    fail(machine, 0.0, threshold - 1)
    assert machine.state == CLOSED
    fail(machine, 0.0)
    assert machine.state == OPEN
    assert not machine.permit(0.0)
    assert f"{threshold} failures in a row" in machine.reason
    assert "it broke" in machine.reason


def test_a_success_between_them_begins_the_count_anew() -> None:
    machine = breaker(error_rate=1.0)
    for _ in range(50):
        fail(machine, 0.0, 2)
        succeed(machine, 0.0)
    assert machine.state == CLOSED


def test_the_error_rate_counts_from_the_minimum_of_calls_and_only_when_exceeded() -> None:
    machine = breaker(failure_threshold=100)
    fail(machine, 0.0, 9)  # 100 %, but too few
    assert machine.state == CLOSED
    fail(machine, 0.0)
    assert machine.state == OPEN
    assert "10 of 10 calls within 10 s failed" in machine.reason

    machine = breaker(failure_threshold=100)
    for _ in range(20):
        succeed(machine, 0.0)
        fail(machine, 0.0)
    assert machine.state == CLOSED  # half of them is not more than half
    fail(machine, 0.0)
    assert machine.state == OPEN


def test_a_success_may_be_the_call_that_completes_the_minimum() -> None:
    machine = breaker(failure_threshold=100)
    fail(machine, 0.0, 9)
    succeed(machine, 0.0)
    assert machine.state == OPEN


def test_what_is_older_than_the_window_is_forgotten() -> None:
    machine = breaker(failure_threshold=100)
    fail(machine, 0.0, 9)
    succeed(machine, 11.0)
    assert machine.state == CLOSED
    assert machine.metrics()["window_calls"] == 1


def test_slow_calls_open_it_only_if_asked_to() -> None:
    machine = breaker()
    succeed(machine, 0.0, 100, seconds=60.0)
    assert machine.state == CLOSED
    machine = breaker(slow_call_duration=1.0, slow_call_rate=0.5)
    succeed(machine, 0.0, 5, seconds=0.5)
    succeed(machine, 0.0, 5, seconds=1.0)
    assert machine.state == CLOSED
    succeed(machine, 0.0, seconds=2.0)
    assert machine.state == OPEN
    assert "6 of 11 calls within 10 s took 1 s or longer" in machine.reason


def test_slow_calls_are_of_the_window_too() -> None:
    machine = breaker(slow_call_duration=1.0, slow_call_rate=0.5)
    succeed(machine, 0.0, 9, seconds=5.0)
    succeed(machine, 20.0, 10)
    succeed(machine, 20.0, 5, seconds=5.0)
    assert machine.state == CLOSED


# --- half open -------------------------------------------------------------------------------------------------------


def test_after_the_recovery_timeout_so_many_probes_are_permitted_and_no_more() -> None:
    machine = opened()
    assert not machine.permit(3.999)
    probes = [machine.permit(4.0) for _ in range(5)]
    assert machine.state == HALF_OPEN
    assert [bool(token) for token in probes] == [True, True, False, False, False]
    assert machine.metrics()["rejected_calls"] == 4


def test_it_closes_when_all_of_them_succeeded() -> None:
    machine = opened()
    first, second = machine.permit(4.0), machine.permit(4.0)
    machine.succeeded(first, 0.01, 4.1)
    assert machine.state == HALF_OPEN
    machine.succeeded(second, 0.01, 4.2)
    assert machine.state == CLOSED


def test_one_failed_probe_opens_it_again() -> None:
    machine = opened()
    first, second = machine.permit(4.0), machine.permit(4.0)
    machine.failed(first, 0.01, 4.1, "still down")
    assert machine.state == OPEN
    assert machine.reason == "a probe failed: still down"
    machine.succeeded(second, 0.01, 4.2)
    assert machine.state == OPEN
    assert machine.late_calls == 1


def test_a_probe_that_was_cancelled_gives_its_token_back() -> None:
    machine = opened()
    for _ in range(100):
        tokens = [machine.permit(4.0), machine.permit(4.0)]
        assert all(tokens)
        assert not machine.permit(4.0)
        for token in tokens:
            machine.release(token)
    succeed(machine, 4.0, 2)
    assert machine.state == CLOSED


def test_a_token_of_an_older_half_open_frees_no_probe() -> None:
    machine = opened()
    old, failing = machine.permit(4.0), machine.permit(4.0)
    machine.failed(failing, 0.01, 4.0, "down")
    machine.tick(12.0)
    assert machine.state == HALF_OPEN
    machine.release(old)
    assert [bool(machine.permit(12.0)) for _ in range(3)] == [True, True, False]


# --- recovery --------------------------------------------------------------------------------------------------------


def test_the_timeout_that_is_told_is_the_one_that_holds() -> None:
    machine = opened()
    for now in (0.0, 1.5, 3.9):
        left = machine.time_until_recovery(now)
        assert left == pytest.approx(4.0 - now)
    machine.tick(3.99)
    assert machine.state == OPEN
    machine.tick(4.0)
    assert machine.state == HALF_OPEN
    assert machine.time_until_recovery(4.0) == 0.0


def test_it_grows_with_every_failed_probe_up_to_its_bound_and_not_for_a_server_that_is_not_there() -> None:
    machine = opened()
    now = 0.0
    for expected in (4.0, 8.0, 16.0, 16.0):
        left = machine.time_until_recovery(now)
        assert left == pytest.approx(expected)
        now += expected
        fail(machine, now)
    before = machine.time_until_recovery(now)
    now += 16.0
    fail(machine, now, absent=True)
    assert machine.time_until_recovery(now) == before == pytest.approx(16.0)

    machine = opened()
    for now in (4.0, 8.0, 12.0):
        fail(machine, now, absent=True)
        assert machine.time_until_recovery(now) == pytest.approx(4.0)
    succeed(machine, 16.0, 2)
    fail(machine, 16.5, 3, absent=True)  # a relapse of that kind does not count as one
    assert machine.time_until_recovery(16.5) == pytest.approx(4.0)


def test_jitter_only_shortens_it() -> None:
    for unit in (0.0, 0.5, 0.999):
        machine = CircuitBreaker(replace(CONFIG, jitter=0.25), 0.0, lambda unit=unit: unit)  # type: ignore[misc]
        fail(machine, 0.0, 3)
        assert machine.time_until_recovery(0.0) == pytest.approx(4.0 * (1 - 0.25 * unit))


def test_the_load_ramps_up_after_a_recovery_and_only_then() -> None:
    machine = breaker()
    assert machine.load(0.0) == 1.0
    machine = opened()
    assert machine.load(1.0) == 0.0
    succeed(machine, 4.0, 2)
    loads = [machine.load(4.0 + step / 50) for step in range(102)]
    assert loads == sorted(loads)
    assert 0 < loads[0] < 0.05
    assert loads[100] == loads[101] == 1.0
    machine.force_close("well", 4.1)
    assert machine.load(4.1) == 1.0


def test_who_relapses_before_the_ramp_is_complete_waits_longer_and_afterwards_not() -> None:
    machine = opened()
    succeed(machine, 4.0, 2)
    fail(machine, 5.0, 3)
    assert machine.time_until_recovery(5.0) == pytest.approx(8.0)
    succeed(machine, 13.0, 2)
    machine.tick(15.0)
    fail(machine, 15.5, 3)
    assert machine.time_until_recovery(15.5) == pytest.approx(4.0)


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_a_call_begun_before_a_transition_never_counts_after_it() -> None:
    machine = breaker()
    early = [machine.permit(0.0) for _ in range(20)]
    fail(machine, 0.0, 3)
    for token in early[:5]:
        machine.failed(token, 1.0, 1.0, "late")
    for token in early[5:10]:
        machine.succeeded(token, 1.0, 1.0)
    assert machine.consecutive_failures == 3
    machine.tick(4.0)
    for token in early[10:15]:
        machine.succeeded(token, 5.0, 5.0)  # would have closed it
    assert machine.state == HALF_OPEN
    succeed(machine, 5.0, 2)
    for token in early[15:]:
        machine.failed(token, 6.0, 6.0, "later")  # would have opened it
    assert machine.state == CLOSED
    assert machine.late_calls == 20


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_forced_open_it_holds_until_lifted() -> None:
    machine = breaker()
    machine.force_open("maintenance", 0.0)
    for now in (1.0, 1e6):
        machine.tick(now)
        assert not machine.permit(now)
    machine.probe("somebody else says so", 1e6)
    machine.trip("somebody else says so", 1e6)
    machine.recover("somebody else says so", 1e6)
    assert (machine.state, machine.forced, machine.forced_reason) == (OPEN, True, "maintenance")
    assert machine.time_until_recovery(1e6) is None
    machine.force_close("done", 1e6)
    assert (machine.state, machine.forced, machine.forced_reason) == (CLOSED, False, None)
    assert [t.reason for t in machine.transitions] == ["maintenance", "done"]


def test_forced_open_for_a_time() -> None:
    machine = breaker()
    machine.force_open("a moment", 0.0, ttl=5.0)
    assert machine.time_until_recovery(2.0) == pytest.approx(3.0)
    machine.tick(4.9)
    assert machine.state == OPEN
    machine.tick(5.0)
    assert (machine.state, machine.forced) == (CLOSED, False)


def test_force_close_clears_the_window_and_goes_on_protecting() -> None:
    machine = opened()
    machine.force_close("checked", 1.0)
    assert machine.consecutive_failures == 0
    assert machine.metrics()["window_calls"] == 0
    fail(machine, 1.0, 2)
    assert machine.state == CLOSED
    fail(machine, 1.0)
    assert machine.state == OPEN
    assert machine.time_until_recovery(1.0) == pytest.approx(4.0)


def test_disabled_it_permits_all_until_enabled() -> None:
    machine = opened()
    machine.disable("seen enough", 1.0)
    fail(machine, 1.0, 100)
    machine.trip("somebody else says so", 1.0)
    assert machine.state == DISABLED
    machine.enable("again", 2.0)
    assert machine.state == CLOSED
    fail(machine, 2.0, 2)
    assert machine.state == CLOSED
    fail(machine, 2.0)
    assert machine.state == OPEN
    machine.enable("does nothing", 2.0)
    assert machine.state == OPEN


def test_reset_is_as_new_but_for_the_history() -> None:
    machine = opened()
    machine.permit(1.0)
    machine.reset(1.0)
    metrics = machine.metrics()
    assert machine.state == CLOSED
    assert not any(metrics[key] for key in metrics if key.endswith(("calls", "failures", "successes")))
    assert len(machine.transitions) == 2


# --- following somebody else -----------------------------------------------------------------------------------------


def test_it_follows_somebody_else_as_if_it_had_seen_it_itself() -> None:
    machine = breaker()
    machine.trip("all workers failed", 0.0, retry_after=9.0)
    assert machine.time_until_recovery(0.0) == pytest.approx(9.0)
    machine.probe("it is time", 1.0)
    assert machine.state == HALF_OPEN
    machine.reopen("nobody reached it", 1.5)
    assert machine.state == OPEN
    machine.recover("worker 1 reached it", 2.0)
    assert machine.state == CLOSED
    assert machine.load(2.0) < 0.05


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_transitions_carry_their_cause_and_the_metrics_as_they_were() -> None:
    machine = breaker()
    succeed(machine, 0.0, 7)
    fail(machine, 1.0, 3)
    [change] = machine.transitions
    assert (change.source, change.target, change.at) == (CLOSED, OPEN, 1.0)
    assert change.snapshot["window_calls"] == 10
    assert change.snapshot["consecutive_failures"] == 3
    assert change.snapshot["error_rate"] == pytest.approx(0.3)
    assert machine.metrics()["window_calls"] == 0


def test_their_number_is_bounded() -> None:
    machine = breaker()
    for turn in range(10 * REMEMBERED):
        machine.force_open("again", float(turn))
    assert len(machine.transitions) == REMEMBERED


def test_consecutive_successes() -> None:
    machine = breaker()
    succeed(machine, 0.0, 4)
    assert machine.metrics()["consecutive_successes"] == 4
    fail(machine, 0.0)
    assert machine.metrics()["consecutive_successes"] == 0
    succeed(machine, 0.0, 2)
    assert machine.metrics()["consecutive_successes"] == 2


def test_the_hot_path_keeps_nothing() -> None:
    machine = breaker(slow_call_duration=1.0)
    now = 0.0

    def calls(times: int) -> None:
        nonlocal now
        for _ in range(times):
            now += 0.001
            machine.succeeded(machine.permit(now), 0.001, now)

    calls(10_000)
    before = sys.getallocatedblocks()
    calls(50_000)
    assert sys.getallocatedblocks() - before < 50


# --- the window ------------------------------------------------------------------------------------------------------


def test_the_window_forgets_a_tenth_at_a_time() -> None:
    window = RateWindow(10.0, 0.0)
    for second in range(10):
        window.add(second + 0.5, failed=1, slow=second % 2, calls=2)
    assert (window.calls, window.failed, window.slow) == (20, 10, 5)
    for second in range(BUCKETS):
        window.advance(10.0 + second + 0.5)
        assert window.calls == 20 - 2 * (second + 1)
    assert (window.calls, window.failed, window.slow) == (0, 0, 0)


def test_good_calls_that_were_added_directly_are_forgotten_too() -> None:
    window = RateWindow(10.0, 0.0)
    window.good += 7
    assert window.calls == 7
    window.add(5.0, 1, 0)
    assert window.calls == 8
    window.advance(10.0)
    assert window.calls == 1
    window.advance(1e9)
    assert window.calls == 0
    window.good += 1
    window.clear(1e9)
    assert window.calls == 0


# --- its settings ----------------------------------------------------------------------------------------------------


def test_presets() -> None:
    def three(config: CircuitBreakerConfig) -> tuple[float, float, float]:
        return config.failure_threshold, config.recovery_timeout, config.error_rate

    assert three(CircuitBreakerConfig.conservative()) == (3, 120, 0.1)
    assert three(CircuitBreakerConfig.balanced()) == (5, 60, 0.5) == three(CircuitBreakerConfig())
    assert three(CircuitBreakerConfig.tolerant()) == (10, 30, 0.7)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("failure_threshold", [0, -1, 1.5, True, "5", None]),
        ("recovery_timeout", [0, -1.0, float("inf"), float("nan"), None]),
        ("error_rate", [0.0, -0.1, 1.1, float("nan"), None]),
        ("minimum_calls", [0, -1]),
        ("window", [0, -1.0]),
        ("slow_call_duration", [0, -1.0]),
        ("slow_call_rate", [0.0, 1.1]),
        ("max_recovery_timeout", [0, -1.0, 59.0]),
        ("half_open_probes", [0, -1]),
        ("ramp", [-0.1, float("inf")]),
    ],
)
def test_wrong_settings_are_refused_at_construction(key: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=key):
            CircuitBreakerConfig(**{key: value})  # type: ignore[arg-type]
