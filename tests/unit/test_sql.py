"""Classification of SQL texts: what counts as proven, what never may, and texts made to hurt the parser."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypg.core import sql as module
from raypg.core.sql import LONGEST, classify, shorten
from raypg.core.sql_text import first_word, highest_parameter, statement_count

READS = [
    "select 1",
    "SELECT 1;",
    "table t",
    "values (1, $1), (2, $2)",
    "(select a from t where b = $1 order by c desc nulls last limit 10 offset 2)",
    "select a from t union all (select b from u intersect select c from v) except select 1",
    "with recursive x(n) as (select 1 union all select n + 1 from x where n < 9) select * from x",
    "with x as materialized (select 1) select * from x, lateral (select x.*) y",
    "select count(*), max(a), string_agg(b, ',' order by c) filter (where d) from t group by rollup (e, f)",
    "select row_number() over (partition by a order by b rows between 1 preceding and current row) from t",
    "select lag(a) over w, percentile_cont(0.5) within group (order by a) from t window w as (order by b)",
    "select pg_catalog.lower(a), upper('x'), coalesce(a, b), greatest(1, 2), nullif(a, b) from t",
    "select a::int, cast(b as public.mood), '2020-01-01'::date, interval '1 day', date '2020-01-01' from t",
    "select extract(year from now()), position('a' in b), substring(a from 1 for 2), trim(a) from t",
    "select now() at time zone 'utc', overlay('a' placing 'b' from 1), a collate \"C\", xmlforest(a) from t",
    "select current_user, current_timestamp, current_date, localtime, session_user, current_catalog",
    "select * from t where a = any($1) and b in (1, 2) and c between 1 and 2 and d like 'x%' and e is null",
    "select * from t where exists (select 1 from u) and a > all (select b from u) and not c is true",
    "select case a when 1 then 'x' else 'y' end, array[1, 2], row(1, 2), a[1], b[1:2], (c).d from t",
    "select * from a natural join b left join c using (d) full join e on e.f = b.f cross join g",
    "select * from generate_series(1, 10) with ordinality as x(a, b), unnest(array[1], array[2]) y",
    "select * from rows from (generate_series(1, 2), json_to_record('{}') as (a int)) z",
    "select * from t tablesample system (10) repeatable (1)",
    "select * from t tablesample pg_catalog.bernoulli(1)",
    "select json_value(a, '$.x' returning int default 1 on empty), json_exists(a, '$'), a is json from t",
    "select json_object('a': 1), json_array(1, 2), json_objectagg(k: v), json_arrayagg(a order by b) from t",
    "select * from json_table('[]'::jsonb, '$[*]' columns (n for ordinality, a int path '$.a')) x",
    "select * from xmltable('/a' passing b columns c int path 'd')",
    "select a operator(pg_catalog.+) b from t order by a using <",
    "select random(), clock_timestamp(), gen_random_uuid(), pg_sleep(1)",
    "select pg_catalog.any_value(a) from t",
    "select current_setting('search_path'), to_regclass('t'), format_type(1, 2), pg_get_viewdef(1)",
    "select distinct on (a) a, grouping(b) from t group by a, b having count(*) > 1 fetch first 3 rows only",
    "select * from pg_stat_activity",
    'select "lower"(a) from t',
    "select /* nothing */ 1 -- done",
    "explain select * from t where a = $1",
    "explain (verbose, costs off, format json) select 1",
    "show search_path",
    "show all",
]

# Each would be sent twice, or leave something in the session, if it were taken for a read: text → part of
# reason.
TRAPS = {
    "select nextval('s')": "nextval",
    "select setval('s', 1)": "setval",
    "select lastval()": "lastval",
    "select a, (select nextval('s')) from t": "nextval",
    "select * from t where a = (values (nextval('s')))": "nextval",
    "select 1 order by nextval('s')": "nextval",
    "select count(*) filter (where pg_try_advisory_lock(a)) from t": "pg_try_advisory_lock",
    "select 1 limit nextval('s')": "nextval",
    "select sum(a) over (partition by nextval('s')) from t": "nextval",
    "select case when nextval('s') > 1 then 1 end": "nextval",
    "select array[nextval('s')]": "nextval",
    "select coalesce(null, nextval('s'))": "nextval",
    "select x.* from t, lateral (select nextval('s')) x": "nextval",
    "select 1 from a join b on nextval('s') > 1": "nextval",
    "with x as (select nextval('s')) select 1": "nextval",
    "select 1 union select nextval('s')": "nextval",
    "select * from rows from (generate_series(1, nextval('s')))": "nextval",
    "select json_object('a': nextval('s'))": "nextval",
    "select xmlelement(name a, nextval('s'))": "nextval",
    "select txid_current()": "txid_current",
    "select pg_notify('a', 'b')": "pg_notify",
    "select pg_advisory_lock(1)": "pg_advisory_lock",
    "select pg_catalog.pg_advisory_lock(1)": "pg_advisory_lock",
    "select set_config('search_path', 'x', false)": "set_config",
    "select setseed(0.5)": "setseed",
    "select query_to_xml('delete from t', true, true, '')": "query_to_xml",
    "select table_to_xml('t', true, true, '')": "table_to_xml",
    "select * from ts_stat('select a from t')": "ts_stat",
    "select lo_unlink(1)": "lo_unlink",
    "select pg_read_file('/etc/passwd')": "pg_read_file",
    "select pg_terminate_backend(1)": "pg_terminate_backend",
    "select * from dblink('', 'delete from t') as x(a int)": "dblink",
    "select my_function()": "my_function",
    "select app.lower(a) from t": "app.lower",
    "select db.pg_catalog.lower(a) from t": "db.pg_catalog.lower",
    'select "LOWER"(a) from t': "LOWER",
    "select any_value(a) from t": "any_value",
    "select uuidv7()": "uuidv7",
    "select 1 operator(app.+) 2": "operator of schema app",
    "select 1 where 1 operator(app.=) any (select 1)": "operator of schema app",
    "select 1 order by 1 using operator(app.<)": "operator of schema app",
    "select * from t tablesample system_rows(1)": "system_rows",
    "select * from t tablesample app.system(1)": "app.system",
    "select * from t for update": "locking",
    "select * from t for key share skip locked": "locking",
    "select * from (select * from t for share) x": "locking",
    "select * into u from t": "creates a table",
    "select 1 as a into temp u": "creates a table",
    "with x as (insert into t values (1) returning 1) select * from x": "INSERT",
    "with x as (with y as (delete from t returning a) select * from y) select * from x": "DELETE",
    "with x as (update t set a = 1 returning 1) select * from x": "UPDATE",
    "with x as (merge into t using s on t.a = s.a when matched then delete returning 1) select 1": "MERGE",
}


@pytest.mark.parametrize("text", READS)
def test_reads(text: str) -> None:
    verdict = classify(text)
    assert (verdict.kind, verdict.reason) == ("read", "")
    assert verdict.retryable
    assert verdict.clean
    assert verdict.statements == 1
    assert not verdict.insert_values
    assert not verdict.returning


@pytest.mark.parametrize(("text", "reason"), TRAPS.items())
def test_what_only_looks_like_a_read(text: str, reason: str) -> None:
    verdict = classify(text)
    assert verdict.kind == "write"
    assert not verdict.retryable
    assert not verdict.clean
    assert reason in verdict.reason


@pytest.mark.parametrize("text", TRAPS)
def test_explain_does_not_make_a_trap_harmless(text: str) -> None:
    verdict = classify(f"explain {text}")
    assert (verdict.kind, verdict.command, verdict.retryable) == ("utility", "EXPLAIN", False)


@pytest.mark.parametrize(
    "text", ["explain analyze select 1", "explain (analyze) select 1", "explain (costs, analyze 0) select 1"]
)
def test_explain_analyze_is_never_a_read(text: str) -> None:
    assert classify(text).kind == "utility"


@pytest.mark.parametrize(
    ("text", "kind", "command"),
    [
        ("insert into t values (1)", "write", "INSERT"),
        ("update t set a = 1", "write", "UPDATE"),
        ("delete from t", "write", "DELETE"),
        ("merge into t using s on t.a = s.a when matched then delete", "write", "MERGE"),
        ("with x as (select 1) insert into t select * from x", "write", "INSERT"),
        ("copy t from stdin", "write", "COPY"),
        ("copy (select 1) to stdout", "write", "COPY"),
        ("truncate t", "write", "TRUNCATE TABLE"),
        ("call p(1)", "write", "CALL"),
        ("do $$ begin end $$", "write", "DO"),
        ("execute s(1)", "write", "EXECUTE"),
        ("select 1 into t", "write", "SELECT INTO"),
        ("create table t (a int)", "utility", "CREATE TABLE"),
        ("create table t as select 1", "utility", "CREATE TABLE AS"),
        ("create index concurrently on t (a)", "utility", "CREATE INDEX"),
        ("create schema s", "utility", "CREATE SCHEMA"),
        ("alter table t add a int", "utility", "ALTER TABLE"),
        ("drop table t", "utility", "DROP"),
        ("set search_path = x", "utility", "SET"),
        ("set local statement_timeout = 1", "utility", "SET"),
        ("reset all", "utility", "RESET"),
        ("set role x", "utility", "SET"),
        ("listen a", "utility", "LISTEN"),
        ("notify a, 'b'", "utility", "NOTIFY"),
        ("vacuum t", "utility", "VACUUM"),
        ("prepare s as select 1", "utility", "PREPARE"),
        ("declare c cursor for select 1", "utility", "DECLARE CURSOR"),
        ("lock table t", "utility", "LOCK TABLE"),
        ("discard all", "utility", "DISCARD"),
        ("begin", "transaction", "BEGIN"),
        ("start transaction isolation level serializable", "transaction", "START TRANSACTION"),
        ("commit", "transaction", "COMMIT"),
        ("end", "transaction", "COMMIT"),
        ("rollback", "transaction", "ROLLBACK"),
        ("abort", "transaction", "ROLLBACK"),
        ("savepoint a", "transaction", "SAVEPOINT"),
        ("release a", "transaction", "RELEASE"),
        ("rollback to savepoint a", "transaction", "ROLLBACK TO"),
        ("prepare transaction 'x'", "transaction", "PREPARE TRANSACTION"),
        ("commit prepared 'x'", "utility", "COMMIT PREPARED"),
        ("rollback prepared 'x'", "utility", "ROLLBACK PREPARED"),
    ],
)
def test_kinds_and_commands(text: str, kind: str, command: str) -> None:
    verdict = classify(text)
    assert (verdict.kind, verdict.command, verdict.statements) == (kind, command, 1)
    assert not verdict.retryable
    assert not verdict.clean
    assert verdict.reason


@pytest.mark.parametrize("text", ["", "  \n", ";", " ;; ; ", "-- nothing", "/* nothing /* at all */ */"])
def test_empty(text: str) -> None:
    verdict = classify(text)
    assert (verdict.kind, verdict.statements, verdict.retryable, verdict.clean) == ("empty", 0, True, True)


def test_several_statements_are_never_a_read() -> None:
    two = classify("select $1; select $3 from t")
    assert (two.kind, two.statements, two.parameters) == ("write", 2, 3)
    assert not two.retryable
    assert not two.clean
    assert classify("select 1; begin").kind == "transaction"
    assert classify("insert into t values (1); insert into t values (2)").insert_values is False


@pytest.mark.parametrize(
    "text",
    ["selec 1", "select from where", "select '", "select $$", "a" * 300, "\ufeff", "/*", "select \ud800", ")"],
)
def test_invalid_sql_is_a_verdict_and_not_an_error(text: str) -> None:
    verdict = classify(text)
    assert verdict.kind == "invalid"
    assert not verdict.retryable
    assert not verdict.clean


def test_invalid_sql_is_still_counted_so_that_no_second_statement_slips_through() -> None:
    verdict = classify("select newer syntax $4 for tomorrow; drop table t")
    assert (verdict.kind, verdict.statements, verdict.parameters) == ("invalid", 2, 4)


def test_a_nul_does_not_hide_what_follows() -> None:
    assert classify("select 1\0; drop table t").kind == "invalid"


@pytest.mark.parametrize("wrong", [None, 1, b"select 1", ["select 1"], {}])
def test_only_strings(wrong: object) -> None:
    with pytest.raises(TypeError, match="must be a str"):
        classify(wrong)  # type: ignore[arg-type]


def test_a_subclass_of_str_will_do() -> None:
    class Text(str):
        __slots__ = ()

    assert classify(Text("select 12345")).kind == "read"
    assert type(next(reversed(module._cache))) is str


@pytest.mark.parametrize(
    ("values", "groupable"),
    [
        ("($1, $2)", True),
        ("(1, 'a', null, true, 1.5, b'1', default)", True),
        ("($1::int, cast($2 as app.mood), '{1,2}'::int[], array[$3, $4], row($5, 1))", True),
        ("(upper($1), pg_catalog.lower($2), $3 || 'x', $4 + 1, -$5, coalesce($6, 0))", True),
        ('(to_jsonb($1::text), current_user, md5($2), $3 collate "C", $4 is null)', True),
        ("($1), ($2)", False),
        ("(now())", False),
        ("(current_timestamp)", False),
        ("(current_date)", False),
        ("(localtimestamp(3))", False),
        ("('now')", False),
        ("('Today'::timestamptz)", False),
        ("(' tomorrow 12:00'::timestamptz)", False),
        ("(age($1))", False),
        ("(statement_timestamp())", False),
        ("(clock_timestamp())", False),
        ("(random())", False),
        ("(gen_random_uuid())", False),
        ("(nextval('s'))", False),
        ("(my_function($1))", False),
        ("((select 1))", False),
        ("($1 in (select a from t))", False),
        ("($1) on conflict do nothing", False),
        ("($1) on conflict (a) do update set a = excluded.a", False),
        ("($1) returning a", False),
        ("(1 operator(app.+) $1)", False),
        ("($1) order by 1", False),
        ("($1) limit 1", False),
    ],
)
def test_inserts_that_may_be_grouped(values: str, groupable: bool) -> None:
    for head in ("insert into t", "insert into app.t (a, b)", "insert into t as x overriding system value"):
        verdict = classify(f"{head} values {values}")
        assert (verdict.kind, verdict.command) == ("write", "INSERT")
        assert verdict.insert_values is groupable
        assert not verdict.retryable


@pytest.mark.parametrize(
    "text",
    [
        "insert into t default values",
        "insert into t select $1",
        "insert into t table u",
        "insert into t (values ($1) union values (2))",
        "with x as (select 1) insert into t values ($1)",
        "update t set a = $1",
    ],
)
def test_what_is_no_insert_of_one_row_of_values(text: str) -> None:
    assert classify(text).kind == "write"
    assert not classify(text).insert_values


@pytest.mark.parametrize(
    ("text", "returning"),
    [
        ("insert into t values (1) returning *", True),
        ("update t set a = 1 returning a, b", True),
        ("delete from t returning 1", True),
        ("merge into t using s on t.a = s.a when matched then delete returning t.a", True),
        ("with x as (delete from t returning a) insert into u select * from x", False),
        ("delete from t", False),
        ("select 'returning'", False),
    ],
)
def test_returning(text: str, returning: bool) -> None:
    assert classify(text).returning is returning


@pytest.mark.parametrize(
    ("text", "highest"),
    [
        ("select 1", 0),
        ("select $1, $1", 1),
        ("select $2 where $10 = '$99' -- $100", 10),
        ("insert into t values ($1, $2::int, upper($3))", 3),
        ("update t set a = $4 where b = any($7)", 7),
        ("selec $3, '$9', $tag$ $8 $tag$, \"$7\"", 3),
        ("explain select $5::int", 5),
    ],
)
def test_highest_parameter(text: str, highest: int) -> None:
    assert classify(text).parameters == highest


def test_long_texts_are_scanned_and_not_trusted() -> None:
    padding = f"/* {'x' * LONGEST} */"
    read = classify(f"{padding} select 1 where a = $3")
    assert (read.kind, read.command, read.statements, read.parameters) == ("write", "SELECT", 1, 3)
    assert classify(f"  begin {padding}").kind == "transaction"
    assert classify(f"{padding} insert into t values ($1)").insert_values is False
    assert classify(f"{padding} create table t ()").kind == "utility"
    two = classify(f"select '{'y' * LONGEST};' ; drop table t {padding}")
    assert (two.statements, two.kind) == (2, "write")


HOSTILE = """
import sys, threading, time
from raypg.core.sql import LONGEST, classify, shorten
def repeated(head, part, tail="", size=LONGEST):
    return head + part * ((size - len(head) - len(tail)) // max(len(part), 1)) + tail
texts = []
for size in (LONGEST, LONGEST + 9, 200_000):
    texts += [
        repeated("select ", "1+", "1", size),
        repeated("select 1", "::a", size=size),
        repeated("select 1", " isnull", size=size),
        repeated("select 1", " collate a", size=size),
        repeated("select 1", " at local", size=size),
        repeated("select 1", " union select 1", size=size),
        repeated("select from a", " natural join a", size=size),
        repeated("select a", "[1]", size=size),
        repeated("select ", "not ", "true", size),
        repeated("select ", "- ", "1", size),
        repeated("select ", "(", size=size),
        repeated("select ", "f(", size=size),
        repeated("select ", "array[", size=size),
        repeated("select ", "case when ", size=size),
        "select " + "(" * (size // 2 - 5) + ")" * (size // 2 - 5),
        repeated("", "/*", size=size),
        repeated("", "/**/", size=size),
        repeated("", "--\\n", size=size),
        repeated("", "$a$ $b$ ", size=size),
        repeated("", "'", size=size),
        repeated("", "E'\\\\", size=size),
        repeated("", '"', size=size),
        repeated("", "begin;", size=size),
        repeated("with a as (", "with a as (", size=size),
        repeated("", "\\x00", size=size),
        repeated("", "\\ud800", size=size),
    ]
texts += ["select " + "(" * 500_000 + ")" * 500_000, repeated("select ", "1+", "1", 1_000_000)]
slowest = 0.0
def run():
    global slowest
    for text in texts:
        before = time.perf_counter()
        verdict = classify(text)
        shorten(text)
        slowest = max(slowest, time.perf_counter() - before)
        assert not (verdict.retryable and verdict.kind == "read" and "1+" in text), text[:40]
threading.stack_size(2 * 1024 * 1024)
thread = threading.Thread(target=run)
thread.start()
thread.join()
print("slowest", slowest)
assert slowest < 5
"""


def test_texts_made_to_break_the_parser_neither_crash_nor_hang() -> None:
    """In a process of its own, on a quarter of the usual stack: a crash is a crash of the process."""
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert "slowest" in done.stdout


WORDS = [
    *("select", "from", "where", "(", ")", ",", ";", "''", "'", '"', "$1", "$$", "$a$", "--", "/*", "*/", "1", "1.5"),
    *("'x'", "a", "*", "insert", "into", "values", "returning", "with", "as", "update", "set", "=", "delete"),
    *("begin", "commit", "order", "by", "for", "e'", "\\", "operator", ".", "pg_catalog", "lower", "now", "nextval"),
    *("create", "table", "show", "explain", "analyze", "do", "copy", "é", "\n", "\0", "\ud800"),
]


@settings(max_examples=500, deadline=None, print_blob=True)
@given(
    st.lists(
        st.sampled_from(WORDS),
        max_size=25,
    )
)
def test_any_text_gets_a_verdict(words: list[str]) -> None:
    text = " ".join(words)
    verdict = classify(text)
    if verdict.kind == "read":
        assert (verdict.statements, verdict.reason) == (1, "")
        assert verdict.command in ("SELECT", "SHOW", "EXPLAIN")
        assert verdict.retryable
    assert len(shorten(text, 30)) <= 30


@settings(max_examples=200, deadline=None, print_blob=True)
@given(st.lists(st.sampled_from([*READS, *TRAPS, "begin", "insert into t values (1)"]), max_size=4))
def test_scanner_and_parser_count_alike(statements: list[str]) -> None:
    text = "\n;\n".join(statement.rstrip(";") for statement in statements)
    assert statement_count(text) == classify(text).statements == len(statements)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("select ';'; select E'\\';'; select 1", 3),
        ("select E'a\\\\'; select 'b\\'; select 1", 3),
        ('select ";"";" ; select 1', 2),
        ("select $$;$$; select $a$ ; $$ ; $a$; select a$b$c from t; select 1", 4),
        ("select 1 /* ; /* ; */ ; */ ; select 2 -- ; \n;", 2),
        ("select U&'\\0041;', b'1', x'2' ;;; ", 1),
        ("select $1; select $2$", 2),
        ("/* unfinished ;", 0),
        ("select 'unfinished ;", 1),
    ],
)
def test_scanner_knows_what_a_semicolon_is_in(text: str, count: int) -> None:
    assert statement_count(text) == count


def test_scanner_finds_first_words_and_parameters() -> None:
    assert first_word(" /* a */ -- b\n ((select 1))") == "SELECT"
    assert first_word("") == first_word("  12 ") == first_word("/* select") == ""
    assert highest_parameter("$1 $20 '$30' a$40 $$ $50 $$ $999999") == 20


@pytest.mark.parametrize(
    "text",
    [
        "select 'SECRET' || $1 from t where a = E'\\'SECRET' and b = $$SECRET$$ -- SECRET",
        "/* SECRET */ insert into t values ('SECRET', 1)",
        "alter role x password 'SECRET'",
        "create user x with encrypted password 'SECRET' valid until '2030-01-01'",
        "copy t from '/SECRET' with (delimiter ',')",
        "do $x$ begin perform 'SECRET'; end $x$",
        "set app.token = 'SECRET'",
        "selec 'SECRET' from t",
        "insert into t values ('SECRET",
        "select SECRET from\0 'SECRET'",
        f"select 'SECRET', '{'x' * LONGEST}'",
    ],
)
def test_a_shortened_text_shows_no_literal(text: str) -> None:
    short = shorten(text)
    assert "SECRET" not in short
    assert "\n" not in short
    assert short.split()[0].lower() == first_word(text).lower()


def test_a_shortened_text_can_be_recognised() -> None:
    assert shorten("select  a,\n\tb from t where c = 17 and d = $1") == ("select a, b from t where c = $2 and d = $1")
    assert shorten('select "a -- b", \'x\' from "t;"') == 'select "a -- b", $1 from "t;"'
    assert shorten("selec 1") == "SELEC …"
    assert shorten("'") == "…"
    long = shorten("select " + "abcdefgh, " * 100 + "1")
    assert len(long) == 200
    assert long.endswith("…")
    assert shorten("select a", 3) == "se…"


def test_a_verdict_travels() -> None:
    verdict = classify("select $1")
    assert pickle.loads(pickle.dumps(verdict)) == verdict


def test_the_cache_is_bounded_in_entries_and_characters() -> None:
    for n in range(module._CACHE_ENTRIES + 100):
        classify(f"select {n} as bounded")
    assert len(module._cache) == module._CACHE_ENTRIES
    for n in range(400):
        classify(f"select {n} /* {'x' * (LONGEST - 100)} */")
    assert sum(map(len, module._cache)) == module._cached_characters <= module._CACHE_CHARACTERS
    classify(f"select 1 /* {'x' * LONGEST} */")
    assert max(map(len, module._cache)) <= LONGEST


def test_the_cache_keeps_what_is_used() -> None:
    kept = "select 'kept in the cache'"
    classify(kept)
    for n in range(2 * module._CACHE_ENTRIES):
        classify(f"select {n} as passing")
        if n % 1000 == 0:
            classify(kept)
    assert kept in module._cache


def test_threads_share_the_cache() -> None:
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for n in range(3000):
                assert classify(f"select {n + offset}").kind == "read"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 100, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(map(len, module._cache)) == module._cached_characters


def test_a_cached_verdict_is_much_cheaper_than_a_new_one() -> None:
    def best(texts: list[str]) -> float:
        times = []
        for text in texts:
            before = time.perf_counter()
            classify(text)
            times.append(time.perf_counter() - before)
        return min(times)

    cold = best([f"select a, b from t where c = $1 and d = {n}" for n in range(100)])
    warm = best(["select a, b from t where c = $1 and d = 99"] * 100)
    assert warm * 5 < cold
