"""Values and errors of asyncpg between processes. raypg.portable is built on these."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from typing import Any

import asyncpg
import pytest

from raypg.embedded import EmbeddedServer

pytestmark = pytest.mark.contract


async def test_a_record_cannot_be_pickled_but_its_values_can(direct: asyncpg.Connection) -> None:
    record = await direct.fetchrow("select 1 as one, 'zwei' as two")
    assert record is not None
    with pytest.raises(TypeError):
        pickle.dumps(record)
    assert pickle.loads(pickle.dumps(tuple(record))) == (1, "zwei")
    assert list(record.keys()) == ["one", "two"]


async def test_a_value_of_a_composite_type_is_a_record_too(direct: asyncpg.Connection, schema: str) -> None:
    await direct.execute("create type pair as (one int, two text)")
    assert isinstance(await direct.fetchval("select (1, 'zwei')::pair"), asyncpg.Record)
    assert await direct.fetchval("select (1, 'zwei')") == (1, "zwei")
    assert type(await direct.fetchval("select (1, 'zwei')")) is tuple


GEOMETRIC = """
import pickle
from asyncpg import Box, Circle, Line, LineSegment, Path, Point, Polygon
values = [Point(1, 2), Box((3, 4), (1, 2)), Path((1, 2), (3, 4)), Circle((1, 2), 3), Line(1, 2, 3),
          LineSegment((1, 2), (3, 4)), Polygon((1, 2), (3, 4))]
for value in values:
    try:
        same = pickle.loads(pickle.dumps(value)) == value
    except Exception as error:
        same = False
    print(type(value).__name__, same)
"""


def test_geometric_types_do_not_survive_pickling() -> None:
    """In a process of its own: raypg.portable teaches pickle how, wherever raypg is imported."""
    done = subprocess.run([sys.executable, "-P", "-c", GEOMETRIC], cwd="/", capture_output=True, text=True, check=True)
    survived = dict(line.split() for line in done.stdout.splitlines())
    assert set(survived) == {"Point", "Box", "Path", "Circle", "Line", "LineSegment", "Polygon"}
    assert [name for name in ("Point", "Box", "Path", "Circle") if survived[name] == "True"] == []


async def unique_violation(direct: asyncpg.Connection) -> asyncpg.PostgresError:
    await direct.execute("create table people (name text constraint only_once unique)")
    await direct.execute("insert into people values ('Ada')")
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await direct.execute("insert into people values ('Ada')")
    return caught.value


async def test_an_error_has_its_fields_as_attributes(direct: asyncpg.Connection, schema: str) -> None:
    error = await unique_violation(direct)
    assert (error.sqlstate, error.severity_en) == ("23505", "ERROR")
    assert (error.constraint_name, error.table_name, error.schema_name) == ("only_once", "people", schema)
    assert error.detail == "Key (name)=(Ada) already exists."


async def test_a_pickled_error_keeps_class_message_and_attributes(direct: asyncpg.Connection, schema: str) -> None:
    error = await unique_violation(direct)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is asyncpg.UniqueViolationError
    assert (again.args, again.constraint_name, again.detail) == (error.args, error.constraint_name, error.detail)


def test_fields_of_the_protocol_make_the_class_of_their_sqlstate() -> None:
    fields = {"S": "ERROR", "V": "ERROR", "C": "23505", "M": "no", "n": "only_once", "t": "people", "D": "a detail"}
    error = asyncpg.PostgresError.new(fields)
    assert type(error) is asyncpg.UniqueViolationError
    assert (error.constraint_name, error.table_name, error.detail) == ("only_once", "people", "a detail")
    assert error.severity_en == "ERROR"
    assert str(error).startswith("no")


def test_a_class_keeps_a_sqlstate_it_does_not_know() -> None:
    error = asyncpg.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": "23Z99", "M": "odd"})
    assert isinstance(error, asyncpg.PostgresError)
    assert error.sqlstate == "23Z99"


# --- arrays that asyncpg reads as text: why there is raypg.server.text_arrays -----------------------------------------

EMPTY_ELEMENT = """
import asyncio, json, sys
import asyncpg

async def main(parameters):
    connection = await asyncpg.connect(**parameters)
    values = await connection.fetchval("select '{a,\\"\\",b}'::tsvector[]")
    print(len(values), values[0], values[1], flush=True)
    print(values[2] is None)

