"""The pipeline gives for each query what a call of its own would have given, in order, and loses nothing."""

from __future__ import annotations

import asyncio
import datetime
import gc
import random
import re
import warnings
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest
from pools import own_pool
from waiting import eventually

from raypg import (
    ConfigError,
    PipelineClosedError,
    PipelineResult,
    PoolNotFoundError,
    QueryPipelineNode,
    StatementNotAllowedError,
    StatementNotRunError,
    WorkflowConnectionPool,
)
from raypg.embedded import EmbeddedServer


def pipeline_of(pool: WorkflowConnectionPool, **more: Any) -> QueryPipelineNode:
    return QueryPipelineNode(name="test", connection_pool=pool, **more)


async def add_all(pipeline: QueryPipelineNode, sql: str, rows: Sequence[Sequence[Any]]) -> list[str]:
    return [await pipeline.add_query(sql, row) for row in rows]


# --- complete, and in order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "flush_interval"), [(100, 0.005), (1, 0.1), (10_000, 0), (7, 0.001)])
async def test_a_flush_returns_every_result_in_order_of_submission(
    pool: WorkflowConnectionPool, table: str, batch_size: int, flush_interval: float
) -> None:
    count = 2500 if batch_size > 1 else 300
    pipeline = pipeline_of(pool, batch_size=batch_size, flush_interval=flush_interval)
    ids = []
    for number in range(count):
        ids.append(await pipeline.add_query(f"insert into {table} values ($1, $2)", [number, "x"]))
        if number % 50 == 0:
            await asyncio.sleep(0.005)  # the background sends meanwhile
    results = await pipeline.flush()
    assert len(results) == count
    assert [result.query_id for result in results] == ids
    assert len(set(ids)) == count
    assert all(result.success and result.error is None and result.result == "INSERT 0 1" for result in results)
    assert all(result.execution_time_ms >= 0 and result.retry_count == 0 for result in results)
    assert await pool.fetchval(f"select count(*) from {table}") == count
    assert len(await pipeline.flush()) == 0
    status = pipeline.get_status()
    assert (status["queued_queries"], status["total_queries"], status["total_failures"]) == (0, count, 0)
    assert status["success_rate"] == 1.0
    assert status["total_batches"] >= count / batch_size
    await pipeline.close()


async def test_what_is_added_is_sent_without_a_flush(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, flush_interval=0.05)
    await pipeline.add_query(f"insert into {table} values (1, 'x')")

    async def arrived() -> bool:
        return bool(await pool.fetchval(f"select count(*) from {table}") == 1)

    await eventually(arrived, timeout=5)
    (result,) = await pipeline.flush()
    assert result.success
    await pipeline.close()


async def test_with_a_flush_interval_of_0_it_is_not(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, flush_interval=0)
    await pipeline.add_query(f"insert into {table} values (1, 'x')")
    await asyncio.sleep(0.3)
    assert await pool.fetchval(f"select count(*) from {table}") == 0
    await pipeline.close()
    assert await pool.fetchval(f"select count(*) from {table}") == 1


async def test_results_are_a_sequence(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool)
    await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i % 90, "x") for i in range(100)])
    results = await pipeline.flush()
    listed = list(results)
    looks = [repr(result) for result in listed]
    assert [repr(results[i]) for i in range(100)] == looks
    assert [repr(results[i]) for i in range(-100, 0)] == looks
    assert [repr(result) for result in results[10:95:7]] == looks[10:95:7]
    assert [repr(result) for result in reversed(results)] == looks[::-1]
    assert listed[3] in results
    assert isinstance(listed[0], PipelineResult)
    with pytest.raises(IndexError):
        results[100]
    assert [i for i, result in enumerate(results) if not result.success] == list(range(90, 100))
    await pipeline.close()


async def test_many_adders_at_once(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, batch_size=64, flush_interval=0.002)
    ids: list[str] = []

    async def add(base: int) -> None:
        for number in range(base, base + 100):
            ids.append(await pipeline.add_query(f"insert into {table} values ($1, $2)", [number, "x"]))
            await asyncio.sleep(0)

    await asyncio.gather(*(add(base) for base in range(0, 2000, 100)))
    results = await pipeline.flush()
    assert sorted(ids) == sorted(result.query_id for result in results)
    assert all(result.success for result in results)
    assert await pool.fetchval(f"select count(*) from {table}") == 2000
    await pipeline.close()


