"""Classification without a server: what taints what, what is learnt, and texts made to hurt."""

from __future__ import annotations

import time
from typing import Any

import pytest
from catalogues import catalogue, function, relation
from hypothesis import given, settings
from hypothesis import strategies as st
from statements import corpus

from raypg.core import functions
from raypg.core.classifier import Classifier
from raypg.core.facts import Facts
from raypg.core.facts_building import build, seeds
from raypg.core.mentions import mentions


def facts(tainted: dict[str, Any] | None = None, **rows: list[dict[str, Any]]) -> Facts:
    return build(catalogue(**rows), tainted)


def kind(sql: str, **rows: list[dict[str, Any]]) -> str:
    return Classifier(facts(**rows)).classify(sql).kind


T = relation("t")


def test_a_read_of_a_known_table_is_one() -> None:
    verdict = Classifier(facts(relations=[T])).classify("select a, count(*) from t join t u using (a) group by a")
    assert (verdict.kind, verdict.reason, verdict.reads) == ("READ", "", ('"public"."t"',))
    assert (verdict.query_type, verdict.deterministic, verdict.command) == ("read_complex", True, "SELECT")


def test_what_nobody_knows_is_unknown() -> None:
    assert kind("select * from t") == "UNKNOWN"
    assert kind("select f(1)") == "UNKNOWN"
    assert kind("select * from other.t", relations=[T]) == "UNKNOWN"
    assert kind("select * from public.t", relations=[T]) == "READ"
    assert kind("with t as (select 1) select * from t") == "READ"
    assert kind("with t as (select 1) select * from s.t") == "UNKNOWN"


def test_one_bad_thing_of_a_name_spoils_the_name() -> None:
    other = relation("t", "other", persistence="u")
    assert kind("select * from t", relations=[T, other]) == "SESSION"
    assert kind("select * from public.t", relations=[T, other]) == "READ"
    writer = function("lower", "insert into t values (1) returning 1", schema="mine")
    assert kind("select lower('A')", functions=[writer]) == "WRITE"
    assert kind("select pg_catalog.lower('A')", functions=[writer]) == "READ"
    assert kind("select upper('A')", functions=[writer]) == "READ"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (relation("t", kind="f"), "UNKNOWN"),
        (relation("t", kind="S"), "SESSION"),
        (relation("t", parts=True), "UNKNOWN"),
        (relation("t", kind="p"), "READ"),
        (relation("t", kind="m"), "READ"),
        (relation("t", kind="v", definition=" SELECT 1 AS a;"), "READ"),
        (relation("t", kind="v", definition=" SELECT nextval('s'::regclass) AS a;"), "WRITE"),
        (relation("t", kind="v", definition=" SELECT newer_than_the_parser(("), "UNKNOWN"),
        (relation("t", policies=["(owner = CURRENT_USER)"]), "READ"),
        (relation("t", policies=["(setval('s', 1) > 0)"]), "WRITE"),
        (relation("pg_stat_activity", "pg_catalog", kind="v"), "SESSION"),
    ],
)
def test_kinds_of_relations(row: dict[str, Any], expected: str) -> None:
    assert kind(f"select * from {row['name']}", relations=[row]) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (function("f", "select 1"), "READ"),
        (function("f", "select 1", volatility="v"), "READ"),
        (function("f", "select 1; select nextval('s')"), "WRITE"),
        (function("f", "select 'a;b'; insert into t values (1)"), "WRITE"),
        (function("f", "BEGIN ATOMIC\n SELECT 1;\nEND"), "READ"),
        (function("f", "BEGIN ATOMIC\n SELECT 1;\n SELECT nextval('s');\nEND"), "WRITE"),
        (function("f", "RETURN (1 + 1)"), "READ"),
        (function("f", "select 1", defaults="nextval('s'::regclass)"), "WRITE"),
        (function("f", "create table x ()"), "DDL"),
        (function("f", "this is not sql"), "UNKNOWN"),
        (function("f", "begin return 1; end", "plpgsql"), "READ"),
        (function("f", "begin return 1; end", "plpgsql", volatility="v"), "WRITE"),
        (function("f", "begin return nextval('s'); end", "plpgsql"), "WRITE"),
        (function("f", "begin return nextval  ('s'); end", "plpgsql"), "WRITE"),
        (function("f", "begin return nextval /* ( */ ('s'); end", "plpgsql"), "WRITE"),
        (function("f", "begin return Pg_Catalog . NextVal('s'); end", "plpgsql"), "WRITE"),
        (function("f", "begin execute 'x'; end", "plpgsql"), "WRITE"),
        (function("f", "begin return query EXECUTE $1; end", "plpgsql"), "WRITE"),
        (function("f", "begin return $$nextval('s')$$; -- execute\nend", "plpgsql"), "READ"),
        (function("f", 'begin return "nextval"(1); end', "plpgsql"), "UNKNOWN"),
        (function("f", "begin return nobody_knows(1); end", "plpgsql"), "UNKNOWN"),
        (function("f", "f", "c"), "READ"),
        (function("f", "f", "c", volatility="v"), "WRITE"),
        (function("f", "f", "plpython3u", volatility="i"), "WRITE"),
        (function("f", "select 1", kind="p"), "WRITE"),
        (function("crosstab", "crosstab", "c"), "WRITE"),
        (function("f", "", "internal", kind="a", calls=[["pg_catalog", "int4pl"]]), "READ"),
        (function("f", "", "internal", kind="a", calls=[["pg_catalog", "nextval"]]), "WRITE"),
    ],
)
def test_kinds_of_functions(row: dict[str, Any], expected: str) -> None:
    assert kind(f"select {row['name']}(1)", functions=[row], relations=[T]) == expected