asyncio.run(main(json.loads(sys.argv[1])))
"""


def test_an_empty_element_of_an_array_read_as_text_kills_the_process(pg: EmbeddedServer) -> None:
    """It is skipped, those behind it move up, and the last is a null pointer. If this fails, asyncpg was mended."""
    command = [sys.executable, "-P", "-c", EMPTY_ELEMENT, json.dumps(pg.parameters)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["3 'a' 'b'"]
    assert done.returncode == -signal.SIGSEGV


async def test_what_a_connection_learns_of_types_passes_where_raypg_can_see_it(pg: EmbeddedServer) -> None:
    """In time for the statement that made it ask, each type behind those that it is made of."""
    seen: list[list[str]] = []

    class Watched(asyncpg.Connection):
        async def _introspect_types(self, typeoids: Any, timeout: Any) -> Any:
            types, statement = await super()._introspect_types(typeoids, timeout)
            seen.append([info["name"] for info in types])
            assert {"oid", "ns", "elemtype", "elemdelim", "basetype"} <= set(types[0].keys())
            settings = self._protocol.get_settings()
            settings.register_data_types(types)
            array = types[-1]["oid"]
            formats = [settings.get_data_codec(array, format) is not None for format in (0, 1)]
            assert formats == [types[-1]["name"] == "_tsvector", types[-1]["name"] == "_int4"]
            settings.add_python_codec(array, "mine", "s", [], "array", lambda value: "{}", lambda text: text, "text")
            return types, statement

    connection = await asyncpg.connect(**pg.parameters, connection_class=Watched)
    try:
        assert await connection.fetchval("""select '{"",b}'::tsvector[]""") == """{"",'b'}"""
        assert await connection.fetchval("select '{1}'::int[]") == "{1}"
        assert await connection.fetchval("""select '{"",c}'::tsvector[]""") == """{"",'c'}"""
        assert seen == [["tsvector", "_tsvector"], ["int4", "_int4"]]
    finally:
        connection.terminate()


async def test_a_new_codec_makes_a_connection_forget_types(pg: EmbeddedServer) -> None:
    connection = await asyncpg.connect(**pg.parameters)
    try:
        await connection.execute("create type pg_temp.pair as (a int, b int)")
        record = "select row(row(1, 2)::pg_temp.pair)"
        with pytest.raises(asyncpg.InternalClientError, match="no decoder"):
            await connection.fetchval(record)
        await connection.fetchval("select null::pg_temp.pair")
        assert await connection.fetchval(record) == ((1, 2),)
        await connection.set_type_codec("money", schema="pg_catalog", encoder=str, decoder=str)
        with pytest.raises(asyncpg.InternalClientError, match="no decoder"):
            await connection.fetchval(record)
    finally:
        connection.terminate()


# --- rows that cannot be read: why there is raypg.server.witness ------------------------------------------------------


async def test_a_row_that_cannot_be_read_hides_what_became_of_the_statement(
    direct: asyncpg.Connection, schema: str
) -> None:
    """Committed, refused at COMMIT, refused while it ran: the same error."""
    await direct.execute("create table t (id int primary key, next int references t deferrable initially deferred)")
    far = "'20000-01-01'::timestamp"
    for sql in (
        f"insert into t values (1, null) returning {far}",
        f"insert into t values (2, 7) returning {far}",
        f"select {far}, 1 / (3 - g) from generate_series(1, 5) g",
    ):
        with pytest.raises(OverflowError):
            await direct.fetch(sql)
        assert not direct.is_closed()
    assert [row["id"] for row in await direct.fetch("select id from t")] == [1]


async def test_an_altered_type_is_noticed_when_the_statement_has_run(direct: asyncpg.Connection, schema: str) -> None:
    await direct.execute("create type pair as (a int); create table t (id int)")
    insert = "insert into t values (1) returning json_populate_record(null::pair, '{}')"
    await direct.fetch(insert)
    await direct.execute("alter type pair add attribute b int")
    with pytest.raises(asyncpg.OutdatedSchemaCacheError):
        await direct.fetch(insert)
    assert await direct.fetchval("select count(*) from t") == 2
    assert list((await direct.fetchval(insert)).keys()) == ["a", "b"]
