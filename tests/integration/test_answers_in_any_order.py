"""Answers of a worker that overtake each other: nobody waits for ever, and nothing runs twice."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from waiting import eventually

from raypg import WorkflowConnectionPool
from raypg.channel import Channel


@pytest.fixture
async def slow(table: str, direct: asyncpg.Connection) -> str:
    """A read that waits while the test has the table."""
    await direct.execute(f"insert into {table} (id) values (0)")
    return f"select id, $1::int from {table}"


async def take(direct: asyncpg.Connection) -> None:
    await direct.execute("begin; lock table item")


async def give_up(direct: asyncpg.Connection) -> None:
    await direct.execute("rollback")


async def test_nothing_left_is_no_answer_for_what_was_sent_since(
    pool: WorkflowConnectionPool, slow: str, direct: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to ``collect`` that says that nothing is left is read after that to a later ``run``."""
    (line,) = (await pool._dispatcher()).channels
    ask = Channel.ask
    second: asyncio.Task[Any] | None = None

    async def held_back(self: Channel, method: str, *arguments: Any) -> Any:
        nonlocal second
        answer = await ask(self, method, *arguments)
        if method == "collect" and answer[1] == 0 and second is None:
            await take(direct)
            second = asyncio.create_task(pool.fetch(slow, 2))
            await eventually(lambda: len(self._untold) == 2 and not self._under_way)  # answered before its end
            await give_up(direct)
        return answer

    monkeypatch.setattr(Channel, "ask", held_back)
    assert [row[1] for row in await asyncio.wait_for(answered_before_its_end(pool, slow, direct, line), 30)] == [1]
    assert second is not None
    assert [row[1] for row in await asyncio.wait_for(second, 30)] == [2]
    assert not line._untold


async def answered_before_its_end(
    pool: WorkflowConnectionPool, slow: str, direct: asyncpg.Connection, line: Channel
) -> list[Any]:
    """Rows of a statement whose ``run`` was answered without them."""
    await take(direct)
    first = asyncio.create_task(pool.fetch(slow, 1))
    await eventually(lambda: line._untold and not line._under_way)
    await give_up(direct)
    return await first


async def test_what_a_worker_has_forgotten_is_not_waited_for(
    pool: WorkflowConnectionPool, slow: str, direct: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
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
    (line,) = (await pool._dispatcher()).channels
    assert [row[1] for row in await asyncio.wait_for(answered_before_its_end(pool, slow, direct, line), 30)] == [1]
    assert swallowed == 1