def test_taint_travels_as_far_as_it_is_used() -> None:
    rows = {
        "functions": [
            function("writer", "insert into t values (1) returning 1"),
            function("caller", "select writer()"),
            function("block", "begin return caller(); end", "plpgsql", volatility="i"),
            function("even", "select odd()"),
            function("odd", "select even()"),
            function("ping", "select pong(), nextval('s')"),
            function("pong", "select ping(), setval('s', 1)"),
        ],
        "relations": [T, relation("v", kind="v", definition="select block() as b from t")],
        "operators": [{"name": "<+>", "schema": "public", "function": "caller", "types": []}],
    }
    for sql in ("select block()", "select * from v", "select 1 <+> 2", "select x.caller from t x", "select ping()"):
        assert kind(sql, **rows) == "WRITE", sql
    assert kind("select even() + 1", **rows) == "READ"


def test_domains_casts_and_operator_classes_taint_their_types_and_what_has_them() -> None:
    writer = function("writer", "insert into t values (1) returning true")
    rows: dict[str, list[dict[str, Any]]] = {
        "functions": [writer, function("takes", "select 1", types=["d"])],
        "relations": [T, relation("has_d"), relation("plain")],
        "domains": [{"name": "d", "checks": ["writer()"]}, {"name": "fine", "checks": ["(VALUE > 0)"]}],
    }
    tainted = {"d": (["d", "_d"], ["has_d"])}
    classifier = Classifier(facts(tainted, **rows))
    expected = {
        "select '1'::d": "WRITE",
        "select d('1')": "UNKNOWN",
        "select '{1}'::d[]": "WRITE",
        "select takes(1)": "WRITE",
        "select * from has_d": "WRITE",
        "select * from plain": "READ",
        "select '1'::fine": "READ",
    }
    assert {sql: classifier.classify(sql).kind for sql in expected} == expected
    assert seeds(classifier.facts) == {"d", "_d"}
    cast = {"schema": "public", "function": "writer", "context": "i", "target": "int4", "type": "mine"}
    assert kind("select '1'::mine", functions=[writer], casts=[cast]) == "WRITE"
    assert kind("select 1::int", functions=[writer], casts=[cast]) == "READ"
    comparison = {"type": "mine", "schema": "public", "function": "writer"}
    assert kind("select '1'::mine", functions=[writer], classes=[comparison]) == "WRITE"


def test_where_anything_may_write_nothing_is_a_read() -> None:
    writer = function("writer", "insert into t values (1) returning true")
    equals = {"name": "=", "schema": "public", "function": "writer", "types": []}
    assert kind("select case 1 when 2 then 3 end", functions=[writer], operators=[equals]) == "UNKNOWN"
    cast = {"schema": "public", "function": "writer", "context": "i", "target": "int4", "type": None}
    assert kind("select '1'", functions=[writer], casts=[cast]) == "UNKNOWN"
    assert kind("select '1'", functions=[writer], casts=[cast | {"context": "a"}]) == "UNKNOWN"
    explicit = cast | {"context": "e"}
    assert kind("select '1'", functions=[writer], casts=[explicit]) == "READ"
    assert kind("select x::int4", functions=[writer], casts=[explicit]) == "WRITE"


def test_where_strings_end_elsewhere_for_the_server_nothing_is_a_read() -> None:
    assert kind("select 'a\\'', nextval('s') --'", settings=[{"strings": "on"}]) == "UNKNOWN"
    assert kind("select 1", settings=[{"strings": "on"}]) == "READ"
    assert kind("select 'a\\'", settings=[{"strings": "off"}]) == "UNKNOWN"


