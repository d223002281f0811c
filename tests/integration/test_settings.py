"""Settings for one call: in force for it, and for nobody after it."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from raypg import ConfigError, WorkflowConnectionPool

SHOW = "select current_setting('{}')"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("search_path", "pg_temp, public", "pg_temp, public"),
        ("statement_timeout", "12345ms", "12345ms"),
        ("STATEMENT_TIMEOUT", "12s", "12s"),
        ("work_mem", "3MB", "3MB"),
        ("TimeZone", "Asia/Tokyo", "Asia/Tokyo"),
        ("my.own", 'it\'s a \\ "quoted" ünï\n$1', 'it\'s a \\ "quoted" ünï\n$1'),
        ("transaction_read_only", "on", "on"),
    ],
)
async def test_a_setting_holds_for_its_call_alone(
    single: WorkflowConnectionPool, name: str, value: str, shown: str
) -> None:
    ask = f"select current_setting('{name}', true)"
    before = await single.fetchval(ask)
    settings = {name: value}
    assert await single.fetchval(ask, settings=settings) == shown != before
    assert (await single.fetch(ask, settings=settings))[0][0] == shown
    row = await single.fetchrow(ask, settings=settings)
    assert row is not None
    assert row[0] == shown
    assert (await single.fetchval(ask) or None) == (before or None)


async def test_writes_with_settings_commit(single: WorkflowConnectionPool, schema: str, table: str) -> None:
    path = {"search_path": schema}
    assert await single.execute("insert into item values (1, 'x')", settings=path) == "INSERT 0 1"
    await single.executemany("insert into item values ($1, 'x')", [(2,), (3,)], settings=path)
    with pytest.raises(asyncpg.UniqueViolationError):
        await single.executemany("insert into item values ($1, 'x')", [(4,), (1,)], settings=path)
    with pytest.raises(asyncpg.UndefinedTableError):
        await single.fetch("select * from item")
    assert await single.fetchval(f"select count(*) from {table}") == 3


async def test_a_role_for_one_call(
    single: WorkflowConnectionPool, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    role = f"role_{schema}"
    await direct.execute(f"create role {role}")
    try:
        assert await single.fetchval("select current_user", settings={"role": role}) == role
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await single.fetch(f"select * from {table}", settings={"role": role})
        assert await single.fetchval("select current_user") != role
        assert await single.fetchval(f"select count(*) from {table}") == 0
    finally:
        await direct.execute(f"drop role {role}")


async def test_a_statement_timeout_of_the_server(single: WorkflowConnectionPool) -> None:
    with pytest.raises(asyncpg.QueryCanceledError):
        await single.fetch("select pg_sleep(20)", settings={"statement_timeout": "50ms"})
    assert await single.fetchval("select 1 from (select pg_sleep(0.1)) s") == 1


async def test_an_application_name_keeps_ours_in_front(single: WorkflowConnectionPool) -> None:
    ours = await single.fetchval(SHOW.format("application_name"))
    both = await single.fetchval(SHOW.format("application_name"), settings={"application_name": "report"})
    assert both == f"{ours}:report"
    assert await single.fetchval(SHOW.format("application_name")) == ours


@pytest.mark.parametrize(
    "settings", [{"work_mem": 5}, {"a b": "x"}, {"x": "a\0b"}, {"x.y": "\ud800"}, {"": "x"}, ["x"], {5: "x"}]
)
async def test_bad_settings_are_refused_here(single: WorkflowConnectionPool, settings: Any) -> None:
    before = await single.process({"operation": "stats"})
    with pytest.raises(ConfigError, match="settings"):
        await single.fetch("select 1", settings=settings)
    after = await single.process({"operation": "stats"})
    assert after["connections"] == before["connections"]


@pytest.mark.parametrize("settings", [{"nowhere": "1"}, {"work_mem": "much"}, {"role": "nobody_of_that_name"}])
async def test_what_the_server_refuses_is_told(single: WorkflowConnectionPool, settings: dict[str, str]) -> None:
    with pytest.raises(asyncpg.PostgresError):
        await single.fetch("select 1", settings=settings)
    assert await single.fetchval("select 1") == 1


async def test_calls_with_unlike_settings_travel_together_and_stay_apart(pool: WorkflowConnectionPool) -> None:
    async def ask(number: int) -> str:
        settings = {"my.number": str(number)} if number % 3 else None
        return str(await pool.fetchval("select current_setting('my.number', true)", settings=settings) or "")

    answers = await asyncio.gather(*(ask(number) for number in range(200)))
    assert answers == [str(number) if number % 3 else "" for number in range(200)]


async def test_a_search_path_before_pg_catalog_makes_a_read_unsafe(
    single: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    """There, lower() may be anybody's function, and leave anything in the session."""
    await direct.execute(f"""
        create function {schema}.lower(text) returns text language sql as
            $$ select set_config('my.secret', $1, false) $$""")
    path = {"search_path": f"{schema}, pg_catalog"}
    assert await single.fetchval("select lower('LEAK'::text)", settings=path) == "LEAK"
    assert not await single.fetchval("select current_setting('my.secret', true)")
