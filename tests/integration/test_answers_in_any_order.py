"""Answers of a worker that overtake each other: nobody waits for ever, and nothing runs twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from waiting import eventually

from raypg import WorkflowConnectionPool
from raypg.channel import Channel

SLOW = "select pg_sleep(0.2), $1::int"


async def test_nothing_left_is_no_answer_for_what_was_sent_since(
    pool: WorkflowConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to ``collect`` that says that nothing is left is read after that to a later ``run``."""
    (line,) = (await pool._dispatcher()).channels
    ask = Channel.ask
    second: asyncio.Task[Any] | None = None

    async def held_back(self: Channel, method: str, *arguments: Any) -> Any:
        nonlocal second
        answer = await ask(self, method, *arguments)
        if method == "collect" and answer[1] == 0 and second is None:
            second = asyncio.create_task(pool.fetch(SLOW, 2))
            await eventually(lambda: len(self._untold) == 2 and not self._under_way)  # answered before its end
        return answer

    monkeypatch.setattr(Channel, "ask", held_back)
    assert [row[1] for row in await asyncio.wait_for(pool.fetch(SLOW, 1), 10)] == [1]
    assert second is not None
    assert [row[1] for row in await asyncio.wait_for(second, 10)] == [2]
    assert not line._untold


async def test_what_a_worker_has_forgotten_is_not_waited_for(
    pool: WorkflowConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that says that nothing is left although it has not told all: the read is sent once more."""
    ask = Channel.ask
    swallowed = 0

    async def forgetful(self: Channel, method: str, *arguments: Any) -> Any:
        nonlocal swallowed
        answer = await ask(self, method, *arguments)
        if method == "collect" and answer[2] and not swallowed:
            swallowed = len(answer[2])
            return (answer[0], 0, [], answer[3])
        return answer

    monkeypatch.setattr(Channel, "ask", forgetful)
    assert [row[1] for row in await asyncio.wait_for(pool.fetch(SLOW, 1), 10)] == [1]
    assert swallowed == 1
