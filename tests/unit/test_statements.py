"""Statements are grouped by what they do; what stands in their literals is nowhere."""

from __future__ import annotations

import time

import pytest

from raypg.core.statements import identify, shown

SECRET = "hunter2hunter2"
CARD = "4111111111111111"


@pytest.mark.parametrize(
    "sql",
    [
        f"select * from users where password = '{SECRET}' and card = {CARD}",
        f"insert into users values ('{SECRET}', {CARD}), (E'{SECRET}', {CARD})",
        f"update users set card = {CARD} where token = $${SECRET}$$",
        f"create user bob password '{SECRET}' valid until '{SECRET}'",
        f"alter role bob set app.token = '{SECRET}'",
        f"set app.token to '{SECRET}'",
        f"set app.pin = {CARD}",
        f"do $body$ begin perform login('{SECRET}', {CARD}); end $body$",
        f"create function f() returns text language sql as $$ select '{SECRET}' $$",
        f"create table t (a bigint default {CARD}, b text default '{SECRET}')",
        f"alter table t add check (a > {CARD} and b <> '{SECRET}')",
        f"prepare p as select {CARD}, '{SECRET}'",
        f"execute p({CARD}, '{SECRET}')",
        f"notify channel, '{SECRET}'",
        f"comment on table t is '{SECRET}'",
        f"copy t from program 'curl {SECRET}'",
        f"select 1 -- {SECRET}",
        f"select /* {SECRET} */ 1",
        f"alter sequence s restart {CARD}",
        f"selekt '{SECRET}', {CARD}",
        f"{SECRET} is not SQL {CARD}",
        f"select '{SECRET}",
        f"select \0 '{SECRET}'",
        f"select {CARD}, '{SECRET}'; drop table t",
    ],
)
def test_no_literal_is_shown(sql: str) -> None:
    statement = identify(sql)
    text = shown(sql, statement)
    for part in (*statement, text):
        assert SECRET not in part.lower()
        assert CARD not in part
    assert 0 < len(text) <= 200


def test_literals_do_not_make_a_difference() -> None:
    same = {
        identify(sql).fingerprint
        for sql in (
            "select a from t where b = 1",
            "SELECT a FROM t WHERE b = 'x'",
            "select a from t where b = $1 -- now",
            "select a  from t where b = 2.5",
        )
    }
    assert len(same) == 1
    assert len({identify(f"select a from t where b in ({', '.join('12345'[:n])})").fingerprint for n in (1, 3, 5)}) == 1
    assert identify("select a from u where b = 1").fingerprint not in same


@pytest.mark.parametrize(
    ("sql", "command"),
    [
        ("select 1", "SELECT"),
        ("with x as (select 1) select * from x", "SELECT"),
        ("insert into t values (1)", "INSERT"),
        ("merge into t using u on true when matched then delete", "MERGE"),
        ("create table t (a int)", "CREATE TABLE"),
        ("begin", "BEGIN"),
        ("", "OTHER"),
        ("selekt 1", "OTHER"),
        ("select from where", "SELECT"),
    ],
)
def test_the_kind_of_statement(sql: str, command: str) -> None:
    assert identify(sql).command == command


def test_ten_megabytes_of_sql_are_grouped_quickly() -> None:
    sql = "select '" + SECRET * 700_000 + "'"
    assert len(sql) > 9_000_000
    started = time.perf_counter()
    statement = identify(sql)
    text = shown(sql, statement)
    assert time.perf_counter() - started < 0.5
    assert statement == ("unparsed:SELECT", "SELECT")
    assert text == "SELECT …"
