"""`PostgresDatasource`: real Ray Data reads tables and queries through a pool."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import gc
from typing import Any

import asyncpg
import pyarrow as pa
import pytest
import ray
from pools import CapWatch, nothing_leased, own_pool
from ray.data import Dataset
from ray.data.expressions import col
from waiting import eventually

from raypg import (
    ConfigError,
    LeaseLostError,
    PostgresDatasource,
    SnapshotLostError,
    StatementNotAllowedError,
    WorkflowConnectionPool,
    datasource,
)
from raypg.embedded import EmbeddedServer

pytestmark = pytest.mark.usefixtures("quiet_ray_data")


@pytest.fixture
async def items(schema: str, direct: asyncpg.Connection) -> str:
    """20,000 rows on many pages, with NULLs."""
    name = f'{schema}."the Items"'
    await direct.execute(
        f"create table {name} (id int, label text, price numeric(10,2), at timestamptz, score float8)"
        " with (autovacuum_enabled = off)"
    )
    await direct.execute(
        f"""insert into {name} select n, 'label ' || n, n / 4.0, timestamptz '2020-01-01 00:00+00' + n * interval '1 s',
            case when n % 100 = 0 then 'NaN' when n % 7 > 0 then n / 8.0 end from generate_series(1, 20000) n"""
    )
    await direct.execute(f"insert into {name} (label) select 'no id ' || n from generate_series(1, 50) n")
    return name


def read(source: PostgresDatasource, blocks: int = 4) -> Dataset:
    return ray.data.read_datasource(source, override_num_blocks=blocks)


async def blocks_of(task: Any) -> list[pa.Table]:
    """What one read task yields; not in this thread, whose event loop it would block."""
    return await asyncio.to_thread(lambda: list(task()))


async def sizes_of(tasks: list[Any]) -> list[int]:
    """How many rows each task reads."""
    return [sum(block.num_rows for block in await blocks_of(task)) for task in tasks]


def table_of(dataset: Dataset) -> pa.Table:
    """All rows, by id, those without one first."""
    blocks = [ray.get(reference) for reference in dataset.to_arrow_refs()]
    return pa.concat_tables(blocks).sort_by([("id", "ascending"), ("label", "ascending")])


async def test_a_dataset_has_as_many_blocks_as_there_is_use_for(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, items: str, schema: str
) -> None:
    """Of its own accord Ray Data makes one for each MB, up to 200."""
    await direct.execute(f"create table {schema}.large as select repeat('x', 1000) as t from generate_series(1, 40000)")
    await direct.execute(f"analyze {schema}.large")
    processors = int(ray.cluster_resources()["CPU"])

    def count(source: PostgresDatasource, **options: Any) -> int:
        read = source.dataset(**options).materialize()
        source.close()
        assert read.count() == (20_050 if source is small else 40_000)
        return read.num_blocks()

    small = PostgresDatasource(pool, table=items)
    large = PostgresDatasource(pool, table=f"{schema}.large", columns=["t"])
    assert await asyncio.to_thread(count, small) == 1
    assert await asyncio.to_thread(count, large) == 2 * processors < 40
    assert await asyncio.to_thread(count, large, override_num_blocks=7, concurrency=1) == 7
    large = PostgresDatasource(pool, table=f"{schema}.large", shards=2 * processors + 1)
    assert await asyncio.to_thread(count, large) == 2 * processors + 1
    query = PostgresDatasource(pool, query=f"select * from {schema}.large")
    assert await asyncio.to_thread(count, query) == 2 * processors
    with pytest.raises(ConfigError, match="no such table"):
        PostgresDatasource(pool, table="nowhere").dataset()


async def test_a_table_comes_whole_in_shards(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, items: str
) -> None:
    assert len(PostgresDatasource(pool, table=items, consistent=False).get_read_tasks(4)) == 1, "it is small"
    source = PostgresDatasource(pool, table=items, shards=4)
    tasks = source.get_read_tasks(40)
    assert len(tasks) == 4
    dataset = read(source)
    assert dataset.schema().types == [
        pa.int32(), pa.string(), pa.decimal128(10, 2), pa.timestamp("us", "UTC"), pa.float64(),
    ]  # fmt: skip
    found = table_of(dataset)
    records = await direct.fetch(f'select * from {items} order by id nulls last, label collate "C"')
    assert found.num_rows == 20_050
    assert found.drop_columns("score").to_pylist() == [
        {key: value for key, value in record.items() if key != "score"} for record in records
    ]
    scores = found.column("score")
    assert scores.null_count == sum(record["score"] is None for record in records)
    assert dataset.count() == 20_050
    sizes = await sizes_of(tasks)
    assert sum(sizes) == 20_050
    assert min(sizes) > 1000
    source.close()
    await eventually(lambda: nothing_leased(pool))


async def test_how_much_there_is(pool: WorkflowConnectionPool, direct: asyncpg.Connection, items: str) -> None:
    """Ray Data divides by it. Of pages a good part is not values."""
    unknown = PostgresDatasource(pool, table=items, consistent=False)
    pages = await direct.fetchval(f"select pg_relation_size('{items}')")
    assert await asyncio.to_thread(unknown.estimate_inmemory_data_size) == pages
    await direct.execute(f"analyze {items}")
    known = PostgresDatasource(pool, table=items, consistent=False)
    size = await asyncio.to_thread(known.estimate_inmemory_data_size)
    (task,) = known.get_read_tasks(1)
    assert size == pytest.approx(sum(block.nbytes for block in await blocks_of(task)), rel=0.3)
    query = PostgresDatasource(pool, query=f"table {items}", consistent=False)
    assert await asyncio.to_thread(query.estimate_inmemory_data_size) is None


async def test_columns_and_filters_are_left_to_the_server(pool: WorkflowConnectionPool, items: str) -> None:
    source = PostgresDatasource(pool, table=items, filter="id % 2 = 0")
    dataset = read(source).filter(expr=(col("id") > 100) & (col("id") <= 200) & ~(col("label") == "label 150"))
    narrow = dataset.select_columns(["label"])
    assert sorted(row["label"] for row in narrow.take_all()) == sorted(
        f"label {n}" for n in range(102, 201, 2) if n != 150
    )
    (plan,) = [source.apply_predicate((col("id") > 100) & (col("score") > 3.0)).apply_projection({"label": "label"})]
    (task,) = plan.get_read_tasks(1)
    (query,) = task.read_fn.queries
    assert '"id" > (100)' in query
    assert query.startswith('SELECT "label" FROM')
    assert task.read_fn.rest == ()
    assert dataset.count() == 49
    source.close()


@pytest.mark.parametrize(
    ("predicate", "condition", "rest"),
    [
        (col("score") > 24.0, "score > 24 and score <> 'NaN'", 0),
        (col("score") <= 24.0, "score <= 24", 0),
        (col("score").is_null() | (col("id") == 7), "score is null or id = 7", 0),
        (col("label") > "label 9", """label collate "C" > 'label 9'""", 0),
        (col("id").is_in([1, 2, 50_000]), "id in (1, 2)", 0),
        (~(col("score") > 24.0), "not (score > 24 and score <> 'NaN')", 0),
        (col("at") < datetime.datetime(2020, 1, 1, 1, tzinfo=datetime.UTC), "at < '2020-01-01 01:00+00'", 0),
        (col("price") < decimal.Decimal("3.25"), "price < 3.25", 1),
        ((col("id") + 1 < 10) & (col("id") > 4), "id + 1 < 10 and id > 4", 1),
    ],
)
async def test_filters_mean_the_same(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, items: str, predicate: Any, condition: str, rest: int
) -> None:
    source = PostgresDatasource(pool, table=items, consistent=False)
    (task,) = source.apply_predicate(predicate).apply_projection({"label": "label"}).get_read_tasks(1)
    assert len(task.read_fn.rest) == rest
    found = sorted(row["label"] for block in await blocks_of(task) for row in block.to_pylist())
    assert found == sorted(row["label"] for row in await direct.fetch(f"select label from {items} where {condition}"))
    # And as pyarrow says of all rows.
    (whole,) = source.get_read_tasks(1)
    everything = pa.concat_tables(await blocks_of(whole))
    assert sorted(everything.filter(predicate.to_pyarrow()).column("label").to_pylist()) == found


async def test_queries_and_keys(pool: WorkflowConnectionPool, items: str) -> None:
    query = f"select id, label, at from {items} -- all of them"
    for key in ("id", "label", "at", None):
        source = PostgresDatasource(pool, query=query, key=key)
        tasks = source.get_read_tasks(5)
        assert len(tasks) == (1 if key is None else 5)
        sizes = await sizes_of(tasks)
        assert sum(sizes) == 20_050
        assert max(sizes) < (5000 if key else 30_000)
        source.close()
    assert read(PostgresDatasource(pool, query=f"select id, label from {items} limit 10")).count() == 10


async def test_empty_tables_and_keys_that_are_all_null(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(f"create table {schema}.nothing (id int, label text)")
    dataset = read(PostgresDatasource(pool, table=f"{schema}.nothing"))
    assert dataset.count() == 0
    assert dataset.schema().names == ["id", "label"]
    await direct.execute(f"insert into {schema}.nothing select null, 'x' from generate_series(1, 10)")
    for key in (None, "id"):
        source = PostgresDatasource(pool, table=f"{schema}.nothing", key=key)
        assert sum(await sizes_of(source.get_read_tasks(3))) == 10


async def test_partitions_and_views(pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str) -> None:
    await direct.execute("create table parts (id int, label text) partition by range (id)")
    await direct.execute("create table low partition of parts for values from (0) to (500)")
    await direct.execute("create table high partition of parts for values from (500) to (1000)")
    await direct.execute(
        "insert into parts select n, 'x' from generate_series(0, 999) n; create view seen as table parts"
    )
    for table in ("parts", "seen"):
        source = PostgresDatasource(pool, table=f"{schema}.{table}", key="id")
        sizes = await sizes_of(source.get_read_tasks(4))
        assert sizes == [250] * 4
        assert len(PostgresDatasource(pool, table=f"{schema}.{table}", consistent=False).get_read_tasks(4)) == 1


async def test_all_shards_see_one_snapshot(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, items: str
) -> None:
    source = PostgresDatasource(pool, table=items, shards=3)
    tasks = source.get_read_tasks(3)
    before = sum(await sizes_of(tasks[:1]))
    await direct.execute(f"delete from {items} where id % 2 = 0; insert into {items} (id) values (-1)")
    seen = before + sum(await sizes_of(tasks[1:]))
    assert seen == 20_050
    loose = PostgresDatasource(pool, table=items, shards=3, consistent=False)
    assert sum(await sizes_of(loose.get_read_tasks(3))) == 10_051
    source.close()
    with pytest.raises(SnapshotLostError):
        await blocks_of(tasks[1])
    again = source.get_read_tasks(3)  # a new read, a new snapshot
    assert sum(await sizes_of(again)) == 10_051
    del tasks, again, source
    gc.collect()
    await eventually(lambda: nothing_leased(pool))


async def test_a_snapshot_that_ends_during_a_read_fails_it(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, items: str
) -> None:
    """Because its connection dies, or its time is over."""
    source = PostgresDatasource(pool, table=items, shards=3)
    first, *others = source.get_read_tasks(3)
    assert sum(await sizes_of([first])) > 0
    assert source._view.snapshot is not None
    assert source._view.snapshot.connection is not None
    await direct.execute("select pg_terminate_backend($1, 5000)", source._view.snapshot.connection.backend_pid)
    for task in others:
        with pytest.raises(SnapshotLostError, match="has ended"):
            await blocks_of(task)
    source.close()
    short = PostgresDatasource(pool, table=items, shards=3, timeout=3.0)
    tasks = short.get_read_tasks(3)

    async def is_over() -> bool:
        try:
            assert sum(await sizes_of(tasks)) == 20_050
        except SnapshotLostError:
            return True
        except LeaseLostError:  # while it was read
            pass
        return False

    await eventually(is_over, timeout=30)
    short.close()


REWRITES = [
    "truncate {}",
    "cluster {} using anew_pkey",
    "vacuum full {}",
    "alter table {} alter n type numeric",
    "alter table {0} rename to former; create table {0} as select * from {1}.former",
    "alter table {0} rename to former; alter table {1}.other rename to anew; insert into {0} select 1, 1",
]
NO_REWRITES = ["vacuum {}", "reindex table {}", "create index on {} (n)", "alter table {} add m int default 5"]

LOST = r"(anew|former|other|low|apart) is no longer as the snapshot .* read again"


@pytest.mark.parametrize("by", ["pages", "key", "query"])
async def test_a_table_that_is_written_anew_is_no_longer_that_of_the_snapshot(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are others, or its rows are gone for every snapshot: never fewer rows, or some twice, in silence."""
    monkeypatch.setattr(datasource, "AGAIN_AFTER", 0.0)  # each plan is a new one
    table = f"{schema}.anew"
    what: dict[str, Any] = {
        "pages": {"table": table},
        "key": {"table": table, "key": "id"},
        "query": {"query": f"select id, n from {table} union all select 0, 0", "key": "id"},
    }[by]
    for statement in (*REWRITES, *NO_REWRITES):
        await direct.execute(f"create table {table} (id int constraint anew_pkey primary key, n int)")
        await direct.execute(f"create table {schema}.other (id int, n int)")
        await direct.execute(f"insert into {table} select i, i from generate_series(1, 5000) i")
        source = PostgresDatasource(pool, columns=["id"], shards=3, **what)
        first, *others = source.get_read_tasks(3)
        seen = await sizes_of([first])
        for part in statement.format(table, schema).split("; "):
            await direct.execute(part)
        for task in (*others, first):  # the first once more, as when its blocks were lost
            if statement in REWRITES:
                with pytest.raises(SnapshotLostError, match=LOST):
                    await blocks_of(task)
            else:
                seen += await sizes_of([task])
        if statement in NO_REWRITES:
            assert sum(seen[:-1]) == 5000 + (by == "query")
            assert seen[-1] == seen[0]
        again = sum(await sizes_of(source.get_read_tasks(3)))  # of the same source, with a new snapshot
        assert again == await direct.fetchval(f"select count(*) from {table}") + (by == "query")
        source.close()
        await direct.execute(f"drop table {table}; drop table if exists {schema}.former, {schema}.other")


