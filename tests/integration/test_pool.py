"""The pool's own words mean what asyncpg's mean, for one caller and for a thousand at once."""

from __future__ import annotations

import asyncio
import decimal
import random
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from pools import CapWatch, backends_of, own_pool, running
from waiting import eventually

from raypg import QueryTimeoutError, Row, StatementNotAllowedError, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

# --- the same as asyncpg, call by call -------------------------------------------------------------------------------

CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "rows": ("fetch", ("select g, g * g as square from generate_series(1, 5) g",), {}),
    "no rows": ("fetch", ("select 1 as one where false",), {}),
    "no columns": ("fetch", ("select",), {}),
    "null": ("fetch", ("select null as nothing, null::int as number, array[null, 1] as list",), {}),
    "parameters": ("fetch", ("select $1::int + $2::int as sum, $3::text as word", 1, 2, "x"), {}),
    "types": (
        "fetch",
        (
            "select 1.50::numeric as n, '2024-02-29'::date as d, 'infinity'::timestamptz as t, "
            "'{\"a\": 1}'::jsonb as j, int4range(1, 5) as r, '\\x00ff'::bytea as b, point(1, 2) as p, "
            "row(1, 'x') as c, array[row(1, 2)] as cs, '10.0.0.0/8'::cidr as i, interval '1 month 2 days' as v",
        ),
        {},
    ),
    "equal names": ("fetch", ("select 1 as a, 2 as a",), {}),
    "insert returning": ("fetch", ("insert into {table} values (1, 'x', 3) returning id, label",), {}),
    "ddl by fetch": ("fetch", ("create table {schema}.made (a int)",), {}),
    "semicolon": ("fetch", ("select 1 as one;",), {}),
    "comments": ("fetch", ("/* a; b */ select 1 as one -- it's; one\n;  -- end",), {}),
    "semicolon in a literal": ("fetch", ("select 'a;b' as text",), {}),
    "empty": ("fetch", ("",), {}),
    "comment only": ("fetch", ("-- nothing",), {}),
    "first row": ("fetchrow", ("values (1), (2)",), {}),
    "no first row": ("fetchrow", ("select 1 where false",), {}),
    "value": ("fetchval", ("select 7, 8",), {}),
    "value of a column": ("fetchval", ("select 7, 8",), {"column": 1}),
    "value of no row": ("fetchval", ("select 7 where false",), {"column": 3}),
    "value of no column": ("fetchval", ("select 7",), {"column": 3}),
    "null value": ("fetchval", ("select null::int",), {}),
    "tag of select": ("execute", ("select 1",), {}),
    "tag of values": ("execute", ("values (1), (2)",), {}),
    "tag of insert": ("execute", ("insert into {table} select g from generate_series(1, 5) g",), {}),
    "tag of update": ("execute", ("update {table} set amount = $1 where id = 77", 5), {}),
    "tag of delete": ("execute", ("delete from {table}",), {}),
    "tag of ddl": ("execute", ("create table {schema}.made (a int)",), {}),
    "tag of nothing": ("execute", ("",), {}),
    "many": ("executemany", ("insert into {table} values ($1, $2)", [(1, "a"), [2, "b"]]), {}),
    "many of none": ("executemany", ("insert into {table} values ($1, $2)", []), {}),
    "syntax error": ("fetch", ("selekt 1",), {}),
    "unknown table": ("fetch", ("select * from {schema}.nowhere",), {}),
    "unknown column": ("fetch", ("select nowhere from {table}",), {}),
    "division by zero": ("fetchval", ("select 1 / $1::int", 0), {}),
    "raised": ("execute", ("do $$ begin raise exception 'so' using errcode = 'ABCDE', hint = 'why' ; end $$",), {}),
    "not null": ("execute", ("insert into {table} values (1, null)",), {}),
    "check": ("execute", ("insert into {table} values (1, 'x', -1)",), {}),
    "too few parameters": ("fetch", ("select $1::int",), {}),
    "too many parameters": ("fetch", ("select 1", 1), {}),
    "wrong type of parameter": ("fetch", ("select $1::int", "one"), {}),
    "out of range": ("fetch", ("select $1::int", 2**40), {}),
    "nul in a parameter": ("fetch", ("select $1::text", "a\0b"), {}),
    "half a surrogate": ("fetch", ("select $1::text", "\ud800"), {}),
    "many with a string for a row": ("executemany", ("insert into {table} values ($1, 'x')", ["1"]), {}),
    "many with a dict for a row": ("executemany", ("insert into {table} values ($1, 'x')", [{"a": 1}]), {}),
    "many with rows too long": ("executemany", ("insert into {table} values ($1, 'x')", [(1, 2)]), {}),
    "many with a bad row": ("executemany", ("insert into {table} values ($1, $2)", [(1, "a"), (2, 3)]), {}),
    "many of what is no list": ("executemany", ("insert into {table} values ($1, $2)", 5), {}),
    "timeout of a wrong type": ("fetch", ("select 1",), {"timeout": "soon"}),
    "timeout of a boolean": ("fetch", ("select 1",), {"timeout": True}),
    "no timeout": ("fetch", ("select 1 as one",), {"timeout": None}),
}


