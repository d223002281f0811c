"""One breaker over several workers: who decides, who probes, and what is not to be moved."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from raypg.core.breaker import CLOSED, DISABLED, HALF_OPEN, OPEN, BreakerConfig, State
from raypg.core.quorum import JOIN_PATIENCE, PROBE_PATIENCE, STALE_AFTER, Quorum, Report

CONFIG = BreakerConfig(
    failure_threshold=3,
    error_rate=0.5,
    minimum_calls=10,
    window=10.0,
    recovery_timeout=4.0,
    max_recovery_timeout=16.0,
    ramp=2.0,
    jitter=0.0,
)


def quorum(workers: int, **changes: object) -> Quorum:
    made = Quorum(replace(CONFIG, **changes), 0.0, lambda: 0.0, workers)
    for worker in range(workers):
        made.join(worker, 0.0)
        tell(made, worker, 0.0)
    return made


def tell(
    quorum: Quorum,
    worker: int,
    now: float,
    state: State = CLOSED,
    *,
    failures: int = 0,
    successes: int = 0,
    in_a_row: int | None = None,
    absent: bool = False,
    epoch: int | None = None,
) -> None:
    """A report of *worker*, of the present epoch unless another is given."""
    cause = f"worker {worker} failed" if failures else ""
    quorum.report(
        worker,
        Report(
            quorum.machine.epoch if epoch is None else epoch,
            state,
            successes,
            failures,
            consecutive_failures=failures if in_a_row is None else in_a_row,
            cause=cause,
            absent=absent,
        ),
        now,
    )


def opened(workers: int) -> Quorum:
    """One that opened at time 0."""
    made = quorum(workers)
    for worker in range(workers):
        tell(made, worker, 0.0, OPEN, failures=3)
    assert made.machine.state == OPEN
    return made


def half_open(workers: int) -> Quorum:
    """One that turned half open at time 4, when all workers had just reported."""
    made = opened(workers)
    for worker in range(workers):
        tell(made, worker, 3.9, OPEN)
    made.tick(4.0)
    assert made.machine.state == HALF_OPEN
    return made


def prober(quorum: Quorum, now: float) -> list[int]:
    return [worker for worker in quorum if quorum.order(worker, now).state == HALF_OPEN]


# --- opening ---------------------------------------------------------------------------------------------------------


def test_the_only_worker_decides() -> None:
    made = quorum(1)
    tell(made, 0, 1.0, OPEN, failures=3)
    assert made.machine.state == OPEN
    assert made.machine.reason == "worker 0 failed"
    assert made.order(0, 1.0)[:2] == (made.machine.epoch, OPEN)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_one_of_several_never_opens_it_for_the_others(workers: int) -> None:
    made = quorum(workers)
    for step in range(100):
        now = step * 0.1
        tell(made, 0, now, OPEN, failures=10, in_a_row=1000)
        for worker in range(1, workers):
            tell(made, worker, now, successes=1)
        made.tick(now)
    assert made.machine.state == CLOSED
    assert made.workers(10.0)[0]["isolated"]
    assert not made.workers(10.0)[1]["isolated"]


def test_all_of_them_do() -> None:
    made = quorum(3)
    tell(made, 0, 1.0, OPEN, failures=3)
    tell(made, 1, 1.0, OPEN, failures=3)
    assert made.machine.state == CLOSED
    tell(made, 2, 1.0, OPEN, failures=3)
    assert made.machine.state == OPEN
    assert "all 3 workers gave up" in made.machine.reason
    assert not made.workers(1.0)[0]["isolated"]


def test_failures_in_a_row_add_up_over_all_workers_if_none_is_well() -> None:
    made = quorum(3)
    tell(made, 0, 1.0, failures=1)
    tell(made, 1, 1.0, failures=1)
    assert made.machine.state == CLOSED
    tell(made, 2, 1.0, failures=1)
    assert made.machine.state == OPEN
    [change] = made.machine.transitions
    assert change.snapshot["consecutive_failures"] == 3

    made = quorum(3)
    tell(made, 0, 1.0, failures=2)
    tell(made, 1, 1.0, failures=2)
    tell(made, 2, 1.0, successes=1)
    assert made.machine.state == CLOSED


def test_so_does_the_rate() -> None:
    made = quorum(2, failure_threshold=1000)
    tell(made, 0, 1.0, failures=4, successes=2, in_a_row=1)
    assert made.machine.state == CLOSED
    tell(made, 1, 1.0, failures=4, successes=1, in_a_row=1)
    assert made.machine.state == OPEN
    assert "8 of 11 calls" in made.machine.reason


def test_who_is_not_heard_of_has_no_vote() -> None:
    made = quorum(2)
    later = STALE_AFTER + 1
    tell(made, 0, later, OPEN, failures=3)
    assert made.machine.state == OPEN


def test_who_leaves_has_none_either() -> None:
    made = quorum(2)
    now = JOIN_PATIENCE + 0.1
    tell(made, 0, now, OPEN, failures=3)
    assert made.machine.state == CLOSED
    made.leave(1, now)
    assert made.machine.state == OPEN
    assert not made.knows(1)


def test_the_first_to_join_a_new_breaker_do_not_decide_for_the_others() -> None:
    made = Quorum(CONFIG, 0.0, lambda: 0.0, 2)
    made.join(0, 0.0)
    tell(made, 0, 0.1, OPEN, failures=3)
    made.tick(0.2)
    assert made.machine.state == CLOSED
    made.join(1, 0.3)
    tell(made, 1, 0.3)
    made.tick(JOIN_PATIENCE + 0.2)
    assert made.machine.state == CLOSED

    made = Quorum(CONFIG, 0.0, lambda: 0.0, 2)
    made.join(0, 0.0)
    for now in (0.1, JOIN_PATIENCE + 0.1):
        tell(made, 0, now, OPEN, failures=3)
    assert made.machine.state == OPEN  # the other one does not come


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_what_was_said_before_a_transition_moves_nothing_after_it() -> None:
    made = opened(2)
    before = made.machine.epoch
    made.machine.force_close("checked", 1.0)
    made.tick(1.0)
    assert made.machine.state == CLOSED  # though both have said that they are open
    for worker in (0, 1):
        tell(made, worker, 1.1, OPEN, failures=5, epoch=before)
    assert made.machine.state == CLOSED
    assert made.machine.late_calls == 10
    for worker in (0, 1):
        tell(made, worker, 1.2)
    made.tick(1.2)
    assert made.machine.state == CLOSED


# --- probing ---------------------------------------------------------------------------------------------------------


def test_one_at_a_time_probes_for_all() -> None:
    made = half_open(3)
    [first] = prober(made, 4.0)
    others = [worker for worker in made if worker != first]
    assert {made.order(worker, 4.0).state for worker in others} == {OPEN}
    tell(made, first, 4.1)
    assert made.machine.state == CLOSED
    order = made.order(others[0], 4.1)
    assert (order.state, order.ramp) == (CLOSED, True)
    assert not made.order(others[0], 7.0).ramp


def test_after_a_failed_one_the_next_and_after_the_last_it_opens_again() -> None:
    made = half_open(3)
    asked = []
    for step in range(3):
        now = 4.0 + step / 10
        [worker] = prober(made, now)
        asked.append(worker)
        tell(made, worker, now, HALF_OPEN)  # it has only begun
        assert prober(made, now) == [worker]
        tell(made, worker, now, OPEN, failures=1)
    assert sorted(asked) == [0, 1, 2]
    assert made.machine.state == OPEN
    assert made.machine.time_until_recovery(4.2) == pytest.approx(8.0)


def test_for_a_server_that_is_not_there_the_timeout_does_not_grow() -> None:
    made = half_open(2)
    for _ in range(2):
        [worker] = prober(made, 4.0)
        tell(made, worker, 4.0, OPEN, failures=1, absent=True)
    assert made.machine.state == OPEN
    assert made.machine.time_until_recovery(4.0) == pytest.approx(4.0)


def test_who_does_not_answer_is_passed_over() -> None:
    made = half_open(2)
    [first] = prober(made, 4.0)
    now = 4.0 + PROBE_PATIENCE + 0.1
    tell(made, 1 - first, now, OPEN)
    made.tick(now)
    assert prober(made, now) == [1 - first]
    made.leave(1 - first, now)
    tell(made, first, now, OPEN)
    made.tick(now)
    assert made.machine.state == OPEN  # both have had their turn


def test_a_prober_that_dies_is_replaced() -> None:
    made = half_open(2)
    [first] = prober(made, 4.0)
    made.join(first, 4.1)  # its next life
    made.tick(4.1)
    assert prober(made, 4.1)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_what_was_forced_is_not_for_workers_to_move() -> None:
    made = quorum(2)
    made.machine.force_open("maintenance", 0.0)
    order = made.order(0, 0.0)
    assert (order.state, order.forced, order.reason, order.retry_after) == (OPEN, True, "maintenance", None)
    for now in (1.0, 100.0):
        for worker in (0, 1):
            tell(made, worker, now, successes=5)
        made.tick(now)
    assert made.machine.state == OPEN
    made.machine.disable("seen enough", 100.0)
    for worker in (0, 1):
        tell(made, worker, 100.0, OPEN, failures=10)
    assert made.order(0, 100.0).state == DISABLED


# --- any order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_it_closes_again_when_all_is_well(seed: int) -> None:
    rng = random.Random(seed)
    workers = rng.randint(1, 4)
    made, now = quorum(workers), 0.0
    epoch = made.machine.epoch
    for _ in range(400):
        now += rng.choice((0.01, 0.1, 1.0, 5.0))
        known = list(made)
        match rng.choice(("join", "leave", "tick", *(("report",) * 6))):
            case "join":
                made.join(rng.randrange(workers), now)
            case "leave" if known:
                made.leave(rng.choice(known), now)
            case "report" if known:
                state: State = rng.choice((CLOSED, OPEN, HALF_OPEN))
                late = rng.random() < 0.2
                tell(
                    made,
                    rng.choice(known),
                    now,
                    state,
                    failures=rng.choice((0, 0, 1, 3)),
                    successes=rng.choice((0, 5)),
                    absent=rng.random() < 0.5,
                    epoch=max(0, made.machine.epoch - 1) if late else None,
                )
            case _:
                made.tick(now)
        assert made.machine.epoch >= epoch
        epoch = made.machine.epoch
        assert len(prober(made, now)) <= 1
        assert made.machine.state in (CLOSED, OPEN, HALF_OPEN)
    for worker in range(workers):
        made.join(worker, now)
    for _ in range(200):
        now += 0.5
        made.tick(now)
        for worker in made:
            order = made.order(worker, now)
            tell(made, worker, now, CLOSED if order.state in (CLOSED, HALF_OPEN) else OPEN, in_a_row=0)
    assert made.machine.state == CLOSED
