"""Tables and types change, and prepared statements vanish, under callers who go on."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from waiting import eventually

from raypg import QueryPipelineNode, ResultLostError, WorkflowConnectionPool

CHANGES = {
    "column added": "alter table {t} add column more int default 7",
    "column dropped": "alter table {t} drop column amount",
    "column renamed": "alter table {t} rename column amount to sum",
    "type changed": "alter table {t} alter column amount type bigint",
    "table made anew": "drop table {t}; create table {t} (id text, note jsonb)",
}


@pytest.mark.parametrize("settings", [None, {"work_mem": "1MB"}])
@pytest.mark.parametrize("label", CHANGES)
async def test_a_read_after_a_change_of_its_table(
    label: str, settings: Any, single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    ask = f"select * from {table}"
    for _ in range(3):
        await single.fetch(ask, settings=settings)
    await direct.execute(CHANGES[label].format(t=table))
    await direct.execute(f"insert into {table} (id) values (1)")
    rows = await single.fetch(ask, settings=settings)
    (expected,) = await direct.fetch(ask)
    assert list(rows[0].keys()) == list(expected.keys())
    assert tuple(rows[0]) == tuple(expected)


async def test_a_write_with_returning_after_a_change_runs_once(
    single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    insert = f"insert into {table} (id) values ($1) returning *"
    await single.fetch(insert, 1)
    await direct.execute(f"alter table {table} add column more int")
    assert len((await single.fetch(insert, 2))[0]) == 4
    assert await direct.fetchval(f"select count(*) from {table}") == 2


@pytest.mark.parametrize("change", ["add attribute c int", "drop attribute b", "alter attribute b type bigint"])
async def test_a_read_after_a_change_of_a_composite_type(
    change: str, pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    """On every connection, each of which remembers the type."""
    await direct.execute(f"create type {schema}.pair as (a int, b int); create table {schema}.pairs (p {schema}.pair)")
    await direct.execute(f"insert into {schema}.pairs values ((1, 2))")
    ask = f"select p from {schema}.pairs"
    await asyncio.gather(*(pool.fetchval(f"{ask} -- {n % 2}") for n in range(60)))
    await direct.execute(f"drop table {schema}.pairs; alter type {schema}.pair {change}")
    await direct.execute(f"create table {schema}.pairs (p {schema}.pair); insert into {schema}.pairs (p.a) values (5)")
    rows = await asyncio.gather(*(pool.fetchval(f"{ask} -- {n % 2}") for n in range(60)))
    expected = (await (await asyncpg.connect(**pool_parameters(direct))).fetchval(ask)).items()
    assert [list(row.items()) for row in rows] == [list(expected)] * 60


def pool_parameters(direct: asyncpg.Connection) -> dict[str, Any]:
    return {
        "host": direct._addr[0],
        "port": direct._addr[1],
        "user": direct._params.user,
        "database": direct._params.database,
        "password": direct._params.password,
    }


# --- writes whose rows cannot be read --------------------------------------------------------------------------------

ALTER = "alter type {s}.pair add attribute c int"


@pytest.fixture
async def altered(schema: str, table: str, single: WorkflowConnectionPool, direct: asyncpg.Connection) -> str:
    """An INSERT of ``$1`` that returns a composite type, which was altered since `single` read it last."""
    await direct.execute(f"create type {schema}.pair as (a int, b int)")
    sql = f"insert into {table} (id) values ($1) returning (null::{schema}.pair), json_populate_record("
    sql += f'null::{schema}.pair, \'{{"a": 1, "b": 2}}\') as p'
    assert [tuple(row["p"]) for row in await single.fetch(sql, 0)] == [(1, 2)]
    await direct.execute(ALTER.format(s=schema))
    return sql


@pytest.mark.parametrize("method", ["fetch", "fetchrow", "fetchval", "execute"])
async def test_a_write_that_took_effect_is_not_told_as_failed(
    method: str, altered: str, single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    with pytest.raises(ResultLostError, match=r"took effect.*altered") as caught:
        await getattr(single, method)(altered, 1)
    assert caught.value.statement.startswith("insert into")
    assert await direct.fetchval(f"select count(*) from {table}") == 2
    assert [tuple(row["p"]) for row in await single.fetch(altered, 2)] == [(1, 2, None)]
    assert await direct.fetchval(f"select count(*) from {table}") == 3


async def test_nor_by_process(altered: str, single: WorkflowConnectionPool, table: str) -> None:
    request = {"operation": "execute", "query": altered, "params": [1]}
    with pytest.raises(ResultLostError):
        await single.process(request)
    assert (await single.process({**request, "params": [2]}))["success"]
    assert await single.fetchval(f"select count(*) from {table}") == 3


async def test_with_settings_it_is_rolled_back_and_runs_anew(
    altered: str, single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    rows = await single.fetch(altered, 1, settings={"work_mem": "1MB"})
    assert [tuple(row["p"]) for row in rows] == [(1, 2, None)]
    assert await direct.fetchval(f"select count(*) from {table}") == 2


async def test_in_a_lease_it_ran_inside_the_transaction(
    altered: str, single: WorkflowConnectionPool, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    count = f"select count(*) from {table}"
    async with single.transaction() as tx:
        with pytest.raises(ResultLostError, match="inside the open transaction"):
            await tx.fetch(altered, 1)
        assert await tx.fetchval(count) == 2
        assert await tx.fetchval(altered, 2, column=1) == (1, 2, None)
    assert await direct.fetchval(count) == 3
    await direct.execute(f"alter type {schema}.pair drop attribute c")
    async with single.acquire() as connection:
        with pytest.raises(ResultLostError, match="took effect"):
            await connection.fetch(altered, 3)
    assert await direct.fetchval(count) == 4


async def test_in_a_pipeline_it_has_that_error(
    altered: str, single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    async with QueryPipelineNode("unread", single, flush_interval=0) as pipeline:
        await pipeline.add_query(altered, [1])
        (first,) = await pipeline.flush()
        await pipeline.add_query(altered, [2])
        (second,) = await pipeline.flush()
    assert isinstance(first.error, ResultLostError)
    assert second.success
    assert await direct.fetchval(f"select count(*) from {table}") == 3


async def test_a_group_whose_rows_cannot_be_read_is_undone_and_runs_one_by_one(
    altered: str, single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    async with QueryPipelineNode("unread", single, flush_interval=0) as pipeline:
        for number in (1, 2):
            await pipeline.add_query(altered, [number])
        results = await pipeline.flush()
    assert all(result.success or isinstance(result.error, ResultLostError) for result in results)
    assert results[1].success
    assert await direct.fetchval(f"select count(*) from {table}") == 3


FAR = "'20000-01-01'::timestamp"  # a year that Python's datetime does not have


async def test_values_that_python_cannot_hold(
    single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    with pytest.raises(ResultLostError, match="::text"):
        await single.fetch(f"insert into {table} values (1) returning {FAR}")
    assert await direct.fetchval(f"select count(*) from {table}") == 1
    with pytest.raises(OverflowError):  # as asyncpg says it: nothing can have been changed
        await single.fetch(f"select {FAR}")
    with pytest.raises(OverflowError):
        await single.fetch(f"insert into {table} values (2) returning {FAR}", settings={"work_mem": "1MB"})
    assert await direct.fetchval(f"select count(*) from {table}") == 1


async def test_what_the_server_refuses_after_its_first_rows_is_told_as_refused(
    single: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    """asyncpg alone would say only that it cannot read them: tests/contract."""
    await direct.execute(f"""
        create sequence {schema}.n;
        create table {schema}.late (id int unique, next int references {schema}.late (id) deferrable initially deferred)
    """)
    late = f"insert into {schema}.late values (1, 2) returning {FAR}"
    for _ in range(2):
        with pytest.raises(asyncpg.ForeignKeyViolationError) as caught:
            await single.fetch(late)
        assert (caught.value.sqlstate, caught.value.table_name) == ("23503", "late")
    async with single.acquire() as connection:
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await connection.fetchrow(late)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.fetch(f"select {FAR}, 1 / (3 - g), nextval('{schema}.n') from generate_series(1, 5) g")
    # Over many reads of the socket.
    many = f"insert into {schema}.late select g, 3000 - g from generate_series(1, 3000) g "
    many += f"returning {FAR}, repeat('x', 999)"
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="violates") as caught:
        await single.fetch(many)
    assert caught.value.detail.startswith("Key (next)=(0)")
    assert await direct.fetchval(f"select count(*) from {schema}.late") == 0
    with pytest.raises(ResultLostError):
        await single.fetch(many.replace("3000 - g", "g"))
    assert await direct.fetchval(f"select count(*) from {schema}.late") == 3000


async def test_a_new_value_of_an_enum(pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection) -> None:
    await direct.execute(f"create type {schema}.mood as enum ('sad')")
    ask = f"select $1::{schema}.mood"
    assert await asyncio.gather(*(pool.fetchval(ask, "sad") for _ in range(30))) == ["sad"] * 30
    await direct.execute(f"alter type {schema}.mood add value 'ok'")
    assert await asyncio.gather(*(pool.fetchval(ask, "ok") for _ in range(30))) == ["ok"] * 30


DISCARDS = ["discard all", "deallocate all", "discard plans", "do $$ begin deallocate all; end $$"]


@pytest.mark.parametrize("discard", DISCARDS)
async def test_prepared_statements_dropped_by_a_user(
    discard: str, single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    ask, insert = "select $1::int", f"insert into {table} values ($1, 'x')"
    assert await single.fetchval(ask, 1) == 1
    assert await single.execute(insert, 1) == "INSERT 0 1"
    await single.execute(discard)
    assert await single.execute(insert, 2) == "INSERT 0 1"
    assert await single.fetchval(ask, 1) == 1
    await single.execute(discard)
    await single.executemany(insert, [(3,), (4,)])
    await single.execute(discard)
    assert await single.fetchval(ask, 2, settings={"work_mem": "1MB"}) == 2
    await single.execute(discard)
    async with QueryPipelineNode("discards", single) as pipeline:
        await pipeline.add_query(ask, [5])
        await pipeline.add_query(insert, [5])
        results = await pipeline.flush()
        assert [result.error for result in results] == [None, None]
    async with single.acquire() as connection:
        assert await connection.fetchval(ask, 7) == 7
        await connection.execute(discard)
        assert await connection.fetchval(ask, 8) == 8
        async with connection.transaction():
            await connection.execute("deallocate all")
            assert await connection.fetchval(ask, 9) == 9
    assert await direct.fetchval(f"select count(*) from {table}") == 5


async def test_a_procedure_whose_own_statement_is_missing_runs_once(
    single: WorkflowConnectionPool, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    """The same SQLSTATE as of a statement that asyncpg prepared and the server lost, but this one has had effects."""
    await direct.execute(f"""
        create procedure {schema}.half() language plpgsql as $$ begin
            insert into {table} select count(*) from {table}; commit; execute 'execute nowhere'; end $$""")
    with pytest.raises(asyncpg.InvalidSQLStatementNameError):
        await single.execute(f"call {schema}.half()")
    assert await direct.fetchval(f"select count(*) from {table}") == 1


async def test_changes_under_load(pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection) -> None:
    over = asyncio.Event()
    done = 0

    async def caller(number: int) -> None:
        nonlocal done
        while not over.is_set():
            rows = await pool.fetch(f"select * from {table} where id > $1", -1)
            assert all(row["id"] >= 0 for row in rows)
            await pool.execute(f"insert into {table} (id) values ($1)", number * 1_000_000 + done)
            await pool.fetch(f"update {table} set label = 'y' where id = $1 returning *", number * 1_000_000 + done)
            done += 1

    callers = [asyncio.create_task(caller(number)) for number in range(10)]
    for number in range(15):
        wanted = done + 10

        def has_gone_on(least: int = wanted) -> bool:
            return done >= least or any(task.done() for task in callers)

        await direct.execute(f"alter table {table} add column c{number} int default {number}")
        await direct.execute(f"create index on {table} (c{number}); alter table {table} alter c{number} type bigint")
        await eventually(has_gone_on)
    over.set()
    await asyncio.gather(*callers)
    assert await direct.fetchval(f"select count(*) from {table}") == done
