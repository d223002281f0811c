"""How Arrow data gets into a table: types, names, checks, SQL texts, divisions, and which rows are bad."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from raypg.core import arrow_types, write_plan, write_state
from raypg.core.arrow_types import Column
from raypg.core.write_plan import Key, Table
from raypg.errors import ConfigError, IncompatibleDataError, StatementNotAllowedError


def column(name: str = "c", type_: str = "text", **more: Any) -> Column:
    plain = Column(name, type_, "b", "", type_, type_, False, "", False)
    return plain._replace(**more)


def table(*columns: Column, **more: Any) -> Table:
    plain = Table("public", "t", "r", False, False, True, True, columns, ())
    return plain._replace(**more)


@pytest.mark.parametrize(
    ("given", "type_", "to", "form", "direct"),
    [
        (pa.uint8(), "int2", pa.int16(), "int2", True),
        (pa.int64(), "int4", pa.int32(), "int4", True),
        (pa.uint64(), "int8", pa.int64(), "int8", True),
        (pa.int64(), "numeric", pa.decimal128(19, 0), "numeric", True),
        (pa.uint64(), "numeric", pa.uint64(), "numeric", True),
        (pa.decimal128(10, 2), "numeric", pa.decimal128(10, 2), "numeric", True),
        (pa.decimal128(5, -2), "numeric", pa.decimal128(7, 0), "numeric", True),
        (pa.decimal256(70, 2), "numeric", pa.string(), "text", False),
        (pa.float64(), "numeric", pa.float64(), "float8", False),
        (pa.float16(), "float8", pa.float64(), "float8", True),
        (pa.string(), "varchar", pa.string(), "text", True),
        (pa.string_view(), "citext", pa.string(), "text", True),
        (pa.dictionary(pa.int8(), pa.large_string()), "text", pa.large_string(), "text", True),
        (pa.string(), "uuid", pa.binary(16), "uuid", True),
        (pa.uuid(), "uuid", pa.binary(16), "uuid", True),
        (pa.string(), "inet", pa.string(), "text", False),
        (pa.string(), "jsonb", pa.string(), "jsonb", True),
        (pa.struct([("a", pa.int64())]), "jsonb", pa.string(), "jsonb", True),
        (pa.map_(pa.string(), pa.int64()), "json", pa.string(), "text", True),
        (pa.binary_view(), "bytea", pa.binary(), "bytea", True),
        (pa.date64(), "date", pa.date32(), "date", True),
        (pa.timestamp("ns"), "timestamp", pa.timestamp("us"), "timestamp", True),
        (pa.timestamp("s", "Europe/Berlin"), "timestamptz", pa.timestamp("us", "Europe/Berlin"), "timestamptz", True),
        (pa.time32("s"), "time", pa.time64("us"), "time", True),
        (pa.duration("s"), "interval", pa.duration("us"), "interval", True),
        (pa.month_day_nano_interval(), "interval", pa.string(), "text", False),
        (pa.null(), "point", pa.string(), "text", True),
        (pa.bool_(), "bool", pa.bool_(), "bool", True),
    ],
)
def test_the_way_of_a_type(given: pa.DataType, type_: str, to: pa.DataType, form: str, direct: bool) -> None:
    found = arrow_types.way(given, column(type_=type_))
    assert (found.to, found.type, found.direct) == (to, form, direct)


@pytest.mark.parametrize(
    ("given", "element", "form", "direct"),
    [
        (pa.list_(pa.int16()), "int4", "int4[]", True),
        (pa.large_list(pa.string()), "text", "text[]", True),
        (pa.list_(pa.string()), "varchar", "text[]", False),
        (pa.list_(pa.string()), "inet", "text[]", False),
        (pa.list_(pa.list_(pa.int64())), "int8", "text", False),
        (pa.list_(pa.timestamp("us", "UTC")), "timestamptz", "text", False),
    ],
)
def test_the_way_of_an_array(given: pa.DataType, element: str, form: str, direct: bool) -> None:
    found = arrow_types.way(given, column(type_=f"_{element}", element=element))
    assert (found.type, found.direct) == (form, direct)


@pytest.mark.parametrize(
    ("given", "type_", "advice"),
    [
        (pa.timestamp("us"), "timestamptz", "assume_timezone"),
        (pa.timestamp("us", "UTC"), "timestamp", "local_timestamp"),
        (pa.bool_(), "int4", "cast it"),
        (pa.int64(), "text", "cast it"),
        (pa.float64(), "int4", "cast it"),
        (pa.struct([("a", pa.int64())]), "text", "json"),
        (pa.list_(pa.int64()), "int4", "json, jsonb and arrays"),
        (pa.date32(), "timestamp", "cast it"),
    ],
)
def test_what_does_not_fit_is_named_with_a_remedy(given: pa.DataType, type_: str, advice: str) -> None:
    with pytest.raises(IncompatibleDataError, match=advice) as caught:
        arrow_types.way(given, column("total", type_))
    error = caught.value
    assert (error.column, error.arrow_type, error.postgres_type) == ("total", str(given), type_)
    assert all(word in str(error) for word in ("'total'", str(given), type_))


def test_bytes_in_nested_lists_are_no_texts() -> None:
    nested = pa.list_(pa.list_(pa.binary()))
    assert arrow_types.way(nested, column(type_="_bytea", element="bytea")).convert == "array"
    with pytest.raises(IncompatibleDataError):
        arrow_types.way(nested, column(type_="_text", element="text"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("events", (None, "events")),
        ("Public.Events", ("public", "events")),
        ('"My Schema"."a.b""c"', ("My Schema", 'a.b"c')),
        ('s."Ü"', ("s", "Ü")),
    ],
)
def test_names_are_read_as_in_sql(text: str, expected: tuple[str | None, str]) -> None:
    assert write_plan.parse_name(text) == expected


@pytest.mark.parametrize("text", ["", "a b", "a; drop table b", "a.b.c", "a.", '"a', "1a", "a--", None, 7, '""', "a\0"])
def test_nothing_else_is_a_name(text: Any) -> None:
    with pytest.raises(ConfigError, match="into="):
        write_plan.parse_name(text)


def test_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'upsert'"):
        write_plan.check_options("upser", "fail", None, None)
    with pytest.raises(ConfigError, match="'quarantine'"):
        write_plan.check_options("append", "quarantin", None, None)
    with pytest.raises(ConfigError, match="append"):
        write_plan.check_options("append", "fail", ["id"], None)
    with pytest.raises(ConfigError, match="batch_id"):
        write_plan.check_options("append", "fail", None, "")
    assert write_plan.check_options("upsert", "fail", "id", "x") == ("id",)


INT = pa.int64()
ID = column("id", "int8", needed=True)
KEYED = table(ID, column("v", "int8"), keys=(Key(("id",), True, False),))


def test_columns_are_found_by_name() -> None:
    with pytest.raises(IncompatibleDataError, match=r"no column 'idd'.*'id'"):
        write_plan.make_plan(KEYED, [("idd", INT)], "append", None, False)
    with pytest.raises(IncompatibleDataError, match="twice"):
        write_plan.make_plan(KEYED, [("id", INT), ("id", INT)], "append", None, False)
    with pytest.raises(IncompatibleDataError, match="NOT NULL"):
        write_plan.make_plan(KEYED, [("v", INT)], "append", None, False)


def test_what_the_server_would_overwrite_or_refuse_is_refused_first() -> None:
    always = table(column("id", "int8", identity="a"), column("sum", "int8", generated=True))
    with pytest.raises(StatementNotAllowedError, match="overriding=True"):
        write_plan.make_plan(always, [("id", INT)], "append", None, False)
    assert not write_plan.make_plan(always, [("id", INT)], "append", None, True).staged
    with pytest.raises(StatementNotAllowedError, match="GENERATED"):
        write_plan.make_plan(always, [("sum", INT)], "append", None, True)


def test_the_key_must_be_unique() -> None:
    assert write_plan.make_plan(KEYED, [("id", INT)], "upsert", None, False).key == ("id",)
    with pytest.raises(IncompatibleDataError, match=r"it has: id.*CREATE UNIQUE INDEX"):
        write_plan.make_plan(KEYED, [("id", INT), ("v", INT)], "upsert", ("v",), False)
    keyless = table(column("v", "int8"))
    with pytest.raises(IncompatibleDataError, match="needs key="):
        write_plan.make_plan(keyless, [("v", INT)], "upsert", None, False)
    assert write_plan.make_plan(keyless, [("v", INT)], "ignore", None, False).key == ()


@pytest.mark.parametrize("more", [{"kind": "v"}, {"secured": True}, {"ruled": True}])
def test_copy_only_where_it_is_insert(more: dict[str, Any]) -> None:
    assert write_plan.make_plan(KEYED._replace(**more), [("id", INT)], "append", None, False).staged
    with pytest.raises(StatementNotAllowedError, match="GRANT TEMPORARY"):
        write_plan.make_plan(KEYED._replace(may_stage=False, **more), [("id", INT)], "append", None, False)


@pytest.mark.parametrize(
    ("mode", "kind", "reason"),
    [
        ("upsert", INT, "mode='upsert' looks for rows"),
        ("append", pa.string(), "column 'id' of .* needs a cast from text to int8"),
    ],
)
def test_without_temporary_tables_it_says_what_to_grant(mode: str, kind: pa.DataType, reason: str) -> None:
    poor = KEYED._replace(may_stage=False, database='"My db"', user="me")
    assert not write_plan.make_plan(poor, [("id", INT)], "append", None, False).staged
    with pytest.raises(StatementNotAllowedError, match=f'{reason}.*GRANT TEMPORARY ON DATABASE "My db" TO me$'):
        write_plan.make_plan(poor, [("id", kind)], mode, None, False)


def test_texts_quote_every_name() -> None:
    odd = table(
        column('a"; drop', "varchar", shown="varchar(3)"),
        schema="S s",
        name='t"t',
        keys=(Key(('a"; drop',), False, False),),
    )
    plan = write_plan.make_plan(odd, [('a"; drop', pa.string())], "upsert", ('a"; drop',), False)
    assert write_plan.copy_text(plan) == 'COPY "S s"."t""t" ("a""; drop") FROM STDIN (FORMAT binary)'
    text = write_plan.insert_text(plan)
    assert text.count('"a""; drop"') == text.count("drop")
    assert '"a""; drop"::varchar ' in text
    assert "varchar(3)" not in text  # such a cast would cut what is too long
    assert '"a""; drop"::varchar ' in write_plan.leave_equal_out_text(plan)  # equal in the column's type
    assert text.endswith("DO NOTHING")  # there is nothing but the key to update


def test_lines_of_copy() -> None:
    assert write_state.line_of("COPY cc, line 2501") == 2500
    assert write_state.line_of('COPY a, line 3, b, line 7, column x: "y"') == 6
    assert write_state.line_of('SQL statement "…"\nPL/pgSQL function f() line 3\nCOPY t, line 4') == 3
    assert write_state.line_of(None) is None
    assert write_state.line_of("PL/pgSQL function f() line 3 at RAISE") is None


def test_positions_among_good_rows() -> None:
    bad = write_state.BadRows(10)
    for row in (3, 0, 7):
        bad.add(row, "23505", "there")
    good = [row for row in range(10) if row not in bad.found]
    assert [bad.original(position) for position in range(bad.good)] == good
    assert not bad.are_many


def test_ledger_decisions() -> None:
    assert not write_state.is_conflict(b"x", b"x")
    assert write_state.is_conflict(b"x", b"y")
    assert write_state.is_conflict(None, b"y")
    assert write_state.part_id("monday", 3) == "monday/3"
