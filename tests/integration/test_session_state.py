"""What one caller leaves in a session, the next caller never sees."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from pools import grant
from waiting import eventually

from raypg import WorkflowConnectionPool, messages
from raypg.actors.worker import PoolWorker
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.packing import pack, unpack
from raypg.server.connection import ServerConnection

# Everything that can be seen of a session, as one text.
STATE = """
select concat_ws(' | ',
    current_user, session_user, current_setting('search_path'), current_setting('statement_timeout'),
    current_setting('application_name'), current_setting('TimeZone'), current_setting('work_mem'),
    coalesce(current_setting('my.secret', true), ''),
    (select string_agg(name, ',') from pg_prepared_statements where from_sql),
    (select string_agg(name, ',') from pg_cursors where name not like '\\_\\_asyncpg%'),
    (select string_agg(c, ',') from pg_listening_channels() c),
    (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
    (select string_agg(relname, ',') from pg_class where relpersistence = 't' and pg_table_is_visible(oid)),
    (select count(*) from pg_locks where pid = pg_backend_pid() and relation = '{table}'::regclass))
"""

LEAKS = {
    "SET": ["set statement_timeout = '7s'", "set search_path = {schema}"],
    "SET of a custom setting": ["set my.secret = 'hidden'"],
    "SET LOCAL without a transaction": ["set local work_mem = '1MB'"],
    "set_config": ["select set_config('search_path', '{schema}', false)"],
    "SET TIME ZONE": ["set time zone 'Asia/Tokyo'"],
    "SET ROLE": ["set role {role}"],
    "SET SESSION AUTHORIZATION": ["set session authorization {role}"],
    "SET SESSION CHARACTERISTICS": ["set session characteristics as transaction read only"],
    "application_name": ["set application_name = 'stolen'"],
    "temporary table": ["create temp table item (a int)"],
    "temporary table by SELECT INTO": ["select 1 as a into temp item"],
    "temporary view": ["create temp view item as select 1 as a"],
    "temporary sequence": ["create temp sequence item"],
    "session advisory lock": ["select pg_advisory_lock(77)"],
    "advisory lock taken by a function": ["select {schema}.locks()"],
    "setting changed by a function": ["select {schema}.sets()"],
    "setting changed by a DO": ["do $$ begin set statement_timeout = '9s'; end $$"],
    "setting changed by a view's function": ["select * from {schema}.sneaky"],
    "setting changed by an operator": ["select 5 operator({schema}.@@@@) 6"],
    "PREPARE": ["prepare mine as select 1", 'prepare "Mixed Case" as select 2'],
    "LISTEN": ["listen gossip"],
    "WITH HOLD cursor": ["declare c cursor with hold for select 1"],
    "currval": ["select nextval('{schema}.numbers')"],
    "failed SET": ["set statement_timeout = 'never'"],
    "error inside a DO": ["do $$ begin set my.secret = 'x'; raise exception 'no'; end $$"],
    "DISCARD ALL": ["discard all"],
    "DEALLOCATE ALL": ["deallocate all"],
    "LOCK TABLE": ["lock table {table}"],
}


@pytest.fixture
async def objects(schema: str, table: str, direct: asyncpg.Connection) -> AsyncIterator[dict[str, str]]:
    role = f"role_{schema}"
    await direct.execute(f"""
        create role {role};
        create sequence {schema}.numbers;
        create function {schema}.locks() returns int language sql as 'select pg_advisory_lock(78); select 1';
        create function {schema}.sets() returns text language sql as
            $$ select set_config('statement_timeout', '8s', false); select set_config('my.secret', 'y', false) $$;
        create view {schema}.sneaky as select {schema}.sets();
        create function {schema}.op(int, int) returns text language sql as
            $$ select set_config('my.secret', 'z', false) $$;
        create operator {schema}.@@@@ (leftarg = int, rightarg = int, function = {schema}.op);
    """)
    yield {"schema": schema, "table": table, "role": role}
    await direct.execute(f"reset role; drop owned by {role}; drop role {role}")


async def attempt(call: Any) -> None:
    try:
        await call
    except asyncpg.PostgresError:
        pass  # what it left behind is the question, not whether it succeeded


@pytest.mark.parametrize("label", LEAKS)
async def test_a_statement_leaves_nothing_to_the_next_caller(
    label: str, single: WorkflowConnectionPool, objects: dict[str, str], table: str
) -> None:
    state = STATE.format_map(objects)
    before = await single.fetchval(state)
    pid = await single.fetchval("select pg_backend_pid()")
    for sql in LEAKS[label]:
        await attempt(single.execute(sql.format_map(objects)))
        assert await single.fetchval(state) == before
    for sql in LEAKS[label]:
        await attempt(single.fetch(sql.format_map(objects)))
    assert await single.fetchval(state) == before
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
        await single.fetchval(f"select currval('{objects['schema']}.numbers')")
    assert await single.execute(f"insert into {table} values (1, 'x')") == "INSERT 0 1"
    assert await single.fetchval("select pg_backend_pid()") == pid


@pytest.mark.parametrize("label", LEAKS)
async def test_nor_does_a_lease(label: str, single: WorkflowConnectionPool, objects: dict[str, str]) -> None:
    state = STATE.format_map(objects)
    before = await single.fetchval(state)
    async with single.acquire() as connection:
        for sql in LEAKS[label]:
            await attempt(connection.execute(sql.format_map(objects)))
    assert await single.fetchval(state) == before


@pytest.mark.parametrize(
    "left",
    ["begin", "begin; select 1/0", "select 1; begin; select 2", "begin isolation level serializable read only"],
)
async def test_nor_does_a_transaction_that_was_left_open(
    left: str, single: WorkflowConnectionPool, objects: dict[str, str], table: str
) -> None:
    state = STATE.format_map(objects)
    before = await single.fetchval(state)
    async with single.acquire() as connection:
        await attempt(connection.execute(left))
        await attempt(connection.execute(f"insert into {table} values (1, 'x')"))
    assert await single.fetchval(state) == before
    assert await single.fetchval(f"select count(*) from {table}") == 0
    assert await single.execute(f"insert into {table} values (2, 'x')") == "INSERT 0 1"


async def test_all_at_once_over_a_shared_pool(
    pool: WorkflowConnectionPool, objects: dict[str, str], table: str, direct: asyncpg.Connection
) -> None:
    """Leaky statements, temp tables that shadow the real one, and callers that must see none of it."""
    schema = objects["schema"]
    state = STATE.format_map(objects)
    clean = await pool.fetchval(state)

    async def leaky(number: int) -> None:
        statements = [sql for each in LEAKS.values() for sql in each]
        await attempt(pool.execute(statements[number % len(statements)].format_map(objects)))

    async def innocent(number: int) -> bool:
        await pool.execute(f"insert into {table} values ($1, 'x')", number)
        return bool(await pool.fetchval(state) == clean)

    calls = [innocent(n) if n % 2 else leaky(n // 2) for n in range(300)]
    results = await asyncio.gather(*calls)
    assert all(result is not False for result in results)
    assert await direct.fetchval(f"select count(*) from {schema}.item") == 150


async def test_only_what_may_leave_something_is_followed_by_a_reset(
    pg: EmbeddedServer, table: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets = 0
    reset = ServerConnection.reset

    async def counted(self: ServerConnection) -> None:
        nonlocal resets
        resets += 1
        await reset(self)

    monkeypatch.setattr(ServerConnection, "reset", counted)
    worker = PoolWorker("p", 0, "cluster", from_kwargs(name="p", environ={}, **pg.parameters).to_dict())
    await grant(worker, 1)
    numbers = itertools.count(1)

    async def run(sql: str, *arguments: Any) -> int:
        """Run *sql* ten times; how many resets followed."""
        before = resets
        for _ in range(10):
            runs = [(messages.FETCH, sql, [arguments], None, None, None)]
            _, unfinished, parts, _ = unpack(await worker.run(pack(("client", "job", next(numbers), runs))))
            while unfinished:  # it was answered before its end, as on a busy machine
                _, unfinished, more, _ = unpack(await worker.collect(pack(("client", "job"))))
                parts = [*parts, *more]
            [part] = parts
            assert part[4] is None
        connections = worker._engine.connections
        await eventually(lambda: connections.idle == connections.total)  # after the answer comes the reset
        return resets - before

    assert await run("select $1::int + 1", 1) == 0
    assert await run(f"select label from {table} where id = $1", 1) == 0
    assert await run(f"select count(*), max(upper(label)) from {table}") == 0
    assert await run(f"insert into {table} select coalesce(max(id), 0) + 1, 'x' from {table}") == 10
    assert await run("select set_config('my.secret', 'x', false)") == 10
    assert await run("select 1") == 0
    await worker.close("the test is over")
