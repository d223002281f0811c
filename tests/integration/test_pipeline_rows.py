"""Rows of a pipeline fare as each would in a call of its own, whatever the table does with them."""

from __future__ import annotations

import asyncio
import datetime
import random
from typing import Any

import asyncpg
import pytest
from lanes_by_hand import contents, fresh, kind, one_by_one, seen_of
from pools import add_all, pipeline_of

from raypg import (
    StatementNotAllowedError,
    WorkflowConnectionPool,
)

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
                ]
            )
        rows.append(row)
    return rows


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
        number_of = {row["id"]: row["number"] for row in got_rows["item"]}
        numbers = [number_of[row[0]] for row, result in zip(rows, results, strict=True) if result.success]
        assert numbers == sorted(set(numbers))  # given out in order of submission
        got_rows, expected_rows = ({"item": [row[:3] for row in each["item"]]} for each in (got_rows, expected_rows))
    assert got_rows == expected_rows


async def test_errors_of_rows_are_their_own(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool)
    rows: list[tuple[Any, ...]] = [(i, f"label {i}", i) for i in range(200)]
    rows[17] = (3, "double", 1)
    rows[80] = (80, None, 1)
    rows[81] = (81, "x", -5)
    rows[150] = ("150", "x", 1)
    rows[199] = (2**40, "x", 1)
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2, $3)", rows)
    results = await pipeline.flush()
    failed = {i: result for i, result in enumerate(results) if not result.success}
    assert [results[i].query_id for i in failed] == [ids[i] for i in failed]
    assert {i: type(result.error) for i, result in failed.items()} == {
        17: asyncpg.UniqueViolationError,
        80: asyncpg.NotNullViolationError,
        81: asyncpg.CheckViolationError,
        150: asyncpg.DataError,
        199: asyncpg.DataError,
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
    "default",
    [
        "now()",
        "clock_timestamp()",
        "current_timestamp",
        "localtimestamp",
        "statement_timestamp()",
        "current_date + localtime",
    ],
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


async def test_a_plain_table_is_grouped(pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str) -> None:
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
    assert results[6][0][0] == await pool.fetchval("show server_version_num")
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
