"""Every lane gives what the statements give one by one: outcome by outcome, table by table."""

from __future__ import annotations

import datetime
import decimal
import ipaddress
import math
import random
import uuid
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from lanes_by_hand import contents, fresh, kind, one_by_one, seen_of
from pools import add_all, pipeline_of

from raypg import QueryPipelineNode, WorkflowConnectionPool

TABLE = """create type mood as enum ('sad', 'ok', 'happy');
    create domain small as int check (value < 1000);
    create table parent (id int primary key); insert into parent select generate_series(0, 40);
    create table item (id small primary key, label text not null, amount int check (amount >= 0),
        parent int references parent, feeling mood, code varchar(6) unique, price numeric(6, 2), pad char(4));
    create table seen (n bigint);
    insert into item select n, 'old ' || n, n, n, 'ok', 'c' || n, n * 1.5, 'p' from generate_series(0, 30, 3) n;"""
PARTITIONED = (
    TABLE.replace(
        "pad char(4));",
        "pad char(4), primary key (id)) partition by range (id);"
        "create table low partition of item for values from (minvalue) to (20);"
        "create table high partition of item for values from (20) to (maxvalue);",
    )
    .replace("id small primary key", "id small")
    .replace("unique,", ",")
)
TRIGGER = f"""{TABLE} create function note() returns trigger language plpgsql as
        $$ begin insert into {{schema}}.seen select count(*) from {{schema}}.item; return null; end $$;
    create trigger x after insert or update or delete on item for each row execute function note();"""

DAY = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=datetime.UTC)
COMMON: dict[str, list[Any]] = {
    "bool": [True, False],
    "int2": [-32768, 32767],
    "int4": [-(2**31), 2**31 - 1],
    "int8": [-(2**63), 2**63 - 1],
    "float4": [0.5, math.inf],
    "float8": [1e-300, -math.inf, 0.1],
    "numeric": [decimal.Decimal("1.000"), decimal.Decimal("-1E+50"), decimal.Decimal("NaN"), 7],
    "numeric(20,5)": [decimal.Decimal("1.123456")],
    "money": ["12.34"],
    "text": ["", "NULL", "{a,b}", "x" * 5000, "ä\U0001f600\n\t\"'\\"],
    "varchar(20)": ["short"],
    "char(5)": ["ab", ""],
    "name": ["word"],
    "bytea": [b"", bytes(range(256))],
    "uuid": [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)],
    "json": ['{"a": [1, null]}', "null", "[[1, 2], [3]]"],
    "jsonb": ['{"b": {"c": "d"}}', '"x"'],
    "date": [DAY.date(), datetime.date.min, datetime.date.max],
    "time": [DAY.time()],
    "timetz": [DAY.timetz()],
    "timestamp": [DAY.replace(tzinfo=None), datetime.datetime.min],
    "timestamptz": [DAY, DAY.astimezone(datetime.timezone(datetime.timedelta(hours=-7)))],
    "interval": [datetime.timedelta(days=-3, microseconds=1)],
    "inet": [ipaddress.ip_address("::1"), ipaddress.ip_interface("10.0.0.1/8"), "127.0.0.1"],
    "cidr": [ipaddress.ip_network("10.0.0.0/8")],
    "macaddr": ["08:00:2b:01:02:03"],
    "oid": [2**32 - 1],
}

COLUMNS = "(id, label, amount, parent, feeling, code, price, pad)"
VALUES = "values ($1, $2, $3, $4, $5, $6, $7, $8)"

Row = Callable[[random.Random, int], tuple[Any, ...]]


def item(rng: random.Random, number: int) -> tuple[Any, ...]:
    """A row, good or bad."""
    good: list[Any] = [
        100 + number, f"l{number}", rng.choice([None, 0, number]), rng.choice([None, rng.randrange(40)]),
        rng.choice([None, "sad", "happy"]), rng.choice([None, f"n{number}"]), rng.choice([None, "1.25", 17]), "ab",
    ]  # fmt: skip
    if rng.random() < 0.15:
        column, value = rng.choice(
            [(0, rng.randrange(30)), (0, None), (0, 1000), (0, 2**40), (0, "7"), (1, None), (1, 5), (1, "nul\0"),
             (2, -1), (3, 77), (4, "angry"), (5, "toolong"), (5, "c3"), (6, "99999.99"), (7, "12345"),
             (1, [1]), (0, [[1]])]
        )  # fmt: skip
        good[column] = value
    return tuple(good)


