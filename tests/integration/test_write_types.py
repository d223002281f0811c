"""`pipeline.write`: every type arrives as it is, by COPY and by way of a staging table alike."""

from __future__ import annotations

import datetime as dt
import decimal
import ipaddress
import uuid
from typing import Any

import asyncpg
import pyarrow as pa
import pytest
from pools import pipeline_of

from raypg import IncompatibleDataError, WorkflowConnectionPool

D = decimal.Decimal
BERLIN = dt.timezone(dt.timedelta(hours=2))
MOMENT = dt.datetime(2024, 7, 1, 12, 30, 15, 123456)
ID = uuid.UUID("3b241101-e2bb-4255-8caf-4136c566a962")

CASES: dict[str, tuple[str, pa.Array, list[Any]]] = {
    "bool": ("bool", pa.array([True, False]), [True, False]),
    "int2": ("int2", pa.array([-1, 32767], pa.int64()), [-1, 32767]),
    "int4": ("int4", pa.array([7, 2**31 - 1], pa.uint32()), [7, 2**31 - 1]),
    "int8": ("int8", pa.array([7, 2**63 - 1], pa.uint64()), [7, 2**63 - 1]),
    "float4": ("float4", pa.array([1.5, float("inf")]), [1.5, float("inf")]),
    "float8": ("float8", pa.array([1, -2], pa.int32()), [1.0, -2.0]),
    "numeric": (
        "numeric(20,4)",
        pa.array([D("12345678901234.5678"), D("-0.0001")]),
        [D("12345678901234.5678"), D("-0.0001")],
    ),
    "numeric of int": ("numeric", pa.array([-(2**63), 12000], pa.int64()), [D(-(2**63)), D(12000)]),
    "numeric of float": ("numeric(5,2)", pa.array([1.239, -2.5]), [D("1.24"), D("-2.50")]),
    "numeric of text": ("numeric", pa.array(["1e-20", "NaN"]), [D("1e-20"), D("NaN")]),
    "money": ("money", pa.array(["1.50", "2"]), ["$1.50", "$2.00"]),
    "text": ("text", pa.array(["ä€😀", ""]), ["ä€😀", ""]),
    "text, large": ("text", pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
    "text, view": ("text", pa.array(["a", "b" * 40], pa.string_view()), ["a", "b" * 40]),
    "text, dictionary": ("text", pa.array(["a", "a"]).dictionary_encode(), ["a", "a"]),
    "varchar": ("varchar(3)", pa.array(["abc", "d"]), ["abc", "d"]),
    "char": ("char(3)", pa.array(["abc", "d"]), ["abc", "d  "]),
    "name": ("name", pa.array(["abc", "d"]), ["abc", "d"]),
    "enum": ("{schema}.mood", pa.array(["sad", "ok"]).dictionary_encode(), ["sad", "ok"]),
    "domain": ("{schema}.positive", pa.array([1, 2], pa.int64()), [1, 2]),
    "bytea": ("bytea", pa.array([b"\0\xff", b""]), [b"\0\xff", b""]),
    "bytea, fixed": ("bytea", pa.array([b"ab", b"cd"], pa.binary(2)), [b"ab", b"cd"]),
    "uuid of text": ("uuid", pa.array([str(ID), ID.hex.upper()]), [ID, ID]),
    "uuid of bytes": ("uuid", pa.array([ID.bytes, ID.bytes], pa.binary(16)), [ID, ID]),
    "date": ("date", pa.array([dt.date(1, 1, 1), dt.date(9999, 12, 31)]), [dt.date(1, 1, 1), dt.date(9999, 12, 31)]),
    "date64": ("date", pa.array([dt.date(2024, 2, 29)] * 2, pa.date64()), [dt.date(2024, 2, 29)] * 2),
    "time": ("time", pa.array([dt.time(23, 59, 59, 999999), dt.time()]), [dt.time(23, 59, 59, 999999), dt.time()]),
    "time32": ("time", pa.array([3600, 7200], pa.time32("s")), [dt.time(1), dt.time(2)]),
    "timestamp": ("timestamp", pa.array([MOMENT, dt.datetime(1, 1, 1)]), [MOMENT, dt.datetime(1, 1, 1)]),
    "timestamp, ns": ("timestamp", pa.array([1_719_837_015_123_456_789] * 2, pa.timestamp("ns")), [MOMENT] * 2),
    "timestamptz": (
        "timestamptz",
        pa.array([MOMENT.replace(tzinfo=BERLIN)] * 2, pa.timestamp("ms", "Europe/Berlin")).cast(
            pa.timestamp("us", "Europe/Berlin")
        ),
        [MOMENT.replace(tzinfo=BERLIN, microsecond=123000)] * 2,
    ),
    "interval": ("interval", pa.array([dt.timedelta(hours=30)] * 2), [dt.timedelta(hours=30)] * 2),
    "interval, months": (
        "interval",
        pa.array([(1, 2, 3_000_000), (0, 0, 0)], pa.month_day_nano_interval()),
        [dt.timedelta(days=32, milliseconds=3), dt.timedelta()],
    ),
    "jsonb": ("jsonb", pa.array(['{"a": 1}', "null"]), ['{"a": 1}', "null"]),
    "json": ("json", pa.array(["[1,  2]", "{}"]), ["[1,  2]", "{}"]),
    "jsonb of struct": ("jsonb", pa.array([{"a": [1, None]}, {"a": []}]), ['{"a": [1, null]}', '{"a": []}']),
    "jsonb of decimals": (
        "jsonb",
        pa.array([{"a": D("12345678901234567890.10")}, {"a": None}]),
        ['{"a": 12345678901234567890.10}', '{"a": null}'],
    ),
    "json of map": (
        "json",
        pa.array([[("a", [1.5])], []], pa.map_(pa.string(), pa.list_(pa.float64()))),
        ['{"a": [1.5]}', "{}"],
    ),
    "inet": ("inet", pa.array(["10.0.0.1", "::1"]), [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("::1")]),
    "cidr": ("cidr", pa.array(["10.0.0.0/8"] * 2), [ipaddress.ip_network("10.0.0.0/8")] * 2),
    "int4range": ("int4range", pa.array(["[1,5)", "empty"]), [asyncpg.Range(1, 5), asyncpg.Range(empty=True)]),
    "point": ("point", pa.array(["(1,2)"] * 2), [asyncpg.Point(1, 2)] * 2),
    "int[]": ("int[]", pa.array([[1, None, 3], []], pa.list_(pa.int64())), [[1, None, 3], []]),
    "text[]": ("text[]", pa.array([["a", "NULL", '"'], []], pa.list_(pa.string())), [["a", "NULL", '"'], []]),
    "varchar[]": ("varchar(5)[]", pa.array([["a", None], []], pa.list_(pa.string())), [["a", None], []]),
    "float8[], fixed": ("float8[]", pa.array([[1.0, 2.0]] * 2, pa.list_(pa.float64(), 2)), [[1.0, 2.0]] * 2),
    "int[][]": ("int[]", pa.array([[[1, 2], [3, 4]], [[5, 6]]]), [[[1, 2], [3, 4]], [[5, 6]]]),
    "uuid[]": ("uuid[]", pa.array([[str(ID)], []], pa.list_(pa.string())), [[ID], []]),
    "timestamp[], ns": (
        "timestamp[]",
        pa.array([[1_719_837_015_123_456_789], []], pa.list_(pa.timestamp("ns"))),
        [[MOMENT], []],
    ),
    "timestamptz[]": (
        "timestamptz[]",
        pa.array([[MOMENT]] * 2, pa.list_(pa.timestamp("us", "UTC"))),
        [[MOMENT.replace(tzinfo=dt.UTC)]] * 2,
    ),
    "uuid[] of bytes": ("uuid[]", pa.array([[ID.bytes, None], []], pa.list_(pa.binary(16))), [[ID, None], []]),
    "bytea[]": ("bytea[]", pa.array([[b"\0a"], []], pa.list_(pa.binary())), [[b"\0a"], []]),
    "nothing": ("point", pa.nulls(2), [None, None]),
}


async def test_every_type_by_both_ways(pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection) -> None:
    """Two values and a NULL of each type; appended, and upserted."""
    await direct.execute(
        f"create type {schema}.mood as enum ('sad', 'ok'); create domain {schema}.positive as int check (value > 0)"
    )
    pipeline = pipeline_of(pool)
    columns = ", ".join(f'"{name}" {type_.format(schema=schema)}' for name, (type_, _, _) in CASES.items())
    await direct.execute(f"create table {schema}.every (id int primary key, {columns})")
    data: dict[str, Any] = {"id": pa.array([1, 2, 3])}
    for name, (_, values, _) in CASES.items():
        data[name] = pa.concat_arrays([values, pa.nulls(1, values.type)])
    table = pa.table(data)
    direct_ways = table.select([name for name in data if name not in ("int[][]",)])
    assert (await pipeline.write(direct_ways, into=f"{schema}.every")).rows == 3
    assert (await pipeline.write(table, into=f"{schema}.every", mode="upsert")).rows == 3
    rows = await direct.fetch(f"select * from {schema}.every order by id")
    for name, (_, _, expected) in CASES.items():
        assert [row[name] for row in rows] == [*expected, None] or name == "numeric of text", name
    assert rows[0]["numeric of text"] == D("1e-20")


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("domain", "enum")])
async def test_a_type_alone_goes_by_copy_if_it_can(
    pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection, name: str
) -> None:
    type_, values, expected = CASES[name]
    await direct.execute(f"create table {schema}.one (v {type_})")
    await pipeline_of(pool).write(pa.table({"v": values}), into=f"{schema}.one", batch_id=schema)
    stored = [row["v"] for row in await direct.fetch(f"select v from {schema}.one")]
    assert repr(stored) == repr(expected) or stored == expected


