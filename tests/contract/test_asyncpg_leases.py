"""Private parts of asyncpg on which cursors and listeners of a lease rest."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from waiting import eventually

from raypg.server import _asyncpg

pytestmark = pytest.mark.contract

PORTALS = "select count(*)::int from pg_cursors where name like '\\_\\_asyncpg%'"


async def test_a_callback_hears_a_channel_without_a_listen_of_asyncpgs_own(
    direct: asyncpg.Connection, schema: str
) -> None:
    heard: list[Any] = []
    channel = f"{schema} Mixed"
    assert _asyncpg.hear(direct, channel, lambda *told: heard.append(told))
    assert not _asyncpg.hear(direct, channel, print)
    assert await direct.fetch("select pg_listening_channels()") == []
    await direct.execute(f'listen "{channel}"')
    for number in range(5):
        await direct.execute("select pg_notify($1, $2)", channel, str(number))
    await eventually(lambda: len(heard) == 5)
    assert heard == [(direct, direct.get_server_pid(), channel, str(number)) for number in range(5)]

    _asyncpg.ignore(direct, channel)
    _asyncpg.ignore(direct, channel)
    await direct.execute("select pg_notify($1, 'late')", channel)
    await asyncio.sleep(0)
    assert _asyncpg.hear(direct, channel, lambda *told: heard.append(told))
    _asyncpg.ignore_all(direct)
    await direct.execute("select pg_notify($1, 'later')", channel)
    await asyncio.sleep(0)
    assert len(heard) == 5


async def test_a_portal_can_be_closed_inside_its_transaction(direct: asyncpg.Connection) -> None:
    async with direct.transaction():
        statement = await direct.prepare("select generate_series(1, 100)", name="")
        cursor = await statement.cursor()
        assert len(await cursor.fetch(10)) == 10
        assert await direct.fetchval(PORTALS) == 1
        await _asyncpg.close_portal(cursor)
        await _asyncpg.close_portal(cursor)
        assert await direct.fetchval(PORTALS) == 0


async def test_to_close_a_portal_is_no_error_in_another_or_a_failed_transaction(direct: asyncpg.Connection) -> None:
    async with direct.transaction():
        cursor = await (await direct.prepare("select generate_series(1, 100)", name="")).cursor()
    async with direct.transaction():
        await _asyncpg.close_portal(cursor)
        assert await direct.fetchval("select 1") == 1
    transaction = direct.transaction()
    await transaction.start()
    cursor = await (await direct.prepare("select generate_series(1, 100)", name="")).cursor()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await direct.fetchval("select 1/0")
    await _asyncpg.close_portal(cursor)
    await transaction.rollback()


async def test_an_unnamed_statement_of_an_unknown_type_can_be_given_a_portal(
    direct: asyncpg.Connection, schema: str
) -> None:
    """asyncpg asks about the type by an unnamed statement too, and must prepare ours once more."""
    await direct.execute("create type colour as enum ('red'); create type pair as (one colour, two int)")
    async with direct.transaction():
        statement = await direct.prepare("select $1::colour, ($1, 2)::pair from generate_series(1, 3)", name="")
        cursor = await statement.cursor("red")
        assert [tuple(row) for row in await cursor.fetch(3)] == [("red", ("red", 2))] * 3
    assert await direct.fetchval("select count(*) from pg_prepared_statements where name = ''") == 0
