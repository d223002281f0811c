"""What is read from the catalogue of a real server, and when it is read again."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from raypg.core import functions
from raypg.core.classifier import Classifier
from raypg.core.facts import judge
from raypg.core.mentions import mentions
from raypg.embedded import EmbeddedServer
from raypg.server import facts_reader


@pytest.fixture
async def fresh(pg18: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database of its own: facts are of a whole database."""
    name = f"facts_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(**pg18.parameters)
    await admin.execute(f"create database {name}")
    connection = await asyncpg.connect(**(pg18.parameters | {"database": name}))
    try:
        yield connection
    finally:
        connection.terminate()
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


async def test_each_view_of_the_system_is_about_one_server_or_proven_by_its_definition(
    fresh: asyncpg.Connection,
) -> None:
    facts = await facts_reader.load(fresh.fetch)
    views = await fresh.fetch(
        "select n.nspname::text as schema, c.relname::text as name, pg_get_viewdef(c.oid) as definition"
        " from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind = 'v'"
    )
    assert len(views) > 100
    classifier = Classifier(facts)
    unproven, reads = {}, set()
    for view in views:
        verdict = classifier.classify(f"select * from {view['schema']}.{view['name']}")
        proof = judge(mentions(view["definition"]), facts)
        if verdict.kind == "READ":
            reads.add(view["name"])
            if proof.kind != "READ":
                unproven[view["name"]] = proof.reason
    # Neither do these functions write, nor tell more of a session than which schema of temporary tables to leave out.
    assert {reason.split()[1] for reason in unproven.values()} <= {
        *("pg_is_other_temp_schema", "pg_my_temp_schema", "pg_mcv_list_items", "pg_get_statisticsobjdef_expressions"),
        *(
            "pg_get_publication_tables",
            "pg_timezone_abbrevs_zone",
            "pg_timezone_abbrevs_abbrevs",
            "pg_timezone_names",
            "pg_get_wait_events",
        ),
    }, unproven
    assert {"pg_tables", "pg_views", "pg_indexes", "pg_roles", "tables", "columns", "pg_stats"} <= reads
    for name in ("pg_stat_activity", "pg_locks", "pg_settings", "pg_cursors", "pg_sequences", "pg_replication_slots"):
        assert classifier.classify(f"select * from {name}").kind == "SESSION"


async def test_operators_and_fields_of_the_system_call_nothing_volatile(fresh: asyncpg.Connection) -> None:
    """What classification takes for granted: it looks at neither."""
    assert not await fresh.fetchval(
        "select count(*) from pg_operator o join pg_proc p on p.oid = o.oprcode where p.provolatile = 'v'"
    )
    # a.name may call a function `name` that takes a row of any kind.
    called = await fresh.fetch(
        "select proname::text as name from pg_proc where oid < 16384 and provolatile = 'v' and pronargs = 1"
        " and proargtypes[0] in ('record'::regtype, 'anyelement'::regtype, 'anynonarray'::regtype, '\"any\"'::regtype)"
    )
    assert {row["name"] for row in called} <= functions.FORBIDDEN


async def test_an_operator_class_of_a_function_that_writes_taints_the_tables_of_its_type(
    fresh: asyncpg.Connection,
) -> None:
    await fresh.execute(
        """
        create table seen (a int);
        create type odd as (n int);
        create function compare(odd, odd) returns int language plpgsql as
            $$ begin insert into seen values (1); return 0; end $$;
        create function same(odd, odd) returns boolean language sql immutable as 'select true';
        create operator #= (leftarg = odd, rightarg = odd, function = same);
        create operator class odd_ops default for type odd using btree as
            operator 3 #= , function 1 compare(odd, odd);
        create table odds (o odd);
        create table lists (many odd[]);
        create table others (a int);
        """
    )
    classifier = Classifier(await facts_reader.load(fresh.fetch))
    expected = {
        "select o from odds order by o": "WRITE",
        "select distinct o from odds": "WRITE",
        "select max(many) from lists": "WRITE",
        "select row(1)::odd = row(2)::odd": "WRITE",
        "select * from others order by a": "READ",
    }
    assert {sql: classifier.classify(sql).kind for sql in expected} == expected