@pytest.mark.parametrize("name", sorted((functions.FORBIDDEN | functions.LOCAL) - {"currtid2", "ts_rewrite"}))
def test_no_forbidden_function_is_a_read(name: str) -> None:
    classifier = Classifier(facts())
    for sql in (f"select {name}()", f"select pg_catalog.{name}(1, 'a')", f"select * from {name}()"):
        assert classifier.classify(sql).kind != "READ", sql


def test_deterministic_is_what_no_clock_and_no_chance_changes() -> None:
    rows = {"relations": [T], "functions": [function("f", "select 1"), function("g", "select random()")]}
    classifier = Classifier(facts(**rows))
    for sql in (
        *("select 1", "select lower(a) from t where b = $1", "select f()", "select a from t order by a limit 1"),
        "select tableoid from t",
    ):
        assert classifier.classify(sql).deterministic, sql
    for sql in (
        *("select now()", "select current_date", "select 'now'::timestamptz", "select random()", "select g()"),
        *(
            "select a from t limit 1",
            "select * from t tablesample system (1)",
            "explain select 1",
            "select age(a) from t",
        ),
        *("select has_table_privilege('t', 'select')", "select localtimestamp"),
        *(
            "select ctid from t",
            "select t.xmin from t",
            "select a from t where (t).xmax = '0'",
            "select cmin, cmax from t",
        ),
    ):
        assert (classifier.classify(sql).kind, classifier.classify(sql).deterministic) == ("READ", False), sql


@pytest.mark.parametrize(
    ("sql", "query_type", "writes"),
    [
        ("select a from t", "read_simple", ()),
        ("select a from t group by a having count(*) > 1", "read_complex", ()),
        ("insert into t values (1)", "write_simple", ('"t"',)),
        ("insert into s.t values (1), (2)", "write_bulk", ('"s"."t"',)),
        ('insert into "T" select 1', "write_bulk", ('"T"',)),
        ("update t set a = 1 where a = 2", "write_simple", ('"t"',)),
        ("update t set a = 1", "write_bulk", ('"t"',)),
        ("with x as (delete from t returning *) select * from x", "write_simple", ('"t"',)),
        ("truncate t, u", "write_bulk", ('"t"', '"u"')),
        ("copy t from stdin", "write_bulk", ('"t"',)),
        ("copy t to '/tmp/x'", "write_bulk", ()),
        ("drop table t", "ddl", ()),
        ("begin", "transaction", ()),
        ("begin; select 1; commit", "transaction", ()),
        ("select 1; select 2", "unknown", ()),
        ("reset all", "session", ()),
        ("fetch 1 from c", "session", ()),
        ("discard all", "session", ()),
        ("unlisten *", "session", ()),
        ("execute p", "session", ()),
        ("explain execute p", "session", ()),
        ("checkpoint", "ddl", ()),
        ("vacuum t", "ddl", ('"t"',)),
        ("alter system set work_mem = '1MB'", "ddl", ()),
        ("prepare transaction 'x'", "transaction", ()),
        ("commit prepared 'x'", "transaction", ()),
        ("", "unknown", ()),
        ("-- nothing", "unknown", ()),
    ],
)
def test_query_types_and_targets(sql: str, query_type: str, writes: tuple[str, ...]) -> None:
    verdict = Classifier(facts(relations=[T])).classify(sql)
    assert (verdict.query_type, verdict.writes) == (query_type, writes)
    assert 0.0 <= verdict.complexity <= 1.0
    assert bool(verdict.reason) == (verdict.kind != "READ")


def test_a_refusal_is_learnt_until_the_catalogue_changes() -> None:
    classifier = Classifier(facts(relations=[T]))
    assert classifier.classify("select * from t").kind == "READ"
    classifier.learn("select * from t", "a replica refused it")
    verdict = classifier.classify("select * from t")
    assert (verdict.kind, verdict.reason) == ("UNKNOWN", "a replica refused it")
    classifier.update(facts(relations=[T]))
    assert classifier.classify("select * from t").kind == "READ"
    assert classifier.counts == {"READ": 2, "UNKNOWN": 1}


def test_the_memory_is_bounded() -> None:
    classifier = Classifier(facts(relations=[T]))
    for number in range(5000):
        classifier.classify(f"select {number} from t")
        classifier.learn(f"select {number} from u", "refused")
    assert len(classifier._known) <= 4096
    assert len(classifier._learnt) <= 4096
    assert classifier._characters == sum(map(len, classifier._known))