async def test_flushes_at_once_share_the_results_between_them(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, flush_interval=0)
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, "x") for i in range(500)])
    parts = await asyncio.gather(*(pipeline.flush() for _ in range(4)))
    assert [result.query_id for part in parts for result in part] == ids
    await pipeline.close()


async def test_adding_while_a_flush_is_under_way_loses_nothing(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, batch_size=10, flush_interval=0.001)
    ids: list[str] = []
    seen: list[str] = []
    done = False

    async def flusher() -> None:
        while not done:
            seen.extend(result.query_id for result in await pipeline.flush())
            await asyncio.sleep(0)

    task = asyncio.create_task(flusher())
    for number in range(3000):
        ids.append(await pipeline.add_query(f"insert into {table} values ($1, $2)", [number, "x"]))
        if number % 20 == 0:
            await asyncio.sleep(0)
    done = True
    await task
    seen.extend(result.query_id for result in await pipeline.flush())
    assert seen == ids
    assert await pool.fetchval(f"select count(*) from {table}") == 3000
    await pipeline.close()


async def test_queries_run_in_order(pool: WorkflowConnectionPool, table: str) -> None:
    """Each sees what those before it did, also over several messages and without a flush between."""
    pipeline = pipeline_of(pool, batch_size=20, flush_interval=0.001)
    for number in range(400):
        await pipeline.add_query(f"insert into {table} values ($1, 'x', 0)", [number])
        await pipeline.add_query(f"update {table} set amount = amount + 1 where id <= $1", [number])
        await pipeline.add_query(f"select count(*) as n, sum(amount) as total from {table}")
        if number % 40 == 0:
            await asyncio.sleep(0.003)
    results = await pipeline.flush()
    counts = [result.result[0] for result in results if isinstance(result.result, list)]
    assert [row["n"] for row in counts] == list(range(1, 401))
    assert [row["total"] for row in counts] == [n * (n + 1) // 2 for n in range(1, 401)]
    assert [result.result for result in list(results)[1::3]] == [f"UPDATE {n}" for n in range(1, 401)]
    await pipeline.close()


# --- the same as one by one ------------------------------------------------------------------------------------------

NOW = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)

# Tables that a group may not treat as plain ones, and one that it may. The setting up is run in a fresh schema.
TABLES: dict[str, str] = {
    "plain": "create table item (id int primary key, label text not null, amount int check (amount >= 0))",
    "serial": """create table item (id int primary key, label text not null, amount int check (amount >= 0),
        number serial)""",
    "unique nulls": """create table item (id int primary key, label text not null unique,
        amount int check (amount >= 0))""",
    "deferrable": """create table item (id int primary key, label text not null,
        amount int check (amount >= 0), unique (amount) deferrable initially deferred)""",
    "self reference": """create table item (id int primary key, label text not null,
        amount int check (amount >= 0), foreign key (amount) references item (id))""",
    "trigger that counts": """create table item (id int primary key, label text not null,
            amount int check (amount >= 0));
        create table seen (n bigint, label text);
        create function note() returns trigger language plpgsql as
            $$ begin insert into seen select count(*), new.label from item; return null; end $$;
        create trigger t after insert on item for each row execute function note()""",
    "trigger that drops rows": """create table item (id int primary key, label text not null,
            amount int check (amount >= 0));
        create function drop_some() returns trigger language plpgsql as
            $$ begin if new.id % 3 = 0 then return null; end if; return new; end $$;
        create trigger t before insert on item for each row execute function drop_some()""",
    "trigger that refuses": """create table item (id int primary key, label text not null,
            amount int check (amount >= 0));
        create function refuse() returns trigger language plpgsql as
            $$ begin if new.id % 7 = 0 then raise exception 'no %', new.id using errcode = 'ZZ001'; end if;
               return new; end $$;
        create trigger t before insert on item for each row execute function refuse()""",
    "statement trigger": """create table item (id int primary key, label text not null,
            amount int check (amount >= 0));
        create table seen (n int generated always as identity, label text);
        create function note() returns trigger language plpgsql as
            $$ begin insert into seen (label) values (tg_op); return null; end $$;
        create trigger t after insert on item for each statement execute function note()""",
    "rule": """create table item (id int primary key, label text not null, amount int check (amount >= 0));
        create table seen (id int, label text);
        create rule r as on insert to item do also insert into seen values (new.id, new.label)""",
    "rule that does nothing": """create table item (id int primary key, label text not null,
            amount int check (amount >= 0));
        create rule r as on insert to item where new.id % 5 = 0 do instead nothing""",
    "partitions": """create table item (id int, label text not null, amount int check (amount >= 0),
            primary key (id)) partition by range (id);
        create table low partition of item for values from (minvalue) to (20);
        create table high partition of item for values from (20) to (60)""",
    "partition with a trigger": """create table item (id int, label text not null, amount int check (amount >= 0),
            primary key (id)) partition by range (id);
        create table low partition of item for values from (minvalue) to (20);
        create table high partition of item for values from (20) to (maxvalue);
        create table seen (n bigint, label text);
        create function note() returns trigger language plpgsql as
            $$ begin insert into seen select count(*), new.label from item; return null; end $$;
        create trigger t after insert on high for each row execute function note()""",
    "generated": """create table item (id int primary key, label text not null, amount int check (amount >= 0),
        twice int generated always as (amount * 2) stored)""",
    "domain": """create domain small as int check (value < 40);
        create table item (id small primary key, label varchar(6) not null, amount int check (amount >= 0))""",
    "view": """create table base (id int primary key, label text not null, amount int check (amount >= 0));
        create view item as select * from base""",
    "exclusion": """create table item (id int primary key, label text not null, amount int check (amount >= 0),
        exclude using btree (label with =))""",
    "row level security is off for its owner": """create table item (id int primary key, label text not null,
        amount int check (amount >= 0)); alter table item enable row level security""",
}