async def outcome_of(call: Callable[..., Awaitable[Any]], arguments: Any, keywords: Any) -> tuple[Any, ...]:
    try:
        return "returned", plain(await call(*arguments, **keywords))
    except Exception as error:
        seen = {key: getattr(error, key, None) for key in ("sqlstate", "constraint_name", "column_name", "hint")}
        # A position that is not there: "record index …" there, "tuple index …" here.
        return "raised", type(error), None if isinstance(error, IndexError) else str(error), seen


def plain(value: Any) -> Any:
    """*value* with rows, of either library, as tuples of (name, value) pairs."""
    if isinstance(value, asyncpg.Record | Row):
        return tuple((key, plain(item)) for key, item in zip(value.keys(), value.values(), strict=True))
    return [plain(item) for item in value] if isinstance(value, list) else value


def filled(value: Any, **names: str) -> Any:
    if isinstance(value, str):
        for key, name in names.items():
            value = value.replace("{" + key + "}", name)
    return value


@pytest.mark.parametrize("label", CALLS)
async def test_a_call_does_what_it_does_in_asyncpg(
    label: str, pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str, table: str
) -> None:
    method, arguments, keywords = CALLS[label]
    arguments = tuple(filled(argument, schema=schema, table=table) for argument in arguments)
    expected = await outcome_of(getattr(direct, method), arguments, keywords)
    left = await direct.fetch(f"select * from {table} order by 1")
    await direct.execute(f"delete from {table}; drop table if exists {schema}.made")

    assert await outcome_of(getattr(pool, method), arguments, keywords) == expected
    assert await direct.fetch(f"select * from {table} order by 1") == left


async def test_rows_are_found_by_position_and_by_name(pool: WorkflowConnectionPool) -> None:
    row = await pool.fetchrow("select 1 as id, 'x' as label, 2.50::numeric as amount")
    assert row is not None
    assert (row[0], row["label"], row[-1], row[1:]) == (1, "x", decimal.Decimal("2.50"), ("x", decimal.Decimal("2.50")))
    assert dict(row) == {"id": 1, "label": "x", "amount": decimal.Decimal("2.50")}
    assert "label" in row
    assert "x" not in row
    with pytest.raises(KeyError, match="nowhere"):
        row["nowhere"]
    with pytest.raises(IndexError):
        row[3]


async def test_an_error_of_the_sql_is_asyncpgs_own_with_its_details(pool: WorkflowConnectionPool, table: str) -> None:
    await pool.execute(f"insert into {table} values (1, 'x')")
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await pool.execute(f"insert into {table} values ($1, $2)", 1, "y")
    error = caught.value
    assert type(error) is asyncpg.UniqueViolationError
    assert error.sqlstate == "23505"
    assert error.constraint_name == "item_pkey"
    assert f"{error.schema_name}.{error.table_name}" == table
    assert error.detail == "Key (id)=(1) already exists."


async def test_executemany_is_all_or_nothing(pool: WorkflowConnectionPool, table: str) -> None:
    rows = [(i, "x", 1) for i in range(1000)]
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.executemany(f"insert into {table} values ($1, $2, $3)", [*rows, (1000, "x", -1)])
    assert await pool.fetchval(f"select count(*) from {table}") == 0
    await pool.executemany(f"insert into {table} values ($1, $2, $3)", iter(rows))
    assert await pool.fetchval(f"select count(*) from {table}") == 1000


@pytest.mark.parametrize("timeout", [0.2, 0.2001])
async def test_a_timeout_ends_the_statement_on_the_server(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, timeout: float
) -> None:
    mark = uuid.uuid4().hex
    started = time.monotonic()
    with pytest.raises(QueryTimeoutError, match=r"0\.2") as caught:
        await pool.fetch(f"select pg_sleep(30), '{mark}'", timeout=timeout)
    assert time.monotonic() - started < 15
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.timeout == pytest.approx(timeout, abs=0.05)
    assert await running(direct, mark) == 0


@pytest.mark.parametrize("timeout", [0, 0.0, -1])
async def test_a_timeout_of_nothing_is_over_at_once(pool: WorkflowConnectionPool, timeout: float) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pool.fetch("select pg_sleep(5)", timeout=timeout), 4)