def change(rng: random.Random, number: int) -> tuple[Any, ...]:
    return (rng.choice([rng.randrange(35), None]), rng.choice([number, number, number, -1, None, "x"]))


def key(rng: random.Random, number: int) -> tuple[Any, ...]:
    return (rng.choice([rng.randrange(35), rng.randrange(35), None, "x"]),)


STATEMENTS: dict[str, tuple[str, Row, str]] = {
    "insert": (f"insert into {{s}}.item {COLUMNS} {VALUES}", item, "unnest"),
    "insert with casts": (
        f"insert into {{s}}.item {COLUMNS} values ($1, $2 || '!', $3 + 1, $4, $5, $6, $7::numeric / 2, $8)",
        item, "unnest",
    ),
    "insert with a function": (f"insert into {{s}}.item {COLUMNS} {VALUES.replace('$2', 'upper($2)')}", item, "many"),
    "returning": (f"insert into {{s}}.item {COLUMNS} {VALUES} returning label, id, id, price as cost", item, "many"),
    "do nothing": (f"insert into {{s}}.item {COLUMNS} {VALUES} on conflict do nothing", item, "many"),
    "do update": (
        f"insert into {{s}}.item {COLUMNS} {VALUES} on conflict (id) do update set amount = excluded.amount + 1, "
        "label = item.label || '+' where item.amount > 3", item, "many",
    ),
    "do update returning": (
        f"insert into {{s}}.item {COLUMNS} {VALUES} on conflict (id) do update set label = excluded.label returning *",
        item, "many",
    ),
    "update": ("update {s}.item set amount = $2 where id = $1", change, "many"),
    "update returning": ("update {s}.item set amount = $2 where id = $1 returning id, amount", change, "many"),
    "update from": (
        "update {s}.item set amount = $2 + p.id from {s}.parent p where p.id = item.parent and item.id = $1",
        change, "many",
    ),
    "delete": ("delete from {s}.item where id = $1;  -- one", key, "many"),
    "delete returning": ("delete from {s}.item where id = $1 returning label", key, "many"),
    "insert select": (
        "insert into {s}.item (id, label) select id + 200, label from {s}.item where id = $1", key, "many",
    ),
    "read": ("select id, label from {s}.item where id < $1 order by id", key, "single"),
}  # fmt: skip


def told(result: Any) -> Any:
    if not result.success:
        return kind(seen_of(result.error), True)
    return [tuple(row) for row in result.result] if isinstance(result.result, list) else result.result


@pytest.mark.parametrize("table", ["table", "partitioned", "trigger"])
@pytest.mark.parametrize("label", STATEMENTS)
async def test_lanes_give_what_one_by_one_gives(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, rng: random.Random, label: str, table: str
) -> None:
    template, make, lane = STATEMENTS[label]
    sql = template.format(s=schema)
    definition = {"table": TABLE, "partitioned": PARTITIONED, "trigger": TRIGGER}[table].format(schema=schema)
    rows = [make(rng, number) for number in range(60)]
    await fresh(direct, schema, definition)
    expected = [kind(o, True) if isinstance(o, tuple) else o for o in await one_by_one(direct, sql, rows)]
    expected_rows = await contents(direct, schema)
    await fresh(direct, schema, definition)
    async with pipeline_of(pool, batch_size=61, flush_interval=0) as pipeline:
        await add_all(pipeline, sql, rows)
        (step,) = await pipeline.explain()
        assert step.lane == ("single" if table == "trigger" else lane), step
        results = await pipeline.flush()
        assert [told(result) for result in results] == expected
        assert await contents(direct, schema) == expected_rows
        taken = pipeline.get_status()["lanes"]
        assert sum(taken.values()) == 60
        assert taken[step.lane] >= 57  # where a message ends with one that is left over, that one goes by itself