def random_rows(rng: random.Random, count: int, bad: float) -> list[tuple[Any, ...]]:
    """Rows of which about *bad* are refused: doubles, NULLs, negative amounts, wrong types, out of range."""
    rows: list[tuple[Any, ...]] = []
    for number in range(count):
        row: tuple[Any, ...] = (number, f"l{number}", rng.choice([None, number, 0]))
        if rng.random() < bad:
            row = rng.choice(
                [
                    (rng.randrange(count), "d", 1),
                    (number, None, 1),
                    (number, f"l{number}", -1),
                    (f"{number}", f"l{number}", 1),
                    (number, 5, 1),
                    (2**40, f"l{number}", 1),
                    (number, "nul\0", 1),
                    (number, f"l{number}"),
                    (number, f"l{number}", 1, 2),
                ]
            )
        rows.append(row)
    return rows


def seen_of(error: BaseException | None) -> tuple[Any, ...] | None:
    if error is None:
        return None
    return (
        type(error),
        str(error),
        getattr(error, "sqlstate", None),
        getattr(error, "constraint_name", None),
        getattr(error, "detail", None),
    )


async def contents(direct: asyncpg.Connection, schema: str) -> dict[str, list[Any]]:
    """All rows of all tables of *schema*."""
    names = await direct.fetch("select tablename from pg_tables where schemaname = $1 order by 1", schema)
    return {
        name: sorted((await direct.fetch(f"select * from {schema}.{name}")), key=repr)
        for (name,) in names
    }


