"""Cursors, prepared statements and listeners of `pool.sync`."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Any

import asyncpg
import pytest
from pools import unique_name

from raypg import WorkflowConnectionPool

SERIES = "select generate_series(1, $1::int) as n"
PORTALS = "select count(*)::int from pg_cursors where name like '\\_\\_asyncpg%'"


@pytest.mark.parametrize("prefetch", [1, 7, 100])
def test_a_cursor_is_a_plain_iterator(pool: WorkflowConnectionPool, prefetch: int) -> None:
    with pool.sync.transaction() as tx:
        assert [row["n"] for row in tx.cursor(SERIES, 100, prefetch=prefetch)] == list(range(1, 101))
        assert [row["n"] for row in tx.cursor(SERIES, 0)] == []
        assert tx.fetchval(PORTALS) == 0


def test_its_words_go_on_where_the_iteration_was(pool: WorkflowConnectionPool) -> None:
    with pool.sync.transaction() as tx:
        cursor = tx.cursor(SERIES, 40, prefetch=10)
        assert next(cursor)["n"] == 1
        assert [row["n"] for row in cursor.fetch(3)] == [2, 3, 4]
        assert cursor.forward(10) == 10
        assert cursor.fetchrow() == (15,)
        assert [row["n"] for row in cursor.fetch(20)] == list(range(16, 36))
        assert [row["n"] for row in cursor] == [36, 37, 38, 39, 40]
        assert cursor.fetchrow() is None
        assert cursor.forward(1) == 0
        with pytest.raises(asyncpg.InterfaceError, match="greater than zero"):
            cursor.fetch(0)
        cursor = tx.cursor(SERIES, 40)
        assert cursor.forward(39) == 39
        assert cursor.fetchrow() == (40,)
        cursor = tx.cursor(SERIES, 1000)
        assert next(cursor)["n"] == 1
        cursor.close()
        assert list(cursor) == []
        assert tx.fetchval(PORTALS) == 0


def test_a_cursor_without_a_transaction(pool: WorkflowConnectionPool) -> None:
    with pool.sync.acquire() as connection:
        with pytest.raises(asyncpg.NoActiveSQLTransactionError):
            list(connection.cursor("select 1"))
        with connection.transaction():
            assert list(connection.cursor("select 1 as a")) == [(1,)]


def test_prepared_statements(pool: WorkflowConnectionPool, table: str) -> None:
    with pool.sync.transaction() as tx:
        insert = tx.prepare(f"insert into {table} values ($1, $2)")
        assert insert.get_query().startswith("insert")
        assert [one.name for one in insert.get_parameters()] == ["int4", "text"]
        assert insert.get_attributes() == ()
        assert insert.execute(1, "x") == "INSERT 0 1"
        insert.executemany([(2, "y"), (3, "z")])
        select = tx.prepare(f"select id, label from {table} where id >= $1 order by id")
        assert [row["label"] for row in select.fetch(2)] == ["y", "z"]
        assert select.fetchrow(3) == (3, "z")
        assert select.fetchval(1, column=1) == "x"
        assert [row["id"] for row in select.cursor(1, prefetch=2)] == [1, 2, 3]
    with pool.sync.acquire() as connection, pytest.raises(asyncpg.UndefinedTableError):
        connection.prepare("select * from nowhere")


def test_callbacks_are_called_on_the_background_thread(pool: WorkflowConnectionPool) -> None:
    heard: queue.Queue[Any] = queue.Queue()
    channel = unique_name()

    def callback(connection: Any, pid: int, name: str, payload: str) -> None:
        problem = None
        try:
            connection.fetchval("select 1")
        except RuntimeError as error:
            problem = str(error)
        heard.put((connection, pid, name, payload, threading.current_thread().name, problem))

    async def later(connection: Any, pid: int, name: str, payload: str) -> None:
        await asyncio.sleep(0)
        heard.put(payload)

    with pool.sync.acquire() as connection, pool.sync.acquire() as other:
        connection.add_listener(channel, callback)
        pid = other.fetchval("select pg_backend_pid()")
        other.execute("select pg_notify($1, 'one')", channel)
        told = heard.get(timeout=10)
        assert told[:5] == (connection, pid, channel, "one", "raypg-background")
        assert "await" in told[5]
        connection.remove_listener(channel, callback)
        assert connection.fetch("select pg_listening_channels()") == []
        connection.add_listener(channel, later)
        other.execute("select pg_notify($1, 'two')", channel)
        assert heard.get(timeout=10) == "two"
        with pytest.raises(asyncpg.InterfaceError, match="callable"):
            connection.add_listener(channel, "no callback")  # type: ignore[arg-type]
    assert heard.empty()