async def test_a_change_of_the_catalogue_is_noticed_and_nothing_else(fresh: asyncpg.Connection) -> None:
    await fresh.execute("create table t (a int); create view v as select a from t")
    known = await facts_reader.digest(fresh.fetch)
    await fresh.execute("insert into t values (1); analyze t; create temp table x (a int); drop table x")
    await fresh.execute("vacuum t")
    assert await facts_reader.digest(fresh.fetch) == known
    for change in (
        "create function f() returns int language sql as 'select 1'",
        "create or replace function f() returns int language sql as $$ select nextval('s')::int $$",
        "create or replace view v as select a + 1 as a from t",
        "alter table t enable row level security",
        "create policy p on t using (true)",
        "alter policy p on t using (f() = 1)",
        "alter table t set unlogged",
        "alter table t rename to u",
        "create domain d as int check (value > 0)",
        "create operator #+ (leftarg = int, rightarg = int, function = int4pl)",
        "create schema s",
        "alter function f() set schema s",
        "drop function s.f() cascade",
    ):
        await fresh.execute(change if "nextval" not in change else f"create sequence s; {change}")
        now = await facts_reader.digest(fresh.fetch)
        assert now != known, change
        known = now


@pytest.mark.pg15
async def test_an_older_server_tells_the_same_way(pg15: EmbeddedServer) -> None:
    connection = await asyncpg.connect(**pg15.parameters)
    try:
        classifier = Classifier(await facts_reader.load(connection.fetch))
        assert await facts_reader.digest(connection.fetch)
    finally:
        await connection.close()
    assert classifier.classify("select lower(relname) from pg_class").kind == "READ"
    assert classifier.classify("select pg_advisory_lock(1)").kind == "SESSION"
    assert classifier.classify("select uuidv7()").kind == "UNKNOWN"  # not there yet: somebody's own, if anything


