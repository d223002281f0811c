"""`pool.sync`: the same words for plain tasks and threads."""

from __future__ import annotations

import decimal
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import pytest
import ray
from pools import RUNNING
from waiting import wait_until

from raypg import LeaseLostError, QueryTimeoutError, TransactionRolledBackError, WorkflowConnectionPool
from raypg.channel import Channel


def test_every_word(pool: WorkflowConnectionPool, table: str) -> None:
    sync = pool.sync
    assert sync.execute(f"insert into {table} values ($1, $2)", 1, "x") == "INSERT 0 1"
    sync.executemany(f"insert into {table} values ($1, $2)", [(2, "y"), (3, "z")])
    assert [row["label"] for row in sync.fetch(f"select label from {table} order by id")] == ["x", "y", "z"]
    row = sync.fetchrow(f"select * from {table} where id = $1", 2)
    assert row is not None
    assert dict(row) == {"id": 2, "label": "y", "amount": None}
    assert sync.fetchval("select 1, 2.50::numeric", column=1) == decimal.Decimal("2.50")
    assert sync.fetchval("select current_setting('work_mem')", settings={"work_mem": "2MB"}) == "2MB"
    assert sync.process({"operation": "get_status"})["max_connections"] == 10
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        sync.execute(f"insert into {table} values (1, 'x')")
    assert caught.value.constraint_name == "item_pkey"
    with pytest.raises(QueryTimeoutError):
        sync.fetch("select pg_sleep(20)", timeout=0.1)


def test_leases_and_transactions(pool: WorkflowConnectionPool, table: str) -> None:
    insert = f"insert into {table} values ($1, 'x')"
    with pool.sync.acquire() as connection:
        connection.execute("create temp table mine (a int)")
        connection.executemany("insert into mine values ($1)", [(1,), (2,)])
        assert connection.fetchval("select sum(a) from mine") == 3
        with connection.transaction():
            connection.execute(insert, 1)
            with pytest.raises(asyncpg.UniqueViolationError), connection.transaction():
                connection.execute(insert, 1)
            connection.execute(insert, 2)
    with pytest.raises(LeaseLostError):
        connection.fetch("select 1")
    with pool.sync.transaction(isolation="serializable") as tx:
        tx.execute(insert, 3)
        assert tx.fetchrow("select current_setting('transaction_isolation')") == ("serializable",)
    with pytest.raises(ZeroDivisionError), pool.sync.transaction() as tx:  # noqa: PT012
        tx.execute(insert, 4)
        raise ZeroDivisionError
    with pytest.raises(TransactionRolledBackError), pool.sync.transaction() as tx:  # noqa: PT012
        tx.execute(insert, 5)
        with pytest.raises(asyncpg.DivisionByZeroError):
            tx.fetch("select 1/0")
    assert [row["id"] for row in pool.sync.fetch(f"select id from {table} order by id")] == [1, 2, 3]


def test_the_error_on_its_way_is_not_hidden_by_a_lost_lease(pool: WorkflowConnectionPool) -> None:
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        pool.sync.acquire(lease_timeout=3.0) as connection,
        connection.transaction(),
    ):
        with pytest.raises(LeaseLostError):
            connection.fetch("select pg_sleep(20)")
        raise ZeroDivisionError


def test_threads_get_their_own_answers_and_travel_together(
    pool: WorkflowConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = 0
    packed = Channel._pack

    def counted(self: Channel, number: int) -> Any:
        nonlocal sent
        calls, runs = packed(self, number)
        sent += bool(runs)
        return calls, runs

    monkeypatch.setattr(Channel, "_pack", counted)
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda number: pool.sync.fetchval("select $1::int", number), range(1000)))
    assert answers == list(range(1000))
    print(f"{sent} messages")
    assert 20 <= sent < 500  # 50 threads at a time
    assert sum(thread.name == "raypg-background" for thread in threading.enumerate()) == 1


async def test_inside_an_event_loop_it_says_what_to_do(pool: WorkflowConnectionPool) -> None:
    with pytest.raises(RuntimeError, match="await"):
        pool.sync.fetch("select 1")


def test_in_plain_ray_tasks(pool: WorkflowConnectionPool, table: str) -> None:
    def work(handle: WorkflowConnectionPool, number: int) -> int:
        with handle.sync.transaction() as tx:
            tx.execute(f"insert into {table} values ($1, 'x')", number)
        return int(handle.sync.fetchval(f"select id from {table} where id = $1", number))

    task: Any = ray.remote(work)
    assert ray.get([task.remote(pool, number) for number in range(8)]) == list(range(8))


def test_ctrl_c_ends_the_statement(pool: WorkflowConnectionPool) -> None:
    mark = uuid.uuid4().hex

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            pool.sync.fetch(f"select pg_sleep(60), '{mark}'")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    wait_until(lambda: pool.sync.fetchval(RUNNING, f"%{mark}%") == 0, what="it was cancelled")