@pytest.mark.parametrize("_", range(4))
async def test_random_mixtures(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, rng: random.Random, _: int
) -> None:
    """Runs of all kinds behind each other, in messages and groups of any size, with the optimizer on."""
    work: list[tuple[str, tuple[Any, ...]]] = []
    for _ in range(12):
        template, make, _ = STATEMENTS[rng.choice(list(STATEMENTS))]
        work += [(template.format(s=schema), make(rng, rng.randrange(500))) for _ in range(rng.choice([1, 2, 9, 30]))]
    await fresh(direct, schema, TABLE)
    expected = [o for sql, row in work for o in await one_by_one(direct, sql, [row])]
    expected_rows = await contents(direct, schema)
    await fresh(direct, schema, TABLE)
    interval = rng.choice([0, 0.001])
    async with pipeline_of(pool, batch_size=rng.choice([1, 7, 100]), flush_interval=interval) as pipeline:
        for sql, row in work:
            await pipeline.add_query(sql, row)
        results = await pipeline.flush()
    assert [told(r) for r in results] == [kind(o, True) if isinstance(o, tuple) else o for o in expected]
    assert await contents(direct, schema) == expected_rows


@pytest.mark.parametrize("returning", ["", " returning *"])
async def test_all_common_types_travel_in_arrays_as_alone(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, rng: random.Random, returning: str
) -> None:
    columns = {f"c{number}": name for number, name in enumerate(COMMON)}
    definition = f"create table wide (n int, {', '.join(f'{c} {t}' for c, t in columns.items())})"
    await fresh(direct, schema, definition)
    parameters = ", ".join(f"${number}" for number in range(1, len(columns) + 2))
    sql = f"insert into {schema}.wide values ({parameters}){returning}"
    rows = [(n, *(rng.choice([None, *values]) for values in COMMON.values())) for n in range(50)]
    for row in rows:
        await direct.execute(sql, *row)
    expected = await contents(direct, schema)
    await fresh(direct, schema, definition)
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        await add_all(pipeline, sql, rows)
        results = await pipeline.flush()
        assert [r.error for r in results if r.error is not None] == []
        assert pipeline.get_status()["lanes"]["many" if returning else "unnest"] == 50
    assert repr(await contents(direct, schema)) == repr(expected)  # NaN is not equal to itself
    if returning:
        stored = {row["n"]: tuple(row) for row in expected["wide"]}
        assert repr([tuple(result.result[0]) for result in results]) == repr([stored[n] for n in range(50)])


async def test_a_group_that_the_server_does_not_take_goes_one_by_one(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    """Its rows get the server's own words about the user's own text."""
    await direct.execute(f"create table {schema}.item (a int, b text)")
    sql = f"insert into {schema}.item (a, missing) values ($1, $2)"
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        await add_all(pipeline, sql, [(n, "x") for n in range(20)])
        results = await pipeline.flush()
    assert {type(result.error) for result in results} == {asyncpg.UndefinedColumnError}
    assert all(str(result.error) == 'column "missing" of relation "item" does not exist' for result in results)


async def test_shared_now(pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str) -> None:
    await direct.execute(f"create table {schema}.event (id int, at timestamptz default now())")
    for shared, times in ((False, 40), (True, 1)):
        pipeline: QueryPipelineNode = pipeline_of(pool, flush_interval=0, shared_now=shared)
        await add_all(pipeline, f"insert into {schema}.event (id) values ($1)", [(n,) for n in range(40)])
        await pipeline.close()
        assert await direct.fetchval(f"select count(distinct at) from {schema}.event") == times
        await direct.execute(f"truncate {schema}.event")


async def test_explain_runs_nothing_and_says_why(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        assert await pipeline.explain() == []
        ids = await add_all(pipeline, f"insert into {table} values ($1, 'secret')", [(n,) for n in range(20)])
        ids.append(await pipeline.add_query(f"update {table} set label = 'x'"))
        ids.append(await pipeline.add_query("select 1"))
        steps = await pipeline.explain()
        assert [(s.first, s.count, s.lane) for s in steps] == [
            (ids[21], 1, "single"), (ids[0], 20, "unnest"), (ids[20], 1, "single"),
        ]  # fmt: skip
        assert all(step.reason for step in steps)
        assert "secret" not in "".join(map(str, steps))
        assert await direct.fetchval(f"select count(*) from {table}") == 0
