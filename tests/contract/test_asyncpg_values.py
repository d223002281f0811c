"""Values and errors of asyncpg between processes. raypg.portable is built on these."""

from __future__ import annotations

import pickle
import subprocess
import sys

import asyncpg
import pytest

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