async def test_a_write_reaches_all_that_the_catalogue_says_it_reaches(fresh: asyncpg.Connection) -> None:
    await fresh.execute(
        """
        create table plain (id int primary key, note text);
        create table parent (id int primary key);
        create table child (id int references parent on delete cascade, unique (id));
        create table grandchild (id int references child (id) on update set null);
        create table looks (id int references parent);
        create table parts (id int) partition by range (id);
        create table part1 partition of parts for values from (0) to (10);
        create table log (what text);
        create table logged (id int, at timestamptz default now(), number serial, key uuid default gen_random_uuid());
        create table touched (id int, changed timestamptz);
        create table wild (id int);
        create table ruled (id int);
        create table guarded (id int);
        create view shows as select * from plain;
        create view "two of" as select p.* from parent p join part1 on true;
        create view acts as select note from plain;
        create function stamp() returns trigger language plpgsql as
            'begin new.changed := clock_timestamp(); return new; end';
        create function note() returns trigger language plpgsql as
            'begin insert into log (what) values (tg_op) on conflict do nothing; return null; end';
        create function anything() returns trigger language plpgsql as
            'begin execute ''drop table '' || tg_argv[0]; return null; end';
        create function adds(n int) returns int language sql as 'insert into plain values (n) returning id';
        create function asks(n int) returns bool language plpgsql as 'begin perform adds(n); return true; end';
        create function looks_up(n int) returns bigint language plpgsql as
            'begin return (select count(*) from plain where id = n); end';
        create trigger stamps before update on touched for each row execute function stamp();
        create trigger notes after insert on logged for each row execute function note();
        create trigger anything after delete on wild for each statement execute function anything('x');
        create trigger acts_so instead of insert on acts for each row execute function note();
        create rule also as on insert to ruled do also insert into log values ('x');
        alter table guarded add check (asks(id));
        create function by_default(n int default adds(1)) returns int language sql as 'select n';
        create domain asked as int check (asks(value));
        """
    )
    reach = await facts_reader.load_for_writes(fresh.fetch)
    for text, names in {
        "insert into plain values (1)": "plain",
        "update public.plain set note = 'x'": "plain",
        "insert into shows values (1)": "plain",
        'delete from "two of"': "parent parts child grandchild",
        "delete from parent": "parent child grandchild",
        "insert into looks values (1)": "looks",
        "insert into part1 values (1)": "parts",
        "truncate parts": "parts",
        "truncate plain cascade": "",
        "copy parts from stdin": "parts",
        "copy (delete from plain returning id) to stdout": "plain",
        "merge into plain using log on true when matched then delete": "plain",
        "with gone as (delete from log returning what) insert into plain select 1, what from gone": "log plain",
        "update touched set id = 1": "touched",
        "insert into logged values (1)": "logged log",
        "delete from wild": "",
        "insert into acts values ('x')": "plain log",
        "insert into ruled values (1)": "",
        "insert into guarded values (1)": "guarded plain",
        "select adds(1)": "plain",
        "select asks(1)": "plain",
        "select by_default()": "plain",
        "select '1'::asked": "plain",
        "explain analyze execute p": "",  # there is a function that may do anything
        "insert into log select 'x' where asks(1)": "log plain",
        "explain analyze insert into plain values (1)": "plain",
        "create table another (id int)": "",
        "call whatever()": "",
        "do 'begin end'": "",
        "selec": "",
        "insert into nobody values (1)": "*",
        "insert into plain values (1); delete from log": "plain log",
        "begin; insert into plain values (1); commit": "plain",
        "commit prepared 'x'": "",
        "refresh materialized view nobody": "",
    }.items():
        expected = {f'"public"."{name}"' for name in names.split()} if names not in ("", "*") else {names}
        assert reach.of(text) == expected, text
    for text in (
        "select looks_up(1)", "select nextval('x')", "select pg_notify('a', 'b')", "notify a", "set search_path = x",
        "select * from plain for update", "select pg_advisory_xact_lock(1)", "lock table plain", "vacuum plain",
        "commit", "savepoint x", "create temp table t (id int)", "select * from shows", "listen a", "fetch 1 from c",
    ):  # fmt: skip
        assert reach.of(text) == frozenset(), text
    assert reach.of("create temp table t as select adds(1)") == {'"public"."plain"'}
    known = await facts_reader.digest(fresh.fetch)
    await fresh.execute(
        """
        create function tells() returns event_trigger language plpgsql as
            'begin insert into log (what) values (tg_tag); end';
        create event trigger tells on ddl_command_end execute function tells();
        """
    )
    assert await facts_reader.digest(fresh.fetch) != known
    reach = await facts_reader.load_for_writes(fresh.fetch)
    assert reach.of("create temp table t (id int)") == {'"public"."log"'}
    known = await facts_reader.digest(fresh.fetch)
    await fresh.execute("alter event trigger tells disable")
    assert await facts_reader.digest(fresh.fetch) != known
    reach = await facts_reader.load_for_writes(fresh.fetch)
    assert reach.of("create temp table t (id int)") == frozenset()


async def test_a_read_of_a_partition_comes_from_the_whole_family(fresh: asyncpg.Connection) -> None:
    await fresh.execute(
        "create table whole (id int) partition by range (id);"
        "create table part partition of whole for values from (0) to (9) partition by range (id);"
        "create table leaf partition of part for values from (0) to (5)"
    )
    classifier = Classifier(await facts_reader.load(fresh.fetch))
    for name in ("whole", "part", "leaf"):
        assert classifier.classify(f"select * from {name}").reads == ('"public"."whole"',)
