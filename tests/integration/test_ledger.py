"""The ledger of written batches, in databases of its own: an older one, published, without privileges; in what order
the transaction of a batch goes, and how durable it is."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pyarrow as pa
import pytest
from pools import grant, own_pool, pipeline_of
from waiting import eventually

from raypg import LedgerError, WorkflowConnectionPool, ledger
from raypg.actors.worker import PoolWorker
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.portable import unpack_error
from raypg.server import writing
from raypg.server.ledger import LOCK_TIMEOUT
from raypg.server.work import Refused

OLDER = """
create schema raypg;
create table raypg.batches (
    pipeline text not null, batch_id text not null, hash bytea, target text, rows bigint,
    duplicates bigint not null default 0, quarantined bigint not null default 0,
    xid bigint default txid_current(), committed_at timestamptz not null default clock_timestamp()
);
create unique index batches_pkey on raypg.batches (pipeline, batch_id);
create table raypg.quarantine (
    pipeline text not null, batch_id text, target text not null, row bigint not null, sqlstate text not null,
    message text not null, data text not null, stored_at timestamptz not null default clock_timestamp()
);
insert into raypg.batches (pipeline, batch_id) values ('old', 'one');
"""
"""The tables as raypg made them once."""

KEY = """
select pg_get_constraintdef(oid) from pg_constraint where conrelid = 'raypg.batches'::regclass and contype = 'p'
"""


def items(*ids: int, amount: int = 0) -> pa.Table:
    return pa.table({"id": list(ids), "amount": [amount] * len(ids)})


@pytest.fixture
async def database(pg: EmbeddedServer, direct: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection to a database of this test alone, with an empty table ``item (id int primary key,
    amount int check (amount >= 0))``."""
    name = f"ledger_{secrets.token_hex(6)}"
    await direct.execute(f"create database {name}")
    connection = await asyncpg.connect(**{**pg.parameters, "database": name})
    try:
        await connection.execute("create table item (id int primary key, amount int check (amount >= 0))")
        yield connection
    finally:
        connection.terminate()
        await direct.execute(f"drop database {name} with (force)")


async def named(database: asyncpg.Connection) -> str:
    return str(await database.fetchval("select current_database()"))


@pytest.fixture
async def inside(
    ray_cluster: Any, pg: EmbeddedServer, database: asyncpg.Connection
) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool in that database."""
    async with own_pool(pg, database=await named(database), max_connections=4) as pool:
        yield pool


# --- its tables ---


@pytest.mark.parametrize("older", [False, True])
async def test_a_ledger_in_a_database_whose_tables_are_all_published(
    inside: WorkflowConnectionPool, database: asyncpg.Connection, older: bool
) -> None:
    """Rows of a published table can only be changed if it has an identity."""
    if older:
        await database.execute(OLDER)
    await database.execute("create publication everything for all tables")
    pipeline = pipeline_of(inside)
    how: dict[str, Any] = {"into": "item", "mode": "ignore", "on_bad_rows": "quarantine"}
    assert (await pipeline.write(items(1, 2), batch_id="a", **how)).rows == 2
    again = await pipeline.write(items(2, 3), batch_id="b", **how)
    assert (again.rows, again.duplicates) == (1, 1)
    assert (await pipeline.write(items(4, amount=-1), batch_id="c", **how)).quarantined == 1
    assert await ledger.prune(inside, older_than=ledger.parse_age("0s")) == 3 + older
    assert await database.execute("delete from raypg.quarantine") == "DELETE 1"
    assert await database.fetchval(KEY) == "PRIMARY KEY (pipeline, batch_id)"


async def test_many_workers_give_an_older_ledger_its_key(
    ray_cluster: Any, pg: EmbeddedServer, database: asyncpg.Connection
) -> None:
    await database.execute(OLDER)
    pools = 0
    while await database.fetchval(KEY) is None and pools < 3:  # nobody waits long for the others, or tries it twice
        async with own_pool(pg, database=await named(database), workers=3, max_connections=6) as pool:
            rows = items(*range(60 * pools, 60 * pools + 60))
            written = await pipeline_of(pool).write(rows, into="item", batch_id=f"b{pools}", batch_rows=2)
            assert written.rows == 60
            assert len(written.workers) > 1
        pools += 1
    assert await database.fetchval(KEY) == "PRIMARY KEY (pipeline, batch_id)"
    assert await database.fetchval("select count(*) from raypg.batches") == 1 + 30 * pools


async def test_an_older_ledger_that_is_being_written_to_gets_its_key_later(
    inside: WorkflowConnectionPool, database: asyncpg.Connection
) -> None:
    """It is not waited for: batches go on."""
    await database.execute(OLDER)
    async with database.transaction():
        await database.execute("insert into raypg.batches (pipeline, batch_id) values ('old', 'two')")
        written = await asyncio.wait_for(pipeline_of(inside).write(items(1), into="item", batch_id="b"), 20)
    assert written.rows == 1
    assert await database.fetchval(KEY) is None


# --- privileges ---


@pytest.fixture
async def role(direct: asyncpg.Connection, database: asyncpg.Connection) -> AsyncIterator[str]:
    """A role that may write to ``item`` and make temporary tables, and nothing else."""
    name = f"writer_{secrets.token_hex(6)}"
    await direct.execute(f"create role {name} login password 'x'")
    await database.execute(f"grant select, insert on item to {name}")
    try:
        yield name
    finally:
        await database.execute(f"drop owned by {name}")
        await direct.execute(f"drop role {name}")


@pytest.fixture
async def theirs(
    ray_cluster: Any, pg: EmbeddedServer, database: asyncpg.Connection, role: str
) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool of that role."""
    async with own_pool(pg, database=await named(database), user=role, password="x", max_connections=2) as pool:
        yield pool


