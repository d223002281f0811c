"""`PostgresDatasink`: real Ray Data writes through a pool, each row once whatever happens to its tasks."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import asyncpg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from pools import CapWatch, own_pool, unique_name

from raypg import BatchConflictError, ConfigError, PostgresDatasink, PostgresDatasource, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

ROWS = 20_000
SUM = "select count(*), sum(id), sum(hashtext(label)::bigint), sum(amount) from {}"


pytestmark = pytest.mark.usefixtures("quiet_ray_data")


@pytest.fixture
async def source(schema: str, direct: asyncpg.Connection) -> str:
    """A table like `table`, with rows."""
    name = f"{schema}.source"
    await direct.execute(f"create table {name} (id int, label text, amount int)")
    await direct.execute(f"insert into {name} select n, 'row ' || n, n % 9 from generate_series(1, {ROWS}) n")
    return name


def doubled(block: pa.Table) -> pa.Table:
    return block.set_column(2, "amount", pc.multiply(block["amount"], 2))


class DiesOnce(PostgresDatasink):
    """Its first task's process is killed when all it wrote is committed: Ray runs the task again."""

    marker: str

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        result = super().write(blocks, ctx)
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result


async def test_from_postgresql_to_postgresql(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, source: str, table: str
) -> None:
    rows = PostgresDatasource(pool, table=source, shards=4)
    sink = PostgresDatasink(pool, table, batch_rows=3_000)
    changed = ray.data.read_datasource(rows, override_num_blocks=4).map_batches(doubled, batch_format="pyarrow")
    changed.write_datasink(sink)
    rows.close()
    expected = await direct.fetchrow(f"{SUM.format(source).replace('sum(amount)', 'sum(amount) * 2')}")
    assert await direct.fetchrow(SUM.format(table)) == expected
    assert sink.result is not None
    assert (sink.result.rows, sink.result.known_rows) == (ROWS, 0)
    ids = "select count(*), sum(rows)::int from raypg.batches where pipeline = 'ray_data' and batch_id like $1"
    assert await direct.fetchrow(ids, f"{sink.write_id}/%") == (sink.result.batches, ROWS)


async def test_a_task_that_ray_runs_again_writes_nothing_twice(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, source: str, table: str, tmp_path: Path
) -> None:
    data = ray.data.read_datasource(PostgresDatasource(pool, table=source, consistent=False), override_num_blocks=2)
    sink = DiesOnce(pool, table, batch_rows=4_000)
    sink.marker = str(tmp_path / "died")
    data.materialize().write_datasink(sink)
    assert (tmp_path / "died").exists()
    assert await direct.fetchrow(SUM.format(table)) == await direct.fetchrow(SUM.format(source))
    assert sink.result is not None
    assert sink.result.known_rows > 0
    assert sink.result.rows + sink.result.known_rows == ROWS


async def test_the_same_write_again(pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str) -> None:
    write_id = unique_name("write")

    def data(first: int) -> ray.data.Dataset:
        return ray.data.from_arrow([pa.table({"id": range(n, n + 100)}) for n in (first, first + 100)])

    for rows, known in ((200, 0), (0, 200)):
        sink = PostgresDatasink(pool, table, write_id=write_id)
        data(0).write_datasink(sink)
        assert sink.result is not None
        assert (sink.result.rows, sink.result.known_rows) == (rows, known)
    with pytest.raises(BatchConflictError, match="with other content"):
        data(1000).write_datasink(PostgresDatasink(pool, table, write_id=write_id))
    assert await direct.fetchval(f"select count(*) from {table}") == 200


class Interrupted(Exception):
    """What ends a write in its middle."""


@pytest.mark.parametrize("concurrency", [None, 3])
async def test_a_write_that_failed_in_its_middle_goes_on_with_its_id(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, concurrency: int | None, rng: random.Random
) -> None:
    """Whatever the order in which its tasks come: eight that take another time each time, and one that fails once."""
    write_id = unique_name("write")
    rows = [pa.table({"id": range(n * 500, n * 500 + 500), "label": [f"row {n}"] * 500}) for n in range(8)]

    def write(wait: list[float], fails: int | None) -> PostgresDatasink:
        def change(block: pa.Table) -> pa.Table:
            number = block["id"][0].as_py() // 500
            time.sleep(wait[number])  # what makes the order of the blocks
            if number == fails:
                raise Interrupted
            return block

        data = ray.data.from_arrow(rows).map_batches(change, batch_size=None, batch_format="pyarrow")
        data.context.execution_options.preserve_order = concurrency is not None  # then the write has its own tasks
        sink = PostgresDatasink(pool, table, write_id=write_id)
        data.write_datasink(sink, concurrency=concurrency)
        return sink

    def delays() -> list[float]:
        return rng.sample([number * 0.05 for number in range(8)], 8)

    with pytest.raises(ray.exceptions.UserCodeException):
        await asyncio.to_thread(write, delays(), 7)
    there = await direct.fetchval(f"select count(*) from {table}")
    assert there <= 3_500
    sink = await asyncio.to_thread(write, delays(), None)
    assert sink.result is not None
    # What was under way when the first write failed, may have ended after we looked.
    assert sink.result.rows + sink.result.known_rows == 4_000
    assert sink.result.known_rows >= there
    sink = await asyncio.to_thread(write, delays(), None)
    assert sink.result is not None
    assert (sink.result.rows, sink.result.known_rows) == (0, 4_000)
    assert await direct.fetchrow(f"select count(*), count(distinct id), sum(id) from {table}") == (
        *(4_000, 4_000, 4_000 * 3_999 // 2),
    )


async def test_upsert_pandas_and_nothing_at_all(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str
) -> None:
    import pandas as pd

    await direct.execute(f"insert into {table} select n, 'old', 1 from generate_series(1, 10) n")
    frame = pd.DataFrame({"id": [9, 10, 11], "label": ["new"] * 3, "amount": [5, 6, 7]})
    ray.data.from_pandas(frame).write_datasink(PostgresDatasink(pool, table, mode="upsert", key="id"))
    stored = await direct.fetch(f"select label, amount from {table} where id > 8 order by id")
    assert [tuple(row) for row in stored] == [("new", 5), ("new", 6), ("new", 7)]
    ray.data.from_arrow(pa.table({"id": pa.array([], pa.int32())})).write_datasink(PostgresDatasink(pool, table))
    assert await direct.fetchval(f"select count(*) from {table}") == 11


async def test_the_cap_holds_over_all_write_tasks(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    numbers = [pa.table({"id": range(first, first + 1_000)}) for first in range(0, 8_000, 1_000)]
    data = ray.data.from_arrow(numbers)
    async with own_pool(pg, max_connections=3) as own, CapWatch(pg, own.name) as watch:
        sink = PostgresDatasink(own.name, table, batch_rows=500)
        # In another thread, or nobody would watch.
        await asyncio.to_thread(lambda: data.write_datasink(sink, concurrency=4))
    watch.held(3)
    assert await direct.fetchrow(f"select count(*), sum(id) from {table}") == (8_000, 8_000 * 7_999 // 2)


async def test_bad_values_are_refused_at_once(pool: WorkflowConnectionPool) -> None:
    for wrong in ({"mode": "replace"}, {"batch_rows": 0}, {"on_bad_rows": "drop"}):
        with pytest.raises(ConfigError):
            PostgresDatasink(pool, "t", **wrong)
