"""Which tables a statement may write to, without a server: what reaches further than it says, and what does not."""

from __future__ import annotations

from typing import Any

from catalogues import catalogue, function, relation

from raypg.core.facts_building import build
from raypg.core.reach import ANY_TABLE, ANYTHING, NOTHING, Reach

T, U = relation("t"), relation("u")
WRITES_U = function("g", "insert into u values (1) returning 1", volatility="v")
U_ONLY = frozenset(('"public"."u"',))


def reach(*functions: dict[str, Any], **rows: list[dict[str, Any]]) -> Reach:
    known = catalogue(relations=[T, U], functions=[WRITES_U, *functions], **rows)
    return Reach(build(known), known)


def test_defaults_of_arguments_run_with_the_call() -> None:
    known = reach(
        function("f", "select x", defaults="g()"),
        function("c", "c", "c", defaults="1, (2 + g())"),
        function("h", "select x", defaults="1"),
        function("further", "select f()"),
    )
    assert known.of("select f()") == known.of("select c()") == known.of("select further()") == U_ONLY
    assert known.of("select h()") == NOTHING


def test_checks_of_domains_and_casts_run_where_their_types_are_named() -> None:
    known = reach(
        function("takes", "select 1", types=["checked"]),
        function("block", "begin return '1'::checked; end", "plpgsql", volatility="v"),
        domains=[{"name": "checked", "checks": ["(g() > 0)"]}],
    )
    for text in ("select '1'::checked", "select checked('1')", "select takes('1')", "select block()"):
        assert known.of(text) == U_ONLY, text
    assert known.of("select '1'::int") == NOTHING
    cast = {"context": "e", "target": "text", "schema": "public", "function": "g", "type": "odd"}
    assert reach(casts=[cast]).of("select '1'::odd") == U_ONLY
    # A function that is only declared carelessly writes nothing, and is no reason to drop anything.
    careless = function("looks", "begin return $1 ~ '@'; end", "plpgsql", volatility="v")
    assert reach(careless, domains=[{"name": "email", "checks": ["looks(VALUE)"]}]).of("select 'a'::email") == NOTHING


def test_functions_of_operators_run_where_these_stand() -> None:
    known = reach(
        function("block", "begin return 1 #+ 1; end", "plpgsql", volatility="v"),
        operators=[{"name": "#+", "schema": "public", "function": "g", "types": []}],
    )
    assert known.of("select 1 #+ 1") == known.of("select block()") == U_ONLY
    assert known.of("select 1 + 1") == NOTHING


def test_what_was_prepared_may_write_to_any_table_and_changes_no_catalogue_by_itself() -> None:
    texts = (
        "execute p",
        "execute p(1)",
        "explain analyze execute p",
        "create temp table x as execute p",
        "select 1; execute p",
    )
    for text in texts:
        assert reach().of(text) == ANY_TABLE, text
        # … but a function that it calls may.
        assert reach(function("makes", "create table x ()")).of(text) == ANYTHING, text
    assert reach().of("create table x as execute p") == ANYTHING
    assert reach().of("prepare p as insert into t values (1)") == NOTHING


def test_a_cursor_reaches_what_it_does_when_it_is_declared() -> None:
    for hold in ("", " with hold"):
        assert reach().of(f"declare c cursor{hold} for select g()") == U_ONLY
    for text in ("fetch 10 from c", "fetch all c", "move forward 3 in c", "close c"):
        assert reach().of(text) == NOTHING, text
    opens = function(
        "opens", "declare c refcursor; begin open c for select g(); return c; end", "plpgsql", volatility="v"
    )
    assert reach(opens).of("select opens()") == U_ONLY


def test_event_triggers_run_with_any_change_of_the_schema() -> None:
    told = reach(events=[{"function_schema": "public", "function": "g"}])
    for text in ("create temp table x (a int)", "create temp table x as select 1"):
        assert (told.of(text), reach().of(text)) == (U_ONLY, NOTHING), text
    assert told.of("create table x (a int)") == ANYTHING
    assert told.of("select 1") == NOTHING


def test_nothing_is_believed_of_texts_that_mean_something_else_to_the_server() -> None:
    known = reach(settings=[{"strings": "off"}])
    for text in ("select 'a'", "create temp table x as select 'a'", "create temp table x (a int)", "execute p"):
        assert known.of(text) == ANYTHING, text