IGNORE: dict[str, Any] = {"into": "item", "mode": "ignore"}
BAD_ROWS: dict[str, Any] = {"into": "item", "on_bad_rows": "quarantine"}


async def test_each_missing_privilege_is_told_with_its_grant(
    theirs: WorkflowConnectionPool, database: asyncpg.Connection, role: str
) -> None:
    """Whatever of the ledger is refused, from the making of it to the note of bad rows, nothing is written."""
    pipeline = pipeline_of(theirs)
    on_database = f"GRANT CREATE ON DATABASE {await named(database)} TO {role}"
    on_schema, on_tables = (
        f"GRANT USAGE ON SCHEMA raypg TO {role}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON .* {role}",
    )

    async def refused(grant: str, what: str, data: pa.Table, **how: Any) -> None:
        with pytest.raises(LedgerError, match=grant) as caught:
            await pipeline.write(data, **how)
        assert f"permission denied for {what}" in str(caught.value)
        assert await database.fetchval("select count(*) from item where id > 1") == 0

    # There is no ledger, and it may not be made.
    await refused(on_database, "database", items(2), into="item", batch_id="b")
    await refused(on_database, "database", items(2), **BAD_ROWS)
    # Somebody else makes it.
    await database.execute(OLDER)
    await refused(on_schema, "schema raypg", items(2), into="item", batch_id="b")
    await refused(on_schema, "schema raypg", items(2, amount=-1), **BAD_ROWS)
    await database.execute(f"grant usage on schema raypg to {role}")
    await refused(on_tables, "table batches", items(2), into="item", batch_id="b")
    await refused(on_tables, "table quarantine", items(2, amount=-1), **BAD_ROWS)
    await database.execute(f"grant select, insert on raypg.batches to {role}")
    assert (await pipeline.write(items(1), into="item", batch_id="b")).rows == 1
    await refused(on_tables, "table batches", items(1, 2), batch_id="c", **IGNORE)
    await refused(on_tables, "table quarantine", items(2, amount=-1), batch_id="c", **BAD_ROWS)
    # With what the messages have said, all goes; but for the key of the ledger, which only its owner may make.
    await database.execute(f"grant select, insert, update, delete on raypg.batches, raypg.quarantine to {role}")
    assert (await pipeline.write(items(1, 2), batch_id="c", **IGNORE)).duplicates == 1
    assert (await pipeline.write(items(3, amount=-1), batch_id="d", **BAD_ROWS)).quarantined == 1
    assert await database.fetchval(KEY) is None


async def test_with_the_grant_the_ledger_is_made_on_first_use(
    theirs: WorkflowConnectionPool, database: asyncpg.Connection, role: str
) -> None:
    await database.execute(f"grant create on database {await named(database)} to {role}")
    assert (await pipeline_of(theirs).write(items(1), batch_id="b", **BAD_ROWS)).rows == 1
    owner = "select relowner::regrole::text from pg_class where oid = 'raypg.batches'::regclass"
    assert await database.fetchval(owner) == role


