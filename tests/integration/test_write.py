"""`pipeline.write`: Arrow data into tables by COPY over the workers; its modes, its ledger, its bad rows."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import numpy as np
import pyarrow as pa
import pytest
import ray
from pools import own_pool, pipeline_of, unique_name

from raypg import (
    BatchConflictError,
    ConfigError,
    DataLostError,
    IncompatibleDataError,
    LedgerError,
    QueryPipelineNode,
    StatementNotAllowedError,
    WorkflowConnectionPool,
    ledger,
)
from raypg.embedded import EmbeddedServer
from raypg.ingest.writing import write_batch

ROWS = 5_000


def items(count: int = ROWS, first: int = 0, amount: int = 0) -> pa.Table:
    """*count* rows (id, label, amount)."""
    ids = np.arange(first, first + count)
    return pa.table({"id": ids, "label": [f"row {i}" for i in ids], "amount": np.full(count, amount)})


@pytest.fixture
def pipeline(pool: WorkflowConnectionPool) -> QueryPipelineNode:
    """A pipeline with a name of its own, so that its batches are."""
    return QueryPipelineNode(name=unique_name("load"), connection_pool=pool)


async def count(direct: asyncpg.Connection, table: str) -> int:
    return int(await direct.fetchval(f"select count(*) from {table}"))


# --- what is given ---


async def test_a_table_is_appended_in_batches(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection
) -> None:
    written = await pipeline.write(items(), into=table, batch_rows=1_000)
    assert (written.rows, written.batches, written.duplicates, written.quarantined) == (ROWS, 5, 0, 0)
    assert sum(written.workers.values()) == ROWS
    assert written.seconds > 0
    stored = await direct.fetch(f"select id, label, amount from {table} order by id")
    assert [tuple(row) for row in stored] == [(i, f"row {i}", 0) for i in range(ROWS)]


async def test_data_comes_in_many_forms(pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection) -> None:
    async def later() -> AsyncIterator[Any]:
        yield items(10, 500)
        yield ray.put(items(10, 600))

    reader = pa.RecordBatchReader.from_batches(items().schema, items(100, 100).to_batches(30))
    forms = [
        items(10).to_batches()[0],
        reader,
        iter(items(20, 200).to_batches(7)),
        ray.put(items(10, 300)),
        [ray.put(items(10, 400)), ray.put(items(10, 410).to_batches()[0])],
        later(),
        ray.data.from_arrow([items(10, 700), items(10, 710)]),
    ]
    rows = [(await pipeline.write(data, into=table, batch_rows=50)).rows for data in forms]
    assert rows == [10, 100, 20, 10, 20, 20, 20]
    assert await count(direct, table) == sum(rows)
    assert (await pipeline.write(items(0), into=table)).rows == 0


async def test_columns_in_any_order_and_not_all(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection
) -> None:
    data = pa.table({"amount": [7], "id": [1]})
    await pipeline.write(data, into=table)
    assert tuple(await direct.fetchrow(f"select * from {table}")) == (1, "", 7)


async def test_what_does_not_fit_is_told_before_the_first_byte(pipeline: QueryPipelineNode, table: str) -> None:
    with pytest.raises(IncompatibleDataError, match=r"'amount'.*string.*integer") as caught:
        await pipeline.write(pa.table({"id": [1], "amount": pa.array([["a"]])}), into=table)
    assert caught.value.column == "amount"
    with pytest.raises(asyncpg.UndefinedTableError, match="nowhere"):
        await pipeline.write(items(1), into="nowhere.at_all")
    with pytest.raises(IncompatibleDataError, match="'label'"):
        await pipeline.write(items(0).rename_columns(["id", "lable", "amount"]), into=table)


async def test_names_are_only_names(pipeline: QueryPipelineNode, schema: str, direct: asyncpg.Connection) -> None:
    odd = 'T"; drop table x; --'
    quoted = '"' + odd.replace('"', '""') + '"'
    await direct.execute(f'create table {schema}.{quoted} ("Select ""a""" int primary key, "b c" text)')
    data = pa.table({"b c": ["x", "y"], 'Select "a"': [1, 2]})
    assert (await pipeline.write(data, into=f"{schema}.{quoted}")).rows == 2
    assert (await pipeline.write(data, into=f"{schema}.{quoted}", mode="upsert")).rows == 2
    assert await count(direct, f"{schema}.{quoted}") == 2


