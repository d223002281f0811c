"""When a worker counts as silent, and how those that start are waited for."""

from __future__ import annotations

import time
from typing import Any

import pytest

from raypg.actors.member import PING_EVERY, Member
from raypg.actors.membership import LOST_AFTER, MOST_UNANSWERED, Membership
from raypg.actors.reaper import Reaper
from raypg.config import from_kwargs
from raypg.server.connect import Connector
from raypg.server.control import Control

NOBODY: Any = None
"""The handle of a worker that is sent nothing here."""


def member(now: float) -> Member:
    return Member(0, "worker", "node", NOBODY, answered_at=now)


def test_silence_counts_from_the_first_ping_without_an_answer() -> None:
    one = member(100.0)
    assert one.silent(150.0) == 0.0, "nobody has asked"
    one.asked(101.0)
    one.asked(102.0)
    assert one.silent(104.5) == 4.5, "as ever, when it is asked each second"
    one.answered_at = 104.6
    assert one.silent(110.0) == 0.0


def test_a_pool_actor_that_was_held_up_takes_nobody_for_lost() -> None:
    one = member(100.0)
    one.asked(120.0)
    assert one.silent(121.0) <= 1.0 + PING_EVERY < LOST_AFTER


@pytest.fixture
def membership() -> Membership:
    config = from_kwargs(name="p", environ={}, host="127.0.0.1", max_connections=3)
    reaper = Reaper("p", [Control(Connector(config, "raypg:none:control:0"))], "raypg:none:", lambda: 3)
    return Membership("p", lambda: config, reaper, 1)


async def test_waiting_for_a_worker_that_takes_long_to_start_costs_next_to_nothing(membership: Membership) -> None:
    one = membership.members[0] = member(time.monotonic())
    one.unanswered = MOST_UNANSWERED
    before = time.process_time()
    assert not await membership.appear([one], 1.0)
    assert time.process_time() - before < 0.3


async def test_nothing_is_lent_for_control_before_it_is_known_what_workers_hold(membership: Membership) -> None:
    assert membership._has_room()
    found = membership.members[0] = member(time.monotonic())
    found.node = ""  # of before, and not heard yet
    assert not membership._has_room()
    found.node, found.incarnation = "node", "abc"
    membership.budget.join((0, "abc"), told=3, used=3)
    assert not membership._has_room()
    # It lends one, though nobody gets more than before until it is known what else there is.
    membership._reaper._borrows = True
    membership._divide()
    assert membership.budget.accounts[0, "abc"].share == 2
    for _ in range(3):
        membership.budget.send((0, "abc"), 1)
        membership.budget.answered((0, "abc"), 1, 2, 9)
        membership._divide()
    assert membership.budget.accounts[0, "abc"].share == 2
    assert membership._has_room()
    membership._reaper._borrows = False
    membership._divide()
    assert membership.budget.charged == 2
    membership.frozen = False
    membership._divide()
    assert membership.budget.accounts[0, "abc"].share == 3