async def test_a_transactional_pipeline_needs_no_ledger(
    theirs: WorkflowConnectionPool, database: asyncpg.Connection
) -> None:
    """It only notes its commit there if it may."""
    await database.execute(OLDER)
    async with pipeline_of(theirs, strategy="transactional") as pipeline:
        await pipeline.add_query("insert into item values (1, 1)")
        (result,) = await pipeline.flush()
    assert result.success, result.error


# --- the transaction of a batch ---


async def test_a_batch_waits_for_its_table_as_long_as_it_takes(
    inside: WorkflowConnectionPool, database: asyncpg.Connection
) -> None:
    """Somebody makes an index, say. Only for its row of the ledger, which it locks first, a batch waits briefly."""
    pipeline = pipeline_of(inside)
    await pipeline.write(items(0), into="item", batch_id="makes the ledger")
    waits = """
    select count(*) from pg_locks waiting join pg_locks held using (pid)
    where not waiting.granted and waiting.relation = 'item'::regclass
      and held.granted and held.relation = 'raypg.batches'::regclass and held.mode = 'RowExclusiveLock'
      and waiting.waitstart < clock_timestamp() - $1 * interval '1 second'
    """
    async with database.transaction():
        await database.execute("lock table item in share mode")
        work = asyncio.ensure_future(pipeline.write(items(1, 2), into="item", batch_id="b"))
        await eventually(lambda: database.fetchval(waits, LOCK_TIMEOUT * 1.5), timeout=20)
        assert not work.done()
    assert (await work).rows == 2


@pytest.mark.parametrize(("given", "used"), [("off", "on"), ("local", "local")])
async def test_a_batch_is_on_disk_when_it_is_known(
    ray_cluster: Any, pg: EmbeddedServer, database: asyncpg.Connection, given: str, used: str
) -> None:
    """A crash must not take back what the caller was told; nor is more waited for than the database is set to."""
    name = await named(database)
    await database.execute(
        f"alter database {name} set synchronous_commit = {given}; create table seen (name text, setting text);"
        "create function look() returns trigger language plpgsql as"
        " $$begin insert into seen values (tg_table_name, current_setting('synchronous_commit')); return null; end$$;"
        "create trigger look after insert on item execute function look()"
    )
    async with own_pool(pg, database=name, max_connections=1) as pool:
        assert await pool.fetchval("show synchronous_commit") == given
        await pipeline_of(pool).write(items(1), into="item", batch_id="b")
        assert await database.fetch("select * from seen") == [("item", used)]
        assert await pool.fetchval("show synchronous_commit") == given


async def test_who_holds_a_batch_is_told(
    pg: EmbeddedServer, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction of somebody who lives is waited for, but not for ever. In this process, where that can be short."""
    monkeypatch.setattr(writing, "PATIENCE", 0.5)
    parameters = {**pg.parameters, "database": await named(database)}
    worker = PoolWorker("p", 0, "cluster", from_kwargs(name="p", environ={}, **parameters).to_dict())
    await grant(worker, 2)
    intake = writing.Intake(worker._engine)

    async def write(batch_id: str) -> tuple[int, int, int, bool]:
        spec = writing.Spec((None, "item"), "append", None, "p", batch_id, "fail", False, 0)
        return await intake.write("job", spec, fetch)

    async def fetch() -> pa.Table:
        return items(1)

    assert (await write("makes the ledger"))[0] == 1
    await database.execute("set application_name = 'the other one'; truncate item")
    pid = await database.fetchval("select pg_backend_pid()")
    async with database.transaction():
        await database.execute("insert into raypg.batches (pipeline, batch_id) values ('p', 'b')")
        with pytest.raises(Refused) as caught:
            await asyncio.wait_for(write("b"), 30)
        error = unpack_error(caught.value.packed)
        assert isinstance(error, LedgerError)
        assert f"process {pid} (the other one, idle in transaction, for " in str(error)
        assert f"pg_terminate_backend({pid})" in str(error)
        await database.execute("delete from raypg.batches where batch_id = 'b'")
    assert (await write("b"))[0] == 1
    await worker.close("the test is over")