DOMAINS = """
create type {schema}.mood as enum ('sad', 'ok');
create domain {schema}.short as varchar(3);
create domain {schema}.wide as char(3);
create domain {schema}.flags as bit(3);
create domain {schema}.shorter as {schema}.short check (value <> 'no');
create domain {schema}.positive as int check (value > 0);
create domain {schema}.cents as numeric(4,2);
create domain {schema}.there as text not null;
create domain {schema}.moods as {schema}.mood;
create domain {schema}.words as varchar(3)[];
"""

REFUSED: list[tuple[str, pa.Array, str]] = [
    ("varchar(3)", pa.array(["abc", "abcd"]), "22001"),
    ("char(3)", pa.array(["abc", "abcd"]), "22001"),
    ("bit(3)", pa.array(["101", "1010"]), "22026"),
    ("varbit(3)", pa.array(["101", "1010"]), "22001"),
    ("numeric(4,2)", pa.array([D("1.00"), D("100.00")]), "22003"),
    ("text", pa.array(["a", "a\0b"]), "22021"),
    ("jsonb", pa.array(["{}", "{"]), "22P02"),
    ("int2", pa.array([1, 40_000]), "22003"),
    ("inet", pa.array(["::1", "no"]), "22P02"),
    ("int4 not null", pa.array([1, None]), "23502"),
    ("varchar(3)[]", pa.array([["abc"], ["abcd"]]), "22001"),
    ("{schema}.mood", pa.array(["ok", "glad"]), "22P02"),
    ("{schema}.moods", pa.array(["ok", "glad"]), "22P02"),
    ("{schema}.short", pa.array(["abc", "abcdef"]), "22001"),
    ("{schema}.wide", pa.array(["abc", "abcdef"]), "22001"),
    ("{schema}.flags", pa.array(["101", "10101"]), "22026"),
    ("{schema}.shorter", pa.array(["abc", "abcdef"]), "22001"),
    ("{schema}.shorter", pa.array(["abc", "no"]), "23514"),
    ("{schema}.positive", pa.array([1, 0]), "23514"),
    ("{schema}.cents", pa.array([D("1.00"), D("100.00")]), "22003"),
    ("{schema}.there", pa.array(["", None]), "23502"),
    ("{schema}.words", pa.array([["abc"], ["abcdef"]]), "22001"),
    ("{schema}.words[]", pa.array(['{"{abc}"}', '{"{abcdef}"}']), "22001"),
    ("{schema}.short[]", pa.array([["abc", None], ["abc", "abcdef"]]), "22001"),
    ("{schema}.shorter[]", pa.array([["abc"], ["no"]]), "23514"),
    ("{schema}.short[]", pa.array([[["abc"]], [["abcdef"]]]), "22001"),
    ("name", pa.array(["a" * 63, "a" * 64]), "22001"),
    ("name[]", pa.array([["a" * 63], ["a", "ä" * 32]]), "22001"),
    ('"char"', pa.array(["a", "ab"], pa.string_view()), "22001"),
    ("float4", pa.array([1.0, 1e300]), "22003"),
    ("float4[]", pa.array([[1.0], [-1e300]]), "22003"),
    ("int4[]", pa.array([[1], [2**40]]), "22003"),
    ("timestamp", pa.array([0, 2**62], pa.timestamp("s")), "22008"),
    ("timestamptz", pa.array([0, -(2**63) + 1], pa.timestamp("us", "UTC")), "22008"),
    ("timestamptz[]", pa.array([[0], [2**62]], pa.list_(pa.timestamp("s", "UTC"))), "22008"),
    ("date", pa.array([0, -(2**31)], pa.int32()).view(pa.date32()), "22008"),
    ("interval", pa.array([0, 2**62], pa.duration("s")), "22008"),
    ("jsonb", pa.array([{"a": 1.0}, {"a": float("nan")}]), "22P02"),
    ("json", pa.array([[("a", 1)], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), "22P02"),
    ("int4[]", pa.array([[[1], [2]], [[1], []]]), "22P02"),
]


@pytest.mark.parametrize("mode", ["append", "upsert", "ignore"])
async def test_nothing_is_cut_or_bent(
    pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection, mode: str
) -> None:
    """By COPY and by way of a staging table alike; the value before the bad one is stored as it is."""
    await direct.execute(DOMAINS.format(schema=schema))
    pipeline = pipeline_of(pool)
    for number, (type_, value, sqlstate) in enumerate(REFUSED):
        into = f"{schema}.t{number}"
        await direct.execute(f"create table {into} (id int primary key, v {type_.format(schema=schema)})")
        data = pa.table({"id": [0, 1], "v": value})
        with pytest.raises(asyncpg.PostgresError, match="row 1 of the data") as caught:
            await pipeline.write(data, into=into, mode=mode)
        assert caught.value.sqlstate == sqlstate, (type_, caught.value)
        assert await direct.fetchval(f"select count(*) from {into}") == 0, type_
        assert (await pipeline.write(data, into=into, mode=mode, on_bad_rows="quarantine")).quarantined == 1, type_
        assert [row["id"] for row in await direct.fetch(f"select id from {into} where v is not null")] == [0], type_


@pytest.mark.parametrize("mode", ["append", "upsert"])
async def test_the_first_and_the_last_moments(
    pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection, mode: str
) -> None:
    into = f"{schema}.moments"
    await direct.execute(f"create table {into} (id int primary key, t timestamp, d date)")
    data = pa.table(
        {
            "id": [1, 2],
            "t": pa.array([-210_866_803_200_000_000, 2**63 - 1], pa.timestamp("us")),
            "d": pa.array([-2_440_588, 2_145_042_905], pa.int32()).view(pa.date32()),
        }
    )
    await pipeline_of(pool).write(data, into=into, mode=mode)
    stored = await direct.fetch(f"select t::text, d::text from {into} order by id")
    assert [tuple(row) for row in stored] == [
        ("4714-11-24 00:00:00 BC", "4714-11-24 BC"),
        ("294247-01-10 04:00:54.775807", "5874897-12-31"),
    ]


async def test_a_column_that_changed_its_type_is_seen(
    single: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    """The bytes of a number would be good text."""
    await direct.execute(f"create table {schema}.one (v int4)")
    data = pa.table({"v": [0x41424344]})
    await pipeline_of(single).write(data, into=f"{schema}.one")
    await direct.execute(f"truncate {schema}.one; alter table {schema}.one alter v type text")
    with pytest.raises(IncompatibleDataError):
        await pipeline_of(single).write(data, into=f"{schema}.one")
