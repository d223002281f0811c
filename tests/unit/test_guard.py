"""A worker's own breaker: whom it tells what when it refuses."""

from __future__ import annotations

import time

import pytest

from raypg.core.breaker import CLOSED, HALF_OPEN, OPEN, BreakerConfig, State
from raypg.core.quorum import Order
from raypg.server.figures import Figures
from raypg.server.guard import Guard


def ordered(state: State, epoch: int = 1) -> Order:
    """What a Breaker says of a pool in *state*."""
    return Order(epoch, state, "a test", None if state == CLOSED else 4.0, forced=False)


@pytest.fixture
def guard() -> Guard:
    """Of one worker of several, which has heard nothing yet and cannot connect any more."""
    made = Guard("shop", BreakerConfig(), lambda: None, Figures())
    made.alone = False
    made.machine.trip("cut off", time.monotonic())
    return made


def test_a_worker_that_has_heard_nothing_of_the_pool_speaks_for_it(guard: Guard) -> None:
    assert not guard.refusal().isolated


@pytest.mark.parametrize(("state", "isolated"), [(CLOSED, True), (OPEN, False), (HALF_OPEN, False)])
def test_only_a_worker_of_a_pool_that_is_well_is_isolated(guard: Guard, state: State, isolated: bool) -> None:
    guard.follow(ordered(state), time.monotonic())
    assert guard.refusal().isolated is isolated
    guard.alone = True
    assert not guard.refusal().isolated


@pytest.mark.parametrize(("state", "isolated"), [(CLOSED, True), (OPEN, False), (HALF_OPEN, False)])
def test_while_the_breaker_restarts_its_last_word_holds(guard: Guard, state: State, isolated: bool) -> None:
    """It is asked again and again until it answers, and its orders are forgotten each time."""
    guard.follow(ordered(state, epoch=7), time.monotonic())
    for _ in range(3):
        guard.forget_order()
        assert guard.refusal().isolated is isolated
        assert guard.report().epoch == 0


def test_then_the_new_breaker_is_believed(guard: Guard) -> None:
    guard.follow(ordered(CLOSED, epoch=7), time.monotonic())
    guard.forget_order()
    guard.follow(ordered(OPEN), time.monotonic())
    assert not guard.refusal().isolated
    guard.follow(ordered(CLOSED, epoch=0), time.monotonic())  # older
    assert not guard.refusal().isolated
