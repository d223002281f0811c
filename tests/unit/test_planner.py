"""Which lane a run of statements takes, and the texts that the lanes send."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raypg.core.forms import counting_form, returning_form, unnest_form
from raypg.core.planner import MOST_CHANGES, TableFacts, plan, unnest_types
from raypg.core.shape import default_is_clock, shape_of

PLAIN = TableFacts(family=(1,), kinds="r", columns=("a", "b"))
INT = ("pg_catalog", "int4", "scalar")
TEXT = ("pg_catalog", "text", "scalar")
INSERT = "insert into t (a, b) values ($1, $2)"


def lane(sql: str, facts: TableFacts | None = PLAIN, count: int = 100, **more: Any) -> str:
    return plan(shape_of(sql), facts, count, **{"types": [INT, TEXT], **more}).lane


def reason(sql: str, facts: TableFacts | None = PLAIN, count: int = 100, **more: Any) -> str:
    return plan(shape_of(sql), facts, count, **{"types": [INT, TEXT], **more}).reason


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        (INSERT, "unnest"),
        ("insert into t values ($1, $2)", "unnest"),
        ("insert into t (a, b) overriding system value values ($1, $2 || 'x')", "unnest"),
        ("insert into t (a, b) values ($1, $2::text);", "unnest"),
        ("insert into t (a, b) values ($1, lower($2))", "many"),
        ("insert into t (a, b) values ($1, default)", "many"),
        ("insert into t (a) values (1)", "many"),
        ("insert into t (a) values (array[$1]) ", "unnest"),
        ("insert into t (a, b) values ($1, $2) returning a", "many"),
        ("insert into t (a, b) values ($1, $2) on conflict do nothing", "many"),
        ("insert into t (a, b) values ($1, $2) on conflict (a) do update set b = excluded.b", "many"),
        ("insert into t (a, b) values ($1, $2), (3, 4)", "many"),
        ("insert into t (a, b) select $1, $2", "many"),
        ("insert into t (a, b) values ((select max(a) from t), $1)", "many"),
        ("update t set b = $2 where a = $1", "many"),
        ("update t set b = $2 where a = $1 returning *", "many"),
        ("delete from t where a = $1", "many"),
        ("delete from t using u where a = $1 and u.b = t.b", "many"),
        ("select * from t where a = $1", "single"),
        ("insert into t (a, b) values (nextval('s'), $1)", "single"),
        ("insert into t (a, b) values (f($1), $2)", "single"),
        ("insert into t (a, b) values ($1, pg_notify('x', $2))", "single"),
        ("insert into t (a, b) values ($1, now())", "single"),
        ("update t set b = $1 where pg_advisory_lock(5) is null", "single"),
        ("update t set b = current_timestamp where a = $1", "single"),
        ("insert into t (a) values ('now'::timestamptz)", "single"),
        ("with x as (delete from u returning *) insert into t select * from x", "single"),
        ("with x as (select 1) update t set a = 1", "single"),
        ("update t set a = 1 where current of c", "single"),
        ("merge into t using u on t.a = u.a when matched then delete", "single"),
        ("call f($1)", "single"),
        ("vacuum", "single"),
        ("notify x", "single"),
        ("insert into t values (...)", "single"),
        ("select 1; select 2", "single"),
        ("", "single"),
    ],
)
def test_by_the_text(sql: str, expected: str) -> None:
    assert lane(sql) == expected


def test_one_is_single_and_few_are_no_array() -> None:
    assert lane(INSERT, count=1) == "single"
    assert lane(INSERT, count=2) == "many"


def test_changes_are_bounded_as_others_wait_for_their_locks() -> None:
    assert plan(shape_of("update t set a = $1"), PLAIN, 9999).most == MOST_CHANGES
    assert plan(shape_of(INSERT), PLAIN, 9999, types=[INT, TEXT]).most > 9999


@pytest.mark.parametrize(
    ("changes", "insert", "update"),
    [
        ({"kinds": "rv"}, "single", "single"),
        ({"kinds": "f"}, "single", "single"),
        ({"kinds": ""}, "single", "single"),
        ({"kinds": "prr"}, "unnest", "many"),
        ({"row_security": True}, "single", "single"),
        ({"triggers": True}, "single", "single"),
        ({"rules": True}, "single", "single"),
        ({"deferrable": True}, "single", "single"),
        ({"self_reference": True}, "many", "many"),
        ({"foreign_keys": True}, "unnest", "many"),
        ({"actions": True}, "unnest", "single"),
        ({"isolation": "repeatable read"}, "single", "single"),
        ({"isolation": "serializable"}, "single", "single"),
        ({"clocked": ("c",)}, "single", "many"),
        ({"clocked": ("a",)}, "unnest", "many"),
        ({"computed": ("c",)}, "single", "many"),
        ({"computed": ("b",)}, "unnest", "many"),
        ({"ticking": ("c",)}, "many", "many"),
        ({"ticking": ("b",)}, "unnest", "many"),
    ],
)
def test_by_the_table(changes: dict[str, Any], insert: str, update: str) -> None:
    facts = replace(PLAIN, **changes)
    assert lane(INSERT, facts) == insert
    assert lane("update t set b = $2 where a = $1", facts) == update
    for sql in (INSERT, "update t set b = $2 where a = $1"):
        assert reason(sql, facts)


def test_what_is_left_to_a_default() -> None:
    clocked = replace(PLAIN, clocked=("b",))
    assert lane("insert into t (a) values ($1)", clocked) == "single"
    assert lane("insert into t values ($1)", clocked) == "single"
    assert lane("insert into t values ($1, $2)", clocked) == "unnest"
    assert lane("insert into t (a, b) values ($1, default)", clocked) == "single"
    assert lane("update t set b = default where a = $1", clocked) == "single"
    conflict = "insert into t (a, b) values ($1, $2) on conflict (a) do update set b = default"
    assert lane(conflict, clocked) == "single"
    assert lane("insert into t (a) select $1", clocked) == "single"


def test_no_table_no_group() -> None:
    assert lane(INSERT, None) == "single"


def test_what_it_reads_may_hide_something() -> None:
    sql = "insert into t (a, b) select a, $1 from v"
    assert lane(sql) == "many"
    assert lane(sql, hiding=['"v"']) == "single"


def test_the_clock_may_be_shared_if_the_user_says_so() -> None:
    clocked = replace(PLAIN, clocked=("c",))
    assert "shared_now" in reason(INSERT, clocked)
    assert lane(INSERT, clocked, shared_now=True) == "unnest"
    assert lane("update t set b = now() where a = $1", shared_now=True) == "many"
    assert lane("insert into t (a, b) values ($1, now())", shared_now=True) == "many"


def test_in_a_transaction_that_is_there_anyway() -> None:
    for changes in ({"deferrable": True}, {"isolation": "serializable"}, {"clocked": ("c",)}):
        facts = replace(PLAIN, **changes)  # type: ignore[arg-type]
        assert lane("update t set b = now() where a = $1", facts, in_transaction=True) == "many"
    assert lane(INSERT, replace(PLAIN, triggers=True), in_transaction=True) == "single"


@pytest.mark.parametrize(
    "kind",
    [
        ("pg_catalog", "int4", "array"),
        ("pg_catalog", "_int4", "scalar"),
        ("public", "pair", "composite"),
        ("pg_catalog", "int4range", "range"),
        ("pg_catalog", "point", "scalar"),
        ("pg_catalog", "bit", "scalar"),
    ],
)
def test_values_that_look_like_arrays_are_no_elements(kind: tuple[str, str, str]) -> None:
    assert lane(INSERT, types=[INT, kind]) == "many"
    assert kind[1] in reason(INSERT, types=[INT, kind])
    assert lane(INSERT, types=None) == "many"


def test_types_of_arrays() -> None:
    assert unnest_types([INT, ("My", 'odd"name', "scalar")]) == ['"pg_catalog"."int4"[]', '"My"."odd""name"[]']


@pytest.mark.parametrize(
    ("expression", "clock"),
    [
        ("now()", True),
        ("CURRENT_TIMESTAMP", True),
        ("(CURRENT_DATE + 1)", True),
        ("stamp()", False),
        ("f(now())", False),
    ],
)
def test_defaults_that_are_the_clock(expression: str, clock: bool) -> None:
    assert default_is_clock(expression) is clock


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        (
            "INSERT INTO t (a, b) VALUES ($1, $2)",
            "INSERT INTO t (a, b) SELECT raypg_row.p1, raypg_row.p2 FROM ROWS FROM "
            "(pg_catalog.unnest($1::X[]), pg_catalog.unnest($2::Y[])) AS raypg_row(p1, p2)",
        ),
        (
            """insert into "values (" /* values ( */ values ( $2, ('$1)' || $1), (($2)) ) ; -- values (""",
            """insert into "values (" /* values ( */ SELECT  raypg_row.p2, """
            "('$1)' || raypg_row.p1), ((raypg_row.p2))  FROM ROWS FROM "
            "(pg_catalog.unnest($1::X[]), pg_catalog.unnest($2::Y[])) AS raypg_row(p1, p2)",
        ),
        ("insert into t values ($1), ($2)", None),
        ("insert into t values ($1, $2) returning a", None),
        ("insert into t select $1, $2", None),
        ("insert into t values ($1, $2", None),
    ],
)
def test_the_form_with_arrays(sql: str, expected: str | None) -> None:
    assert unnest_form(sql, ["X[]", "Y[]"]) == expected


def test_forms_end_where_the_statement_ends() -> None:
    assert counting_form("update t set a = ';--' -- x\n ; ") == (
        "WITH raypg_done AS (update t set a = ';--'\nRETURNING 1) SELECT pg_catalog.count(*) FROM raypg_done"
    )
    assert returning_form("delete from t returning a;", 2) == (
        "WITH raypg_done AS (delete from t returning a\n) "
        "SELECT $3::pg_catalog.int8 AS raypg_ordinal, raypg_done.* FROM raypg_done"
    )


def test_shape_of_what_cannot_be_parsed() -> None:
    assert shape_of("INSERT INTO audit_log VALUES (...)").target == "audit_log"
    assert shape_of("insert into App . Log values (...)").target == "app.log"
    assert shape_of("INSERT INTO f(x) VALUES (...)").target == "f"
    for sql in ("WITH x AS (DELETE FROM y) INSERT INTO t ...", "insert into t values (...); drop table x", "selekt"):
        assert not shape_of(sql).target
