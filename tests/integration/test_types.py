"""Values of every type arrive and return through the pool exactly as over an asyncpg connection."""

from __future__ import annotations

import asyncio
import ctypes
import json
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
import values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pools import own_pool, unique_name, worker_pids
from values import SCALARS, arrays, multiranges, ranges, same

from raypg import ConnectError, Row, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

MANY = settings(
    max_examples=3,
    # One connection and one pool serve all examples: they keep nothing of an example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

SCHEMA = "made_types"

MAKE_TYPES = f"""
create schema {SCHEMA};
set search_path = {SCHEMA};
create type mood as enum ('sad', 'ok', 'very happy', 'ünï');
create domain positive as int check (value > 0);
create domain words as text[];
create domain weights as tsvector;
create type inside as (a int, b text, c numeric);
create domain checked as inside check ((value).a > 0);
create type outside as (i inside, many inside[], r int4range, m mood, t timestamptz, d positive, f float8);
create type inside_range as range (subtype = inside, multirange_type_name = inside_multirange);
create type float_range as range (subtype = float8);
"""

maybe = st.none()
inside = st.tuples(maybe | values.integers(32), maybe | values.text, maybe | SCALARS["numeric(20,5)"])
# Ordered by its first field, which is therefore always there.
ordered = st.tuples(values.integers(32), maybe | values.text, maybe | SCALARS["numeric(20,5)"])
mood = st.sampled_from(["sad", "ok", "very happy", "ünï"])
outside = st.tuples(
    maybe | inside,
    maybe | arrays(inside),
    maybe | ranges(values.integers(20)),
    maybe | mood,
    maybe | values.zoned_timestamps,
    maybe | st.integers(1, 2**31 - 1),
    maybe | values.doubles,
)

RANGED: dict[str, tuple[str, SearchStrategy[Any]]] = {
    "int4": ("int4", values.integers(31)),
    "int8": ("int8", values.integers(60)),
    "num": ("num", SCALARS["numeric(20,5)"]),
    "date": ("date", values.dates.filter(lambda day: 2 < day.year < 9998)),
    "ts": ("ts", st.datetimes()),
    "tstz": ("tstz", SCALARS["timestamptz(2)"]),
    "float": (f"{SCHEMA}.float_", values.finite),
}


def _first(bound: Any) -> Any:
    return bound[0]


def composite_ranges() -> SearchStrategy[Any]:
    """Ranges of composites; told apart by their first field alone, as NULLs cannot be compared in Python."""

    def build(one: Any, other: Any, low: bool, high: bool) -> asyncpg.Range[Any]:
        lower, upper = sorted((one, other), key=_first)
        if lower[0] == upper[0]:
            return asyncpg.Range(empty=True)
        return asyncpg.Range(lower if low else None, upper if high else None)

    return st.builds(build, ordered, ordered, st.booleans(), st.booleans())


# An empty element of such an array kills the process that has asyncpg read it: directly, they are asked for as texts.
AS_TEXTS = ("tsvector[]", "tsquery[]", "refcursor[]", f"{SCHEMA}.weights[]")
NO_ARRAYS = ("path", "polygon")  # asyncpg takes them for lists and cannot send them

TYPES: dict[str, SearchStrategy[Any]] = {
    **SCALARS,
    **{f"{kind}[]": arrays(strategy) for kind, strategy in SCALARS.items() if kind not in NO_ARRAYS},
    **{f"{name}range": ranges(strategy) for name, strategy in RANGED.values()},
    **{f"{name}range[]": arrays(ranges(strategy)) for name, strategy in RANGED.values()},
    **{f"{name}multirange": multiranges(strategy) for name, strategy in RANGED.values()},
    "json": values.json_values.map(lambda value: json.dumps(value).replace("\\u0000", "")),
    "jsonb": st.dictionaries(values.word, values.finite, max_size=3).map(lambda value: json.dumps(value)),
    f"{SCHEMA}.mood": mood,
    f"{SCHEMA}.mood[]": arrays(mood),
    f"{SCHEMA}.positive": st.integers(1, 2**31 - 1),
    f"{SCHEMA}.positive[]": arrays(st.integers(1, 2**31 - 1)),
    f"{SCHEMA}.words": arrays(values.text),
    f"{SCHEMA}.weights[]": arrays(SCALARS["tsvector"]),
    "refcursor[]": arrays(values.text),
    f"{SCHEMA}.inside": inside,
    f"{SCHEMA}.inside[]": arrays(inside),
    f"{SCHEMA}.checked": ordered.filter(lambda fields: fields[0] > 0),
    f"{SCHEMA}.outside": outside,
    f"{SCHEMA}.outside[]": arrays(outside),
    f"{SCHEMA}.inside_range": composite_ranges(),
    f"{SCHEMA}.inside_range[]": arrays(composite_ranges()),
    f"{SCHEMA}.inside_multirange": st.lists(composite_ranges(), max_size=3),
}


@pytest.fixture(scope="module", params=["pg18", "pg15"])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """Both servers, with the types that this file makes."""
    found: EmbeddedServer = request.getfixturevalue(request.param)

    async def run(sql: str) -> None:
        connection = await asyncpg.connect(**found.parameters)
        await connection.execute(sql)
        await connection.close()

    asyncio.run(run(MAKE_TYPES))
    yield found
    asyncio.run(run(f"drop schema {SCHEMA} cascade"))


@pytest.fixture(scope="module")
def pool(ray_cluster: Any, server: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool on `server`."""
    handle = WorkflowConnectionPool(name=unique_name(), **server.parameters, max_connections=3)
    asyncio.run(handle.process({"operation": "initialize"}))
    yield handle
    asyncio.run(handle.close())


@pytest.fixture
async def direct(server: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    """A plain asyncpg connection to `server`."""
    connection = await asyncpg.connect(**server.parameters)
    yield connection
    connection.terminate()


def check(expected: Any, actual: Any) -> None:
    assert same(expected, actual), f"{actual!r}, directly {expected!r}"


# --- random values of all types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@MANY
@given(data=st.data())
async def test_random_values_are_the_same_as_over_asyncpg(
    kind: str, data: st.DataObject, pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    table = f"{SCHEMA}.of_type_{list(TYPES).index(kind)}"
    await direct.execute(f"create table if not exists {table} (id int, value {kind}); truncate {table}")
    sent = data.draw(st.lists(st.none() | TYPES[kind], min_size=1, max_size=15))
    ask = f"select $1::{kind}"

    async def through_pool(arguments: list[Any]) -> list[Any]:
        return await asyncio.gather(*(pool.fetchval(ask, argument) for argument in arguments))

    safe = "::text[]" if kind in AS_TEXTS else ""
    expected = [await direct.fetchval(ask + safe, value) for value in sent]
    received = await through_pool(sent)
    check(expected, received)
    # What came from the pool can be given to it again.
    check(expected, await through_pool(received))

    await pool.executemany(f"insert into {table} values ($1, $2)", enumerate(sent))
    read = "select id, value{} as value from {} order by id"
    check(await direct.fetch(read.format(safe, table)), await pool.fetch(read.format("", table)))
    assert await direct.fetchval(f"select count(*) from {table}") == len(sent)


# --- values that Python cannot make, and those it cannot hold --------------------------------------------------------

LITERALS = {
    "infinite times": "'infinity'::timestamptz, '-infinity'::timestamptz, 'infinity'::timestamp, '-infinity'::date",
    "a date before Christ": "'0044-03-15 BC'::date",
    "a time after Python's": "'20000-01-01'::timestamp",
    "a time of day at midnight": "'24:00'::time",
    "an interval of months": "interval '1 year 2 months 3 days 04:05:06.789'",
    "a timetz with seconds in its zone": "'10:00:00+05:30:15'::timetz",
    "special floats": "'nan'::float8, '-0'::float8, 'infinity'::float4, '5e-324'::float8",
    "numeric scales": "1.0::numeric, 1.00::numeric, 1e-50::numeric, 1e200::numeric, 'nan'::numeric",
    "arrays with lower bounds": "'[2:3]={1,2}'::int[]",
    "empty arrays": "'{}'::int[], '{}'::text[][], array[null]::int[]",
    "an anonymous record": "row(1, 'x'::text, null::int)",
    "a record in a record": f"row(1, row(2, 'y', 3)::{SCHEMA}.inside), null::{SCHEMA}.inside",
    "records of unlike shapes": "unnest(array[row(1, 2)]), row(row(row(1)))",
    "an array of records": f"array[row(1, row(1, 'x', 2)::{SCHEMA}.inside), null], null::{SCHEMA}.inside",
    "composite with equal names": f"row(1, 'x', 2)::{SCHEMA}.inside as a, row(2, 'y', 3)::{SCHEMA}.inside as a",
    "void": "pg_sleep(0)",
    "json null": "'null'::json, null::json, 'null'::jsonb",
    "system types": "'int4'::regtype, '1 2'::int2vector, '1 2'::oidvector, '(1,2)'::tid",
    "acl": "'{=r/postgres}'::aclitem[]",
    "money": "'-12.34'::money",
    "a bit of nothing": "''::varbit, B'0'::bit, B'1010'",
    "cidr and inet": "'10.0.0.1/8'::inet, '10.0.0.1'::inet, '::1/64'::inet, '10/8'::cidr",
    "weights": "'a:1A b:2'::tsvector, '!a & (b | c:*)'::tsquery",
}


async def outcome(call: Any) -> Any:
    try:
        return await call
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("label", LITERALS)
async def test_values_that_the_server_makes(
    label: str, pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    sql = f"select {LITERALS[label]}"
    check(await outcome(direct.fetch(sql)), await outcome(pool.fetch(sql)))
    async with pool.acquire() as connection:
        check(await outcome(direct.fetch(sql)), await outcome(connection.fetch(sql)))


@pytest.mark.parametrize("kind", ["tsvector", "tsquery", "refcursor", f"{SCHEMA}.weights"])
async def test_an_empty_text_in_an_array_kills_no_worker(kind: str, pool: WorkflowConnectionPool) -> None:
    """As it kills a process that has asyncpg 0.32 alone: tests/contract."""
    before = await worker_pids(pool.name)
    assert before
    sql = f"""select '{{""}}'::{kind}[], '{{"",NULL,""}}'::{kind}[], '[2:3][1:1]={{{{""}},{{NULL}}}}'::{kind}[]"""
    expected = ([""], ["", None, ""], [[""], [None]])
    assert await pool.fetchrow(sql) == expected
    assert await pool.fetchrow(f"select $1::{kind}[], $2::{kind}[], $3::{kind}[]", *expected) == expected
    async with pool.acquire() as connection:
        assert await connection.fetchrow(sql) == expected
    assert await worker_pids(pool.name) == before


async def test_a_type_learned_before_such_an_array_is_not_forgotten(pool: WorkflowConnectionPool) -> None:
    """Anonymous records need it, and they do not tell asyncpg to look."""
    record = f"select row(1, row(1, 'x', 2)::{SCHEMA}.inside)"
    async with pool.acquire() as connection:
        await connection.fetch(f"select null::{SCHEMA}.inside")
        before = await connection.fetchval(record)
        for kind in ("gtsvector", "tsvector", "tsquery", "refcursor", "money"):
            await connection.fetch(f"select null::{kind}[]")
            check(before, await connection.fetchval(record))
        await connection.execute("create domain pg_temp.late as tsvector")
        assert await connection.fetchval("select array['', 'x']::pg_temp.late[]") == ["", "'x'"]
        check(before, await connection.fetchval(record))


async def test_composites_anywhere_in_a_column_are_rows(pool: WorkflowConnectionPool) -> None:
    """Also where the first rows of the column do not show that it holds any."""
    one = f"row(1, 'x', 2)::{SCHEMA}.inside"
    # The other columns make asyncpg learn the types, which records alone would not.
    rows = f"(null::record, 1), (row(1), 2), (row({one}), 3), (row(array[{one}]), 4)"
    known = f"null::{SCHEMA}.inside as known, null::{SCHEMA}.inside[] as known_too"
    sql = f"select v, {known} from (values {rows}) t (v, n) order by n"
    empty, plain, direct, listed = [row["v"] for row in await pool.fetch(sql)]
    assert (empty, plain) == (None, (1,))
    assert isinstance(direct[0], Row)
    assert direct[0]["b"] == listed[0][0]["b"] == "x"
    column = f"select v from (values (null::{SCHEMA}.inside[], 1), ('{{}}', 2), (array[null, {one}], 3)) t (v, n)"
    assert [row["v"] for row in await pool.fetch(column)] == [None, [], [None, (1, "x", 2)]]


async def test_rows_pickle_small(pool: WorkflowConnectionPool) -> None:
    rows = await pool.fetch("select g as a_rather_long_name_of_a_column, g::text as b from generate_series(1, 1000) g")
    again = pickle.loads(pickle.dumps(rows))
    assert again == rows
    assert again[7]["a_rather_long_name_of_a_column"] == 8
    assert [type(row) for row in again] == [type(row) for row in rows]
    tuples = len(pickle.dumps([tuple(row) for row in rows]))
    assert len(pickle.dumps(rows)) < 2 * tuples


# --- codecs by name --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded(ray_cluster: Any, server: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool with codecs: each server has one extension that the other has not."""
    extension, codec = ("vector", "vector") if server.version.startswith("18") else ("public.hstore", "hstore")

    async def prepare() -> None:
        connection = await asyncpg.connect(**server.parameters)
        await connection.execute(f"create extension if not exists {codec} schema public")
        await connection.close()

    asyncio.run(prepare())
    codecs = {"json": "json", "jsonb": "json", extension: codec, "money": "text"}
    handle = WorkflowConnectionPool(name=unique_name(), **server.parameters, max_connections=2, codecs=codecs)
    asyncio.run(handle.process({"operation": "initialize"}))
    yield handle
    asyncio.run(handle.close())


@pytest.mark.parametrize("kind", ["json", "jsonb"])
@settings(MANY, max_examples=30)
@given(data=st.data())
async def test_json_as_objects(kind: str, data: st.DataObject, coded: WorkflowConnectionPool) -> None:
    # jsonb refuses NUL, and keeps numbers as numeric: whole floats come back as integers.
    sent = data.draw(st.lists(values.json_values, min_size=1, max_size=20))
    # None is SQL's NULL, not JSON's.
    sql = f"select $1::{kind}"
    received = await asyncio.gather(*(coded.fetchval(sql, value) for value in sent))
    assert received == sent


async def test_vectors_and_hstores(server: EmbeddedServer, coded: WorkflowConnectionPool) -> None:
    if server.version.startswith("18"):
        sent = [[1.0, -2.5, 0.0], [ctypes.c_float(1e-30).value, 3e38, 1.5]]
        for vector in sent:
            received = await coded.fetchval("select $1::vector", vector)
            assert [type(item) for item in received] == [float] * 3
            assert received == pytest.approx(vector, rel=1e-6)
        assert await coded.fetchval("select $1::vector <-> $2::vector", [0, 0], [3, 4]) == 5.0
        assert await coded.fetchval("select array[$1::vector]", [1, 2]) == [[1.0, 2.0]]
    else:
        for pairs in ({}, {"a": "1", "b": None}, {'q"uote': "back\\slash", "ünï": "=>, "}):
            assert await coded.fetchval("select $1::hstore", pairs) == pairs
        assert await coded.fetchval("select 'a=>1'::hstore -> 'a'") == "1"


async def test_arrays_of_types_with_a_codec(
    server: EmbeddedServer, coded: WorkflowConnectionPool, pool: WorkflowConnectionPool
) -> None:
    assert await coded.fetchval("select array['{\"a\": [1]}', null, '\"\"']::json[]") == [{"a": [1]}, None, ""]
    assert await coded.fetchval("select $1::jsonb[]", [[{"b": 'x, "y"'}], [None]]) == [[{"b": 'x, "y"'}], [None]]
    assert await coded.fetchval("select $1::money[]", ["$1,234.50", None]) == ["$1,234.50", None]
    with pytest.raises(asyncpg.DataError, match="a str is needed, not int"):
        await coded.fetchval("select $1::money[]", [1])
    if not server.version.startswith("18"):
        sql = """select '{"",a=>1}'::hstore[]"""
        assert await coded.fetchval(sql) == [{}, {"a": "1"}]
        assert await pool.fetchval(sql) == ["", '"a"=>"1"']


async def test_codec_text_gives_the_servers_own_words(coded: WorkflowConnectionPool) -> None:
    assert await coded.fetchval("select $1::money", "$1,234.50") == "$1,234.50"
    async with coded.acquire() as connection:
        assert await connection.fetchval("select $1::json", {"a": [1, None]}) == {"a": [1, None]}


async def test_a_codec_for_a_type_that_is_not_there_is_told(server: EmbeddedServer, ray_cluster: Any) -> None:
    with pytest.raises(ConnectError, match="nowhere"):
        async with own_pool(server, codecs={"nowhere": "text"}):
            pass


# --- XML, which only the system's server can read --------------------------------------------------------------------


async def test_xml(server: EmbeddedServer, pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    sql = "select $1::xml, array[$1::xml, null]"
    check(await outcome(direct.fetchrow(sql, "<a b='c'>ü</a>")), await outcome(pool.fetchrow(sql, "<a b='c'>ü</a>")))
