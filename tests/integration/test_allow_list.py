"""The lists of functions, held against the catalogue of real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from raypg.core import functions
from raypg.core.sql import classify
from raypg.embedded import EmbeddedServer

Volatilities = dict[str, set[str]]

VOLATILITIES = """
    select proname::text as name, array_agg(distinct provolatile::text) as volatilities
    from pg_catalog.pg_proc where pronamespace = 'pg_catalog'::regnamespace and prokind <> 'p'
    group by proname
"""


async def volatilities(server: EmbeddedServer) -> Volatilities:
    connection = await asyncpg.connect(**server.parameters)
    try:
        rows = await connection.fetch(VOLATILITIES)
    finally:
        await connection.close()
    return {row["name"]: set(row["volatilities"]) for row in rows}


@pytest.fixture
async def catalogue(pg18: EmbeddedServer) -> Volatilities:
    return await volatilities(pg18)


@pytest.fixture
async def older_catalogue(pg15: EmbeddedServer) -> Volatilities:
    return await volatilities(pg15)


@pytest.fixture
async def connection(pg18: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(**pg18.parameters)
    yield connection
    await connection.close()


def test_each_name_exists_and_every_overload_is_immutable_or_stable(catalogue: Volatilities) -> None:
    assert sorted(name for name in functions.READ | functions.NEWER if name not in catalogue) == []
    volatile = {name for name in functions.READ | functions.NEWER if "v" in catalogue[name]}
    assert volatile == functions.VOLATILE_BUT_HARMLESS.keys()
    assert all(functions.VOLATILE_BUT_HARMLESS.values())


@pytest.mark.pg15
def test_names_without_schema_exist_in_older_servers_too(older_catalogue: Volatilities) -> None:
    """Otherwise the bare name would be a function of the user there."""
    assert sorted(name for name in functions.READ if name not in older_catalogue) == []
    assert sorted(name for name in functions.PURE if "v" in older_catalogue[name]) == []


@pytest.mark.pg15
def test_newer_names_are_newer(older_catalogue: Volatilities) -> None:
    assert sorted(name for name in functions.NEWER if name in older_catalogue) == []


def test_the_forbidden_exist_and_are_not_allowed(catalogue: Volatilities) -> None:
    assert sorted(name for name in functions.FORBIDDEN if name not in catalogue) == []
    assert functions.FORBIDDEN.isdisjoint(functions.READ | functions.NEWER)
    assert functions.PURE.isdisjoint(functions.NEWER)
    assert functions.PURE.issuperset(functions.CLOCK)


def test_no_volatile_function_slipped_in_under_another_name(catalogue: Volatilities) -> None:
    """Volatile ones are forbidden by default: each must be classified as a write, unless it is named."""
    for name in (name for name, kinds in catalogue.items() if "v" in kinds):
        expected = "read" if name in functions.VOLATILE_BUT_HARMLESS else "write"
        assert classify(f'select pg_catalog."{name}"()').kind == expected, name


async def test_none_of_them_executes_what_it_is_given(connection: asyncpg.Connection) -> None:
    """The server's own view: functions that run SQL are parallel-unsafe or restricted; few allowed ones are."""
    rows = await connection.fetch(
        "select distinct proname::text as name from pg_catalog.pg_proc"
        " where pronamespace = 'pg_catalog'::regnamespace and proparallel = 'u' and proname = any($1)",
        sorted(functions.READ | functions.NEWER),
    )
    # Unsafe since a search_path that begins with pg_temp makes them create the session's temporary schema.
    assert {row["name"] for row in rows} == {"current_schema", "current_schemas"}
    restricted = await connection.fetch(
        "select distinct proname::text as name from pg_catalog.pg_proc"
        " where pronamespace = 'pg_catalog'::regnamespace and proparallel = 'r' and proname = any($1)",
        sorted(functions.READ | functions.NEWER),
    )
    # Bound to the session they run in, which they only look at.
    assert {row["name"] for row in restricted} == {
        *("age", "pg_backend_pid", "pg_conf_load_time", "pg_get_viewdef"),
        *("inet_client_addr", "inet_client_port", "inet_server_addr", "inet_server_port", "pg_my_temp_schema"),
        *("pg_stat_get_activity", "pg_stat_get_dead_tuples", "pg_stat_get_live_tuples", "pg_stat_get_numscans"),
        "random",
    }