async def test_a_timed_out_write_had_no_effect(pool: WorkflowConnectionPool, table: str) -> None:
    with pytest.raises(QueryTimeoutError):
        await pool.execute(f"insert into {table} select 1 from (select pg_sleep(5)) s", timeout=0.3)
    assert await pool.fetchval(f"select count(*) from {table}") == 0


async def test_a_cancelled_call_ends_on_the_server(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    mark = uuid.uuid4().hex
    call = asyncio.create_task(pool.fetch(f"select pg_sleep(30), '{mark}'"))
    await eventually(lambda: running(direct, mark), what="the statement runs")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    async def ended() -> bool:
        return await running(direct, mark) == 0

    await eventually(ended, timeout=5, what="the statement was cancelled")


@pytest.mark.parametrize("query", [b"select 1", 5, None])
async def test_a_statement_that_is_no_text_is_refused_here(pool: WorkflowConnectionPool, query: Any) -> None:
    with pytest.raises(TypeError, match="must be a str"):
        await pool.fetch(query)


@pytest.mark.parametrize(("sql", "word"), [("select '\0'", "NUL"), ("select '\ud800'", "surrogates")])
async def test_a_text_that_cannot_be_sent_harms_nobody(pool: WorkflowConnectionPool, sql: str, word: str) -> None:
    """A NUL makes PostgreSQL end the session, half a surrogate asyncpg; and here sessions are shared."""
    before = await pool.process({"operation": "stats"})
    with pytest.raises(StatementNotAllowedError, match=word):
        await pool.fetch(sql)
    async with pool.acquire() as connection:
        with pytest.raises(StatementNotAllowedError, match=word):
            await connection.fetch(sql)
        assert await connection.fetchval("select 1") == 1
    after = await pool.process({"operation": "stats"})
    assert after["connections"]["recycled"] == before["connections"]["recycled"]


TRANSACTIONS = [
    "begin",
    "START TRANSACTION",
    "commit",
    "rollback;",
    "savepoint a",
    "/* x */ end",
    "prepare transaction 'x'",
]


@pytest.mark.parametrize("sql", TRANSACTIONS)
async def test_transaction_commands_without_a_lease_name_the_way(pool: WorkflowConnectionPool, sql: str) -> None:
    with pytest.raises(StatementNotAllowedError, match=r"pool\.transaction\(\)"):
        await pool.execute(sql)


@pytest.mark.parametrize("sql", ["select 1; select 2", "select 1; begin; select 2", "select 1;; -- x\n select 2;"])
async def test_several_statements_without_a_lease_name_the_way(pool: WorkflowConnectionPool, sql: str) -> None:
    for call in (pool.fetch, pool.execute):
        with pytest.raises(StatementNotAllowedError, match=r"pool\.transaction\(\)"):
            await call(sql)


# --- many at once ----------------------------------------------------------------------------------------------------


async def test_a_thousand_concurrent_calls_get_their_own_answers(
    pool: WorkflowConnectionPool, rng: random.Random
) -> None:
    async def call(number: int) -> bool:
        kind = rng.randrange(5)
        if kind == 0:
            return bool(await pool.fetchval("select $1::int", number) == number)
        if kind == 1:
            rows = await pool.fetch("select g as n from generate_series(1, $1) g", number % 50)
            return [row["n"] for row in rows] == list(range(1, number % 50 + 1))
        if kind == 2:
            row = await pool.fetchrow("select $1::text as a, $2::int as b", str(number), number)
            return row is not None and dict(row) == {"a": str(number), "b": number}
        if kind == 3:
            return await pool.execute("select generate_series(1, $1)", number % 7) == f"SELECT {number % 7}"
        try:
            await pool.fetchval("select 10 / ($1::int - $1), $2::text", number, "x")
        except asyncpg.DivisionByZeroError:
            return True
        return False

    assert all(await asyncio.gather(*(call(number) for number in range(1000))))


async def test_callers_in_many_threads_get_their_own_answers(pool: WorkflowConnectionPool) -> None:
    """Each thread has an event loop of its own."""
    wrong: list[int] = []

    def work(base: int) -> None:
        async def run() -> None:
            numbers = range(base, base + 50)
            answers = await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in numbers))
            wrong.extend(number for number, answer in zip(numbers, answers, strict=True) if number != answer)

        asyncio.run(run())

    threads = [threading.Thread(target=work, args=(base,)) for base in range(0, 400, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, 30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


async def test_a_slow_statement_does_not_delay_fast_ones(pool: WorkflowConnectionPool) -> None:
    slow = [asyncio.create_task(pool.fetch("select pg_sleep(60)")) for _ in range(3)]
    fast = []
    for _ in range(10):
        started = time.monotonic()
        await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(20)))
        fast.append(time.monotonic() - started)
    assert not any(task.done() for task in slow)
    assert sorted(fast)[len(fast) // 2] < 0.3
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_failing_statement_leaves_its_neighbours_alone(pool: WorkflowConnectionPool, table: str) -> None:
    """In one message: bad SQL, bad values, refused statements, between good ones."""
    bad = [
        pool.fetch("selekt"),
        pool.fetch("select $1::int", "x"),
        pool.execute("begin"),
        pool.execute(f"insert into {table} values (1, null)"),
        pool.fetch("select 1; select 2"),
        pool.fetch("select 1/0"),
        pool.fetch("select 1", timeout=-1),
        pool.executemany(f"insert into {table} values ($1, 'x')", [(1,), ("y",)]),
    ]
    good = [pool.fetchval("select $1::int", number) for number in range(300)]
    results = await asyncio.gather(*good[:100], *bad, *good[100:], return_exceptions=True)
    assert results[:100] + results[108:] == list(range(300))
    assert all(isinstance(result, Exception) for result in results[100:108])


class Unsendable:
    """A value that cannot leave this process."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("this cannot be pickled")


def _explode() -> None:
    raise RuntimeError("this cannot be unpickled")


class Unreceivable:
    """A value that leaves this process, and arrives in none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, ()


@pytest.mark.parametrize(
    ("label", "keywords", "value"),
    [
        ("unpicklable", {}, Unsendable()),
        ("not to be unpickled", {}, Unreceivable()),
        ("a lock", {}, threading.Lock()),
        ("a bad timeout", {"timeout": "soon"}, 1),
    ],
)
async def test_a_value_that_cannot_travel_fails_its_caller_alone(
    pool: WorkflowConnectionPool, label: str, keywords: dict[str, Any], value: Any
) -> None:
    good = [pool.fetchval("select $1::int", number) for number in range(100)]
    bad = pool.fetchval("select $1::int", value, **keywords)
    slow = asyncio.create_task(pool.fetchval("select 5 from (select pg_sleep(0.5)) s"))
    await asyncio.sleep(0.1)
    results = await asyncio.wait_for(asyncio.gather(*good[:50], bad, *good[50:], return_exceptions=True), 20)
    assert isinstance(results[50], Exception)
    assert not type(results[50]).__module__.startswith("ray"), results[50]
    assert results[:50] + results[51:] == list(range(100))
    assert await slow == 5


async def test_big_results_and_big_parameters(pool: WorkflowConnectionPool) -> None:
    text = "0123456789abcdef" * (10 * 1024 * 1024 // 16)
    small = asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(50)))
    length, back, rows = await asyncio.gather(
        pool.fetchval("select length($1::text)", text),
        pool.fetchval("select repeat('0123456789abcdef', $1)", len(text) // 16),
        pool.fetch("select g, repeat('x', 100) as filler from generate_series(1, 100000) g"),
    )
    assert length == len(text)
    assert back == text
    assert [row["g"] for row in rows] == list(range(1, 100_001))
    assert all(row["filler"] == "x" * 100 for row in rows)
    assert await small == list(range(50))


async def test_more_callers_than_one_message_holds(pool: WorkflowConnectionPool) -> None:
    texts = [f"{number}-" + "x" * 2000 for number in range(3000)]
    assert await asyncio.gather(*(pool.fetchval("select $1::text", text) for text in texts)) == texts


async def test_the_cap_holds_in_a_storm(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    """Reads, writes, leases, cancellations, errors and killed backends: never more backends than the cap."""
    await direct.execute(f"create table {schema}.storm (a int)")
    async with (
        own_pool(pg, max_connections=6, workers=2, max_lifetime=1.0) as pool,
        CapWatch(pg, pool.name) as watch,
    ):
        killing = asyncio.Lock()

        async def caller(number: int) -> None:
            for step in range(12):
                kind = (number + step) % 6
                try:
                    if kind == 0:
                        await pool.execute(f"insert into {schema}.storm values ($1)", number)
                    elif kind == 1:
                        async with pool.transaction() as tx:
                            await tx.execute("create temp table t (a int)")
                    elif kind == 2:
                        await pool.fetch("select pg_sleep(5)", timeout=0.05)
                    elif kind == 3:
                        await asyncio.wait_for(pool.fetch("select pg_sleep(5)"), 0.05)
                    elif kind == 4 and step % 4 == 0:
                        async with killing:
                            victims = await backends_of(direct, pool.name, control=False)
                            await direct.fetch("select pg_terminate_backend($1)", victims[0]["pid"])
                    else:
                        await pool.fetch("select count(*) from generate_series(1, 2000)")
                except Exception:
                    pass  # each kind of failure has a test of its own; here only the count counts

        await asyncio.gather(*(caller(number) for number in range(30)))
    print(f"{watch.rate:.0f} looks per second, at most {watch.most} backends")
    assert watch.most <= 6
    assert watch.most >= 4
    watch.looked_well()