async def test_partitions_that_come_and_go_between_shards(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    """A snapshot shows rows, and not to which table they belong."""
    table = f"{schema}.parts"
    changes = {
        f"drop table {schema}.low": True,
        f"alter table {table} detach partition {schema}.low": True,
        f"alter table {table} detach partition {schema}.low concurrently": True,
        f"alter table {table} attach partition {schema}.apart for values from (2000) to (3000)": True,
        f"create table {schema}.tomorrow partition of {table} for values from (3000) to (4000)": False,
    }
    for change, is_lost in changes.items():
        await direct.execute(f"create table {table} (id int, t text) partition by range (id)")
        await direct.execute(f"create table {schema}.low partition of {table} for values from (0) to (1000)")
        await direct.execute(f"create table {schema}.high partition of {table} for values from (1000) to (2000)")
        await direct.execute(f"create table {schema}.apart as select 2000 as id, 'x' as t")
        await direct.execute(f"insert into {table} select n, 'x' from generate_series(0, 1999) n")
        source = PostgresDatasource(pool, table=table, key="id", shards=4)
        first, *others = source.get_read_tasks(4)
        seen = await sizes_of([first])
        await direct.execute(change)
        if is_lost:
            for task in others:
                with pytest.raises(SnapshotLostError, match=LOST):
                    await blocks_of(task)
        else:
            assert sum(seen + await sizes_of(others)) == 2000
        source.close()
        tables = ", ".join(f"{schema}.{name}" for name in ("parts", "low", "high", "apart", "tomorrow"))
        await direct.execute(f"drop table if exists {tables}")


async def test_the_cap_holds_over_all_read_tasks(
    ray_cluster: Any, pg: EmbeddedServer, items: str, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg, max_connections=3) as own, CapWatch(pg, own.name) as watch:
        # In another thread, or nobody would watch.
        dataset = await asyncio.to_thread(
            lambda: read(PostgresDatasource(own.name, table=items, shards=8), blocks=8).materialize()
        )
        assert table_of(dataset).num_rows == 20_050
        del dataset
    watch.held(3)


async def test_what_is_wrong_is_said_before_anything_is_read(pool: WorkflowConnectionPool, items: str) -> None:
    with pytest.raises(ConfigError, match="one of table= and query="):
        PostgresDatasource(pool)
    with pytest.raises(StatementNotAllowedError):
        PostgresDatasource(pool, query="delete from t returning a")
    with pytest.raises(ConfigError, match="no such table"):
        PostgresDatasource(pool, table="no.where").get_read_tasks(1)
    with pytest.raises(ConfigError, match=r"'labl'.*did you mean 'label'"):
        PostgresDatasource(pool, table=items, columns=["labl"]).get_read_tasks(1)
    with pytest.raises(ConfigError, match="same name"):
        PostgresDatasource(pool, query="select 1 as a, 2 as a").get_read_tasks(1)
    keyed = PostgresDatasource(pool, table=items, filter="nope > 1", key="id")
    for _ in range(2):
        with pytest.raises(asyncpg.UndefinedColumnError):
            keyed.get_read_tasks(2)
    with pytest.raises(asyncpg.UndefinedColumnError):
        PostgresDatasource(pool, table=items, filter="nope > 1").get_read_tasks(1)