async def one_by_one(direct: asyncpg.Connection, sql: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What asyncpg gives for each row alone: a command tag, or what is seen of the error."""
    outcomes: list[Any] = []
    for row in rows:
        try:
            statement = await direct.prepare(sql)
            await statement.fetch(*row)
            outcomes.append(statement.get_statusmsg())
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            outcomes.append(seen_of(error))
    return outcomes


async def fresh(direct: asyncpg.Connection, schema: str, definition: str) -> None:
    await direct.execute(f"drop schema {schema} cascade; create schema {schema}; set search_path = {schema}, public")
    await direct.execute(definition)


@pytest.mark.parametrize("bad", [0.0, 0.02, 0.4])
@pytest.mark.parametrize("label", TABLES)
async def test_rows_fare_as_they_would_one_by_one(
    pool: WorkflowConnectionPool,
    direct: asyncpg.Connection,
    schema: str,
    rng: random.Random,
    label: str,
    bad: float,
) -> None:
    rows = random_rows(rng, 60, bad)
    sql = f"insert into {schema}.item (id, label, amount) values ($1, $2, $3)"
    definition = TABLES[label].replace("from item;", f"from {schema}.item;").replace("into seen", f"into {schema}.seen")
    definition = definition.replace("from item", f"from {schema}.item")
    await fresh(direct, schema, definition)
    expected = await one_by_one(direct, sql, rows)
    expected_rows = await contents(direct, schema)
    await fresh(direct, schema, definition)

    pipeline = pipeline_of(pool, batch_size=25)
    await add_all(pipeline, sql, rows)
    results = await pipeline.flush()
    await pipeline.close()
    got = [result.result if result.success else seen_of(result.error) for result in results]
    # Rows that were rolled back use up numbers of a sequence: how many, PostgreSQL promises to nobody.
    wording = label != "serial"
    assert [kind(outcome, wording) for outcome in got] == [kind(outcome, wording) for outcome in expected]
    got_rows = await contents(direct, schema)
    if label == "serial":
        numbers = [row["number"] for row in sorted(got_rows["item"], key=lambda row: row["id"])]
        assert numbers == sorted(set(numbers))
        got_rows, expected_rows = ({"item": [row[:3] for row in each["item"]]} for each in (got_rows, expected_rows))
    assert got_rows == expected_rows


def kind(outcome: Any, wording: bool) -> Any:
    """Class, SQLSTATE, constraint and, if wanted, words of an error; not the words of asyncpg about a value.

    Those count the elements of a group. And the server qualifies names that the search_path does not lead to.
    """
    if not isinstance(outcome, tuple):
        return outcome
    cls, text, sqlstate, constraint, detail = outcome
    if not wording or text.startswith(("invalid input for query argument", "the server expects")):
        return cls, sqlstate, constraint
    return cls, re.sub(r"\bt_[0-9a-f]{12}\.", "", text), sqlstate, constraint, detail


async def test_errors_of_rows_are_their_own(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool)
    rows: list[tuple[Any, ...]] = [(i, f"label {i}", i) for i in range(200)]
    rows[17] = (3, "double", 1)
    rows[80] = (80, None, 1)
    rows[81] = (81, "x", -5)
    rows[150] = ("150", "x", 1)
    rows[199] = (199, "x")
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2, $3)", rows)
    results = await pipeline.flush()
    failed = {i: result for i, result in enumerate(results) if not result.success}
    assert [results[i].query_id for i in failed] == [ids[i] for i in failed]
    assert {i: type(result.error) for i, result in failed.items()} == {
        17: asyncpg.UniqueViolationError,
        80: asyncpg.NotNullViolationError,
        81: asyncpg.CheckViolationError,
        150: asyncpg.DataError,
        199: asyncpg.InterfaceError,
    }
    assert failed[17].error.detail == "Key (id)=(3) already exists."  # type: ignore[union-attr]
    assert failed[17].result is None
    stored = await pool.fetch(f"select id from {table} order by id")
    assert [row["id"] for row in stored] == [i for i in range(200) if i not in failed]
    assert pipeline.get_status()["total_failures"] == 5
    assert pipeline.get_status()["success_rate"] == pytest.approx(195 / 200)
    await pipeline.close()


async def test_a_value_that_cannot_travel_fails_alone(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, flush_interval=0)
    rows: list[tuple[Any, ...]] = [(i, "x") for i in range(100)]
    rows[40] = (40, asyncio.get_running_loop())
    await add_all(pipeline, f"insert into {table} values ($1, $2)", rows)
    results = await pipeline.flush()
    assert [i for i, result in enumerate(results) if not result.success] == [40]
    assert await pool.fetchval(f"select count(*) from {table}") == 99
    await pipeline.close()


@pytest.mark.parametrize(
    "default", ["now()", "clock_timestamp()", "current_timestamp", "localtimestamp", "statement_timestamp()", "current_date + localtime"]
)
async def test_defaults_of_the_clock_tell_rows_apart(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, default: str
) -> None:
    """One by one each row has a time of its own; a group is one transaction, with one time."""
    await direct.execute(f"create table {schema}.event (id int, at timestamptz default {default})")
    pipeline = pipeline_of(pool)
    await add_all(pipeline, f"insert into {schema}.event (id) values ($1)", [(i,) for i in range(50)])
    assert all(result.success for result in await pipeline.flush())
    times = [row["at"] for row in await direct.fetch(f"select at from {schema}.event order by id")]
    assert times == sorted(times)
    assert len(set(times)) == 50
    await pipeline.close()


async def test_default_by_a_function_of_the_user_is_not_grouped(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(f"""
        create function {schema}.stamp() returns xid8 language sql volatile as 'select pg_current_xact_id()';
        create table {schema}.event (id int, tx xid8 default {schema}.stamp())""")
    pipeline = pipeline_of(pool)
    await add_all(pipeline, f"insert into {schema}.event (id) values ($1)", [(i,) for i in range(30)])
    assert all(result.success for result in await pipeline.flush())
    assert await direct.fetchval(f"select count(distinct tx) from {schema}.event") == 30
    await pipeline.close()


async def test_default_of_a_domain_is_a_default_too(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(f"""
        create domain {schema}.moment as timestamptz default now();
        create table {schema}.event (id int, at {schema}.moment)""")
    pipeline = pipeline_of(pool)
    await add_all(pipeline, f"insert into {schema}.event (id) values ($1)", [(i,) for i in range(30)])
    assert all(result.success for result in await pipeline.flush())
    assert await direct.fetchval(f"select count(distinct at) from {schema}.event") == 30
    await pipeline.close()


async def test_a_plain_table_is_grouped(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str
) -> None:
    """Or the pipeline would be no faster than calls of its own."""
    pipeline = pipeline_of(pool, batch_size=50, flush_interval=0)
    await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, "x") for i in range(500)])
    await pipeline.flush()
    assert await direct.fetchval(f"select count(distinct xmin::text) from {table}") == 10
    await pipeline.close()


async def test_rows_queries_and_returning(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool)
    await pipeline.add_query(f"insert into {table} values ($1, $2), ($3, $4)", [1, "a", 2, "b"])
    await pipeline.add_query(f"insert into {table} values ($1, $2) returning id, label", [3, "c"])
    await pipeline.add_query(f"select id, label from {table} order by id")
    await pipeline.add_query("select 1 as one where false")
    await pipeline.add_query(f"delete from {table} where id = 77 returning id")
    await pipeline.add_query(f"update {table} set label = 'z'")
    await pipeline.add_query("show server_version_num")
    await pipeline.add_query("values (5)")
    await pipeline.add_query("select $1::int as a", (5,))
    await pipeline.add_query(f"create index on {table} (label)")
    await pipeline.add_query("")
    results = [result.result for result in await pipeline.flush()]
    assert results[0] == "INSERT 0 2"
    assert [dict(row) for row in results[1]] == [{"id": 3, "label": "c"}]
    assert [dict(row) for row in results[2]] == [{"id": i, "label": x} for i, x in [(1, "a"), (2, "b"), (3, "c")]]
    assert results[3] == []
    assert results[4] == []
    assert results[5] == "UPDATE 3"
    assert results[6][0][0].startswith("18")
    assert [tuple(row) for row in results[7]] == [(5,)]
    assert results[8][0]["a"] == 5
    assert results[9] == "CREATE INDEX"
    assert results[10] == ""
    await pipeline.close()


async def test_refused_statements_fail_alone(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool)
    for sql in ("begin", f"insert into {table} values (1, 'x')", "select 1; select 2", "commit", "selekt"):
        await pipeline.add_query(sql)
    results = await pipeline.flush()
    assert [type(result.error) for result in results] == [
        StatementNotAllowedError,
        type(None),
        StatementNotAllowedError,
        StatementNotAllowedError,
        asyncpg.PostgresSyntaxError,
    ]
    await pipeline.close()


async def test_big_rows(pool: WorkflowConnectionPool, table: str) -> None:
    text = "x" * 1_000_000
    pipeline = pipeline_of(pool)
    await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, text) for i in range(30)])
    assert all(result.success for result in await pipeline.flush())
    assert await pool.fetchval(f"select sum(length(label)) from {table}") == 30_000_000
    await pipeline.close()


# --- transactional ---------------------------------------------------------------------------------------------------


async def test_transactional_commits_all_in_flush_and_nothing_before(
    pool: WorkflowConnectionPool, table: str
) -> None:
    pipeline = pipeline_of(pool, strategy="transactional", batch_size=10, flush_interval=0.001)
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, "x") for i in range(200)])
    await pipeline.add_query(f"select count(*) as n from {table}")
    await asyncio.sleep(0.1)
    assert await pool.fetchval(f"select count(*) from {table}") == 0
    results = await pipeline.flush()
    assert [result.query_id for result in results][:200] == ids
    assert all(result.success for result in results)
    assert results[200].result[0]["n"] == 200
    assert await pool.fetchval(f"select count(*) from {table}") == 200
    await pipeline.close()


@pytest.mark.parametrize("position", [0, 77, 149])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((1000, "double"), asyncpg.UniqueViolationError),
        ((5000, None), asyncpg.NotNullViolationError),
        (("5000", "x"), asyncpg.DataError),
        ((5000,), asyncpg.InterfaceError),
    ],
)
async def test_transactional_is_all_or_nothing_and_names_the_culprit(
    pool: WorkflowConnectionPool, table: str, position: int, row: Any, expected: type[Exception]
) -> None:
    await pool.execute(f"insert into {table} values (1000, 'there')")
    pipeline = pipeline_of(pool, strategy="transactional")
    rows: list[Any] = [(i, "x") for i in range(150)]
    rows[position] = row
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2)", rows)
    await pipeline.add_query(f"update {table} set label = 'changed'")
    results = await pipeline.flush()
    assert len(results) == 151
    assert not any(result.success for result in results)
    assert type(results[position].error) is expected
    rest = [result.error for i, result in enumerate(results) if i != position]
    assert all(isinstance(error, StatementNotRunError) and error.culprit == ids[position] for error in rest)
    assert await pool.fetch(f"select id, label from {table}") == [(1000, "there")]
    # The next flush is a transaction of its own.
    await pipeline.add_query(f"insert into {table} values (1, 'x')")
    assert [result.success for result in await pipeline.flush()] == [True]
    assert await pool.fetchval(f"select count(*) from {table}") == 2
    await pipeline.close()


async def test_transactional_failure_at_commit_fails_all(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(
        f"create table {schema}.late (id int primary key, "
        f"next int references {schema}.late deferrable initially deferred)"
    )
    pipeline = pipeline_of(pool, strategy="transactional")
    await add_all(pipeline, f"insert into {schema}.late values ($1, $2)", [(i, i + 1) for i in range(50)])
    results = await pipeline.flush()
    assert len(results) == 50
    assert not any(result.success for result in results)
    assert all(isinstance(result.error, asyncpg.ForeignKeyViolationError) for result in results)
    assert await direct.fetchval(f"select count(*) from {schema}.late") == 0
    await pipeline.close()


async def test_transactional_refuses_to_end_its_own_transaction(pool: WorkflowConnectionPool, table: str) -> None:
    for sql in ("commit", "rollback", "begin", "select 1; commit"):
        pipeline = pipeline_of(pool, strategy="transactional")
        await pipeline.add_query(f"insert into {table} values (1, 'x')")
        await pipeline.add_query(sql)
        results = await pipeline.flush()
        assert [type(result.error) for result in results] == [StatementNotRunError, StatementNotAllowedError]
        assert await pool.fetchval(f"select count(*) from {table}") == 0
        await pipeline.close()


async def test_a_transaction_of_many_messages(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, strategy="transactional")
    await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, "x") for i in range(12_000)])
    await pipeline.add_query(f"insert into {table} values (5, 'x')")
    results = await pipeline.flush()
    assert len(results) == 12_001
    assert not any(result.success for result in results)
    assert isinstance(results[12_000].error, asyncpg.UniqueViolationError)
    assert await pool.fetchval(f"select count(*) from {table}") == 0
    await pipeline.close()


# --- ends ------------------------------------------------------------------------------------------------------------


async def test_close_flushes_and_is_final(pool: WorkflowConnectionPool, table: str) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        await pipeline.add_query(f"insert into {table} values (1, 'x')")
    assert await pool.fetchval(f"select count(*) from {table}") == 1
    with pytest.raises(PipelineClosedError, match="test"):
        await pipeline.add_query("select 1")
    with pytest.raises(PipelineClosedError):
        await pipeline.flush()
    await pipeline.close()


async def test_failures_of_the_last_flush_are_logged(
    pool: WorkflowConnectionPool, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        await add_all(pipeline, f"insert into {table} values ($1, 'x')", [(1,), (1,), (1,)])
    assert "2 queries failed" in caplog.text


async def test_a_pipeline_that_is_dropped_with_queries_says_so(pool: WorkflowConnectionPool) -> None:
    pipeline = pipeline_of(pool, flush_interval=0)
    await pipeline.add_query("select 1")
    with pytest.warns(ResourceWarning, match="1 unsent"):
        del pipeline
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = pipeline_of(pool)
        await pipeline.add_query("select 1")
        await pipeline.close()
        del pipeline
        gc.collect()


async def test_an_empty_flush(pool: WorkflowConnectionPool) -> None:
    for strategy in ("best_effort", "transactional"):
        async with pipeline_of(pool, strategy=strategy) as pipeline:
            assert list(await pipeline.flush()) == []
            assert pipeline.get_status()["success_rate"] == 1.0


# --- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"connection_pool": ""}, "connection_pool"),
        ({"connection_pool": "no such name"}, "pool name"),
        ({"connection_pool": 5}, "connection_pool"),
        ({"connection_pool": "x", "batch_size": 0}, "batch_size"),
        ({"connection_pool": "x", "batch_size": True}, "batch_size"),
        ({"connection_pool": "x", "batch_size": 1.5}, "batch_size"),
        ({"connection_pool": "x", "flush_interval": -1}, "flush_interval"),
        ({"connection_pool": "x", "flush_interval": "fast"}, "flush_interval"),
        ({"connection_pool": "x", "flush_interval": float("nan")}, "flush_interval"),
        ({"connection_pool": "x", "strategy": "best-effort"}, "best_effort"),
        ({"connection_pool": "x", "strategy": ["parallel"]}, "strategy"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QueryPipelineNode(**{"name": "p", **arguments})


@pytest.mark.parametrize("strategy", ["sequential", "parallel"])
def test_strategies_that_are_not_there_yet_do_not_pretend(strategy: str) -> None:
    with pytest.raises(NotImplementedError, match=strategy):
        QueryPipelineNode(name="p", connection_pool="x", strategy=strategy)


async def test_a_pool_that_does_not_run(ray_cluster: Any) -> None:
    pipeline = QueryPipelineNode(name="p", connection_pool="nowhere", flush_interval=0)
    await pipeline.add_query("select 1")
    (result,) = await pipeline.flush()
    assert isinstance(result.error, PoolNotFoundError)
    await pipeline.close()


@pytest.mark.parametrize(
    ("query", "params"), [(b"select 1", None), (5, None), ("select $1", "x"), ("select $1", 5), ("select $1", {"a": 1})]
)
async def test_wrong_types_are_refused_where_they_are_given(
    pool: WorkflowConnectionPool, query: Any, params: Any
) -> None:
    async with pipeline_of(pool) as pipeline:
        with pytest.raises(TypeError):
            await pipeline.add_query(query, params)
        assert pipeline.get_status()["total_queries"] == 0


async def test_params_may_be_reused_and_changed_after_adding(pool: WorkflowConnectionPool, table: str) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        row: list[Any] = [0, "x"]
        for number in range(10):
            row[0] = number
            await pipeline.add_query(f"insert into {table} values ($1, $2)", row)
        await pipeline.add_query(f"insert into {table} values ($1, $2)", (value for value in (10, "y")))
    assert await pool.fetchval(f"select count(*) from {table}") == 11


async def test_it_works_by_the_name_of_the_pool(pool: WorkflowConnectionPool, table: str) -> None:
    async with QueryPipelineNode(name="by_name", connection_pool=pool.name) as pipeline:
        await pipeline.add_query(f"insert into {table} values (1, 'x')")
        (result,) = await pipeline.flush()
    assert result.success
    assert result.query_id.startswith("by_name")


async def test_one_connection_is_enough(ray_cluster: Any, pg: EmbeddedServer, table: str) -> None:
    async with own_pool(pg, max_connections=1) as lone:
        both = [pipeline_of(lone), pipeline_of(lone, strategy="transactional")]
        for number, pipeline in enumerate(both):
            await add_all(pipeline, f"insert into {table} values ($1, $2)", [(1000 * number + i, "x") for i in range(300)])
        parts = await asyncio.wait_for(asyncio.gather(*(pipeline.flush() for pipeline in both)), 30)
        assert all(result.success for part in parts for result in part)
        assert await lone.fetchval(f"select count(*) from {table}") == 600
        await asyncio.gather(*(pipeline.close() for pipeline in both))
