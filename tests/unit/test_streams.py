"""Messages of one pipeline run in their order, whatever order they arrive in."""

from __future__ import annotations

import asyncio
import random

import pytest

from raypg.errors import StatementNotRunError
from raypg.server import streams
from raypg.server.streams import Streams


async def run(known: Streams, name: str, number: int, follows: bool, order: list[int]) -> None:
    try:
        await known.turn(name, number, follows)
        order.append(number)
        await asyncio.sleep(0)
    finally:
        known.finished(name, number)


async def test_two_under_way_run_in_order_however_they_arrive(rng: random.Random) -> None:
    for _ in range(200):
        known, order = Streams(), list[int]()
        tasks: list[asyncio.Task[None]] = []
        numbers = list(range(1, 20))
        for at in range(0, 18, 2):  # neighbours overtake each other
            if rng.random() < 0.5:
                numbers[at], numbers[at + 1] = numbers[at + 1], numbers[at]
        for number in numbers:
            tasks.append(asyncio.create_task(run(known, "a", number, number > 1, order)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert order == sorted(order)
        assert len(order) == 19


async def test_streams_do_not_wait_for_each_other() -> None:
    known, order = Streams(), list[int]()
    waits = asyncio.create_task(run(known, "a", 2, True, order))
    await asyncio.sleep(0)
    await run(known, "b", 1, False, order)
    assert order == [1]
    assert not waits.done()
    await run(known, "a", 1, False, order)
    await waits
    assert order == [1, 1, 2]


async def test_the_first_after_a_pause_waits_for_nobody() -> None:
    known, order = Streams(), list[int]()
    await run(known, "a", 7, False, order)  # 6 went to another worker
    assert order == [7]


async def test_a_message_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "ARRIVES_WITHIN", 0.05)
    known = Streams()
    with pytest.raises(StatementNotRunError, match="did not arrive"):
        await run(known, "a", 2, True, [])
    # Who is here may take its time.
    await known.turn("a", 3, False)
    order: list[int] = []
    later = asyncio.create_task(run(known, "a", 4, True, order))
    await asyncio.wait((later,), timeout=0.2)
    assert not later.done()
    known.finished("a", 3)
    await later
    assert order == [4]


async def test_forgotten_when_nothing_comes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "REMEMBER", 0.0)
    known = Streams()
    for number in range(100):
        await run(known, f"pipeline {number}", 1, False, [])
    assert len(known) <= 2