# --- ignore and upsert ---


async def test_upsert_replaces_and_ignore_leaves(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection
) -> None:
    await pipeline.write(items(100), into=table)
    left = await pipeline.write(items(150, 50, amount=1), into=table, mode="ignore", key="id", batch_rows=40)
    assert (left.rows, left.duplicates) == (100, 50)
    replaced = await pipeline.write(items(100, amount=2), into=table, mode="upsert", batch_rows=40)
    assert (replaced.rows, replaced.duplicates) == (100, 0)
    sums = await direct.fetch(f"select amount, count(*) from {table} group by 1 order by 1")
    assert [tuple(row) for row in sums] == [(1, 100), (2, 100)]


async def test_null_is_no_key_and_ignore_needs_none(
    pipeline: QueryPipelineNode, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"create table {schema}.k (a int, b text, unique (a, b))")
    data = pa.table({"a": [1, 1, 1], "b": pa.array([None, None, "x"])})
    assert (await pipeline.write(data, into=f"{schema}.k", mode="upsert", key=["b", "a"])).rows == 3
    again = await pipeline.write(data, into=f"{schema}.k", mode="ignore")
    assert (again.rows, again.duplicates) == (2, 1)


async def test_many_that_upsert_the_same_rows_in_other_orders(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    order = np.random.default_rng(7).permutation(2_000)
    several = [items(2_000, amount=n).take(pa.array(order if n % 2 else order[::-1])) for n in range(6)]
    results = await asyncio.gather(
        *(pipeline_of(pool).write(data, into=table, mode="upsert", batch_rows=500) for data in several)
    )
    assert [result.rows for result in results] == [2_000] * 6
    assert await count(direct, table) == 2_000


# --- the ledger ---


async def test_the_same_batch_id_applies_once(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection
) -> None:
    first = await pipeline.write(items(), into=table, batch_id="monday", batch_rows=1_000)
    again = await pipeline.write(iter(items().to_batches(333)), into=table, batch_id="monday", batch_rows=1_000)
    assert (first.rows, first.batches, first.known_batches) == (ROWS, 5, 0)
    assert (again.rows, again.batches, again.known_batches, again.known_rows) == (0, 0, 5, ROWS)
    assert await count(direct, table) == ROWS
    rows = await direct.fetch(
        "select batch_id, rows, xid, committed_at from raypg.batches where pipeline = $1", pipeline.name
    )
    assert sorted(row["batch_id"] for row in rows) == [f"monday/{n}" for n in range(5)]
    assert all(row["rows"] == 1_000 and row["xid"] and row["committed_at"] for row in rows)


@pytest.mark.parametrize("how", [{"amount": 1}, {"mode": "upsert"}, {"rows": 50}, {"columns": ["id", "label"]}])
async def test_other_content_under_the_same_id_is_refused(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection, how: dict[str, Any]
) -> None:
    how = dict(how)
    await pipeline.write(items(100), into=table, batch_id="b")
    data = items(how.pop("rows", 100), amount=how.pop("amount", 0)).select(
        how.pop("columns", ["id", "label", "amount"])
    )
    with pytest.raises(BatchConflictError, match="'b/0'"):
        await pipeline.write(data, into=table, batch_id="b", **how)
    assert await direct.fetchval(f"select sum(amount) from {table}") == 0


async def test_writers_of_one_batch_wait_for_each_other(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    name = unique_name("load")
    counts = await asyncio.gather(
        *(write_batch(pool, items(500), table, batch_id="x", pipeline=name) for _ in range(8))
    )
    assert sorted(each.known for each in counts) == [False] + [True] * 7
    assert {each.rows for each in counts} == {500}
    assert await count(direct, table) == 500


async def test_a_failed_batch_leaves_no_entry(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection
) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await pipeline.write(items(10, amount=-1), into=table, batch_id="b")
    assert (await pipeline.write(items(10, amount=1), into=table, batch_id="b")).rows == 10


async def test_a_missing_privilege_is_named(
    pipeline: QueryPipelineNode, table: str, pg: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    await pipeline.write(items(1), into=table, batch_id="makes the ledger")
    role = f"writer_{schema}"
    await direct.execute(f"create role {role} login password 'x'")
    try:
        await direct.execute(
            f"create table {schema}.t (id int primary key); create table {schema}.part (id int, other int)"
        )
        await direct.execute(f"grant usage on schema {schema} to {role}; grant insert on {schema}.t to {role}")
        await direct.execute(f"grant insert (id) on {schema}.part to {role}")
        async with own_pool(pg, user=role, password="x", max_connections=2) as own:
            data = pa.table({"id": [1, 2]})
            with pytest.raises(LedgerError, match=f"GRANT USAGE ON SCHEMA raypg TO {role}"):
                await pipeline_of(own).write(data, into=f"{schema}.t", batch_id="b")
            assert (await pipeline_of(own).write(data, into=f"{schema}.t")).rows == 2
            assert (await pipeline_of(own).write(data, into=f"{schema}.part")).rows == 2
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
                await pipeline_of(own).write(data.rename_columns(["other"]), into=f"{schema}.part")
    finally:
        await direct.execute(f"drop owned by {role}; drop role {role}")


async def test_without_temporary_tables_the_grant_is_named(
    ray_cluster: Any, pg: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    """In a database of its own, where nobody may make them; what needs none works."""
    role = database = f"poor_{schema}"
    await direct.execute(f"create role {role} login password 'x'")
    await direct.execute(f"create database {database} owner {role}")
    try:
        await direct.execute(f"revoke temporary on database {database} from public, {role}")
        async with own_pool(pg, user=role, password="x", database=database, max_connections=2) as own:
            await own.execute("create schema s")
            await own.execute("create table s.t (id int primary key, label text)")
            pipeline, data = pipeline_of(own), pa.table({"id": [1, 2], "label": ["a", "b"]})
            assert (await pipeline.write(data, into="s.t", batch_id="b")).rows == 2
            for mode in ("ignore", "upsert"):
                with pytest.raises(StatementNotAllowedError, match=f"GRANT TEMPORARY ON DATABASE {database} TO {role}"):
                    await pipeline.write(data, into="s.t", mode=mode)
            await direct.execute(f"grant temporary on database {database} to {role}")
            assert (await pipeline.write(data, into="s.t", mode="upsert")).rows == 2  # at once
    finally:
        await direct.execute(f"drop database {database} with (force)")
        await direct.execute(f"drop role {role}")


async def test_old_batches_are_forgotten(
    pool: WorkflowConnectionPool, pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection
) -> None:
    for number, batch_id in enumerate(("monday", "tuesday", "wednesday")):
        await pipeline.write(items(100, number * 100), into=table, batch_id=batch_id, batch_rows=50)
    assert await ledger.prune(pool, pipeline=pipeline.name, before="tuesday") == 2
    assert await ledger.prune(pool, pipeline=pipeline.name, older_than=datetime.timedelta(hours=1)) == 0
    assert await ledger.prune(pool, pipeline=pipeline.name, older_than=datetime.timedelta()) == 4
    with pytest.raises(ConfigError, match="no batch 'tuesday'"):
        await ledger.prune(pool, pipeline=pipeline.name, before="tuesday")
    with pytest.raises(ConfigError, match="either"):
        await ledger.prune(pool)


# --- bad rows ---


@pytest.fixture
def flawed() -> pa.Table:
    """Ten thousand rows, of which 1234 and 7777 are refused."""
    data = items(10_000)
    amounts = data["amount"].to_numpy().copy()
    amounts[[1_234, 7_777]] = -1
    return data.set_column(2, "amount", pa.array(amounts))


async def test_fail_says_which_row_and_leaves_nothing_of_its_batch(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection, flawed: pa.Table
) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="row 7777 of the data") as caught:
        await pipeline.write(_mended(flawed, 1_234), into=table, batch_rows=4_000)
    error: Any = caught.value
    assert error.row == 7_777
    assert error.written.rows == await count(direct, table)
    assert not await direct.fetchval(f"select count(*) from {table} where id between 4000 and 7999")


@pytest.mark.parametrize("mode", ["append", "upsert"])
async def test_quarantine_stores_bad_rows_and_commits_the_rest(
    pipeline: QueryPipelineNode, table: str, direct: asyncpg.Connection, flawed: pa.Table, mode: str
) -> None:
    how: dict[str, Any] = {"into": table, "mode": mode, "batch_id": mode, "batch_rows": 5_000}
    written = await pipeline.write(flawed, on_bad_rows="quarantine", **how)
    assert (written.rows, written.quarantined) == (9_998, 2)
    assert await count(direct, table) == 9_998
    query = (
        "select batch_id, target, row, sqlstate, message, data from raypg.quarantine where pipeline = $1 order by row"
    )
    bad = await direct.fetch(query, pipeline.name)
    assert [(row["batch_id"], row["row"], row["sqlstate"]) for row in bad] == [
        (f"{mode}/0", 1_234, "23514"),
        (f"{mode}/1", 7_777, "23514"),
    ]
    assert '"row 1234"' in bad[0]["data"]
    again = await pipeline.write(flawed, on_bad_rows="quarantine", **how)
    assert (again.known_batches, again.rows, again.quarantined) == (2, 0, 0)


async def test_bad_rows_of_every_kind(pipeline: QueryPipelineNode, schema: str, direct: asyncpg.Connection) -> None:
    """Not null, too long, a foreign key (which no line of COPY names), a number too big, a text that is no uuid; and
    so many of them that they are looked for by halves."""
    await direct.execute(f"create table {schema}.parent (id int primary key); insert into {schema}.parent values (1)")
    await direct.execute(
        f"create table {schema}.child (n int not null, parent int references {schema}.parent, name varchar(3), id uuid)"
    )
    rows: list[dict[str, Any]] = [
        {"n": i, "parent": 1, "name": "abc", "id": "3b241101-e2bb-4255-8caf-4136c566a962"} for i in range(400)
    ]
    bad = {
        10: ("n", None, "23502"),
        20: ("parent", 2, "23503"),
        30: ("name", "abcd", "22001"),
        40: ("n", 2**40, "22003"),
        50: ("id", "no", "22P02"),
        **{100 + i: ("name", "too long", "22001") for i in range(12)},
    }
    for row, (column, value, _) in bad.items():
        rows[row][column] = value
    kind = pa.schema([("n", pa.int64()), ("parent", pa.int64()), ("name", pa.string()), ("id", pa.string())])
    data = pa.Table.from_pylist(rows, schema=kind)
    written = await pipeline.write(data, into=f"{schema}.child", on_bad_rows="quarantine")
    assert (written.rows, written.quarantined) == (400 - len(bad), len(bad))
    stored = await direct.fetch("select row, sqlstate from raypg.quarantine where pipeline = $1", pipeline.name)
    assert {row["row"]: row["sqlstate"] for row in stored} == {row: state for row, (_, _, state) in bad.items()}
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="row 20 of the data"):
        await pipeline.write(_without(data.slice(0, 25), 10), into=f"{schema}.child")


def _without(data: pa.Table, row: int) -> pa.Table:
    """*data* with row *row* twice the one before it, so that numbers stay."""
    numbers = list(range(data.num_rows))
    numbers[row] -= 1
    return data.take(pa.array(numbers))


def _mended(data: pa.Table, row: int) -> pa.Table:
    """*data* with an amount in *row* that is allowed."""
    amounts = data["amount"].to_numpy().copy()
    amounts[row] = 1
    return data.set_column(2, "amount", pa.array(amounts))


# --- references ---


async def test_what_a_task_failed_to_make_is_told(pipeline: QueryPipelineNode, table: str) -> None:
    @ray.remote(num_cpus=0)
    def fails() -> Any:
        raise ValueError("no such file")

    with pytest.raises(DataLostError, match="no such file"):
        await pipeline.write(fails.remote(), into=table)
    with pytest.raises(TypeError, match="Table or RecordBatch"):
        await pipeline.write(ray.put([1, 2]), into=table)


# --- what COPY would get wrong ---


async def test_views_and_row_security_and_identity(
    pipeline: QueryPipelineNode, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(
        f"create table {schema}.t (id int generated always as identity, v int,"
        " twice int generated always as (v * 2) stored);"
        f"create view {schema}.w as select id, v from {schema}.t where v > 0 with check option"
    )
    assert (await pipeline.write(pa.table({"v": [1, 2]}), into=f"{schema}.t")).rows == 2
    assert (await pipeline.write(pa.table({"v": [3]}), into=f"{schema}.w")).rows == 1
    with pytest.raises(asyncpg.WithCheckOptionViolationError, match="row 1 "):
        await pipeline.write(pa.table({"v": [4, -1]}), into=f"{schema}.w")
    with pytest.raises(StatementNotAllowedError, match="overriding=True"):
        await pipeline.write(pa.table({"id": [9]}), into=f"{schema}.t")
    with pytest.raises(StatementNotAllowedError, match="GENERATED"):
        await pipeline.write(pa.table({"twice": [9]}), into=f"{schema}.t")
    assert (await pipeline.write(pa.table({"id": [9], "v": [9]}), into=f"{schema}.t", overriding=True)).rows == 1
    stored = await direct.fetch(f"select id, v, twice from {schema}.t order by v")
    assert [tuple(row) for row in stored][:3] == [(1, 1, 2), (2, 2, 4), (3, 3, 6)]
    assert tuple(stored[-1]) == (9, 9, 18)


async def test_row_security_holds(pg: EmbeddedServer, schema: str, direct: asyncpg.Connection) -> None:
    role = f"r_{schema}"
    await direct.execute(
        f"create role {role} login password 'x'; grant usage on schema {schema} to {role};"
        f"create table {schema}.s (owner text, v int); alter table {schema}.s enable row level security;"
        f"create policy p on {schema}.s with check (owner = current_user); grant all on {schema}.s to {role}"
    )
    try:
        async with own_pool(pg, user=role, password="x", max_connections=2) as own:
            good = pa.table({"owner": [role, role], "v": [1, 2]})
            assert (await pipeline_of(own).write(good, into=f"{schema}.s")).rows == 2
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match=r"row 1 .*row-level security"):
                await pipeline_of(own).write(pa.table({"owner": [role, "x"], "v": [3, 4]}), into=f"{schema}.s")
        assert await count(direct, f"{schema}.s") == 2
    finally:
        await direct.execute(f"drop owned by {role}; drop role {role}")


async def test_what_one_batch_leaves_does_not_hinder_another(
    single: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    """One connection: the table changes under it, staging tables of other shapes follow each other."""
    pipeline = pipeline_of(single)
    await direct.execute(f"create table {schema}.t (id int primary key, v int)")
    data = pa.table({"id": [1, 2], "v": [1, 2]})
    for _ in range(3):
        await pipeline.write(data, into=f"{schema}.t", mode="upsert")
    await direct.execute(f"alter table {schema}.t alter v type bigint")
    for mode in ("upsert", "ignore"):
        await pipeline.write(data, into=f"{schema}.t", mode=mode)
    await direct.execute(f"truncate {schema}.t; alter table {schema}.t alter v type text")
    with pytest.raises(IncompatibleDataError):
        await pipeline.write(data, into=f"{schema}.t")
    assert await single.fetchval("select count(*) from pg_class where relname like 'raypg_stage%'") <= 2