HOSTILE = {
    "nested parentheses": "select " + "(" * 500_000 + "1" + ")" * 500_000,
    "nested parentheses, as many as are parsed": "select " + "(" * 8_000 + "1" + ")" * 8_000,
    "long sums": "select 1" + "+1" * 500_000,
    "sums, as many as are parsed": "select 1" + "+1" * 8_000,
    "a NUL": "select 1\0; delete from t",
    "only NULs": "\0" * 1_000_000,
    "an open string": "select '" + "x" * 1_000_000,
    "an open name": 'select "' + "x" * 10_000,
    "an open comment": "/*" * 100 + "x" * 10_000,
    "open comments": "/*" * 500_000,
    "open dollars": "select $a$" + "x" * 10_000,
    "quotes": "'" * 999_999,
    "semicolons": ";" * 1_000_000,
    "a lone surrogate": "select '\ud800'",
    "nested selects": "select * from (" * 1_000 + "select 1" + ") x" * 1_000,
    "nested unions": "(" * 5_000 + "select 1" + " union select 1)" * 1_000,
    "a long list": "select 1 where 1 in (" + "1," * 7_000 + "1)",
    "spaces": " " * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_texts_made_to_hurt(name: str) -> None:
    classifier = Classifier(facts())
    started = time.perf_counter()
    verdict = classifier.classify(HOSTILE[name])
    again = classifier.classify(HOSTILE[name])
    assert verdict == again
    assert time.perf_counter() - started < 2.0
    assert verdict.kind in ("UNKNOWN", "READ")
    if verdict.kind == "READ":
        assert "as many as are parsed" in name or name in ("nested selects", "a long list")


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_no_text_raises(text: str) -> None:
    assert Classifier().classify(f"select {text}").kind


def test_only_strings_are_classified() -> None:
    with pytest.raises(TypeError, match="must be a str"):
        Classifier().classify(b"select 1")  # type: ignore[arg-type]


def best(call: Any, texts: list[str], rounds: int = 7) -> float:
    """Seconds a text, in the best of several rounds."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for text in texts:
            call(text)
        found.append((time.perf_counter() - started) / len(texts))
    return min(found)


def test_a_verdict_is_quick() -> None:
    """Cached at most 2 µs, cold at most 150 µs, over the corpus."""
    texts = [statement.sql for statement in corpus()]
    classifier = Classifier(facts(relations=[relation("users"), relation("orders")]))
    for text in texts:
        classifier.classify(text)
    assert best(classifier.classify, texts) <= 2e-6
    assert best(classifier._judge, texts) <= 150e-6
    assert best(mentions, texts) <= 150e-6


def test_what_a_function_reads_is_read_by_who_calls_it() -> None:
    rows = {
        "relations": [T, relation("u"), relation("v", kind="v", definition="select total() as a from t")],
        "functions": [function("total", "select sum(a) from u"), function("twice", "select 2 * total()")],
        "operators": [{"name": "<+>", "schema": "public", "function": "twice", "types": []}],
    }
    classifier = Classifier(facts(**rows))
    for sql in ("select total() from t", "select twice() from t", "select * from v", "select t.total from t"):
        verdict = classifier.classify(sql)
        assert (verdict.kind, verdict.deterministic) == ("READ", True), sql
        assert set(verdict.reads) == {'"public"."t"', '"public"."u"'}, sql
    assert not classifier.classify("select a <+> 1 from t").deterministic  # what it reads is not known
    assert classifier.classify("select a + 1 from t").deterministic


def test_what_depends_on_who_asks_is_not_deterministic() -> None:
    rows = [relation("t", policies=["owner = current_user"]), relation("u"), relation("none", policies=[])]
    rows.append(relation("mine", kind="v", definition="select * from t"))
    classifier = Classifier(facts(relations=rows))
    for name, steady in (("t", False), ("none", False), ("mine", False), ("u", True)):
        verdict = classifier.classify(f"select * from {name}")
        assert (verdict.kind, verdict.deterministic) == ("READ", steady), name
    assert '"public"."t"' in classifier.classify("select * from t").reads


def test_an_immutable_function_that_names_a_table_is_not_believed() -> None:
    rows = {
        "relations": [T],
        "functions": [
            function("liar", "begin return (select sum(a) from t); end", "plpgsql", volatility="i"),
            function("honest", "begin return 1; end", "plpgsql", volatility="i"),
        ],
    }
    classifier = Classifier(facts(**rows))
    assert not classifier.classify("select liar() from t").deterministic
    assert classifier.classify("select honest() from t").deterministic
