"""Each condition of the planner, with what breaks without it: the lane by hand gives something else than one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from lanes_by_hand import contents, fresh, one_by_one

from raypg.core.forms import unnest_form
from raypg.core.shape import shape_of
from raypg.embedded import EmbeddedServer
from raypg.server.catalogue import Catalogue
from raypg.server.connection import ServerConnection
from raypg.server.planning import plan_for

Way = Callable[[asyncpg.Connection, str, list[Any]], Awaitable[list[Any]]]


async def by_many(direct: asyncpg.Connection, sql: str, rows: list[Any]) -> list[Any]:
    """One transaction, each row an execution of its own."""
    try:
        await direct.executemany(sql, rows)
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return [type(error)] * len(rows)
    return ["INSERT 0 1"] * len(rows)


async def by_unnest(direct: asyncpg.Connection, sql: str, rows: list[Any]) -> list[Any]:
    """One statement with arrays."""
    kinds = (await direct.prepare(sql)).get_parameters()
    insert, rest = (sql.partition(word) for word in (" on conflict", " returning"))
    ending = "".join(insert[1:]) or "".join(rest[1:])
    form = unnest_form(sql.removesuffix(ending), [kind.name.removesuffix("[]") + "[]" for kind in kinds])
    assert form is not None
    columns = zip(*rows, strict=True)
    try:
        await direct.execute(form + ending, *columns)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        return [type(error)] * len(rows)
    return ["INSERT 0 1"] * len(rows)


@dataclass
class Case:
    setup: str
    sql: str
    rows: list[Any]
    way: Way
    reason: str


_COUNTING = """create table t (a int); create table seen (n bigint);
    create function note() returns trigger language plpgsql as
        $$ begin insert into seen select count(*) from t; return null; end $$;
    create trigger x after insert on t for each row execute function note()"""
_TRANSACTIONS = """create table seen (x xid8);
    create function note() returns trigger language plpgsql as
        $$ begin insert into seen select pg_current_xact_id() where not exists
           (select from seen where x = pg_current_xact_id()); return null; end $$;"""

CASES = {
    "unnest, self reference: the child comes first": Case(
        "create table t (a int primary key, b int references t)",
        "insert into t values ($1, $2)", [(2, 1), (1, None)] + [(n, None) for n in range(3, 12)], by_unnest,
        "points to the table itself",
    ),
    "unnest, triggers: each sees all rows of the statement": Case(
        _COUNTING, "insert into t values ($1)", [(n,) for n in range(9)], by_unnest, "triggers",
    ),
    "unnest, arrays are flattened": Case(
        "create table t (a int[])", "insert into t values ($1)", [([n, n],) for n in range(9)], by_unnest,
        "a parameter of type int4",
    ),
    "unnest, DO UPDATE: a key twice": Case(
        "create table t (a int primary key, b int)",
        "insert into t values ($1, $2) on conflict (a) do update set b = excluded.b",
        [(n % 2, n) for n in range(9)], by_unnest, "DO UPDATE",
    ),
    "unnest, DO NOTHING: whose row was there is not told": Case(
        "create table t (a int primary key)", "insert into t values ($1) on conflict do nothing",
        [(n % 2,) for n in range(9)], by_unnest, "DO NOTHING",
    ),
    "unnest, functions: in VALUES no set may be returned": Case(
        "create table t (a int)", "insert into t values (generate_series(1, $1))", [(2,)] * 9, by_unnest,
        "not parameters",
    ),
    "many, triggers: they see one transaction": Case(
        f"create table t (a int); {_TRANSACTIONS} create trigger x after insert on t for each row "
        "execute function note()",
        "insert into t values ($1)", [(n,) for n in range(9)], by_many, "triggers",
    ),
    "many, triggers: that drop rows are not told of": Case(
        """create table t (a int); create function drop_some() returns trigger language plpgsql as
           $$ begin if new.a % 3 = 0 then return null; end if; return new; end $$;
           create trigger x before insert on t for each row execute function drop_some()""",
        "insert into t values ($1)", [(n,) for n in range(9)], by_many, "triggers",
    ),
    "many, rules": Case(
        "create table t (a int); create rule r as on insert to t where new.a % 2 = 0 do instead nothing",
        "insert into t values ($1)", [(n,) for n in range(9)], by_many, "rules",
    ),
    "many, views have rules and triggers behind them": Case(
        "create table base (a int); create view t as select * from base; "
        "create rule r as on insert to t do instead insert into base select new.a where new.a % 2 = 0",
        "insert into t values ($1)", [(n,) for n in range(9)], by_many, "not a plain table",
    ),
    "many, deferrable constraints: the parent comes in time": Case(
        "create table t (a int primary key, b int references t deferrable initially deferred)",
        "insert into t values ($1, $2)", [(2, 1), (1, None)], by_many, "deferrable",
    ),
    "many, the clock in the text": Case(
        "create table t (a int, b timestamptz unique)", "insert into t values ($1, now())", [(n,) for n in range(9)],
        by_many, "clock",
    ),
    "many, the clock in a default": Case(
        "create table t (a int, b timestamptz unique default now())", "insert into t (a) values ($1)",
        [(n,) for n in range(9)], by_many, "default of b",
    ),
    "many, functions in a default": Case(
        "create function f() returns xid8 language sql volatile as 'select pg_current_xact_id()'; "
        "create table t (a int, b xid8 unique default f())",
        "insert into t (a) values ($1)", [(n,) for n in range(9)], by_many, "default of b",
    ),
    "many, foreign keys that do something": Case(
        f"create table t (a int primary key); create table child (a int references t on delete cascade); "
        f"{_TRANSACTIONS} "
        "create trigger x after delete on child for each row execute function note(); "
        "insert into t select generate_series(1, 9); insert into child select generate_series(1, 9)",
        "delete from t where a = $1", [(n,) for n in range(1, 10)], by_many, "change other tables",
    ),
    "many, CALL that commits": Case(
        "create table t (a int); create procedure p(n int) language plpgsql as "
        "$$ begin insert into t values (n); commit; end $$",
        "call p($1)", [(n,) for n in range(3)], by_many, "CALL",
    ),
    "many, row-level security hides functions": Case(
        """create table t (a int); create table seen (x xid8);
           create function f() returns boolean language sql volatile as 'insert into {schema}.seen
               select pg_current_xact_id() where not exists (select from {schema}.seen where x = pg_current_xact_id())
               returning true';
           alter table t enable row level security; alter table t force row level security;
           create policy p on t with check (f())""",
        "insert into t values ($1)", [(n,) for n in range(9)], by_many, "row-level security",
    ),
}  # fmt: skip


class FactsOf:
    """As much of an engine as planning needs."""

    def __init__(self) -> None:
        self.catalogue = Catalogue()

    def now(self) -> float:
        return 0.0


@pytest.mark.parametrize("label", CASES)
async def test_what_breaks_without_the_condition(
    pg: EmbeddedServer, direct: asyncpg.Connection, schema: str, label: str
) -> None:
    case = CASES[label]
    role = f"r_{schema}"
    await direct.execute(f"create role {role}")  # a superuser is above row-level security
    outcomes = []
    try:
        for way in (one_by_one, case.way):
            await fresh(direct, schema, case.setup.replace("{schema}", schema))
            await direct.execute(
                f"grant all on schema {schema} to {role}; grant all on all tables in schema {schema} to {role}"
            )
            if "security" in label:
                await direct.execute(f"set role {role}")
            told = [o if isinstance(o, str) else "failed" for o in await way(direct, case.sql, case.rows)]
            await direct.execute("reset role")
            outcomes.append((_counts(await contents(direct, schema)), told))
        if case.sql.startswith("delete"):
            outcomes = [(rows, []) for rows, _ in outcomes]
        assert outcomes[0] != outcomes[1]
        connection = ServerConnection(direct, 0, 0.0, None)
        plan, _ = await plan_for(
            FactsOf(),
            connection,
            case.sql,
            len(case.rows),
            in_transaction=False,
            shared_now=False,  # type: ignore[arg-type]
        )
        assert plan.lane in (("single",) if case.way is by_many else ("single", "many"))
        assert case.reason in plan.reason
    finally:
        await direct.execute(f"drop owned by {role}; drop role {role}")


def _counts(tables: dict[str, list[Any]]) -> dict[str, Any]:
    """What must be the same: all but the very times and transaction numbers."""
    return {
        name: [row["n"] for row in rows] if rows and "n" in rows[0] else len(rows)  # type: ignore[operator]
        for name, rows in tables.items()
    }


async def test_equal_notifications_of_a_transaction_arrive_as_one(
    direct: asyncpg.Connection, pg: EmbeddedServer
) -> None:
    heard: list[Any] = []
    listener = await asyncpg.connect(**pg.parameters)
    await listener.add_listener("lanes", lambda *args: heard.append(args[3]))
    await direct.executemany("select pg_notify('lanes', $1)", [("x",)] * 3)
    await listener.execute("select 1")
    assert len(heard) == 1
    for _ in range(3):
        await direct.fetch("select pg_notify('lanes', $1)", "x")
    await listener.execute("select 1")
    await listener.close()
    assert len(heard) == 4
    assert shape_of("select pg_notify('lanes', $1)").doubt
    assert shape_of("insert into t values (pg_notify('lanes', $1))").doubt


async def test_a_stricter_default_isolation_gives_a_group_one_snapshot(
    direct: asyncpg.Connection, pg: EmbeddedServer, schema: str
) -> None:
    await direct.execute("create table t (a int primary key, b int); insert into t values (1, 0), (2, 0)")
    locker, other = [await asyncpg.connect(**pg.parameters) for _ in range(2)]
    sql = f"update {schema}.t set b = b + 1 where a = $1"
    await direct.execute("set default_transaction_isolation = 'repeatable read'")

    async def meanwhile(work: Awaitable[Any]) -> Any:
        """While *work* waits for the first row, somebody changes the second."""
        await locker.execute("begin")
        await locker.execute(f"select from {schema}.t where a = 1 for update")
        task = asyncio.ensure_future(work)
        while not await other.fetchval(  # noqa: ASYNC110 - seen from outside
            "select count(*) from pg_stat_activity where pid = $1 and wait_event_type = 'Lock'", direct.get_server_pid()
        ):
            await asyncio.sleep(0.01)
        await other.execute(f"update {schema}.t set b = b + 10 where a = 2")
        await locker.execute("commit")
        return await task

    async def singly() -> None:
        await direct.execute(sql, 1)
        await direct.execute(sql, 2)

    await meanwhile(singly())
    with pytest.raises(asyncpg.SerializationError):
        await meanwhile(direct.executemany(sql, [(1,), (2,)]))
    plan, _ = await plan_for(
        FactsOf(),
        ServerConnection(direct, 0, 0.0, None),
        sql,
        9,
        in_transaction=False,
        shared_now=False,  # type: ignore[arg-type]
    )
    assert (plan.lane, plan.reason) == ("single", "the default isolation is repeatable read")
    await asyncio.gather(locker.close(), other.close())
