"""Results as Arrow: `fetch_arrow` and `stream`, on the pool, on leases and without an event loop."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import gc
import json
import os
import uuid
from typing import Any

import asyncpg
import pyarrow as pa
import pytest
import values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pools import figures, nothing_leased, own_pool, worker_pids
from shared_memory import is_shared, memory_of
from waiting import eventually

from raypg import (
    ArrowValueError,
    ConfigError,
    LeaseLostError,
    QueryTimeoutError,
    StatementNotAllowedError,
    WorkflowConnectionPool,
    arrow_stream,
)
from raypg.arrow_stream import ArrowStream
from raypg.embedded import EmbeddedServer
from raypg.lent_memory import Place, borrow

SERIES = "select n, 'name ' || n as t from generate_series(1, $1::bigint) n"


# --- what arrives ----------------------------------------------------------------------------------------------------

# Not the first and the last that Python knows: to asyncpg those are infinity.
moments = st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30))
zoned = moments.map(lambda moment: moment.replace(tzinfo=datetime.UTC))
days = st.dates(datetime.date(1, 1, 2), datetime.date(9999, 12, 30))

KINDS: dict[str, tuple[Any, pa.DataType]] = {
    "boolean": (st.booleans(), pa.bool_()),
    "smallint": (values.integers(16), pa.int16()),
    "integer": (values.integers(32), pa.int32()),
    "bigint": (values.integers(64), pa.int64()),
    "oid": (st.integers(0, 2**32 - 1), pa.uint32()),
    "real": (st.floats(width=32, allow_nan=False), pa.float32()),
    "double precision": (st.floats(allow_nan=False), pa.float64()),
    "text": (values.text, pa.string()),
    "varchar(30)": (values.text, pa.string()),
    "bytea": (st.binary(max_size=20), pa.binary()),
    "date": (days, pa.date32()),
    "time": (st.times(), pa.time64("us")),
    "timestamp": (moments, pa.timestamp("us")),
    "timestamptz": (zoned, pa.timestamp("us", "UTC")),
    "uuid": (st.uuids(), pa.string()),
    "jsonb": (values.json_values.map(json.dumps), pa.string()),
    "json": (values.json_values.map(json.dumps), pa.string()),
    "numeric": (values.numerics, pa.string()),
    "inet": (values.inets, pa.string()),
    "int4range": (st.just(asyncpg.Range(1, 5)), pa.string()),
    "int[]": (st.lists(st.none() | values.integers(32), max_size=4), pa.list_(pa.int32())),
    "text[]": (st.lists(st.none() | values.text, max_size=4), pa.list_(pa.string())),
    "timestamp[]": (st.lists(moments, max_size=4), pa.list_(pa.timestamp("us"))),
    "numeric[]": (st.lists(st.decimals(-1000, 1000, places=3), max_size=4), pa.list_(pa.string())),
}


def told(value: Any, kind: str) -> Any:
    """What asyncpg told, as Arrow tells it."""
    if isinstance(value, list):
        return [told(item, kind.removesuffix("[]")) for item in value]
    if isinstance(value, uuid.UUID):
        return str(value)
    return value


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_values_are_those_that_asyncpg_reads(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, data: st.DataObject
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.tuples(*(st.none() | KINDS[kind][0] for kind in kinds)), max_size=6))
    numbered = [f"(${number + 1}::{kind})" for number, kind in enumerate(kinds)]
    one = f"select {', '.join(f'{number} as c{place}' for place, number in enumerate(numbered))}"
    as_text = [place for place, kind in enumerate(kinds) if kind.startswith(("numeric", "inet", "int4range"))]
    for row in rows[:3]:
        table = await pool.fetch_arrow(one, *row)
        assert table.schema.types == [KINDS[kind][1] for kind in kinds]
        (record,) = await direct.fetch(one, *row)
        expected = [told(value, kind) for value, kind in zip(record, kinds, strict=True)]
        for place in as_text:
            cast = "text[]" if kinds[place].endswith("[]") else "text"
            expected[place] = await direct.fetchval(f"select $1::{kinds[place]}::{cast}", row[place])
        assert list(table.to_pylist()[0].values()) == expected


async def test_many_rows_with_nulls_in_every_column(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    sql = """select nullif(n % 7, 0) as a, case when n % 5 > 0 then repeat('x', n % 50) end as b,
             case when n % 3 > 0 then timestamptz '2020-01-01 00:00+00' + n * interval '1 second' end as c,
             case when n % 4 > 0 then array[n, null, n + 1] end as d from generate_series(1, 20000) n"""
    found = await pool.stream(sql, batch_bytes=20_000).read_all()
    assert found.to_pylist() == [dict(row) for row in await direct.fetch(sql)]
    assert found.column("a").num_chunks > 5
    found.validate(full=True)


async def test_enums_domains_composites_and_names(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute("create type mood as enum ('sad', 'glad'); create domain small as int check (value < 10)")
    await direct.execute("create type pair as (one int, two text)")
    found = await pool.fetch_arrow(
        f"""select 'glad'::{schema}.mood as "a ""b", 3::{schema}.small as s, (1, 'x')::{schema}.pair, 2 as s,
            array['sad']::{schema}.mood[] as moods, 'n'::name, interval '1 month 2 days 3 seconds' as i"""
    )
    assert found.column_names == ['a "b', "s", "row", "s", "moods", "name", "i"]
    first = [column[0].as_py() for column in found.columns]
    assert first[:6] == ["glad", 3, "(1,x)", 2, ["sad"], "n"]
    assert tuple(first[6]) == (1, 2, 3_000_000_000)
    assert found.schema.field(0).metadata == {b"postgresql.type": b"mood"}


async def test_parameters_are_values_wherever_they_stand(pool: WorkflowConnectionPool) -> None:
    nasty = 'it\'s \\ $2 "x" -- ;'
    sql = "select $1::text as a, '$1' as b, $2::timestamptz as c, $3::int[] as d, $4::float8 as e -- $1"
    when = datetime.datetime(2020, 2, 29, 12, 30, 1, 5, datetime.UTC)
    found = await pool.fetch_arrow(sql, nasty, when, [1, None], 0.1 + 0.2)
    assert found.to_pylist() == [{"a": nasty, "b": "$1", "c": when, "d": [1, None], "e": 0.1 + 0.2}]
    with pytest.raises(asyncpg.InterfaceError, match="expects 1 argument"):
        await pool.fetch_arrow("select $1::int")
    with pytest.raises(asyncpg.DataError):
        await pool.fetch_arrow("select $1::int", "x")


async def test_empty_results_have_their_schema(pool: WorkflowConnectionPool) -> None:
    found = await pool.fetch_arrow("select 1 as a, 'x' as b where false;")
    assert (found.num_rows, found.schema.names, found.schema.types) == (0, ["a", "b"], [pa.int32(), pa.string()])
    assert [batch async for batch in pool.stream("select 1 where false")] == []


# --- what is refused, and what fails ---------------------------------------------------------------------------------


async def test_what_cannot_be_read(pool: WorkflowConnectionPool) -> None:
    with pytest.raises(StatementNotAllowedError, match="insert into"):
        pool.stream("insert into t values (1) returning a")
    with pytest.raises(StatementNotAllowedError, match="without columns"):
        await pool.fetch_arrow("select")
    for size in (0, 10, 2**40, "4 MB", True):
        with pytest.raises(ConfigError, match="batch_bytes"):
            pool.stream("select 1", batch_bytes=size)  # type: ignore[arg-type]
    with pytest.raises(asyncpg.UndefinedTableError):
        await pool.fetch_arrow("select * from nowhere")
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await pool.fetch_arrow("selekt 1")
    with pytest.raises(ArrowValueError, match=r"'t'.*infinity"):
        await pool.fetch_arrow("select timestamp 'infinity' as t")
    await eventually(lambda: nothing_leased(pool))


async def test_an_error_in_the_middle_comes_after_what_was_good(pool: WorkflowConnectionPool) -> None:
    seen = 0
    with pytest.raises(asyncpg.DivisionByZeroError):  # noqa: PT012
        async for batch in pool.stream(
            "select 10 / (300000 - n) as q from generate_series(1, 400000) n", batch_bytes=4096
        ):
            seen += batch.num_rows
    assert 0 < seen < 300_000
    await eventually(lambda: nothing_leased(pool))


async def test_a_batch_that_takes_too_long(pool: WorkflowConnectionPool) -> None:
    with pytest.raises(QueryTimeoutError, match=r"0\.3 s"):
        await pool.fetch_arrow("select n, pg_sleep(case when n > 90 then 30 else 0 end) from generate_series(1, 99) n",
                               timeout=0.3)  # fmt: skip
    await eventually(lambda: nothing_leased(pool))


async def test_a_backend_killed_under_it(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    async with pool.acquire() as connection, connection.stream(SERIES, 10_000_000) as stream:
        await anext(stream)
        await direct.fetchval("select pg_terminate_backend($1, 5000)", connection.backend_pid)
        with pytest.raises((LeaseLostError, asyncpg.PostgresError, OSError)):
            [batch async for batch in stream]


# --- leases ----------------------------------------------------------------------------------------------------------


async def test_a_stream_in_a_transaction_sees_it(pool: WorkflowConnectionPool) -> None:
    async with pool.transaction() as tx:
        await tx.execute("create temp table made on commit drop as select n from generate_series(1, 10) n")
        assert (await tx.fetch_arrow("table made")).column("n").to_pylist() == list(range(1, 11))
        async with tx.stream(SERIES, 100_000, batch_bytes=4096) as stream:
            first = (await anext(stream)).num_rows
            assert 10 < first < 100_000
            with pytest.raises(asyncpg.InterfaceError, match="a stream is open"):
                await tx.fetchval("select 1")
            with pytest.raises(asyncpg.InterfaceError, match="a stream is open"):
                await tx.fetch_arrow("select 1")
            assert first + sum([batch.num_rows async for batch in stream]) == 100_000
        assert await tx.fetchval("select count(*) from made") == 10


async def test_a_stream_that_is_left_ends(pool: WorkflowConnectionPool) -> None:
    async for _ in pool.stream(SERIES, 10_000_000):
        break
    gc.collect()
    await eventually(lambda: nothing_leased(pool))
    async with pool.acquire() as connection:
        async for _ in connection.stream(SERIES, 10_000_000):
            break
        gc.collect()
        assert await asyncio.wait_for(connection.fetchval("select 1"), 10) == 1
        async with connection.stream(SERIES, 10_000_000) as stream:
            await anext(stream)
        assert await asyncio.wait_for(connection.fetchval("select 1"), 10) == 1
    async with pool.stream(SERIES, 10_000_000) as stream:
        await anext(stream)
    await eventually(lambda: nothing_leased(pool))


INLINE = 100 * 1024
"""Bytes up to which Ray sends an answer in its message (``max_direct_call_object_size``)."""


async def read_pieces(stream: ArrowStream) -> tuple[list[int], int]:
    """Its first column, and the number of its pieces."""
    rows, pieces = [], 0
    while (data := await stream.next_piece()) is not None:
        assert is_shared(data) or len(data) < INLINE, "what is small comes with the answer"
        batch = stream.decode(data)
        rows += [] if batch is None else batch.column(0).to_pylist()
        pieces += 1
    return rows, pieces


async def test_pieces_are_read_where_the_worker_has_them(
    pool: WorkflowConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the worker uses its memory for the next ones, not before it may."""
    lent: list[Place] = []

    def noted(place: Place) -> memoryview:
        lent.append(place)
        return borrow(place)

    monkeypatch.setattr(arrow_stream, "borrow", noted)
    rows, pieces = await read_pieces(pool.stream(SERIES, 400_000, batch_bytes=1 << 20))
    assert pieces > 8, "a piece is about as large as was asked for"
    assert rows == list(range(1, 400_001))
    assert 1 < len(lent) <= 8, "each part of the memory is borrowed once; the first ones are smaller"


