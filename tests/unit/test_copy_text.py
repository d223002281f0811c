"""The query of a COPY is the user's, with literals where its parameters stood."""

from __future__ import annotations

import pytest

from raypg.core.copy_text import check_query, copy_query, literal, with_literals, without_semicolon
from raypg.core.sql_text import quoted_name
from raypg.errors import StatementNotAllowedError


def test_only_parameters_become_literals() -> None:
    sql = """select $1, '$1', "$1", $$ $1 $$, -- $1\n e'\\'$1', a$1, $2::int /* $2 */ from t where x=$1"""
    assert with_literals(sql, ["(A)", "(B)"]) == (
        """select (A), '$1', "$1", $$ $1 $$, -- $1\n e'\\'$1', a$1, (B)::int /* $2 */ from t where x=(A)"""
    )


def test_literals_hold_anything() -> None:
    assert literal(None, "int4") == "(NULL::int4)"
    assert literal("it's \\ $1", '"pg_catalog"."text"') == """(E'it''s \\\\ $1'::"pg_catalog"."text")"""
    assert quoted_name("a", 'b"c') == '"a"."b""c"'


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select 1;", "select 1"),
        ("select 1 ; -- end;", "select 1"),
        ("select ';'", "select ';'"),
        ("select 1 -- ;", "select 1"),
        ("select 1;;\n", "select 1"),
    ],
)
def test_the_semicolon_at_the_end_goes(sql: str, expected: str) -> None:
    assert without_semicolon(sql).rstrip() == expected


def test_columns_are_cast_by_place() -> None:
    assert copy_query("select a, a, c from t", ["", "text", "text[]"], 77) == (
        "SELECT (77)::pg_catalog.int4, q.c0, q.c1::pg_catalog.text, q.c2::pg_catalog.text[] FROM (\n"
        "select a, a, c from t\n) AS q(c0, c1, c2)"
    )


def test_without_key_and_casts_a_query_stays_as_it_is() -> None:
    assert copy_query("select a from t -- all;", ["", ""]) == "select a from t\n"
    assert copy_query("select a, b from t;", ["", "text"]) == (
        "SELECT q.c0, q.c1::pg_catalog.text FROM (\nselect a, b from t\n) AS q(c0, c1)"
    )


@pytest.mark.parametrize("sql", ["select 1", "values (1)", "table t", "with a as (select 1) select * from a", "selekt"])
def test_queries(sql: str) -> None:
    check_query(sql)


@pytest.mark.parametrize(
    "sql",
    ["insert into t values (1) returning a", "select 1; select 2", "show work_mem", "begin", "", "explain select 1"],
)
def test_other_statements_are_refused(sql: str) -> None:
    with pytest.raises(StatementNotAllowedError, match="read as Arrow"):
        check_query(sql)
