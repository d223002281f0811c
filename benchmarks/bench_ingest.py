"""Arrow data into a table: pipeline.write against ADBC, the server's own COPY of a file, and Ray Data's write_sql."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import asyncpg
import numpy as np
import psutil
import pyarrow as pa
import ray
from measure import Setting, answer, compare, ratio, report
from pgpq import ArrowToPostgresBinaryEncoder

from raypg import PostgresDatasink, QueryPipelineNode

ROWS = int(os.environ.get("RAYPG_BENCH_ROWS", "1000000"))
WRITE_SQL_ROWS = 300_000
LEDGER_ROUNDS = 15
LEAST = {"ADBC adbc_ingest": 1.15, "the server's own COPY of a file": 0.85}
COLUMNS = "id bigint, at timestamp, note text, value float8"


def events(rows: int) -> pa.Table:
    ids = np.arange(rows)
    return pa.table(
        {
            "id": ids,
            "at": pa.array(ids * 1_000_000 + 1_700_000_000_000_000, pa.timestamp("us")),
            "note": [f"note of row {i}" for i in range(rows)],
            "value": np.random.default_rng(1).random(rows),
        }
    )


async def timed_on(
    direct: asyncpg.Connection, table: str, work: Callable[[], Awaitable[object]], rows: int = ROWS, empty: bool = True
) -> float:
    """Rows per second of *work*, which fills *table* with *rows*; it is emptied before, but for updates."""
    if empty:
        await direct.execute(f"TRUNCATE {table}; CHECKPOINT")
    started = time.perf_counter()
    await work()
    seconds = time.perf_counter() - started
    assert await direct.fetchval(f"SELECT count(*) FROM {table}") == rows
    return rows / seconds


async def append(here: Setting) -> None:
    data = events(ROWS)
    direct = await asyncpg.connect(**here.server.parameters)
    await direct.execute(f"CREATE TABLE events ({COLUMNS}); CREATE TABLE keyed ({COLUMNS}, PRIMARY KEY (id))")
    pipeline = QueryPipelineNode(name="bench", connection_pool=here.pool)
    file = Path(tempfile.mkdtemp(prefix="raypg-bench-", dir="/tmp")) / "events.copy"
    encoder = ArrowToPostgresBinaryEncoder(data.schema)
    with file.open("wb") as stream:
        stream.write(encoder.write_header())
        for batch in data.to_batches(65_536):
            stream.write(encoder.write_batch(batch))
        stream.write(encoder.finish())
    file.parent.chmod(0o755)
    file.chmod(0o644)

    timed = functools.partial(timed_on, direct)

    async def write() -> None:
        await pipeline.write(data, into="events")

    def by_adbc() -> None:
        with adbc.connect(here.server.dsn) as connection:
            with connection.cursor() as cursor:
                cursor.adbc_ingest("events", data, mode="append")
            connection.commit()

    async def by_server() -> None:
        await direct.execute(f"COPY events FROM '{file}' (FORMAT binary)")

    async def upsert() -> None:
        await pipeline.write(data, into="keyed", mode="upsert", key=["id"])

    async def append_keyed() -> None:
        await pipeline.write(data, into="keyed")

    async def upserted() -> float:
        return await timed("keyed", upsert)

    figures = await compare(
        {
            "pipeline.write": functools.partial(timed, "events", write),
            "ADBC adbc_ingest": functools.partial(timed, "events", lambda: asyncio.to_thread(by_adbc)),
            "the server's own COPY of a file": functools.partial(timed, "events", by_server),
            "append, table with a primary key": functools.partial(timed, "keyed", append_keyed),
            "upsert, all new": upserted,
            "upsert, all there": functools.partial(timed, "keyed", upsert, ROWS, False),
        }
    )
    lines = [
        f"pipeline.write ÷ {other}: {ratio(figures, 'pipeline.write', other):.2f} (at least {least:g})"
        for other, least in LEAST.items()
    ]
    for what in ("upsert, all new", "upsert, all there"):
        upserts = ratio(figures, what, "append, table with a primary key")
        lines.append(f"{what} ÷ append into the same table: {upserts:.2f} (at least 0.35)")
    report(f"{ROWS:,} rows of Arrow data", "rows/s", figures, lines)
    await pipeline.close()
    await direct.close()


async def ledger(here: Setting) -> None:
    """What exactly once costs. In a comparison of its own, with many rounds: it is less than a round differs."""
    data = events(ROWS)
    direct = await asyncpg.connect(**here.server.parameters)
    await direct.execute(f"CREATE TABLE noted ({COLUMNS})")
    pipeline = QueryPipelineNode(name="bench", connection_pool=here.pool)
    number = iter(range(1_000_000))

    async def without() -> None:
        await pipeline.write(data, into="noted")

    async def with_id() -> None:
        await pipeline.write(data, into="noted", batch_id=f"run {next(number)}")

    figures = await compare(
        {
            "without batch_id": functools.partial(timed_on, direct, "noted", without),
            "with batch_id": functools.partial(timed_on, direct, "noted", with_id),
        },
        rounds=LEDGER_ROUNDS,
    )
    medians = statistics.median(figures["with batch_id"]) / statistics.median(figures["without batch_id"])
    lines = [
        f"the ledger costs {1 - ratio(figures, 'with batch_id', 'without batch_id'):.1%} of a round (at most 3 %)",
        f"and {1 - medians:.1%} by the medians of all",
    ]
    report(f"{ROWS:,} rows of Arrow data, exactly once", "rows/s", figures, lines)
    await pipeline.close()
    await direct.close()


async def write_sql(here: Setting) -> None:
    """What Ray Data itself does: rows by INSERT, in a transaction for each block."""
    data = events(WRITE_SQL_ROWS)
    direct = await asyncpg.connect(**here.server.parameters)
    await direct.execute(f"CREATE TABLE by_sql ({COLUMNS})")
    pipeline = QueryPipelineNode(name="bench", connection_pool=here.pool)
    dsn = here.server.dsn
    dataset = ray.data.from_arrow(data)
    insert = "INSERT INTO by_sql (id, at, note, value) VALUES (%s, %s, %s, %s)"

    def connect() -> object:
        import psycopg

        return psycopg.connect(dsn)

    async def by_write_sql() -> float:
        started = time.perf_counter()
        await asyncio.to_thread(dataset.write_sql, insert, connect)
        return WRITE_SQL_ROWS / (time.perf_counter() - started)

    large = events(ROWS)

    async def by_write() -> float:
        started = time.perf_counter()
        await pipeline.write(large, into="by_sql")
        seconds = time.perf_counter() - started
        await direct.execute("TRUNCATE by_sql")
        return ROWS / seconds

    figures = await compare({"pipeline.write": by_write, "Ray Data write_sql": by_write_sql}, rounds=3)
    line = f"pipeline.write ÷ write_sql: {ratio(figures, 'pipeline.write', 'Ray Data write_sql'):.0f} (at least 60)"
    report("Ray Data's write_sql", "rows/s", figures, [line])
    await direct.close()


async def memory(here: Setting) -> None:
    """Peak size of the worker and of the caller while 120 batches of 65,536 rows pass, in each of three ways."""
    key = ", PRIMARY KEY (id)"
    await here.pool.execute(f"CREATE UNLOGGED TABLE passing ({COLUMNS})")
    await here.pool.execute(f"CREATE UNLOGGED TABLE staying ({COLUMNS}{key})")
    pipeline = QueryPipelineNode(name="bench", connection_pool=here.pool)
    batch = events(65_536)
    (worker,) = [int(line.split()[0]) for line in workers()]
    before, here_before = resident(worker), resident(os.getpid())
    ways: dict[str, dict[str, Any]] = {
        "append": {"into": "passing"},
        "append, with batch_id": {"into": "passing", "batch_id": "memory"},
        "upsert": {"into": "staying", "mode": "upsert", "key": "id"},
    }
    figures: dict[str, list[float]] = {}
    for way, how in ways.items():
        sizes, here_sizes = [], []

        async def batches() -> AsyncIterator[pa.Table]:
            for _ in range(120):
                yield batch
                sizes.append(resident(worker))  # noqa: B023
                here_sizes.append(resident(os.getpid()))  # noqa: B023

        await pipeline.write(batches(), **how)
        figures[f"worker, {way}"] = [size - before for size in sizes]
        figures[f"caller, {way}"] = [size - here_before for size in here_sizes]
    allowed = 2 * batch.nbytes / 1e6 + 100
    report(
        "Memory beyond idle, 120 batches",
        "MB",
        figures,
        [f"at most {max(map(max, figures.values())):.0f} ({allowed:.0f})"],
    )


async def write_tasks(here: Setting) -> None:
    """Peak size of the processes of Ray Data's write tasks, and of the worker, while 60 blocks of 65,536 rows pass."""
    await here.pool.execute(f"CREATE UNLOGGED TABLE tasks ({COLUMNS})")
    block = events(65_536)
    (worker,) = [int(line.split()[0]) for line in workers()]
    begun = resident(worker)

    def write(blocks: int) -> None:
        ray.data.from_arrow_refs([ray.put(block) for _ in range(blocks)]).write_datasink(
            PostgresDatasink(here.pool, "tasks")
        )

    ray.data.DataContext.get_current().enable_progress_bars = False
    await asyncio.to_thread(write, 4)  # all is imported
    idle = {pid: resident(pid) for pid in processes("ray::IDLE", "ray::Write")}
    work = asyncio.ensure_future(asyncio.to_thread(write, 60))
    tasks, sizes = [0.0], [0.0]
    while not work.done():
        for pid in processes("ray::Write"):
            with contextlib.suppress(OSError):
                tasks.append(resident(pid) - idle.get(pid, min(idle.values())))
        sizes.append(resident(worker) - begun)
        await asyncio.sleep(0.02)
    await work
    assert len(tasks) > 10
    allowed = 2 * block.nbytes / 1e6 + 100
    figures = {"write task": tasks, "worker": sizes}
    report(
        "Memory beyond idle, 60 blocks by Ray Data",
        "MB",
        figures,
        [f"at most {max(map(max, figures.values())):.0f} ({allowed:.0f})"],
    )


def workers() -> list[str]:
    return [line for line in shown() if "ray::PoolWorker" in line or "PoolWorker(bench" in line]


def processes(*names: str) -> list[int]:
    """Those of our own cluster that are called so."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    found = [int(line.split()[0]) for line in shown() if any(name in line for name in names)]
    return [pid for pid in found if pid in ours]


def shown() -> list[str]:
    return subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()


def resident(pid: int) -> float:
    """Megabytes of a process that are in memory and its own: not what it sees of the object store."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize() / 1e6


QUESTIONS = {"append": append, "ledger": ledger, "write_sql": write_sql, "memory": memory, "write_tasks": write_tasks}


if __name__ == "__main__":
    answer(QUESTIONS)