@pytest.mark.parametrize("how", ["it runs elsewhere", "the kernel does not allow it"])
async def test_pieces_are_read_where_ray_has_put_them(
    pool: WorkflowConnectionPool, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A reader that cannot see the memory of the worker. Both run on this machine as the same user: so the reader says
    that it does not, or meets the error that the kernel would give."""

    def refused(place: Place) -> memoryview:
        raise PermissionError(13, "Permission denied", f"/proc/{place.pid}/fd/{place.fd}")

    if how == "it runs elsewhere":
        monkeypatch.setattr(arrow_stream, "here", lambda: ("another machine", "its container", "0"))
    else:
        monkeypatch.setattr(arrow_stream, "borrow", refused)
    rows, pieces = await read_pieces(pool.stream(SERIES, 400_000, batch_bytes=1 << 20))
    assert pieces > 5
    assert rows == list(range(1, 400_001))


async def read_on(stream: ArrowStream) -> None:
    """To its end."""
    while await stream.next_piece() is not None:
        pass


async def test_what_is_looked_at_stays_though_its_lease_ends(pool: WorkflowConnectionPool) -> None:
    stream = pool.stream(SERIES, 400_000, batch_bytes=1 << 20, lease_timeout=5.0)
    data = await stream.next_piece()
    assert data is not None
    seen = bytes(data)
    await eventually(lambda: nothing_leased(pool))  # its deadline has passed
    with pytest.raises(LeaseLostError):
        await read_on(stream)
    for _ in range(3):  # the worker needs memory for others
        assert (await pool.fetch_arrow(SERIES, 400_000)).num_rows == 400_000
    assert bytes(data) == seen


async def test_a_cancelled_reader_leaves_nothing(pool: WorkflowConnectionPool) -> None:
    reading = asyncio.create_task(pool.fetch_arrow("select pg_sleep(60)"))
    await eventually(lambda: _one_leased(pool))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await eventually(lambda: nothing_leased(pool))


async def _one_leased(pool: WorkflowConnectionPool) -> bool:
    return not await nothing_leased(pool)


def test_without_an_event_loop(pool: WorkflowConnectionPool) -> None:
    assert pool.sync.fetch_arrow("select 1 as a").to_pylist() == [{"a": 1}]
    with pool.sync.stream(SERIES, 100_000, batch_bytes=100_000) as stream:
        assert stream.schema.names == ["n", "t"]
        assert sum(batch.num_rows for batch in stream) == 100_000
    with pool.sync.transaction() as tx:
        tx.execute("create temp table made on commit drop as select 5 as five")
        assert tx.fetch_arrow("table made").to_pylist() == [{"five": 5}]
    assert sum(batch.num_rows for batch in pool.sync.stream(SERIES, 1000)) == 1000


# --- its cost --------------------------------------------------------------------------------------------------------


async def test_a_large_result_is_never_in_memory_as_a_whole(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """400 MB through a worker of their own."""
    async with own_pool(pg, max_connections=2) as pool:
        (worker,) = (await worker_pids(pool.name)).values()
        assert (await pool.fetch_arrow("select 1 as one")).num_rows == 1
        processes = (worker, os.getpid())
        before = [memory_of(pid) for pid in processes]
        size, grown = 0, [0.0, 0.0]
        async for batch in pool.stream("select repeat('x', 2000) as t from generate_series(1, 200000)"):
            size += batch.num_rows
            now = [(memory_of(pid) - was) / 1024**2 for pid, was in zip(processes, before, strict=True)]
            grown = [max(pair) for pair in zip(grown, now, strict=True)]
        assert size == 200_000
        print(f"worker and caller grew by {grown} MB")
        assert grown[0] > 4, "what is lent is counted"
        assert max(grown) < 100


async def test_many_streams_share_the_memory_of_a_worker(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """16 streams of 20 MB at once. With pieces of 4 MB each they would have 256 MB in it."""
    text = "select n, repeat('x', 2000) as t from generate_series(1, 10000) n"
    async with own_pool(pg, max_connections=20) as pool:
        (worker,) = (await worker_pids(pool.name)).values()
        assert (await pool.fetch_arrow("select 1 as one")).num_rows == 1
        before = memory_of(worker)
        streams = [pool.stream(text) for _ in range(16)]
        grown, rows, left = 0, [0] * 16, set(range(16))
        while left:  # all of them go on at the same pace
            for number in tuple(left):
                batch = await anext(streams[number], None)
                if batch is None:
                    left.remove(number)
                else:
                    rows[number] += batch.num_rows
            grown = max(grown, memory_of(worker) - before)
        assert rows == [10_000] * 16
        print(f"the worker grew by {grown / 1024**2:.0f} MB")
        assert 20 << 20 < grown < 108 << 20


async def test_its_rows_are_counted(pool: WorkflowConnectionPool) -> None:
    async def fetched() -> int:
        return int((await figures(pool))["detailed_metrics"]["counters"]["rows_fetched"])

    before = await fetched()
    await pool.fetch_arrow(SERIES, 12_345)
    assert await fetched() == before + 12_345


async def test_a_decimal_is_one_where_its_scale_is_known(pool: WorkflowConnectionPool) -> None:
    stream = pool.stream("select 1.5::numeric(10, 2) as a union all select null", decimals={"a": (10, 2)})
    assert (await stream.read_all()).to_pylist() == [{"a": decimal.Decimal("1.50")}, {"a": None}]
